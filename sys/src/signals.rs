//! Our own signals: signal(7), sigaction(2). Numbers of real-time signals are the kernel's.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;

use nix::sys::signal::SigSet;

use crate::{Errno, Result};

/// The action of a signal (`struct sigaction`).
#[derive(Clone, Copy)]
pub struct Action(libc::sigaction);

impl std::fmt::Debug for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Action({:#x})", self.0.sa_sigaction)
    }
}

/// Sets the action to `SIG_DFL`. Returns the previous action.
///
/// # Errors
/// `EINVAL` for an invalid number, and for SIGKILL and SIGSTOP.
pub fn by_default(signal: i32) -> Result<Action> {
    set(signal, libc::SIG_DFL)
}

/// Sets the action to `SIG_IGN`. Returns the previous action.
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

/// Sets a previous action again. Returns the one that it replaces. Makes one system call.
///
/// # Errors
/// As for [`by_default`].
pub fn restore(signal: i32, action: &Action) -> Result<Action> {
    let mut before = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: live structures. The action is SIG_DFL, SIG_IGN, or a previous one of this process, whose handler still
    // exists.
    unsafe {
        let r = libc::sigaction(signal, &raw const action.0, before.as_mut_ptr());
        Errno::result(r)?;
        Ok(Action(before.assume_init()))
    }
}

/// A set of these signals, without those out of range. nix's own takes no real-time signals.
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
