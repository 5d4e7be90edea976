//! Signals that are read instead of being delivered, and the initial signal state of a program.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::process::Command;

use ckpt_sys::prctl;
use ckpt_sys::process;
use ckpt_sys::signals::{self, Action};
use nix::sys::signal::SigSet;
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::signals::{Received, forwardable};

/// Signals that are read instead of being delivered, until the process ends.
#[derive(Debug)]
pub struct Signals {
    fd: SignalFd,
    /// Our original state, which our program gets.
    inherited: Inherited,
}

#[derive(Clone, Copy, Debug)]
struct Inherited {
    mask: SigSet,
    on_child: Action,
}

impl Signals {
    /// Blocks every signal that can be passed on, and `SIGCHLD`, in this thread and threads that it creates; must be
    /// called before there are others.
    ///
    /// # Errors
    /// When no descriptor can be created.
    pub fn take_over() -> nix::Result<Self> {
        // With an inherited SIG_IGN the kernel would reap our children and discard their status.
        let on_child = signals::by_default(libc::SIGCHLD)?;
        let mask = SigSet::thread_get_mask()?;
        let ours = signals::set_of(forwardable().chain([libc::SIGCHLD]));
        ours.thread_block()?;
        let fd = SignalFd::with_flags(&ours, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Signals {
            fd,
            inherited: Inherited { mask, on_child },
        })
    }

    /// The next pending signal, if any.
    pub(super) fn next(&self) -> nix::Result<Option<Received>> {
        let Some(info) = self.fd.read_signal()? else {
            return Ok(None);
        };
        Ok(Some(Received {
            signal: info.ssi_signo as i32,
            code: info.ssi_code,
            sender: info.ssi_pid as i32,
            value: info.ssi_ptr,
        }))
    }

    /// Makes `command` start its program with our original signal state, and permits our descendants to trace it
    /// where Yama limits that to ancestors.
    pub(super) fn leave_to(&self, command: &mut Command, traced: bool) {
        let Inherited { mask, on_child } = self.inherited;
        let own = std::process::id();
        let restore = move || {
            // The old action is the one from before our exec, so it is not a handler of ours.
            signals::restore(libc::SIGCHLD, &on_child)?;
            if traced {
                prctl::let_trace(own);
            }
            // The standard library has emptied the mask before.
            mask.thread_set_mask().map_err(io::Error::from)
        };
        process::before_exec(command, restore);
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Sends the received signal, with its value if it has one.
///
/// The caller must not have reaped `pid`, which could be reused.
pub(super) fn send(pid: i32, received: &Received) -> nix::Result<()> {
    let signal = received.signal;
    match received.code {
        libc::SI_QUEUE => process::queue_signal(pid, signal, received.value),
        _ => process::kill(pid, signal),
    }
}
