//! The way of a restore, looked at as a whole before anything is created: everything that stands in
//! it is found at once.

use std::path::PathBuf;

use ckpt_image::{Arch, Reader};
use ckpt_tracer::Pid;
use ckpt_tracer::features::KernelFeatures;
use ckpt_tracer::proc::status::read_status;

use super::clock;
use super::image_file::ImageFile;
use super::pids::{self, Pids, Place};
use super::planner::Job;
use super::put::{self, Put};
use super::{Request, bundle, paths, spawn, surroundings};
use crate::error::{Error, Obstacle, Result};
use crate::isolate::First;
use crate::objects::clock::Clocks;
use crate::objects::files::changed::Cut;
use crate::objects::files::left;
use crate::objects::plan::Inherit;
use crate::objects::processor::Baseline;
use crate::objects::rights;
use crate::objects::vdso::{self, Replaced};
use crate::objects::{Snapshot, credentials, ipc, processor, seccomp, security, signals};
use crate::snapshot;

/// An image that was read and can be believed.
pub struct Opened<'a> {
    pub(super) request: &'a Request<'a>,
    /// Bytes of memory that a plan may take.
    room: u64,
    pub(super) image: Reader,
    /// With the paths that its files have now.
    pub(super) snapshot: Snapshot,
    pub(super) kernel: KernelFeatures,
    /// Our supplementary groups outside of a user namespace, which the kernel does not show inside.
    groups: Vec<u32>,
    /// Those that a process of ours has where the work is done.
    groups_there: Vec<u32>,
    vdso: Replaced,
    /// The namespaces are made, and we are in them.
    inside: bool,
    /// The first process of our namespace, if the job begins with it.
    pub(super) first: Option<First>,
    /// What has come up already.
    obstacles: Vec<Obstacle>,
    /// What the job has to do without, one sentence each.
    pub(super) warnings: Vec<String>,
    /// Bundled files that are not as they were here.
    pub(super) given: Vec<PathBuf>,
}

impl Opened<'_> {
    /// In whose name files are opened, if not in ours.
    pub(super) fn rights(&self) -> Result<Option<rights::Rights>> {
        let means = pids::means(&self.snapshot);
        Ok(super::host_state(&self.groups_there, means, &self.snapshot)?.rights)
    }

    /// What the job was started to use of the processor.
    pub fn baseline(&self) -> Option<Baseline> {
        self.snapshot.host.baseline
    }

    /// What is restored: a rehearsal has it otherwise than it was.
    pub(crate) fn snapshot_mut(&mut self) -> &mut Snapshot {
        &mut self.snapshot
    }

    /// Supplementary groups of whoever does the work.
    pub fn groups_of_the_job(&self) -> &[u32] {
        &self.groups
    }

    /// The work is done by that one.
    pub fn restored_by(&mut self, owner: &crate::isolate::Owner) {
        self.groups = owner.groups.clone();
        self.groups_there = owner.groups.clone();
    }

    /// With `--detach` the job's parent ends when the job runs. That is not to come to its first process as the
    /// signal that it asked for (`PR_SET_PDEATHSIG`), which would be the end of most; one that is ignored may.
    pub fn keep_from_parents_end(&mut self) {
        if self.request.foreground {
            return;
        }
        let root = &mut self.snapshot.processes[0];
        let actions = &root.actions;
        let threads = root.threads.iter_mut();
        let asked = threads.filter(|thread| {
            let signal = thread.parent_death_signal;
            signal != 0 && !signals::is_ignored(actions, signal)
        });
        if asked.map(|thread| thread.parent_death_signal = 0).count() > 0 {
            self.warnings.push(format!(
                "process {} asked for a signal at the end of its parent and gets none: its parent is restore, \
                 which ends before it",
                root.pid
            ));
        }
    }

    /// Decides where the job would have its pids, and who would do the work; what stands in the way of
    /// its pids there.
    pub(super) fn look_for_a_place(&mut self) -> Result<Vec<Obstacle>> {
        if let Place::Here = pids::decide(self, Pids::Auto)? {
            let leaving = &self.request.objects.leaving;
            return Ok(pids::in_the_way(
                &self.snapshot,
                &self.kernel,
                None,
                leaving,
            ));
        }
        if let Some(owner) = pids::namespaces(self)?.owner {
            self.restored_by(&owner);
        }
        Ok(Vec::new())
    }

    /// The work is done in a namespace, where we are now; with `first`, that one becomes the job's root.
    pub fn restored_inside(&mut self, first: Option<First>) {
        self.kernel = KernelFeatures::probe();
        self.first = first;
        self.inside = true;
        if credentials::groups_can_be_set()
            && let Ok(status) = read_status(Pid::own())
        {
            self.groups_there = status.groups;
        }
    }

    /// Which clocks the job gets; what is against it is noted.
    pub(super) fn decide_clocks(&mut self) -> Result<Clocks> {
        let decided = clock::decide(self.request.clock, &mut self.snapshot.host);
        refused_or(decided, &mut self.obstacles)
    }
}

/// What a job is restored from.
pub(super) struct Way<'a> {
    pub(super) job: Job<'a>,
    /// What the root needs from us.
    pub(super) inherit: Vec<Inherit>,
    pub(super) puts: Vec<Put<'a>>,
    pub(super) cuts: Vec<Cut>,
}

/// Reads an image, and looks at what can be told of it and the machine.
///
/// # Errors
/// [`Error::Image`] and [`Error::Metadata`], and [`Error::Refused`] for an image of somebody else. What
/// else is in the way is only noted.
pub fn open<'a>(request: &'a Request<'a>) -> Result<Opened<'a>> {
    open_file(ImageFile::open(request.image)?, request)
}

