//! Errors of inspecting and controlling other tasks.

use std::io;
use std::path::PathBuf;

use ckpt_sys::text::Shown;
use nix::errno::Errno;

use crate::{Pid, RemoteAddr, Tid};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the tracer. [`Error::Died`] is never confused with an errno.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The task is gone: it exited, was killed, or its process called exec.
    #[error("task {tid} ended while it was being examined")]
    Died {
        /// The task.
        tid: Tid,
    },
    /// A `/proc` file could not be read.
    #[error("cannot read {}: {source}", path.shown())]
    Proc {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A `/proc` file has contents that this version does not understand.
    #[error("{} has contents that this version does not understand: {what}", path.shown())]
    ProcSyntax {
        /// The file.
        path: PathBuf,
        /// The part that was not understood.
        what: String,
    },
    /// A system call of ours failed.
    #[error("{call} on {object} failed: {}", errno.desc())]
    Kernel {
        /// The call.
        call: &'static str,
        /// Its object.
        object: String,
        /// The kernel's error.
        errno: Errno,
    },
    /// The target's memory could not be read or written.
    #[error("cannot {what} {len} bytes at {addr} of process {pid}: {}", errno.desc())]
    Memory {
        /// "read" or "write".
        what: &'static str,
        /// The process.
        pid: Pid,
        /// Start address.
        addr: RemoteAddr,
        /// Length in bytes.
        len: usize,
        /// The kernel's error.
        errno: Errno,
    },
    /// A system call executed in the target failed.
    #[error("{call} executed in task {tid} failed: {}", errno.desc())]
    Remote {
        /// The task that made it.
        tid: Tid,
        /// The call.
        call: &'static str,
        /// The kernel's error.
        errno: Errno,
    },
    /// The task stopped for a reason that the protocol does not allow at that point.
    #[error("task {tid} stopped unexpectedly ({what})")]
    UnexpectedStop {
        /// The task.
        tid: Tid,
        /// The stop.
        what: String,
    },
    /// Attaching was refused by the kernel.
    #[error("{0}")]
    Attach(#[from] AttachError),
    /// No unused room was found for the few bytes of code that remote calls need.
    #[error(
        "process {pid} has no unused room of {need} bytes in executable memory for remote system calls"
    )]
    NoCodeCave {
        /// The process.
        pid: Pid,
        /// Bytes needed.
        need: usize,
    },
    /// No unused room was found from which all threads may make system calls.
    #[error(
        "process {pid} has no unused room of {need} bytes in the executable memory from which all its \
         threads may make system calls (syscall user dispatch); let it turn that off for the checkpoint"
    )]
    NoAllowedCave {
        /// The process.
        pid: Pid,
        /// Bytes needed.
        need: usize,
    },
    /// A task does not stop. Transient as a rule.
    #[error("{reason}")]
    DoesNotStop {
        /// One sentence: what it waits for, and what to do.
        reason: String,
    },
    /// The process kept creating threads for as long as we tried to stop them.
    #[error(
        "process {pid} creates threads faster than they can be stopped (gave up after {rounds} rounds); try again, or stop it first with kill -STOP {pid}"
    )]
    ThreadsGrow {
        /// The process.
        pid: Pid,
        /// Rounds tried.
        rounds: u32,
    },
    /// The task executes 32-bit code, or code in another segment, where our code would decode differently.
    #[error(
        "task {tid} of a 64-bit program executes code of the segment {selector:#x}, in which no call can be made from outside; try again in a moment"
    )]
    OtherCode {
        /// The task.
        tid: Tid,
        /// Its `cs`.
        selector: u64,
    },
    /// A fault injected by a test (feature `faults`).
    #[error("fault injected at step {0}")]
    Injected(crate::fault::Step),
}

/// Why a task could not be attached to.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// No such process.
    #[error("there is no process {pid}; look for the right one with `pgrep -a NAME`")]
    NoSuchProcess {
        /// The pid asked for.
        pid: Pid,
    },
    /// The kernel refuses.
    #[error("{}", .reason)]
    Refused {
        /// One sentence: what was refused, why, and what to do.
        reason: String,
    },
}

impl Error {
    /// `ESRCH` of a ptrace request or a `/proc` read means that the task is gone.
    pub fn from_errno(call: &'static str, tid: Tid, errno: Errno) -> Self {
        if errno == Errno::ESRCH {
            Error::Died { tid }
        } else {
            Error::Kernel {
                call,
                object: format!("task {tid}"),
                errno,
            }
        }
    }
}
