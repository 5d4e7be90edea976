//! Descriptors and sharing where pidfd_getfd(2) or kcmp(2) is not available, as in a container: each process of the
//! frozen job sends us its descriptors itself. Meanwhile it is marked, and another process that shows the marks
//! shares its descriptor table or its directories ([`ckpt_tracer::remote::lend`]).
//!
//! Sharing detected in this way is refused, between processes and between threads, since it is not known completely
//! (whether signal actions are shared, for instance).

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use ckpt_tracer::proc::ProcRoot;
use ckpt_tracer::proc::fdlink::{FdLink, list_fds, read_fd_link};
use ckpt_tracer::proc::maps::read_smaps;
use ckpt_tracer::proc::status::{read_status, read_task};
use ckpt_tracer::remote::lend::{self, Borrower, Marks};
use ckpt_tracer::remote::{Cave, RemoteCalls};
use ckpt_tracer::task::Stopped;
use ckpt_tracer::{Pid, RemoteAddr, Tid};

use crate::error::{Error, Obstacle, Result};
use crate::objects::files::WITHHELD_REMEDY;
use crate::objects::ipc;
use crate::objects::job::FrozenJob;
use crate::objects::source::{Copies, Source};

/// Obtains all descriptors of the job; `withheld` is the call that is not available.
///
/// # Errors
/// [`Error::Refused`] for sharing, or if a process cannot make the calls.
pub(super) fn all(job: &mut FrozenJob, withheld: &str) -> Result<Copies> {
    let (frozen, sources) = job.split();
    if !ipc::no_semaphores() {
        return Err(refused(
            sources[0],
            "whether it shares its adjustments of System V semaphores cannot be determined",
            withheld,
        ));
    }
    let borrower = Borrower::new()?;
    let mut copies = HashMap::new();
    for (index, frozen) in frozen.into_iter().enumerate() {
        let source = sources[index];
        let fds = list_fds(source.dir.clone())?;
        let mut shared = None;
        let lent = borrow(frozen.tasks_mut(), source, &fds, &borrower, &mut |marks| {
            shared = shared.take().or_else(|| who_shares(index, &sources, marks));
        });
        let lent = lent?;
        if let Some(what) = shared {
            return Err(refused(source, &what, withheld));
        }
        copies.extend(lent.into_iter().map(|(fd, copy)| ((source.pid, fd), copy)));
    }
    Ok(Copies::Lent(copies))
}

fn refused(source: &Source, what: &str, withheld: &str) -> Error {
    Error::refuse(Obstacle::new(
        source.title(),
        format!("cannot be captured where {withheld} is not permitted: {what}"),
        WITHHELD_REMEDY,
    ))
}

/// A marked process.
struct Marked {
    marks: Marks,
    /// The link of the marking descriptor.
    link: FdLink,
    /// An address that is mapped meanwhile.
    memory: RemoteAddr,
}

fn borrow(
    tasks: &mut [Stopped],
    source: &Source,
    fds: &[i32],
    borrower: &Borrower,
    look: &mut dyn FnMut(Marked),
) -> Result<Vec<(i32, OwnedFd)>> {
    let vmas = read_smaps(source.dir.clone())?;
    let scratch =
        crate::objects::holes::scratch(source, &vmas, lend::SCRATCH).map_err(Error::refuse)?;
    let memory = scratch.at();
    let cave = Cave::dig(&source.mem, &vmas, &*tasks)?.with_doorbell(tasks);
    let leader = tasks.first_mut().ok_or(ckpt_tracer::Error::Died {
        tid: source.pid.leader(),
    })?;
    let umask = read_status(source.dir.clone())?.umask.unwrap_or(0o022);
    let calls = RemoteCalls::begin(leader, &cave, scratch);
    let mut calls = calls.map_err(|e| crate::objects::holes::refusal(source, lend::SCRATCH, e))?;
    let mut lent = Vec::with_capacity(fds.len());
    // At least once, without a descriptor if there is none, to detect sharing.
    let mut rest = fds;
    loop {
        let (some, more) = rest.split_at(rest.len().min(lend::AT_ONCE));
        let copies = borrower.borrow(&mut calls, some, umask, &mut |marks| {
            let link = read_fd_link(source.dir.clone(), marks.fd)?;
            look(Marked {
                marks,
                link,
                memory,
            });
            Ok(())
        })?;
        lent.extend(some.iter().copied().zip(copies));
        rest = more;
        if rest.is_empty() {
            break;
        }
    }
    calls.finish()?;
    cave.fill_in()?;
    Ok(lent)
}

/// A process or thread that shares with that process, or does not, other than usual; as the second half of a
/// sentence.
fn who_shares(index: usize, sources: &[&Source], marked: Marked) -> Option<String> {
    let source = sources[index];
    let threads = ckpt_tracer::proc::tasks::list_tasks(source.pid).unwrap_or_default();
    for tid in threads {
        let fd = source
            .dir
            .join(format!("task/{tid}/fd/{}", marked.marks.fd));
        if std::fs::symlink_metadata(fd).is_err() {
            return Some(format!("its thread {tid} has its own descriptor table"));
        }
        if !has_umask(source.pid, tid, marked.marks.umask) {
            return Some(format!("its thread {tid} has its own working directory"));
        }
    }
    let shares = |what: &str, pid: Pid| Some(format!("it shares its {what} with process {pid}"));
    for other in sources.iter().filter(|other| other.pid != source.pid) {
        let seen_by = |source: &Source| source.mem.read_array::<1024>(marked.memory).ok();
        if seen_by(source).is_some_and(|bytes| seen_by(other) == Some(bytes)) {
            return shares("memory", other.pid);
        }
        if shows(other.pid, &marked) {
            return shares("table of descriptors", other.pid);
        }
        if other.status.umask == source.status.umask
            && has_umask(other.pid, other.pid.leader(), marked.marks.umask)
        {
            return shares("working directory", other.pid);
        }
    }
    let parent = source.status.ppid;
    let outside = !sources.iter().any(|s| s.pid == parent);
    match outside && shows(parent, &marked) {
        true => shares("table of descriptors", parent),
        false => None,
    }
}

fn shows(pid: Pid, marked: &Marked) -> bool {
    let dir = ProcRoot::default().process(pid);
    read_fd_link(dir, marked.marks.fd).is_ok_and(|link| link == marked.link)
}

fn has_umask(pid: Pid, tid: Tid, umask: u32) -> bool {
    read_task(pid, tid).is_ok_and(|status| status.umask == Some(umask))
}
