//! An image becomes a running job: the plan, and its execution.
//!
//! Everything that can be checked is checked before a process exists: the image's metadata,
//! the machine, the files, the pid. Then a process is created that executes the job's own
//! executable and is stopped before its first instruction ([`spawn`]), and the plan
//! ([`planner`]) is executed in it ([`driver`]).

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use ckpt_image::{Arch, Reader};
use ckpt_tracer::proc::status::read_status;
use ckpt_tracer::proc::tasks;
use ckpt_tracer::{Pid, Tid};

use crate::error::{Error, Obstacle, Result};
use crate::objects::credentials::Credentials;
use crate::objects::files::changed::Cut;
use crate::objects::files::inotify::Overflows;
use crate::objects::vdso::{self, Replaced};
use crate::objects::{Snapshot, ipc, scheduling};
use crate::progress::Progress;
use crate::snapshot;
use planner::Job;
use put::PutFiles;

pub mod births;
mod build;
pub mod clock;
pub mod contents;
pub mod driver;
mod executor;
pub mod fill;
mod handover;
pub mod paths;
pub mod plan;
pub mod planner;
pub mod pty;
pub mod put;
pub mod spawn;
pub mod stop;
pub mod terminal;
pub mod terminals;

/// What to do with files that are not as they were at the checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FilesPolicy {
    /// Refuse, naming the file and what changed.
    #[default]
    Strict,
    /// Take what is there.
    Adopt,
    /// As strict, and files that the job writes lose what was appended after the checkpoint.
    Truncate,
}

/// A wish for a restore.
pub struct Request<'a> {
    /// The image.
    pub image: &'a Path,
    /// About changed files.
    pub files: FilesPolicy,
    /// Where the job's paths lead now (`--map-path OLD=NEW`).
    pub map_paths: Vec<paths::Mapping>,
    /// About files whose contents the image holds.
    pub put_files: PutFiles,
    /// About the clocks that differ from boot to boot.
    pub clock: clock::ClockPolicy,
    /// Descriptors that get another file than they had (`--fd N=PATH`).
    pub fds: BTreeMap<i32, PathBuf>,
    /// Leave the job stopped, for a debugger.
    pub stopped: bool,
    /// The caller waits for the job: a job that led its process group gets the terminal.
    pub foreground: bool,
    /// Who is told how far it is.
    pub progress: &'a dyn Progress,
}

/// A restored job: its root is a child of the caller.
#[derive(Debug)]
pub struct Restored {
    /// The root's pid.
    pub pid: i32,
    /// What could not be brought back exactly, without harm to the job (a hard limit, say);
    /// one sentence each.
    pub warnings: Vec<String>,
    /// Our terminal is the job's until this is dropped.
    pub terminal: Option<terminal::Foreground>,
    /// The master of the job's terminal, when that is a new one.
    pub master: Option<OwnedFd>,
}

impl Restored {
    /// Waits for the root's end; its exit code, or 128 plus the signal that ended it. Signals
    /// that the caller gets meanwhile are not passed on here; see `supervise`.
    pub fn wait(self) -> Result<i32> {
        use nix::sys::wait::{WaitStatus, waitpid};
        loop {
            match waitpid(nix::unistd::Pid::from_raw(self.pid), None) {
                Ok(WaitStatus::Exited(_, code)) => return Ok(code),
                Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(128 + signal as i32),
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => {
                    let text = format!("cannot wait for process {}: {}", self.pid, e.desc());
                    return Err(Error::Restore(text));
                }
            }
        }
    }
}

/// The plans as text, one operation a line. Touches nothing.
pub fn dry_run(request: &Request<'_>) -> Result<String> {
    let (image, mut snapshot, vdso) = open(request)?;
    clock::foresee(request.clock, &mut snapshot.host)?;
    ipc::refuse(&snapshot, request)?;
    let job = Job::new(&snapshot, &image, request, host_state()?, vdso).map_err(Error::Refused)?;
    let mut text = String::new();
    if let Some(warning) = put::warning(request.put_files, &snapshot) {
        text.push_str(&format!("# warning: {warning}\n"));
    }
    for put in put::decide(&snapshot, &image, request.put_files)? {
        text.push_str(&format!("# {}\n", put.describe()));
    }
    for cut in Cut::all(&snapshot, request).map_err(Error::Refused)? {
        text.push_str(&format!("# {}\n", cut.describe()));
    }
    for (index, process) in snapshot.processes.iter().enumerate() {
        let planned = job.plan(index, &[], None).map_err(Error::Refused)?;
        if snapshot.processes.len() > 1 {
            text.push_str(&format!("# process {}\n", process.pid));
        }
        for warning in &planned.plan.warnings {
            text.push_str(&format!("# warning: {warning}\n"));
        }
        text.push_str(&planned.plan.to_text());
    }
    Ok(text)
}

