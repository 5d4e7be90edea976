//! The way of a restore, looked at as a whole before anything is created: everything that stands in
//! it is found at once.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use ckpt_image::{Arch, Reader};
use ckpt_tracer::Pid;
use ckpt_tracer::features::KernelFeatures;
use ckpt_tracer::proc::status::read_status;

use super::clock::{self, Clocks};
use super::plan::Inherit;
use super::planner::Job;
use super::put::{self, Put};
use super::{Request, bundle, paths, pids, surroundings};
use crate::error::{Error, Obstacle, Result};
use crate::inspect::references;
use crate::objects::files::changed::Cut;
use crate::objects::vdso::{self, Replaced};
use crate::objects::{Snapshot, credentials, ipc, processor, seccomp};
use crate::snapshot;

/// An image that was read and can be believed.
pub struct Opened<'a> {
    pub(super) request: &'a Request<'a>,
    pub(super) image: Reader,
    /// With the paths that its files have now.
    pub(super) snapshot: Snapshot,
    pub(super) kernel: KernelFeatures,
    /// Our supplementary groups; in a user namespace the kernel does not show them.
    groups: Vec<u32>,
    vdso: Replaced,
    /// What has come up already.
    obstacles: Vec<Obstacle>,
    /// What the job has to do without, one sentence each.
    pub(super) warnings: Vec<String>,
    /// Bundled files that are not as they were here.
    pub(super) given: Vec<PathBuf>,
}

impl Opened<'_> {
    /// The work is done by that one.
    pub fn restored_by(&mut self, owner: &crate::isolate::Owner) {
        self.groups = owner.groups.clone();
    }

    /// The work is done in a namespace, where we are now.
    pub fn restored_inside(&mut self) {
        self.kernel = KernelFeatures::probe();
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
    let image = open_own(request)?;
    image.require_arch(Arch::native())?;
    let mut snapshot = snapshot::read(&image, request.image)?;
    if let Some(what) = references::check(&snapshot, &image).into_iter().next() {
        let path = request.image.to_owned();
        return Err(Error::Metadata { path, what });
    }
    let kernel = KernelFeatures::probe();
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
    put::forget(request.put_files, &mut snapshot);
    let vdso = vdso::adapt(&mut snapshot).map_err(Error::Refused);
    let vdso = refused_or(vdso, &mut obstacles)?;
    let given = bundle::choose(&mut snapshot, request);
    Ok(Opened {
        request,
        image,
        snapshot,
        kernel,
        groups: read_status(Pid(std::process::id() as i32))?.groups,
        vdso,
        obstacles,
        warnings,
        given,
    })
}

/// What is in an image runs with the ids that are in it, so whoever wrote it must be ourselves, or
/// trusted by root.
fn open_own(request: &Request<'_>) -> Result<Reader> {
    let image = Reader::open(request.image)?;
    let path = request.image;
    let owner = std::fs::metadata(path).map(|meta| meta.uid());
    let me = nix::unistd::geteuid();
    match owner {
        Ok(owner) if owner != me.as_raw() && !(me.is_root() && request.any_owner) => {
            let remedy = match me.is_root() {
                true => "if you trust whoever wrote it, restore it with --any-owner",
                false => "if you trust whoever wrote it as yourself, make a copy that is yours",
            };
            Err(Error::refuse(Obstacle::new(
                format!("the image {}", path.display()),
                format!("belongs to uid {owner} and you are uid {me}"),
                remedy,
            )))
        }
        _ => Ok(image),
    }
}

/// Looks at everything, and touches nothing; `pids` is what stands in the way of the job's ids.
///
/// # Errors
/// [`Error::Refused`] names all that is in the way. Other errors are those of looking.
pub(super) fn look<'a>(opened: &'a Opened<'a>, pids: Vec<Obstacle>) -> Result<Way<'a>> {
    let (request, image, snapshot) = (opened.request, &opened.image, &opened.snapshot);
    let mut obstacles = opened.obstacles.clone();
    obstacles.extend(surroundings::in_the_way(snapshot, &opened.kernel));
    let mut inherit = Vec::new();
    let job = match Job::new(
        snapshot,
        image,
        request,
        super::host_state(&opened.groups, pids::means(snapshot))?,
        &opened.vdso,
    ) {
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
                Ok(plan) if index == 0 => inherit = plan.inherit,
                Ok(_) => {}
                Err(more) => obstacles.extend(more),
            }
        }
    }
    let puts = put::decide(snapshot, image, request.put_files);
    let puts = refused_or(puts, &mut obstacles)?;
    let cuts = Cut::all(snapshot, request).map_err(Error::Refused);
    let cuts = refused_or(cuts, &mut obstacles)?;
    refused_or(ipc::refuse(snapshot, request), &mut obstacles)?;
    if let Some(job) = &job {
        obstacles.extend(credentials::obstacles(snapshot, &job.host.credentials));
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
