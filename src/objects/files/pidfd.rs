//! pidfd_open(2).
//!
//! A pidfd of the job's first process is opened like any other file. Those of other tasks of the job
//! can only be opened when these exist: until then the first process's stands in for them
//! ([`rebuild_late`]). One of a process that has been waited for is a handle of nobody for ever; the
//! restoring process makes it from a child of its own that ends the same way.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, OwnedFd};

use ckpt_tracer::Pid;
use ckpt_tracer::proc::fdinfo::FdDetail;
use serde::{Deserialize, Serialize};

use super::epoll::{Entry, Epoll};
use super::{Kind, Look, sys};
use crate::capture::source::Source;
use crate::error::Obstacle;
use crate::objects::Snapshot;
use crate::objects::process::Process;
use crate::outsiders::process_name;
use crate::restore::plan::{Builder, Inherited};

/// A handle of a process or thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PidFd {
    /// Whose, in the job; `None` for one that has ended and been waited for.
    pub task: Option<i32>,
    /// `PIDFD_THREAD`: of this one thread.
    pub thread: bool,
    /// How it ended, as wait(2) tells, where the kernel still knows.
    pub status: Option<i32>,
}

/// `PIDFD_THREAD` is `O_EXCL`.
const PIDFD_THREAD: u32 = libc::O_EXCL as u32;

/// Captures a pidfd. `is_ours` tells which ids of tasks belong to the job.
pub fn capture(
    source: &Source,
    look: &Look,
    is_ours: impl Fn(i32) -> bool,
) -> Result<PidFd, Box<Obstacle>> {
    let thread = look.info.flags & PIDFD_THREAD != 0;
    let refuse = |reason: String| {
        let remedy = "close it before the checkpoint";
        Err(Box::new(Obstacle::new(look.object(source), reason, remedy)))
    };
    match look.info.detail {
        FdDetail::PidFd { pid: Pid(-1), .. } => Ok(PidFd {
            task: None,
            thread,
            status: exit_status(&look.copy),
        }),
        FdDetail::PidFd { pid, .. } if is_ours(pid.raw()) => Ok(PidFd {
            task: Some(pid.raw()),
            thread,
            status: None,
        }),
        FdDetail::PidFd { pid: Pid(0), .. } => {
            refuse("is a pidfd of a process in another pid namespace".to_owned())
        }
        FdDetail::PidFd { pid, .. } => refuse(format!(
            "is a pidfd of {}, which is not part of the job",
            process_name(pid)
        )),
        _ => refuse("is a pidfd of which the kernel does not tell the process".to_owned()),
    }
}

/// How the process of a pidfd ended (`PIDFD_GET_INFO`, Linux 6.15).
fn exit_status(fd: &OwnedFd) -> Option<i32> {
    const EXIT: u64 = 1 << 3;
    let mut info = [0; 64];
    info[..8].copy_from_slice(&EXIT.to_ne_bytes());
    sys::pidfd_info(fd.as_raw_fd(), &mut info).ok()?;
    let mask = u64::from_ne_bytes(info[..8].try_into().ok()?);
    let status = i32::from_ne_bytes(info[60..].try_into().ok()?);
    (mask & EXIT != 0).then_some(status)
}

/// Whether a description is a pidfd of a task that does not exist when descriptions are opened.
pub fn is_late(description: usize, snapshot: &Snapshot) -> bool {
    let first = snapshot.processes.first().map(|p| p.pid);
    match snapshot.descriptions.get(description).map(|d| &d.kind) {
        Some(Kind::PidFd(p)) => p.task.is_some() && p.task != first,
        _ => false,
    }
}

impl PidFd {
    fn object(&self) -> String {
        let task = self.task.unwrap_or(0);
        format!("a pidfd of task {task}")
    }