/// Restores. On error no process is left behind.
pub fn restore(request: &Request<'_>) -> Result<Restored> {
    let (image, mut snapshot, vdso) = open(request)?;
    clock::enter(request.clock, &mut snapshot.host)?;
    let job = Job::new(&snapshot, &image, request, host_state()?, vdso).map_err(Error::Refused)?;
    // First plans find what stands in the way, before anything exists.
    let mut obstacles = Vec::new();
    let mut inherit = Vec::new();
    for index in 0..snapshot.processes.len() {
        match job.draft(index) {
            Ok(plan) if index == 0 => inherit = plan.inherit,
            Ok(_) => {}
            Err(more) => obstacles.extend(more),
        }
    }
    obstacles.extend(pids_taken(&job));
    let puts = refused_or(
        put::decide(&snapshot, &image, request.put_files),
        &mut obstacles,
    )?;
    let cuts = Cut::all(&snapshot, request).map_err(Error::Refused);
    let cuts = refused_or(cuts, &mut obstacles)?;
    if !obstacles.is_empty() {
        return Err(Error::Refused(obstacles));
    }
    ipc::refuse(&snapshot, request)?;
    let put_back = put::put(&puts, &image)?;
    let objects = ipc::Prepared::new(&snapshot, &image, request)?;
    let root = &snapshot.processes[0];
    let ptys = pty::Ptys::make(&snapshot, &job.terminals)?;
    let descriptors = contents::open_all(&inherit, &snapshot, &image, &ptys)?;
    let mut overflows = Some(Overflows::of(&inherit, &descriptors, &snapshot)?);
    let lost = ptys.warnings.clone();
    let master = ptys.finish(&snapshot)?;
    let executable = contents::executable(root.memory.executable, &snapshot, &image)?;
    // Processes of the job that lose their parents become ours.
    crate::supervise::adopt_orphans();
    let (mut brood, leader) = spawn::spawn(root, &executable, descriptors)?;
    let mut terminal = None;
    let last = &mut || {
        overflows.take().map_or(Ok(()), Overflows::make)?;
        if request.foreground && master.is_none() && root.session != root.pid {
            terminal = terminal::Foreground::lend(&snapshot, &job.terminals);
        }
        Ok(())
    };
    let mut warnings = driver::rebuild(&job, &image, &cuts, &mut brood, leader, last)?;
    warnings.extend(lost);
    brood.keep();
    terminal.iter().for_each(terminal::Foreground::redraw);
    warnings.extend(objects.keep());
    warnings.extend(put::warning(request.put_files, &snapshot));
    warnings.extend(put_back.keep());
    Ok(Restored {
        pid: root.pid,
        warnings,
        terminal,
        master,
    })
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

/// Ids of the job that somebody else has. Those of processes that have just been killed are free
/// when their parent has taken note, so that is waited for.
fn pids_taken(job: &Job<'_>) -> Vec<Obstacle> {
    const PATIENCE: std::time::Duration = std::time::Duration::from_secs(2);
    let begun = std::time::Instant::now();
    loop {
        let taken = ids_taken(job);
        let ended = |id: &i32| read_status(Tid(*id)).is_ok_and(|s| s.state.has_ended());
        if taken.is_empty() || !taken.iter().all(ended) || begun.elapsed() > PATIENCE {
            return taken.into_iter().map(pid_taken).collect();
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

fn ids_taken(job: &Job<'_>) -> Vec<i32> {
    let snapshot = job.snapshot;
    let tids = snapshot.processes.iter().flat_map(|p| &p.threads);
    let tids = tids.map(|t| t.tid);
    let zombies = snapshot.zombies.iter().map(|z| z.pid);
    let helpers = job
        .births
        .iter()
        .flat_map(births::Births::all)
        .map(|b| b.pid);
    let mut ids: Vec<i32> = tids.chain(zombies).chain(helpers).collect();
    ids.sort_unstable();
    ids.dedup();
    ids.retain(|id| Path::new(&format!("/proc/{id}")).exists());
    ids
}

fn open(request: &Request<'_>) -> Result<(Reader, Snapshot, Replaced)> {
    let image = Reader::open(request.image)?;
    image.require_arch(Arch::native())?;
    let mut snapshot = snapshot::read(&image, request.image)?;
    let faults = crate::inspect::references::check(&snapshot, &image);
    if let Some(fault) = faults.into_iter().next() {
        return Err(Error::Metadata {
            path: request.image.to_owned(),
            what: fault,
        });
    }
    refuse_other_processor(&snapshot)?;
    paths::apply(&request.map_paths, &mut snapshot).map_err(Error::Refused)?;
    put::forget(request.put_files, &mut snapshot);
    let vdso = vdso::adapt(&mut snapshot).map_err(Error::Refused)?;
    Ok((image, snapshot, vdso))
}

/// What the processor must have in common with that of the checkpoint.
fn refuse_other_processor(snapshot: &Snapshot) -> Result<()> {
    let was = &snapshot.host;
    let mut obstacles = Vec::new();
    let now = ckpt_tracer::features::KernelFeatures::probe().cpu.xcr0;
    let missing = was.xcr0 & !now;
    if missing != 0 {
        obstacles.push(Obstacle::new(
            "the job",
            format!(
                "may use processor state that this machine does not have ({})",
                component_names(missing)
            ),
            "restore it on a machine with the same or a newer processor",
        ));
    }
    if obstacles.is_empty() {
        Ok(())
    } else {
        Err(Error::Refused(obstacles))
    }
}

/// Names of xsave components (Intel SDM volume 1, chapter 13).
fn component_names(bits: u64) -> String {
    const NAMES: &[(u64, &str)] = &[
        (1 << 1, "SSE"),
        (1 << 2, "AVX"),
        (3 << 3, "MPX"),
        (7 << 5, "AVX-512"),
        (1 << 9, "protection keys"),
        (3 << 17, "AMX"),
    ];
    let names: Vec<&str> = NAMES
        .iter()
        .filter(|(mask, _)| bits & mask != 0)
        .map(|(_, name)| *name)
        .collect();
    if names.is_empty() {
        format!("components {bits:#x}")
    } else {
        names.join(", ")
    }
}

/// What the new process will have from us before the plan sets anything.
fn host_state() -> Result<plan::HostState> {
    const CAP_SYS_RESOURCE: u64 = 1 << 24;
    let me = Pid(std::process::id() as i32);
    let status = read_status(me)?;
    let mut credentials = Credentials::of(&status, own_securebits());
    // Exec by root gives all permitted capabilities; by others, none but the ambient ones.
    if status.uid.effective == 0 {
        credentials.permitted = status.capabilities.bounding;
        credentials.effective = status.capabilities.bounding;
    } else {
        credentials.permitted = status.capabilities.ambient;
        credentials.effective = status.capabilities.ambient;
    }
    Ok(plan::HostState {
        scheduling: scheduling::capture(Tid(me.raw()), 0),
        may_raise_limits: status.capabilities.effective & CAP_SYS_RESOURCE != 0,
        credentials,
    })
}

#[allow(unsafe_code)]
fn own_securebits() -> u32 {
    // SAFETY: a call without pointers.
    unsafe { libc::prctl(libc::PR_GET_SECUREBITS, 0, 0, 0, 0) }.max(0) as u32
}

/// The obstacle that somebody else has the pid.
pub(crate) fn pid_taken(pid: i32) -> Obstacle {
    let name = tasks::comm(Pid(pid)).map_or_else(|_| "?".into(), |c| c.to_string());
    let leader = read_status(Tid(pid)).map_or(pid, |s| s.tgid.raw());
    let who = if leader == pid {
        format!("process {pid} ({name})")
    } else {
        format!("a thread of process {leader} ({name})")
    };
    // A zombie cannot be ended again; its parent has to take note of its end.
    if let Ok(status) = read_status(Tid(pid))
        && status.state.has_ended()
    {
        let parent = status.ppid;
        return Obstacle::new(
            format!("the pid {pid}"),
            format!(
                "is taken by {who}, which has ended but which its parent {parent} has not waited for"
            ),
            "let the parent wait for it or end the parent, or restore in a pid namespace of its own: \
             unshare --pid --fork --mount-proc restore IMAGE",
        );
    }
    Obstacle::new(
        format!("the pid {pid}"),
        format!("is taken by {who}"),
        "end that one first, or restore in a pid namespace of its own: unshare --pid --fork \
         --mount-proc restore IMAGE",
    )
}
