//! An image becomes a running job: the plan, and its execution.
//!
//! Everything that can be checked is checked before a process exists: the image's metadata,
//! the machine, the files, the pid. Then a process is created that executes the job's own
//! executable and is stopped before its first instruction ([`spawn`]), and the plan
//! ([`planner`]) is executed in it ([`driver`]).

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::Path;

use ckpt_tracer::capabilities::Held;
use ckpt_tracer::features::KernelFeatures;
use ckpt_tracer::proc::status::read_status;
use ckpt_tracer::{Pid, Tid};

use crate::error::{Error, Obstacle, Result};
use crate::objects::cgroup;
use crate::objects::credentials::Credentials;
use crate::objects::files::inotify::Overflows;
use crate::objects::files::left::Chosen;
use crate::objects::options::Options;
use crate::objects::plan::{HostState, Means};
use crate::objects::rights::Rights;
use crate::objects::{Snapshot, ipc, memory_policy, scheduling, session, sockets, switches};
use crate::progress::Progress;
use crate::supervise::foreground::JobTerminal;
use crate::text::Shown;
use put::PutFiles;

mod build;
pub mod bundle;
pub mod clock;
pub mod contents;
pub mod driver;
pub mod env;
mod executor;
pub mod fill;
mod handover;
mod ids;
mod image_file;
mod late;
mod named;
pub mod next_pid;
pub mod paths;
pub mod pids;
pub mod planner;
pub mod pty;
pub mod put;
pub mod spawn;
pub mod stop;
pub mod surroundings;
mod taken;
pub mod terminals;
mod way;

pub use image_file::ImageFile;
pub use way::{Opened, open, open_file, open_trusted};

/// A wish for a restore.
pub struct Request<'a> {
    /// The image.
    pub image: &'a Path,
    /// What single objects heed.
    pub objects: Options,
    /// Where the job's paths lead now (`--map-path OLD=NEW`).
    pub map_paths: Vec<paths::Mapping>,
    /// About files whose contents the image holds.
    pub put_files: PutFiles,
    /// About the clocks that differ from boot to boot.
    pub clock: clock::ClockPolicy,
    /// Descriptors that the job does without (`--drop-fd`).
    pub drop: Vec<Chosen>,
    /// In which control groups the job is.
    pub cgroups: cgroup::Policy,
    /// Leave the job stopped, for a debugger.
    pub stopped: bool,
    /// The caller waits for the job: a job that led its process group gets the terminal.
    pub foreground: bool,
    /// The image is looked at and not restored: what takes more memory than its size allows is refused.
    pub bounded: bool,
    /// What is known of the kernel, and of what we may do with it, already; else it is found out.
    pub kernel: Option<&'a KernelFeatures>,
    /// Who is told how far it is.
    pub progress: &'a dyn Progress,
}

impl<'a> Request<'a> {
    /// A restore without options of a job that goes on in the foreground.
    pub fn plain(image: &'a Path, progress: &'a dyn Progress) -> Self {
        Self {
            image,
            objects: Options::default(),
            map_paths: Vec::new(),
            put_files: PutFiles::No,
            clock: clock::ClockPolicy::default(),
            drop: Vec::new(),
            cgroups: cgroup::Policy::default(),
            stopped: false,
            foreground: true,
            bounded: true,
            kernel: None,
            progress,
        }
    }
}

/// A restored job: its root is a child of the caller.
#[derive(Debug)]
pub struct Restored {
    /// The root's pid.
    pub pid: i32,
    /// What could not be brought back exactly, without harm to the job (a hard limit, say);
    /// one sentence each.
    pub warnings: Vec<String>,
    /// The master of the job's terminal, when that is a new one.
    pub master: Option<OwnedFd>,
}

/// The plans as text, one operation a line. Touches nothing.
pub fn dry_run(opened: &mut Opened<'_>, line: &mut dyn FnMut(fmt::Arguments<'_>)) -> Result<()> {
    opened.decide_clocks()?;
    // What is against it is told by the restore.
    let _ = opened.look_for_a_place();
    let opened = &*opened;
    let (request, snapshot) = (opened.request, &opened.snapshot);
    let way = way::look(opened, Vec::new())?;
    let nothing_put = put::warning(request.put_files, snapshot);
    for warning in opened.warnings.iter().chain(&nothing_put) {
        line(format_args!("# warning: {warning}"));
    }
    for path in &opened.given {
        line(format_args!("# take {} from the image", path.shown()));
    }
    for put in &way.puts {
        line(format_args!("# {}", put.describe()));
    }
    for cut in &way.cuts {
        line(format_args!("# {}", cut.describe()));
    }
    for index in way.job.owners() {
        let planned = way.job.plan(index, &[], None).map_err(Error::Refused)?;
        if snapshot.processes.len() > 1 {
            let pid = snapshot.processes[index].pid;
            line(format_args!("# process {pid}"));
        }
        for warning in &planned.plan.warnings {
            line(format_args!("# warning: {warning}"));
        }
        planned.plan.tell(line);
    }
    Ok(())
}

/// Everything that stands in the way of a restore; empty when there is nothing. Touches nothing.
///
/// # Errors
/// When the image cannot be read, or cannot be believed.
pub fn obstacles(request: &Request<'_>) -> Result<Vec<Obstacle>> {
    obstacles_of(open(request)?)
}

