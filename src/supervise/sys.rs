//! Signals that are read instead of being delivered, and what a program is started with.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::process::Command;

use ckpt_sys::prctl;
use ckpt_sys::process;
use ckpt_sys::signals::{self, Action};
use nix::sys::signal::SigSet;
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::signals::{Received, forwardable};

/// Signals that are read instead of being delivered, from its making on until the process ends.
#[derive(Debug)]
pub struct Signals {
    fd: SignalFd,
    /// What we were started with, and what our program is to be started with.
    inherited: Inherited,
}

#[derive(Clone, Copy, Debug)]
struct Inherited {
    mask: SigSet,
    on_child: Action,
}

impl Signals {
    /// Blocks every signal that can be passed on, and `SIGCHLD`, in this thread and those that it
    /// will start; must be called before there are others.
    ///
    /// # Errors
    /// When the kernel gives no descriptor.
    pub fn take_over() -> nix::Result<Self> {
        // An inherited "ignore" would make the kernel reap our children and keep their status.
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

    /// The next signal that has arrived, if there is one.
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

    /// Makes `command` start its program with the signals that we were started with, and lets
    /// our descendants trace it where Yama allows that to ancestors only.
    pub(super) fn leave_to(&self, command: &mut Command, traced: bool) {
        let Inherited { mask, on_child } = self.inherited;
        let own = std::process::id();
        let restore = move || {
            // The old action is the one that exec found before us, so its handler, if any, is not code of ours.
            signals::restore(libc::SIGCHLD, &on_child)?;
            if traced {
                prctl::let_trace(own);
            }
            // The standard library has emptied the mask before this.
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

/// Sends on what was received, with its value when it has one.
///
/// The caller must not have waited for the end of `pid`, or another process may have it by now.
pub(super) fn send(pid: i32, received: &Received) -> nix::Result<()> {
    let signal = received.signal;
    match received.code {
        libc::SI_QUEUE => process::queue_signal(pid, signal, received.value),
        _ => process::kill(pid, signal),
    }
}
