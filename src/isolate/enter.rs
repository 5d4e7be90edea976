//! Enters the namespaces of a job with a pid namespace of its own: a process inside inspects or checkpoints it like
//! any other job.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use ckpt_sys::prctl::die_with_parent;
use ckpt_sys::process::{self, Fork, leave};
use ckpt_tracer::pidfd::PidFd;
use ckpt_tracer::proc::stat::read_stat;
use ckpt_tracer::proc::status::read_status;
use ckpt_tracer::proc::{ProcRoot, tasks};
use ckpt_tracer::{Error as TracerError, Pid};

use super::init;
use super::work::keep_exit_codes;
use crate::error::{Error, Obstacle, Result};
use crate::objects::job::Family;
use crate::objects::namespaces::{self, Names, Namespaces, OWN};

/// A job as seen in its pid namespace.
#[derive(Clone, Debug)]
pub struct Visited {
    /// Its root.
    pub pid: Pid,
    /// Our process that adopts its orphans, if there is one.
    pub init: Option<i32>,
    /// Its own namespaces.
    pub namespaces: Namespaces,
    /// Supplementary groups as seen from outside; inside a user namespace they are not visible.
    pub groups: Vec<u32>,
}

/// Runs `work` on a job, inside its namespaces if it has its own pid namespace; `work` gets an error if they cannot
/// be entered. Returns the exit code of `work`, or 128 plus the signal that ended its process.
///
/// Must be called while this process is single-threaded.
///
/// # Errors
/// For ckpt's own process in the namespace, or when no process can be created.
pub fn visit(pid: Pid, work: impl FnOnce(Result<&Visited>) -> u8) -> Result<u8> {
    // Opened first: everything later refers to this very process, or fails.
    let handle = PidFd::open(pid);
    let Some(mut visited) = look(pid)? else {
        return Ok(work(Ok(&Visited {
            pid,
            init: None,
            namespaces: Namespaces::default(),
            groups: Vec::new(),
        })));
    };
    let handle = handle?;
    keep_exit_codes();
    let directory = std::env::current_dir();
    match process::fork().map_err(|e| failed(pid, e.into()))? {
        Fork::Parent(child) => wait(child).map_err(|e| failed(pid, e)),
        Fork::Child => {
            die_with_parent(true);
            let root = std::fs::metadata("/");
            let entered = enter(&handle, &visited.namespaces)
                .and_then(|()| std::env::set_current_dir(directory?))
                .and_then(|()| Ok(process::fork()?));
            match entered {
                Ok(Fork::Child) => {
                    die_with_parent(true);
                    if let Some(names) = &mut visited.namespaces.uts {
                        *names = Names::here();
                    }
                    let fits = proc_fits(pid).and_then(|()| root_fits(pid, root));
                    leave(work(fits.map(|()| &visited)).into())
                }
                Ok(Fork::Parent(child)) => leave(wait(child).map_or(1, i32::from)),
                Err(error) => leave(work(Err(failed(pid, error))).into()),
            }
        }
    }
}

fn failed(pid: Pid, error: io::Error) -> Error {
    Error::step(format!("enter the namespaces of process {pid}"), error)
}

/// Pids are looked up in `/proc`. The /proc of another pid namespace would show other processes under them, and
/// ourselves with several pids.
fn proc_fits(pid: Pid) -> Result<()> {
    let me = std::process::id() as i32;
    let shown = std::fs::read_link("/proc/self").unwrap_or_default();
    let fits = shown == Path::new(&me.to_string())
        && read_status(Pid(me)).is_ok_and(|status| status.ns_pid == [me]);
    match fits {
        true => Ok(()),
        false => Err(Error::refuse(Obstacle::new(
            format!("process {pid}"),
            "is in a pid namespace of its own and has no /proc for it",
            "mount one there: unshare --pid --fork --mount-proc does that from the beginning",
        ))),
    }
}

/// A restored job has the root file system of `restore`, where all its paths are resolved.
fn root_fits(pid: Pid, ours: io::Result<Metadata>) -> Result<()> {
    let (theirs, ours) = match (std::fs::metadata("/"), ours) {
        (Ok(theirs), Ok(ours)) => (theirs, ours),
        (Err(error), _) | (_, Err(error)) => return Err(failed(pid, error)),
    };
    match (theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino()) {
        true => Ok(()),
        false => Err(Error::refuse(Obstacle::new(
            format!("process {pid}"),
            "is in a container with its own root file system, which is not restored",
            "run ckpt inside that container, and later restore inside one with the same files",
        ))),
    }
}