/// The same of an image that is open already.
///
/// # Errors
/// As [`obstacles`].
pub fn obstacles_of(mut opened: Opened<'_>) -> Result<Vec<Obstacle>> {
    opened.decide_clocks()?;
    let pids = match opened.look_for_a_place() {
        Ok(obstacles) | Err(Error::Refused(obstacles)) => obstacles,
        Err(e) => return Err(e),
    };
    match way::look(&opened, pids) {
        Ok(_) => Ok(Vec::new()),
        Err(Error::Refused(obstacles)) => Ok(obstacles),
        Err(e) => Err(e),
    }
}

/// Restores; `lend` is told what the job wants of our terminal, if it shall have it, when it is
/// complete and about to be let go. On error no process is left behind.
pub fn restore(
    opened: &mut Opened<'_>,
    lend: &mut dyn FnMut(Option<JobTerminal>),
) -> Result<Restored> {
    /// Somebody who creates processes all the time may take an id of the job's as often.
    const ATTEMPTS: u32 = 8;
    for _ in 1..ATTEMPTS {
        match attempt(opened, lend) {
            Err(Error::PidMissed { .. }) if pids::awaited(&opened.snapshot).is_none() => {}
            other => return other,
        }
    }
    attempt(opened, lend)
}

fn attempt(opened: &mut Opened<'_>, lend: &mut dyn FnMut(Option<JobTerminal>)) -> Result<Restored> {
    let clocks = opened.decide_clocks()?;
    let first = opened.first.take();
    let opened = &*opened;
    let (request, image, snapshot) = (opened.request, &opened.image, &opened.snapshot);
    let pids = pids::in_the_way(snapshot, &opened.kernel, first.as_ref(), &[]);
    let way::Way {
        job,
        inherit,
        puts,
        cuts,
    } = way::look(opened, pids)?;
    let put_back = put::put(&puts, image, job.host.rights.as_ref())?;
    let groups = cgroup::settings::make(snapshot, &request.cgroups)?;
    let objects = ipc::Prepared::new(snapshot, image, &request.objects)?;
    let root = &snapshot.processes[0];
    let ptys = pty::Ptys::make(snapshot, &job.terminals)?;
    let rights = job.host.rights.as_ref();
    let (descriptors, incomplete) = contents::open_all(
        &inherit,
        snapshot,
        image,
        &ptys,
        (rights, request.objects.files),
    )?;
    let mut overflows = Some(Overflows::of(&inherit, &descriptors, snapshot)?);
    let lost = ptys.warnings.clone();
    let master = ptys.finish(snapshot)?;
    let executable = contents::executable(
        root.memory.executable,
        snapshot,
        image,
        (rights, request.objects.files),
    )?;
    let bound = sockets::Made::before(snapshot, rights);
    // Processes of the job that lose their parents become ours.
    ckpt_sys::prctl::adopt_orphans();
    let means = job.host.means;
    let (mut brood, leader) = spawn::spawn(root, &executable, descriptors, clocks, (first, means))?;
    let last = &mut || {
        overflows.take().map_or(Ok(()), Overflows::make)?;
        let ours = request.foreground && master.is_none() && root.session != root.pid;
        lend(ours.then(|| job.terminals.wanted(snapshot)));
        Ok(())
    };
    let mut warnings = driver::rebuild(&job, image, &cuts, &mut brood, leader, last)?;
    warnings.extend(opened.warnings.iter().cloned());
    warnings.extend(lost);
    warnings.extend(incomplete);
    brood.keep();
    bound.keep();
    warnings.extend(objects.keep());
    warnings.extend(put::warning(request.put_files, snapshot));
    warnings.extend(put_back.keep());
    warnings.extend(groups.keep());
    Ok(Restored {
        pid: root.pid,
        warnings,
        master,
    })
}

/// What the new process will have from us before the plan sets anything.
fn host_state(groups: &[u32], means: Means, snapshot: &Snapshot) -> Result<HostState> {
    let me = Pid::own();
    let status = read_status(me)?;
    let mut credentials = Credentials::of(&status, ckpt_sys::credentials::securebits());
    credentials.groups = groups.to_vec();
    // Exec by root gives all permitted capabilities; by others, none but the ambient ones.
    if status.uid.effective == 0 {
        credentials.permitted = status.capabilities.bounding;
        credentials.effective = status.capabilities.bounding;
    } else {
        credentials.permitted = status.capabilities.ambient;
        credentials.effective = status.capabilities.ambient;
    }
    let held = Held::now().with(credentials.effective);
    let rights = Rights::of(snapshot, &credentials, held);
    if let Some(rights) = &rights {
        // What the plan begins with.
        credentials.groups = rights.groups().to_vec();
        (credentials.uid[3], credentials.gid[3]) = rights.ids();
    }
    let root = &snapshot.processes[0].threads[0].credentials;
    let another = root.uid[0] != credentials.uid[0];
    Ok(HostState {
        means,
        keyring: (another && ckpt_sys::credentials::keyrings_exist())
            .then_some((root.uid[0], root.gid[0])),
        rights,
        leaving: false,
        scheduling: scheduling::capture(Tid(me.raw()), 0),
        held,
        credentials,
        switches: switches::Ours::ask(),
        memory_policy: memory_policy::own(),
        login_uid: session::login_uid(&me.into()),
        security: Default::default(),
    })
}
