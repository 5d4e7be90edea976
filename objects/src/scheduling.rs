//! Scheduling of a task.

use ckpt_sys::tasks::{self, IOPRIO_WHO_PROCESS};
use ckpt_tracer::Tid;
use ckpt_tracer::capabilities::Use;
use serde::{Deserialize, Serialize};

use crate::bounds;
use crate::plan::Builder;

/// Scheduling of one task (sched(7), ioprio_set(2), `PR_SET_TIMERSLACK`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduling {
    /// `struct sched_attr` as sched_getattr(2) returns it: policy, flags, nice, priority, deadline parameters,
    /// utilization clamps.
    #[serde(with = "serde_bytes")]
    pub attr: Vec<u8>,
    /// Nice value; `attr` has it for SCHED_OTHER and SCHED_BATCH only.
    #[serde(deserialize_with = "bounds::nice")]
    pub nice: i32,
    /// Affinity, a bit for each CPU.
    #[serde(with = "serde_bytes")]
    pub affinity: Vec<u8>,
    /// I/O priority, class and data; 0 follows the nice value.
    #[serde(deserialize_with = "bounds::io_priority")]
    pub io_priority: i32,
    /// Timer slack in nanoseconds.
    pub timer_slack: u64,
}

/// What is visible from outside; the timer slack is read from inside.
pub fn capture(tid: Tid, timer_slack: u64) -> Scheduling {
    Scheduling {
        attr: tasks::scheduling(tid.raw()),
        nice: tasks::nice(tid.raw()),
        affinity: tasks::affinity(tid.raw()),
        io_priority: tasks::io_priority(tid.raw()),
        timer_slack,
    }
}

impl Scheduling {
    /// Whether it needs a privilege: a negative nice value, a real-time policy or I/O priority.
    pub fn is_favoured(&self) -> bool {
        const ORDINARY: [i32; 3] = [libc::SCHED_OTHER, libc::SCHED_BATCH, libc::SCHED_IDLE];
        /// `IOPRIO_CLASS_RT` and the position of the class, linux/ioprio.h.
        const REAL_TIME: i32 = 1;
        const CLASS: u32 = 13;
        let word = |at: usize| self.attr.get(at..at + 4)?.first_chunk().copied();
        let policy = self.policy();
        let nice = word(16).map_or(0, i32::from_le_bytes);
        self.nice < 0
            || nice < 0
            || !ORDINARY.contains(&policy)
            || self.io_priority >> CLASS == REAL_TIME
    }

    /// `SCHED_*`; the second word of `struct sched_attr`.
    fn policy(&self) -> i32 {
        let word = self.attr.get(4..8).and_then(|word| word.first_chunk());
        word.map_or(libc::SCHED_OTHER, |word| i32::from_le_bytes(*word))
    }

    /// Sets what differs from `now`, our own scheduling. An affinity with CPUs that do not exist here is left out,
    /// with a warning.
    pub fn rebuild(&self, now: &Scheduling, plan: &mut Builder) {
        let object = || "scheduling".to_owned();
        let without = |what| format!("{what} is not kept; it may need {}", Use::Scheduling);
        if self.affinity != now.affinity && !self.affinity.is_empty() {
            let at = plan.data(&self.affinity);
            let args = [0, self.affinity.len() as u64, at];
            plan.try_syscall(
                libc::SYS_sched_setaffinity,
                &args,
                "the CPU affinity is not kept",
            );
        }
        if self.nice != now.nice {
            let args = [libc::PRIO_PROCESS as u64, 0, self.nice as u64];
            plan.try_syscall(libc::SYS_setpriority, &args, &without("the nice value"));
        }
        if self.attr != now.attr && !self.attr.is_empty() {
            let at = plan.data(&self.attr);
            let what = without("the scheduling policy, priority or nice value");
            plan.try_syscall(libc::SYS_sched_setattr, &[0, at, 0], &what);
        }
        if self.io_priority != now.io_priority {
            let args = [IOPRIO_WHO_PROCESS, 0, self.io_priority as u64];
            plan.try_syscall(libc::SYS_ioprio_set, &args, &without("the I/O priority"));
        }
        let args = [libc::PR_SET_TIMERSLACK as u64, self.timer_slack];
        plan.syscall(libc::SYS_prctl, &args, object);
        const REAL_TIME: [i32; 3] = [libc::SCHED_FIFO, libc::SCHED_RR, libc::SCHED_DEADLINE];
        if self.timer_slack == 0 && !REAL_TIME.contains(&self.policy()) {
            // 0 requests the default; only a fork of a real-time task inherits 0.
            plan.warn(
                "the timer slack was 0, inherited from a real-time task, and is the default now"
                    .into(),
            );
        }
    }
}
