//! pidfd_open(2).
//!
//! A pidfd of the job's first process is opened like any other file. Those of other tasks of the job can be opened
//! only when these exist: until then the first process's is a placeholder ([`super::late`]). A pidfd of a reaped
//! process refers to no process any more; the restoring process makes it from a child of its own that ends the same
//! way.

use std::os::fd::OwnedFd;

use ckpt_sys::process::{self, Fork};
use ckpt_tracer::Pid;
use ckpt_tracer::proc::fdinfo::FdDetail;
use ckpt_tracer::proc::fdlink::FdLink;
use serde::{Deserialize, Serialize};

use super::kind::{Captured, OpenFile, Place, Sight};
use super::{Look, procfs};
use crate::bounds;
use crate::error::Obstacle;
use crate::outsiders::process_name;
use crate::plan::{Builder, Inherited};
use crate::process::Process;
use crate::source::{Collector, Source};

/// A pidfd of a process or thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PidFd {
    /// The process, in the job; `None` for a reaped one.
    #[serde(default, deserialize_with = "bounds::pid")]
    pub task: Option<i32>,
    /// `PIDFD_THREAD`: of this thread only.
    pub thread: bool,
    /// Its wait status, if the kernel still knows it.
    #[serde(default, deserialize_with = "bounds::status")]
    pub status: Option<i32>,
    /// Its inode, if each process has one (pidfs, Linux 6.9): programs compare it to recognize pidfds of one process.
    #[serde(default)]
    pub inode: Option<u64>,
}

/// `PID_FS_MAGIC`
const PID_FS: i64 = 0x5049_4446;

/// `PIDFD_THREAD` is `O_EXCL`.
const PIDFD_THREAD: u32 = libc::O_EXCL as u32;

/// Captures a pidfd. `is_ours` says which tasks belong to the job.
fn capture(
    source: &Source,
    look: &Look,
    is_ours: impl Fn(i32) -> bool,
) -> Result<PidFd, Box<Obstacle>> {
    let thread = look.info.flags & PIDFD_THREAD != 0;
    let refuse = |reason: String| {
        let remedy = "close it before the checkpoint";
        Err(Box::new(Obstacle::new(look.object(source), reason, remedy)))
    };
    let is_pidfs = ckpt_sys::files::fstatfs(&look.copy).is_some_and(|(kind, _)| kind == PID_FS);
    let inode = is_pidfs.then_some(look.stat.st_ino);
    match look.info.detail {
        FdDetail::PidFd { pid: Pid(-1), .. } => Ok(PidFd {
            task: None,
            thread,
            status: exit_status(&look.copy),
            inode,
        }),
        FdDetail::PidFd { pid, .. } if is_ours(pid.raw()) => Ok(PidFd {
            task: Some(pid.raw()),
            thread,
            status: None,
            inode,
        }),
        FdDetail::PidFd { pid: Pid(0), .. } => {
            refuse("is a pidfd of a process in another pid namespace".to_owned())
        }
        FdDetail::PidFd { pid, .. } => refuse(format!(
            "is a pidfd of {}, which is not part of the job",
            process_name(pid)
        )),
        _ => refuse("is a pidfd of which the kernel does not show the process".to_owned()),
    }
}

/// The wait status of the process of a pidfd (`PIDFD_GET_INFO`, Linux 6.15).
fn exit_status(fd: &OwnedFd) -> Option<i32> {
    const EXIT: u64 = 1 << 3;
    let mut info = [0; 64];
    info[..8].copy_from_slice(&EXIT.to_ne_bytes());
    ckpt_sys::events::pidfd_info(fd, &mut info).ok()?;
    let mask = u64::from_ne_bytes(info[..8].try_into().ok()?);
    let status = i32::from_ne_bytes(info[60..].try_into().ok()?);
    (mask & EXIT != 0).then_some(status)
}

impl OpenFile for PidFd {
    fn capture(sight: &Sight, collector: &mut Collector) -> Captured {
        if sight.look.link != FdLink::PidFd {
            return None;
        }
        let is_ours = |task| procfs::is_of_the_job(task, collector);
        Some(capture(sight.source, sight.look, is_ours).map(Into::into))
    }

    fn class(&self) -> &'static str {
        "pidfd"
    }

    fn object(&self) -> String {
        let task = self.task.unwrap_or(0);
        format!("a pidfd of task {task}")
    }

    fn shown(&self) -> String {
        match self.task {
            Some(task) => format!("pidfd:{task}"),
            None => "pidfd of an ended process".into(),
        }
    }

    fn each_inode(&mut self, f: &mut dyn FnMut(&mut u64)) {
        self.inode.iter_mut().for_each(f);
    }

    fn is_late(&self, first: Option<i32>) -> bool {
        self.task.is_some() && self.task != first
    }

    fn open(&self, place: &Place, plan: &mut Builder) -> Result<(), Vec<Obstacle>> {
        if self.task.is_none() {
            plan.inherit(place.at, Inherited::EndedProcess(place.index));
            return Ok(());
        }
        let first = place.snapshot.processes.first().map_or(0, |p| p.pid);
        let thread = if self.task == Some(first) {
            PIDFD_THREAD
        } else {
            0
        };
        let flags = place.flags & (thread | libc::O_NONBLOCK as u32);
        let args = [first as u64, flags.into()];
        plan.expect(libc::SYS_pidfd_open, &args, 0, || self.object());
        super::place(0, place.at, plan, || self.object());
        Ok(())
    }

    fn open_late(&self, flags: u32, at: i32, _: &Process, plan: &mut Builder) {
        let flags = flags & (PIDFD_THREAD | libc::O_NONBLOCK as u32);
        let args = [self.task.unwrap_or(0) as u64, flags.into()];
        plan.expect(libc::SYS_pidfd_open, &args, at as u64, || self.object());
    }
}

impl PidFd {
    /// Whether both refer to the same reaped process.
    pub fn is_same_process(&self, other: &Self) -> bool {
        self.task.is_none()
            && other.task.is_none()
            && self.inode.is_some()
            && self.inode == other.inode
    }

    /// Creates descriptions of a reaped process, with these flags.
    pub fn of_ended(&self, flags: &[u32]) -> Result<Vec<OwnedFd>, nix::errno::Errno> {
        // The child waits before its end: where SIGCHLD is ignored its pid is freed as soon as it ends.
        let (wait, go) = ckpt_sys::pipes::pipe()?;
        let child = match process::fork()? {
            Fork::Parent(child) => child,
            Fork::Child => {
                drop(go);
                ckpt_sys::events::wait_for_hangup(wait);
                process::end_as(self.status.unwrap_or(0))
            }
        };
        let flags = flags.iter();
        let flags = flags.map(|flags| flags & (PIDFD_THREAD | libc::O_NONBLOCK as u32));
        let fds = flags.map(|flags| ckpt_sys::events::pidfd(child, flags));
        let fds = fds.collect();
        drop(go);
        let _ = process::end_of(child);
        fds
    }
}
