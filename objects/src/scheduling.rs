//! How a task is scheduled.
#![allow(unsafe_code)]

use ckpt_tracer::Tid;
use ckpt_tracer::capabilities::Use;
use serde::{Deserialize, Serialize};

use crate::bounds;
use crate::plan::Builder;

/// Scheduling of one task (sched(7), ioprio_set(2), `PR_SET_TIMERSLACK`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduling {
    /// `struct sched_attr` as sched_getattr(2) gives it: policy, flags, nice, priority,
    /// deadline parameters, utilisation clamps.
    #[serde(with = "serde_bytes")]
    pub attr: Vec<u8>,
    /// Nice value; `attr` has it for SCHED_OTHER and SCHED_BATCH only.
    #[serde(deserialize_with = "bounds::nice")]
    pub nice: i32,
    /// CPUs the task may run on, a bit each.
    #[serde(with = "serde_bytes")]
    pub affinity: Vec<u8>,
    /// I/O priority, class and data; 0 is "follow the nice value".
    #[serde(deserialize_with = "bounds::io_priority")]
    pub io_priority: i32,
    /// Timer slack in nanoseconds.
    pub timer_slack: u64,
}

/// Room for `struct sched_attr` of kernels to come; the first four bytes tell the size.
const ATTR_ROOM: usize = 128;
/// Room for 8,192 CPUs.
const AFFINITY_ROOM: usize = 1024;
/// `IOPRIO_WHO_PROCESS`, which means one task.
const IOPRIO_WHO_PROCESS: u64 = 1;

/// What can be asked from outside; the timer slack comes from inside.
pub fn capture(tid: Tid, timer_slack: u64) -> Scheduling {
    let mut attr = vec![0u8; ATTR_ROOM];
    // SAFETY: the kernel writes at most ATTR_ROOM bytes.
    let r = unsafe {
        libc::syscall(
            libc::SYS_sched_getattr,
            tid.raw(),
            attr.as_mut_ptr(),
            ATTR_ROOM,
            0,
        )
    };
    let size = attr
        .first_chunk()
        .map_or(0, |b| u32::from_le_bytes(*b) as usize);
    attr.truncate(if r == 0 { size.min(ATTR_ROOM) } else { 0 });
    let mut affinity = vec![0u8; AFFINITY_ROOM];
    // SAFETY: the kernel writes at most AFFINITY_ROOM bytes and returns how many.
    let n = unsafe {
        libc::syscall(
            libc::SYS_sched_getaffinity,
            tid.raw(),
            AFFINITY_ROOM,
            affinity.as_mut_ptr(),
        )
    };
    affinity.truncate(n.max(0) as usize);
    // SAFETY: a system call without pointers.
    let io = unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, tid.raw()) };
    // SAFETY: a call without pointers. The raw call answers 20 minus the nice value.
    let nice = unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, tid.raw()) };
    let nice = if nice > 0 { 20 - nice as i32 } else { 0 };
    Scheduling {
        attr,
        nice,
        affinity,
        io_priority: io.max(0) as i32,
        timer_slack,
    }
}

impl Scheduling {
    /// Whether it is more than everybody may have: a lower nice value than 0, a real-time policy or
    /// I/O priority.
    pub fn is_favoured(&self) -> bool {
        const ORDINARY: [i32; 3] = [libc::SCHED_OTHER, libc::SCHED_BATCH, libc::SCHED_IDLE];
        /// `IOPRIO_CLASS_RT` and where the class stands, linux/ioprio.h.
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

    /// Sets what differs from `now`, the scheduling of the process that restores. An affinity
    /// that names CPUs which do not exist here is left alone with a warning.
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
            // 0 asks for the default, and only a fork of a real-time task inherits it.
            plan.warn(
                "the timer slack was 0, inherited from a real-time task, and is the default now"
                    .into(),
            );
        }
    }
}
