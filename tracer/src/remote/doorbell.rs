//! The doorbell: a signal that the program ignores but for which a traced task stops.

use super::RemoteCalls;
use crate::Pid;
use crate::proc::status::SignalSets;
use crate::task::{Stop, Stopped};

/// Synchronous signals, which the kernel generates for faults (`SYNCHRONOUS_MASK`, kernel/signal.c), and signals that
/// discard pending ones, even blocked ones (`prepare_signal`): a stop signal discards SIGCONT, and SIGCONT discards
/// all stop signals.
const NEVER: [i32; 12] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGTRAP,
    libc::SIGFPE,
    libc::SIGSYS,
    libc::SIGKILL,
    libc::SIGSTOP,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
    libc::SIGCONT,
];

/// A signal that the process ignores, by default or explicitly. One that any of the tasks blocks does not qualify: it
/// may be pending for a signalfd, and would be consumed with the doorbell.
pub(super) fn doorbell(pid: Pid, tasks: &[Stopped]) -> Option<i32> {
    let signals = crate::proc::status::read_status(pid).ok()?.signals;
    let mut blocked = 0;
    for task in tasks {
        blocked |= task.signal_mask().ok()?;
    }
    choose(signals.caught, signals.ignored, blocked)
}

/// Whether a process with these tasks has a signal that can be the doorbell.
pub fn may_ring<'s>(tasks: impl IntoIterator<Item = &'s SignalSets>) -> bool {
    let none = (0, 0, 0);
    let (caught, ignored, blocked) = tasks.into_iter().fold(none, |sets, task| {
        (task.caught, task.ignored, sets.2 | task.blocked)
    });
    choose(caught, ignored, blocked).is_some()
}

/// Chooses from signal sets, bit n-1 for signal n.
fn choose(caught: u64, ignored: u64, blocked: u64) -> Option<i32> {
    let has = |set: u64, signal: i32| set & (1 << (signal - 1)) != 0;
    let by_default = [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD];
    let by_default = by_default.into_iter().filter(|s| !has(caught, *s));
    let by_wish = (1..=64).filter(|s| has(ignored, *s) && !NEVER.contains(s));
    by_default.chain(by_wish).find(|s| !has(blocked, *s))
}

impl RemoteCalls<'_> {
    pub(super) fn at_doorbell(&self) -> bool {
        matches!((self.task.stop(), self.doorbell), (Stop::Signal(at), Some(bell)) if at == bell)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(signals: &[i32]) -> u64 {
        signals.iter().fold(0, |set, s| set | 1 << (s - 1))
    }

    #[test]
    fn no_doorbell_signal_discards_pending_ones() {
        let usual = [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD];
        assert_eq!(choose(0, 0, 0), Some(libc::SIGURG));
        assert_eq!(choose(set(&usual[..2]), 0, 0), Some(libc::SIGCHLD));
        assert_eq!(choose(set(&usual), 0, 0), None);
        assert_eq!(choose(0, 0, set(&usual)), None);
        assert_eq!(choose(set(&usual), set(&NEVER), 0), None);
        let pipe = set(&[libc::SIGPIPE]);
        assert_eq!(choose(set(&usual), pipe, 0), Some(libc::SIGPIPE));
        assert_eq!(choose(set(&usual), pipe, pipe), None);
    }
}
