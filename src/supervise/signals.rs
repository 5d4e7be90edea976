//! Which signals are passed on.

/// A signal as it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Its number.
    pub signal: i32,
    /// `si_code`: who made it.
    pub code: i32,
    /// The process that sent it, 0 when it was the kernel or a process we cannot see.
    pub sender: i32,
    /// What it carries, when `code` is `SI_QUEUE`.
    pub value: u64,
}

/// What stays with us: signals that a fault of our own raises, `SIGCHLD`, which is about our own
/// children, and those that stop us like any program for touching the terminal.
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

/// All signals that can be passed on. 32 and 33 belong to the C library.
pub(super) fn forwardable() -> impl Iterator<Item = i32> {
    let kept = |signal: &i32| {
        [libc::SIGKILL, libc::SIGSTOP, 32, 33].contains(signal) || OURS.contains(signal)
    };
    (1..=LAST).filter(move |signal| !kept(signal))
}

/// Whether `received` is to be passed on to the child.
///
/// What the terminal sends (`SI_KERNEL`) goes to every process of the foreground group; the child
/// has it already when it is in our group. What the child sends to us is not thrown back at it.
/// `kill` with a group's number cannot be told from one with our pid: there the child gets the
/// signal twice.
pub fn is_forwarded(received: &Received, child: i32, same_group: bool) -> bool {
    if received.signal == libc::SIGCHLD || received.sender == child {
        return false;
    }
    received.code != libc::SI_KERNEL || !same_group
}

/// Whether a program stopped by this signal was stopped by its terminal, so that its shell, which
/// sees only us, must see us stop.
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