/// The namespaces to enter; `None` if the job shares ours, or if the inspection will report the obstacle.
fn look(pid: Pid) -> Result<Option<Visited>> {
    let dir = ProcRoot::default().process(pid);
    let kinds = match namespaces::others(&dir) {
        Ok(kinds) => kinds,
        Err(TracerError::Died { .. } | TracerError::Proc { .. }) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let known = |kind: &String| OWN.contains(&kind.as_str());
    if !kinds.iter().any(|k| k == "pid") || !kinds.iter().all(known) {
        return Ok(None);
    }
    let status = read_status(pid)?;
    let inner = status.ns_pid.last().copied().unwrap_or(1);
    if inner == 1 && status.name.0 == init::NAME.to_bytes() {
        return Err(Error::refuse(ours(pid)));
    }
    let init = (inner != 1 && is_root(status.ppid, pid)).then_some(1);
    if kinds.iter().any(|kind| kind == "ipc") {
        alone_in_ipc(pid, init.map_or(pid, |_| status.ppid))?;
    }
    Ok(Some(Visited {
        pid: Pid(inner),
        init,
        namespaces: with_groups(Namespaces::of(&dir, &kinds)?, pid),
        groups: status.groups,
    }))
}

/// How often a process must be seen outside a running job before it counts as outside.
const LOOKS: u32 = 3;

/// An IPC namespace is restored with the job, so it may contain no other processes, except those that started the job
/// and wait for it, as unshare(1) does.
fn alone_in_ipc(pid: Pid, top: Pid) -> Result<()> {
    let namespace = |pid: Pid| {
        let path = ProcRoot::default().process(pid).join("ns/ipc");
        std::fs::metadata(path).map(|meta| meta.ino()).ok()
    };
    let theirs = namespace(pid);
    let parent = |pid: &Pid| {
        read_status(*pid)
            .ok()
            .map(|s| s.ppid)
            .filter(|p| p.raw() != 0)
    };
    let above: Vec<Pid> = std::iter::successors(Some(top), parent).collect();
    let mut others = tasks::list_processes(&ProcRoot::default()).unwrap_or_default();
    others.retain(|other| theirs.is_some() && !above.contains(other));
    // The job runs: a process that is orphaned meanwhile may be missed once.
    for _ in 0..LOOKS {
        let family = Family::of(top)?;
        others.retain(|other| !family.living.contains(other) && namespace(*other) == theirs);
    }
    match others.first() {
        None => Ok(()),
        Some(other) => Err(Error::refuse(Obstacle::new(
            format!("process {pid}"),
            format!(
                "is in another ipc namespace than ckpt, and shares it with process {other}, which is \
                 outside the job"
            ),
            "end that one, or checkpoint an ancestor of both",
        ))),
    }
}

/// Adds the groups that a user namespace inherited from its creator: processes inside have them until they call
/// setgroups(2), after which all groups are mapped.
fn with_groups(mut namespaces: Namespaces, pid: Pid) -> Namespaces {
    let family = Family::of(pid).unwrap_or_default();
    if let Some(user) = namespaces.user.as_mut().filter(|u| !u.groups_are_fixed) {
        let mut statuses = family
            .living
            .iter()
            .filter_map(|pid| read_status(*pid).ok());
        let foreign = statuses.find(|status| user.has_foreign(&status.groups));
        user.inherited_groups = foreign.map(|status| status.groups).unwrap_or_default();
    }
    namespaces
}

/// The obstacle for our own first process of a job's namespace.
fn ours(pid: Pid) -> Obstacle {
    let children = tasks::children(&ProcRoot::default(), pid).unwrap_or_default();
    let job = children.first().map_or("PID".into(), Pid::to_string);
    Obstacle::new(
        format!("process {pid}"),
        "belongs to ckpt: it is process 1 of a job's pid namespace",
        format!("name the job instead: ckpt attach {job}"),
    )
}

/// Whether a process has the name of our first process of a namespace.
pub(crate) fn is_init(pid: Pid) -> bool {
    tasks::comm(pid).is_ok_and(|name| name.0 == init::NAME.to_bytes())
}

/// Whether the process is the root of a job whose parent is our first process of a namespace: its oldest child. The
/// others are orphans of the job.
fn is_root(parent: Pid, pid: Pid) -> bool {
    let begun = |pid: &Pid| read_stat(*pid).map_or(u64::MAX, |stat| stat.starttime);
    let children = || tasks::children(&ProcRoot::default(), parent).unwrap_or_default();
    is_init(parent) && children().iter().min_by_key(|child| begun(child)) == Some(&pid)
}

/// Enters the user namespace first, which permits entering the others.
fn enter(handle: &PidFd, namespaces: &Namespaces) -> io::Result<()> {
    let kinds = libc::CLONE_NEWNS | libc::CLONE_NEWPID | super::make::optional(namespaces);
    Ok(ckpt_sys::namespaces::enter(handle, kinds)?)
}

fn wait(pid: i32) -> io::Result<u8> {
    Ok(process::end_of(pid)?.code().unwrap_or(1) as u8)
}
