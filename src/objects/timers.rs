//! Interval timers (setitimer(2)) and POSIX timers (timer_create(2)).

use serde::{Deserialize, Serialize};

/// The three interval timers: real, virtual, prof. Seconds and microseconds:
/// `[interval_s, interval_us, value_s, value_us]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct IntervalTimers(pub [[i64; 4]; 3]);

/// A POSIX timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixTimer {
    /// The id that the program knows it by.
    pub id: i32,
    /// `CLOCK_*`, or a process's or thread's CPU clock.
    pub clock: i32,
    /// `SIGEV_SIGNAL`, `SIGEV_NONE` or `SIGEV_THREAD_ID`.
    pub notify: i32,
    /// The signal.
    pub signal: i32,
    /// The signal's value.
    pub value: u64,
    /// The thread notified, with `SIGEV_THREAD_ID`.
    pub thread: Option<i32>,
    /// Repetition, seconds and nanoseconds.
    pub interval: (i64, i64),
    /// What remains until it fires; zero when it is not armed.
    pub remaining: (i64, i64),
    /// Overrun count of the last notification.
    pub overrun: i32,
}
