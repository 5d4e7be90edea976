//! Signals of our own: signal(7), sigaction(2). Numbers of real-time signals are as the kernel has them.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;

use nix::sys::signal::SigSet;

use crate::{Errno, Result};

/// What a signal does (`struct sigaction`).
#[derive(Clone, Copy)]
pub struct Action(libc::sigaction);

impl std::fmt::Debug for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Action({:#x})", self.0.sa_sigaction)
    }
}

/// `SIG_DFL`: the signal does from now on what it does by default; what it did before.
///
/// # Errors
/// `EINVAL` for a number that is none, and for SIGKILL and SIGSTOP.
pub fn by_default(signal: i32) -> Result<Action> {
    set(signal, libc::SIG_DFL)
}

/// `SIG_IGN`: the signal does nothing from now on; what it did before.
///
/// # Errors
/// As for [`by_default`].
pub fn ignore(signal: i32) -> Result<Action> {
    set(signal, libc::SIG_IGN)
}

fn set(signal: i32, what: libc::sighandler_t) -> Result<Action> {
    // SAFETY: plain integers and pointers, for which zero is valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = what;
    restore(signal, &Action(action))
}

/// Makes a signal do again what it has done; what it did now. It makes one system call.
///
/// # Errors
/// As for [`by_default`].
pub fn restore(signal: i32, action: &Action) -> Result<Action> {
    let mut before = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: live structures. The action is the default one, none, or one that this process had before, whose
    // handler is still there.
    unsafe {
        let r = libc::sigaction(signal, &raw const action.0, before.as_mut_ptr());
        Errno::result(r)?;
        Ok(Action(before.assume_init()))
    }
}

/// A set of these signals; those of numbers out of range are left out. nix's own takes no real-time signals.
pub fn set_of(signals: impl IntoIterator<Item = i32>) -> SigSet {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initializes the set, sigaddset changes it; numbers out of range are
    // refused. `SigSet` is a transparent wrapper and accepts every set that libc made.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        SigSet::from_sigset_t_unchecked(set.assume_init())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_action_comes_back() {
        let found = ignore(libc::SIGUSR2).unwrap();
        assert_eq!(
            by_default(libc::SIGUSR2).unwrap().0.sa_sigaction,
            libc::SIG_IGN
        );
        assert_eq!(
            restore(libc::SIGUSR2, &found).unwrap().0.sa_sigaction,
            libc::SIG_DFL
        );
        assert!(ignore(libc::SIGKILL).is_err());
        assert!(set_of([libc::SIGTERM, 64, 65]).contains(nix::sys::signal::Signal::SIGTERM));
    }
}