/// The same of an image that is open already.
///
/// # Errors
/// As [`open`].
pub fn open_file<'a>(image: ImageFile, request: &'a Request<'a>) -> Result<Opened<'a>> {
    opened(image.ours()?, request)
}

/// The same of an image that we have just written, or made in memory.
///
/// # Errors
/// As [`open`].
pub fn open_trusted<'a>(image: Reader, request: &'a Request<'a>) -> Result<Opened<'a>> {
    opened(image, request)
}

fn opened<'a>(image: Reader, request: &'a Request<'a>) -> Result<Opened<'a>> {
    image.require_arch(Arch::native())?;
    let mut room = match request.bounded {
        true => snapshot::allowance(&image),
        false => u64::MAX,
    };
    let mut snapshot = snapshot::read_within(&mut room, &image, request.image)?;
    let kernel = request.kernel.cloned();
    let kernel = kernel.unwrap_or_else(KernelFeatures::probe);
    let verdict = processor::judge(&snapshot, &kernel.cpu);
    let fewer_filters = seccomp::surroundings::fewer_here(snapshot.filters_around());
    let warnings = verdict.warning().into_iter().chain(fewer_filters).collect();
    let mut obstacles = verdict.obstacles;
    obstacles.extend(
        paths::apply(&request.map_paths, &mut snapshot)
            .err()
            .into_iter()
            .flatten(),
    );
    obstacles.extend(left::unknown_numbers(&snapshot, &request.drop));
    left::drop_from(&mut snapshot, &request.drop);
    put::forget(request.put_files, &mut snapshot);
    let vdso = vdso::adapt(&mut snapshot).map_err(Error::Refused);
    let vdso = refused_or(vdso, &mut obstacles)?;
    let given = bundle::choose(&mut snapshot, request);
    let groups = read_status(Pid::own())?.groups;
    Ok(Opened {
        request,
        room,
        image,
        snapshot,
        kernel,
        groups_there: groups.clone(),
        groups,
        vdso,
        inside: false,
        first: None,
        obstacles,
        warnings,
        given,
    })
}

/// Looks at everything, and touches nothing; `pids` is what stands in the way of the job's ids.
///
/// # Errors
/// [`Error::Refused`] names all that is in the way. Other errors are those of looking.
pub(super) fn look<'a>(opened: &'a Opened<'a>, pids: Vec<Obstacle>) -> Result<Way<'a>> {
    let (request, image, snapshot) = (opened.request, &opened.image, &opened.snapshot);
    let mut obstacles = opened.obstacles.clone();
    let leaving = !request.objects.leaving.is_empty();
    obstacles.extend(surroundings::in_the_way(snapshot, &opened.kernel, leaving));
    let mut inherit = Vec::new();
    let means = pids::means(snapshot);
    let mut host = super::host_state(&opened.groups_there, means, snapshot)?;
    host.leaving = leaving;
    obstacles.extend(host.switches.obstacle());
    host.security = security::Surroundings::of(snapshot, |c| spawn::may_become(c, means));
    let job = match Job::new(snapshot, image, request, host, (&opened.vdso, opened.room)) {
        Ok(job) => Some(job),
        Err(more) => {
            obstacles.extend(more);
            None
        }
    };
    // First plans find what stands in their way.
    if let Some(job) = &job {
        for index in job.owners() {
            match job.draft(index) {
                Ok(needed) if index == 0 => inherit = needed,
                Ok(_) => {}
                Err(more) => obstacles.extend(more),
            }
        }
    }
    let puts = put::decide(snapshot, image, request.put_files);
    let puts = refused_or(puts, &mut obstacles)?;
    let rights = job.as_ref().and_then(|job| job.host.rights.as_ref());
    let cuts = rights::with(rights, || Cut::all(snapshot, &request.objects));
    let cuts = cuts.map_err(Error::Refused);
    let cuts = refused_or(cuts, &mut obstacles)?;
    // In a namespace of its own everything is missing, and may be created.
    if opened.inside || !snapshot.namespaces.ipc {
        refused_or(ipc::refuse(snapshot, &request.objects), &mut obstacles)?;
    }
    if let Some(job) = &job {
        let (now, held) = (&job.host.credentials, job.host.held);
        // What ids there are, and what may be done with them, shows inside.
        obstacles.extend(match opened.inside || snapshot.namespaces.user.is_none() {
            true => credentials::obstacles(snapshot, now, held, &opened.groups),
            false => credentials::foreign_groups(snapshot, &opened.groups),
        });
    }
    obstacles.extend(pids);
    match job {
        Some(job) if obstacles.is_empty() => Ok(Way {
            job,
            inherit,
            puts,
            cuts,
        }),
        _ => Err(Error::Refused(each_once(obstacles))),
    }
}

/// Collects a refusal with the others.
fn refused_or<T: Default>(result: Result<T>, obstacles: &mut Vec<Obstacle>) -> Result<T> {
    match result {
        Err(Error::Refused(more)) => {
            obstacles.extend(more);
            Ok(T::default())
        }
        other => other,
    }
}

/// Several processes may meet the same.
fn each_once(obstacles: Vec<Obstacle>) -> Vec<Obstacle> {
    let mut once: Vec<Obstacle> = Vec::with_capacity(obstacles.len());
    for obstacle in obstacles {
        if !once.contains(&obstacle) {
            once.push(obstacle);
        }
    }
    once
}
