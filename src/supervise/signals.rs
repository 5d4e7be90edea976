//! Which signals are passed on.

/// A signal as it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Its number.
    pub signal: i32,
    /// `si_code`: its origin.
    pub code: i32,
    /// The sending process, 0 for the kernel or a process that is not visible.
    pub sender: i32,
    /// Its value, when `code` is `SI_QUEUE`.
    pub value: u64,
}

/// Not passed on: signals of our own faults, `SIGCHLD`, which concerns our own children, and those that stop us like
/// any program for using the terminal.
const OURS: [i32; 11] = [
    libc::SIGILL,
    libc::SIGTRAP,
    libc::SIGABRT,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGSEGV,
    libc::SIGSYS,
    libc::SIGPIPE,
    libc::SIGCHLD,
    libc::SIGTTIN,
    libc::SIGTTOU,
];

/// Linux has signals 1 to 64.
const LAST: i32 = 64;

/// All signals that can be passed on. The C library uses 32 and 33.
pub(super) fn forwardable() -> impl Iterator<Item = i32> {
    let kept = |signal: &i32| {
        [libc::SIGKILL, libc::SIGSTOP, 32, 33].contains(signal) || OURS.contains(signal)
    };
    (1..=LAST).filter(move |signal| !kept(signal))
}

/// Whether `received` must be passed on to the child.
///
/// Signals of the terminal (`SI_KERNEL`) go to every process of the foreground process group; a child in our group
/// has it already. Signals from the child to us are not returned to it. kill(2) of a process group cannot be
/// distinguished from one of our pid: then the child gets the signal twice.
pub fn is_forwarded(received: &Received, child: i32, same_group: bool) -> bool {
    if received.signal == libc::SIGCHLD || received.sender == child {
        return false;
    }
    received.code != libc::SI_KERNEL || !same_group
}

/// Whether this stop signal is one of the terminal's, so that we must stop too for the shell, which only sees us.
pub(super) fn stops_the_shell_job(signal: i32) -> bool {
    [libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU].contains(&signal)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHILD: i32 = 100;

    fn received(signal: i32, code: i32, sender: i32) -> Received {
        Received {
            signal,
            code,
            sender,
            value: 0,
        }
    }

    #[test]
    fn the_terminals_signals_reach_both_of_a_group() {
        for signal in [libc::SIGINT, libc::SIGQUIT, libc::SIGTSTP, libc::SIGHUP] {
            let received = received(signal, libc::SI_KERNEL, 0);
            assert!(!is_forwarded(&received, CHILD, true));
            assert!(is_forwarded(&received, CHILD, false));
        }
    }

    #[test]
    fn signals_sent_to_us_alone_are_passed_on() {
        for signal in [
            libc::SIGTERM,
            libc::SIGINT,
            libc::SIGCONT,
            libc::SIGUSR2,
            64,
        ] {
            for code in [libc::SI_USER, libc::SI_QUEUE, libc::SI_TKILL] {
                assert!(is_forwarded(&received(signal, code, 7), CHILD, true));
            }
        }
    }

    #[test]
    fn the_child_does_not_get_its_own_signals_back() {
        assert!(!is_forwarded(
            &received(libc::SIGUSR1, libc::SI_USER, CHILD),
            CHILD,
            true
        ));
        assert!(!is_forwarded(
            &received(libc::SIGCHLD, libc::SI_USER, 7),
            CHILD,
            true
        ));
    }

    #[test]
    fn faults_of_our_own_and_the_c_librarys_signals_stay() {
        let all: Vec<i32> = forwardable().collect();
        for kept in [
            libc::SIGSEGV,
            libc::SIGKILL,
            libc::SIGSTOP,
            libc::SIGPIPE,
            32,
            33,
        ] {
            assert!(!all.contains(&kept), "{kept}");
        }
        for passed in [
            libc::SIGHUP,
            libc::SIGTERM,
            libc::SIGUSR1,
            libc::SIGWINCH,
            34,
            64,
        ] {
            assert!(all.contains(&passed), "{passed}");
        }
    }
}
