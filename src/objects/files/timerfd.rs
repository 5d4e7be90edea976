//! timerfd_create(2).

use serde::{Deserialize, Serialize};

/// A timer read through a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimerFd {
    /// `CLOCK_*`.
    pub clock: i32,
    /// Expirations not yet read.
    pub ticks: u64,
    /// `TFD_TIMER_*` with which it was set.
    pub settime_flags: u32,
    /// What remains until it fires, seconds and nanoseconds; zero when not armed.
    pub remaining: (i64, i64),
    /// Repetition.
    pub interval: (i64, i64),
}