    /// Opens it at its staging number, or what stands in for it.
    pub fn rebuild(
        &self,
        index: usize,
        flags: u32,
        at: i32,
        snapshot: &Snapshot,
        plan: &mut Builder,
    ) {
        if self.task.is_none() {
            plan.inherit(at, Inherited::EndedProcess(index));
            return;
        }
        let first = snapshot.processes.first().map_or(0, |p| p.pid);
        let thread = if self.task == Some(first) {
            PIDFD_THREAD
        } else {
            0
        };
        let flags = flags & (thread | libc::O_NONBLOCK as u32);
        let args = [first as u64, flags.into()];
        plan.expect(libc::SYS_pidfd_open, &args, 0, || self.object());
        super::place(0, at, plan, || self.object());
    }

    /// An own description of it, for a process that has ended already.
    pub fn of_nobody(&self, flags: u32) -> Result<OwnedFd, nix::errno::Errno> {
        let flags = flags & (PIDFD_THREAD | libc::O_NONBLOCK as u32);
        sys::pidfd_of_nobody(self.status.unwrap_or(0), flags)
    }
}

/// With every task of the job there: opens the process's own pidfds that had to wait, and adds them
/// to the epoll sets that watch them. The process has its descriptors under their numbers, and no
/// others. `index` is that of the process.
pub fn rebuild_late(index: usize, snapshot: &Snapshot, plan: &mut Builder) {
    let Some(process) = snapshot.processes.get(index) else {
        return;
    };
    let taken: BTreeSet<i32> = process.fds.iter().map(|e| e.fd).collect();
    let free = (0..).find(|fd| !taken.contains(fd)).unwrap_or(i32::MAX);
    let held = process.fds.iter().map(|e| e.description);
    let watched = sets(process, snapshot).flat_map(|(_, set)| &set.entries);
    let late: BTreeSet<usize> = held
        .chain(watched.map(|e| e.description))
        .filter(|d| is_late(*d, snapshot))
        .collect();
    for description in late {
        let flags = snapshot.descriptions[description].flags;
        let Kind::PidFd(pidfd) = &snapshot.descriptions[description].kind else {
            continue;
        };
        let own = process.fds.iter().filter(|e| e.description == description);
        let adds: Vec<_> = sets(process, snapshot)
            .filter(|(at, _)| adder(*at, description, snapshot) == Some(index))
            .collect();
        if own.clone().next().is_none() && adds.is_empty() {
            continue;
        }
        let object = || pidfd.object();
        let flags = flags & (PIDFD_THREAD | libc::O_NONBLOCK as u32);
        let args = [pidfd.task.unwrap_or(0) as u64, flags.into()];
        plan.expect(libc::SYS_pidfd_open, &args, free as u64, object);
        for entry in own {
            let cloexec = if entry.close_on_exec {
                libc::O_CLOEXEC
            } else {
                0
            };
            let args = [free as u64, entry.fd as u64, cloexec as u64];
            plan.expect(libc::SYS_dup3, &args, entry.fd as u64, object);
        }
        for (at, set) in adds {
            let entries = set.entries.iter();
            for entry in entries.filter(|e| e.description == description) {
                watch(process, at, entry, free, plan);
            }
        }
        plan.syscall(libc::SYS_close, &[free as u64], object);
    }
}

/// Adds the pidfd that is open as `fd` to the epoll set of description `set`, under its number.
fn watch(process: &Process, set: usize, entry: &Entry, fd: i32, plan: &mut Builder) {
    let Some(set) = process.fds.iter().find(|e| e.description == set) else {
        return;
    };
    let holder = process.fds.iter().find(|e| e.fd == entry.fd);
    match holder.map(|e| e.description) {
        Some(d) if d == entry.description => entry.add(set.fd, entry.fd, plan),
        None if entry.fd == fd => entry.add(set.fd, fd, plan),
        None => {
            let object = || entry.object();
            let number = entry.fd as u64;
            plan.expect(libc::SYS_dup3, &[fd as u64, number, 0], number, object);
            entry.add(set.fd, entry.fd, plan);
            plan.syscall(libc::SYS_close, &[number], object);
        }
        // Whoever closes another file's number may lose its locks.
        Some(_) => plan.warn(format!(
            "the epoll set of fd {} watches a pidfd that was added as fd {}, which is another file \
             by now, and does not watch it any more",
            set.fd, entry.fd
        )),
    }
}

