//! The calls that no safe wrapper covers: signal sets with real-time signals, waiting that
//! understands them, and what happens between fork and exec.

#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::signals::{Received, forwardable};

/// `PR_SET_PTRACER` of `linux/prctl.h`; the `libc` crate has it, as an `int`.
const PR_SET_PTRACER: libc::c_int = libc::PR_SET_PTRACER;

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
    on_child: SigAction,
}

impl Signals {
    /// Blocks every signal that can be passed on, and `SIGCHLD`, in this thread and those that it
    /// will start; must be called before there are others.
    ///
    /// # Errors
    /// When the kernel gives no descriptor.
    pub fn take_over() -> nix::Result<Self> {
        // An inherited "ignore" would make the kernel reap our children and keep their status.
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        // SAFETY: the default action runs no code of ours.
        let on_child = unsafe { sigaction(Signal::SIGCHLD, &default) }?;
        let mask = SigSet::thread_get_mask()?;
        let ours = our_set();
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
            // SAFETY: this runs between fork and exec in a copy of one thread: sigaction and prctl
            // are bare system calls there, and the old action is the one that exec found
            // before us, so its handler, if any, is not code of ours.
            unsafe {
                sigaction(Signal::SIGCHLD, &on_child)?;
                if traced {
                    // Kernels without Yama refuse; then it is not needed.
                    libc::prctl(PR_SET_PTRACER, own as libc::c_ulong, 0, 0, 0);
                }
            }
            // The standard library has emptied the mask before this.
            mask.thread_set_mask().map_err(io::Error::from)
        };
        // SAFETY: the closure neither allocates nor locks.
        unsafe { command.pre_exec(restore) };
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn our_set() -> SigSet {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initializes the set, sigaddset changes it; numbers out of range are
    // refused. `SigSet` is a transparent wrapper and accepts every set that libc made.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in forwardable().chain([libc::SIGCHLD]) {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        SigSet::from_sigset_t_unchecked(set.assume_init())
    }
}

/// Sends on what was received, with its value when it has one.
///
/// The caller must not have waited for the end of `pid`, or another process may have it by now.
pub(super) fn send(pid: i32, received: &Received) -> nix::Result<()> {
    let signal = received.signal;
    // SAFETY: both calls take numbers only; the value is not a pointer here but what the sender
    // passed, for the receiver to understand.
    let result = unsafe {
        if received.code == libc::SI_QUEUE {
            let sival_ptr = received.value as *mut libc::c_void;
            libc::sigqueue(pid, signal, libc::sigval { sival_ptr })
        } else {
            libc::kill(pid, signal)
        }
    };
    Errno::result(result).map(drop)
}
