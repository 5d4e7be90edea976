//! POSIX timers of a process: `/proc/PID/timers` (`show_timer` in the kernel's `fs/proc/base.c`).
//!
//! The remaining time is not printed; that needs `timer_gettime` inside the process.

use super::ProcDir;
use super::parse::{dec, hex, key_value, lines};
use crate::{Result, Tid};

/// One timer of `timer_create`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PosixTimer {
    /// The kernel's id, by which the process refers to it.
    pub id: i32,
    /// `sigev_signo`; meaningless with [`Notify::None`].
    pub signal: i32,
    /// `sigev_value`.
    pub sigval: u64,
    /// `sigev_notify`.
    pub notify: Notify,
    /// Clock; negative for processor-time clocks (`MAKE_PROCESS_CPUCLOCK`).
    pub clock: i32,
}

/// `sigev_notify`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notify {
    /// `SIGEV_SIGNAL`: the process gets the signal.
    Signal,
    /// `SIGEV_SIGNAL | SIGEV_THREAD_ID`: this task gets the signal.
    Thread(Tid),
    /// `SIGEV_NONE`: no notification.
    None,
    /// `SIGEV_THREAD`: for the kernel the same as [`Notify::Signal`]; the C libraries do not use it.
    LibraryThread,
}

/// Reads the timers of a process, in the order of their ids. Empty on a kernel without
/// `CONFIG_POSIX_TIMERS` or `CONFIG_CHECKPOINT_RESTORE`.
///
/// # Errors
/// See [`ProcDir::read`]; [`crate::Error::ProcSyntax`] when the format is unknown.
pub fn read_timers(process: impl Into<ProcDir>) -> Result<Vec<PosixTimer>> {
    let dir = process.into();
    let text = dir.read_optional("timers")?.unwrap_or_default();
    parse(&text).map_err(|line| dir.syntax("timers", line))
}

fn parse(text: &[u8]) -> Result<Vec<PosixTimer>, &[u8]> {
    let mut timers: Vec<PosixTimer> = Vec::new();
    for line in lines(text).filter(|line| !line.is_empty()) {
        field(&mut timers, line).ok_or(line)?;
    }
    timers.sort_by_key(|timer| timer.id);
    Ok(timers)
}

fn field(timers: &mut Vec<PosixTimer>, line: &[u8]) -> Option<()> {
    let (key, value) = key_value(line, b':')?;
    if key == b"ID" {
        let id = dec(value)?;
        timers.push(PosixTimer {
            id,
            signal: 0,
            sigval: 0,
            notify: Notify::Signal,
            clock: 0,
        });
        return Some(());
    }
    let timer = timers.last_mut()?;
    match key {
        b"signal" => {
            let (signal, sigval) = key_value(value, b'/')?;
            timer.signal = dec(signal)?;
            timer.sigval = hex(sigval)?;
        }
        b"notify" => {
            let (how, target) = key_value(value, b'/')?;
            timer.notify = match (how, key_value(target, b'.')?) {
                (b"signal", (b"tid", tid)) => Notify::Thread(Tid(dec(tid)?)),
                (b"signal", (b"pid", _)) => Notify::Signal,
                (b"none", _) => Notify::None,
                (b"thread", _) => Notify::LibraryThread,
                _ => return None,
            };
        }
        b"ClockID" => timer.clock = dec(value)?,
        _ => {}
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_notification() {
        let text = b"ID: 3\nsignal: 0/0000000000000000\nnotify: thread/pid.9\nClockID: -6\n\
            ID: 2\nsignal: 40/00007fff86e452a8\nnotify: signal/tid.5626\nClockID: 1\n\
            ID: 1\nsignal: 14/0000000000000001\nnotify: none/pid.5626\nClockID: 7\n\
            ID: 0\nsignal: 60/ffffffffffffffff\nnotify: signal/pid.5626\nClockID: 0\n";
        let timer = |id, signal, sigval, notify, clock| PosixTimer {
            id,
            signal,
            sigval,
            notify,
            clock,
        };
        let expected = [
            timer(0, 60, u64::MAX, Notify::Signal, 0),
            timer(1, 14, 1, Notify::None, 7),
            timer(2, 40, 0x7fff_86e4_52a8, Notify::Thread(Tid(5626)), 1),
            timer(3, 0, 0, Notify::LibraryThread, -6),
        ];
        assert_eq!(parse(text).unwrap(), expected);
        assert_eq!(parse(b"").unwrap(), []);
    }

    #[test]
    fn odd_text_is_an_error_that_names_the_line() {
        assert_eq!(parse(b"signal: 1/0\n"), Err(&b"signal: 1/0"[..]));
        assert_eq!(
            parse(b"ID: 1\nnotify: carrier pigeon/pid.1\n").unwrap_err(),
            b"notify: carrier pigeon/pid.1"
        );
    }
}