/// The epoll sets that a process has open, each once.
fn sets<'a>(process: &Process, snapshot: &'a Snapshot) -> impl Iterator<Item = (usize, &'a Epoll)> {
    let held: BTreeSet<usize> = process.fds.iter().map(|e| e.description).collect();
    held.into_iter()
        .filter_map(|at| match &snapshot.descriptions.get(at)?.kind {
            Kind::Epoll(set) => Some((at, set)),
            _ => None,
        })
}

/// Which process adds a pidfd to a set: the first that has both, else the first that has the set.
fn adder(set: usize, description: usize, snapshot: &Snapshot) -> Option<usize> {
    let has = |p: &Process, what: usize| p.fds.iter().any(|e| e.description == what);
    let all = &snapshot.processes;
    let both = all.iter().position(|p| has(p, set) && has(p, description));
    both.or_else(|| all.iter().position(|p| has(p, set)))
}

#[cfg(test)]
mod tests {
    use super::super::{Description, FdEntry};
    use super::*;
    use crate::inspect::fixture;
    use crate::restore::plan::HostState;

    fn entry(fd: i32, description: usize) -> FdEntry {
        FdEntry {
            fd,
            description,
            close_on_exec: false,
        }
    }

    /// Two processes: the first has, under 0, an epoll set that watches the second's pidfd, which
    /// both have under 1; under 2 the first has its own.
    fn snapshot() -> Snapshot {
        let mut snapshot = fixture::snapshot();
        let (parent, child) = (snapshot.processes[0].pid, 77);
        let watches = |fd| Entry {
            fd,
            description: 1,
            events: 1,
            data: 9,
        };
        let pidfd = |task| {
            Kind::PidFd(PidFd {
                task: Some(task),
                thread: false,
                status: None,
            })
        };
        let entries = vec![watches(1), watches(2), watches(5)];
        let kinds = [Kind::Epoll(Epoll { entries }), pidfd(child), pidfd(parent)];
        snapshot.descriptions = kinds
            .map(|kind| Description {
                kind,
                flags: libc::O_RDWR as u32,
                owner: None,
            })
            .into();
        let mut second = snapshot.processes[0].clone();
        second.pid = child;
        second.fds = vec![entry(0, 0), entry(1, 1)];
        snapshot.processes[0].fds = vec![entry(0, 0), entry(1, 1), entry(2, 2)];
        snapshot.processes.push(second);
        snapshot
    }

    fn late(index: usize) -> (Vec<String>, Vec<String>) {
        let mut plan = Builder::new(0, HostState::default());
        rebuild_late(index, &snapshot(), &mut plan);
        let plan = plan.finish();
        let text = plan.to_text();
        let calls = text.lines().map(|line| {
            // What follows is an address.
            let end = line.find(", 0x").or(line.find(" #")).unwrap_or(line.len());
            line[..end].trim_end().to_owned()
        });
        (calls.collect(), plan.warnings)
    }

    #[test]
    fn the_first_holder_of_set_and_pidfd_adds_it() {
        let (calls, warnings) = late(0);
        let expected = [
            "pidfd_open(77)",
            "dup3(3, 1)",
            "epoll_ctl(0, 1, 1",
            "dup3(3, 5)",
            "epoll_ctl(0, 1, 5",
            "close(5)",
            "close(3)",
        ];
        assert_eq!(calls, expected);
        // Under 2 is another file by now.
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].contains("as fd 2"), "{warnings:?}");
    }

    #[test]
    fn others_open_it_for_themselves() {
        let (calls, warnings) = late(1);
        assert_eq!(calls, ["pidfd_open(77)", "dup3(2, 1)", "close(2)"]);
        assert_eq!(warnings, [""; 0]);
    }

    #[test]
    fn only_those_of_the_first_process_are_there_at_once() {
        let snapshot = snapshot();
        let late: Vec<bool> = (0..4).map(|d| is_late(d, &snapshot)).collect();
        assert_eq!(late, [false, true, false, false]);
    }
}
