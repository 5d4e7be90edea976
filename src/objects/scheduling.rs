//! How a task is scheduled.

use serde::{Deserialize, Serialize};

/// Scheduling of one task (sched(7), ioprio_set(2), `PR_SET_TIMERSLACK`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduling {
    /// `struct sched_attr` as sched_getattr(2) gives it.
    #[serde(with = "serde_bytes")]
    pub attr: Vec<u8>,
    /// Nice value, -20 to 19.
    pub nice: i32,
    /// CPUs the task may run on, a bit each.
    #[serde(with = "serde_bytes")]
    pub affinity: Vec<u8>,
    /// I/O priority, class and data.
    pub io_priority: i32,
    /// Timer slack in nanoseconds.
    pub timer_slack: u64,
}
