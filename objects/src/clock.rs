//! The machine's clocks, and those of a job: in a time namespace `CLOCK_MONOTONIC` and `CLOCK_BOOTTIME` continue from
//! their value at the checkpoint (time_namespaces(7)).

use std::fmt::Write;

use ckpt_sys::errno_of;
use ckpt_sys::namespaces;
use ckpt_sys::process::in_a_child;
use ckpt_tracer::Pid;
use ckpt_tracer::capabilities::Use;
use ckpt_tracer::proc::namespaces::timens_offsets;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Obstacle, Result};

/// The clocks of a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Clocks {
    /// The machine's.
    #[default]
    Ours,
    /// The job's own, with these values in nanoseconds when it is created.
    GoOn {
        /// `CLOCK_MONOTONIC`.
        monotonic_ns: u64,
        /// `CLOCK_BOOTTIME`.
        boottime_ns: u64,
        /// `CLOCK_MONOTONIC_RAW`, at least.
        monotonic_raw_ns: u64,
    },
}

/// Clocks that a time namespace shifts, and their names in `/proc/PID/timens_offsets`.
pub const CLOCKS: [(i32, &str); 2] = [
    (libc::CLOCK_MONOTONIC, "monotonic"),
    (libc::CLOCK_BOOTTIME, "boottime"),
];

/// The time of a clock in nanoseconds.
pub fn clock(id: i32) -> u64 {
    ckpt_sys::clocks::clock(id)
}

/// Seconds since 1970 of a time in clock ticks since boot, as in `/proc/PID/stat`.
pub fn unix_time_of_ticks(ticks: u64) -> i64 {
    let a_second = ckpt_sys::clocks::ticks_per_second();
    let started = clock(libc::CLOCK_REALTIME).saturating_sub(clock(libc::CLOCK_BOOTTIME));
    (started / 1_000_000_000 + ticks / a_second) as i64
}

impl Clocks {
    /// Runs `create`; processes that it creates have these clocks.
    ///
    /// # Errors
    /// [`Error::Refused`] where no time namespace can be made.
    pub fn during<T>(self, create: impl FnOnce() -> T) -> Result<T> {
        if self == Clocks::Ours {
            return Ok(create());
        }
        self.enter().map_err(denied)?;
        let created = create();
        // Before Linux 6.2 a process whose children have other clocks cannot create threads. In a user namespace made
        // for it, it may not return to the old time namespace either, and does without threads.
        if let Ok(ours) = std::fs::File::open("/proc/self/ns/time") {
            let _ = namespaces::enter(ours, libc::CLONE_NEWTIME);
        }
        Ok(created)
    }

    /// Sets the clocks of this single-threaded process.
    ///
    /// # Errors
    /// As for [`during`](Self::during).
    pub fn join(self) -> Result<()> {
        if self == Clocks::Ours {
            return Ok(());
        }
        self.enter().map_err(denied)?;
        let ours = std::fs::File::open("/proc/self/ns/time_for_children");
        let ours = ours.map_err(|e| errno_of(&e));
        let joined = ours.and_then(|ours| namespaces::enter(ours, libc::CLONE_NEWTIME));
        joined.map_err(denied)
    }

    /// Whether a time namespace can be created: tried in a child, whose clocks show what ours do.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn may_be_made() -> Result<(), Errno> {
        let as_ours = Clocks::GoOn {
            monotonic_ns: clock(libc::CLOCK_MONOTONIC),
            boottime_ns: clock(libc::CLOCK_BOOTTIME),
            monotonic_raw_ns: 0,
        };
        in_a_child(|| as_ours.enter())
    }

    /// Whether the kernel accepts the offsets of these clocks (`proc_timens_set_offset`, kernel/time/namespace.c).
    ///
    /// # Errors
    /// `ERANGE`, as the kernel has it.
    pub fn are_possible(self) -> Result<(), Errno> {
        /// `KTIME_SEC_MAX`, linux/ktime.h.
        const KTIME_SEC_MAX: i128 = i64::MAX as i128 / 1_000_000_000;
        if self == Clocks::Ours {
            return Ok(());
        }
        let me = Pid::own();
        for (clock, _) in CLOCKS {
            let ahead = self.ahead(clock);
            let seconds = (offset(me, clock) + ahead).div_euclid(1_000_000_000);
            let shown = (i128::from(self::clock(clock)) + ahead).div_euclid(1_000_000_000);
            let is_shift = (-KTIME_SEC_MAX..=KTIME_SEC_MAX).contains(&seconds);
            if !is_shift || !(0..=KTIME_SEC_MAX / 2).contains(&shown) {
                return Err(Errno::ERANGE);
            }
        }
        Ok(())
    }

    /// Creates a new time namespace for our children.
    fn enter(self) -> Result<(), Errno> {
        let me = Pid::own();
        namespaces::unshare(libc::CLONE_NEWTIME)?;
        let mut text = String::new();
        for (clock, name) in CLOCKS {
            let shift = offset(me, clock) + self.ahead(clock);
            let (seconds, rest) = (
                shift.div_euclid(1_000_000_000),
                shift.rem_euclid(1_000_000_000),
            );
            let _ = writeln!(text, "{name} {seconds} {rest}");
        }
        let written = std::fs::write("/proc/self/timens_offsets", text);
        written.map_err(|e| errno_of(&e))
    }

    /// The difference to our clock, in nanoseconds.
    fn ahead(self, clock: i32) -> i128 {
        let ahead = |clock| i128::from(self.shown(clock)) - i128::from(self::clock(clock));
        match clock {
            // Both clocks are shifted by the same offset, and NTP makes them differ by another amount on each
            // machine: neither may go back.
            libc::CLOCK_MONOTONIC => ahead(clock).max(ahead(libc::CLOCK_MONOTONIC_RAW)),
            _ => ahead(clock),
        }
    }

    fn shown(self, clock: i32) -> u64 {
        match self {
            Clocks::Ours => self::clock(clock),
            Clocks::GoOn { monotonic_ns, .. } if clock == libc::CLOCK_MONOTONIC => monotonic_ns,
            Clocks::GoOn {
                monotonic_raw_ns, ..
            } if clock == libc::CLOCK_MONOTONIC_RAW => monotonic_raw_ns,
            Clocks::GoOn { boottime_ns, .. } => boottime_ns,
        }
    }
}

/// The time of a clock of a process, in nanoseconds, when ours is `ours`.
pub fn as_seen_by(pid: Pid, clock: i32, ours: u64) -> u64 {
    let me = Pid::own();
    let shift = offset(pid, clock) - offset(me, clock);
    (i128::from(ours) + shift).max(0) as u64
}

/// The offset of a clock in the time namespace of a process, in nanoseconds.
fn offset(pid: Pid, clock: i32) -> i128 {
    let name = CLOCKS.iter().find(|(id, _)| *id == clock).map(|(_, n)| *n);
    let offsets = timens_offsets(pid).unwrap_or_default();
    let found = offsets.iter().find(|o| Some(o.clock.as_str()) == name);
    found.map_or(0, |o| {
        i128::from(o.seconds) * 1_000_000_000 + i128::from(o.nanoseconds)
    })
}

/// The refusal if no time namespace can be created.
pub fn denied(errno: Errno) -> Error {
    Error::refuse(Obstacle::new(
        "the time namespace that continues the job's clocks",
        format!(
            "cannot be made: {}; it needs {}",
            errno.desc(),
            Use::OwnClocks
        ),
        "run restore as root, or take the machine's clocks: --clock host",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readings_of_clocks_are_predicted() {
        if let Err(errno) = Clocks::may_be_made() {
            return eprintln!("skipped: no time namespace can be made: {errno}");
        }
        const SECOND: u64 = 1_000_000_000;
        const MOST: u64 = i64::MAX as u64 / SECOND / 2;
        let now = [libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME].map(clock);
        let clocks = |monotonic_ns, boottime_ns, monotonic_raw_ns| Clocks::GoOn {
            monotonic_ns,
            boottime_ns,
            monotonic_raw_ns,
        };
        for (clocks, possible) in [
            (clocks(now[0], now[1], 0), true),
            (clocks(0, 0, 0), true),
            (clocks(1000 * SECOND, 2000 * SECOND, 3000 * SECOND), true),
            (clocks((MOST - 9) * SECOND, now[1], 0), true),
            (clocks((MOST + 9) * SECOND, now[1], 0), false),
            (clocks(now[0], (MOST + 9) * SECOND, 0), false),
            (clocks(now[0], now[1], (MOST + 9) * SECOND), false),
            (clocks(u64::MAX, u64::MAX, u64::MAX), false),
        ] {
            let answer = in_a_child(|| clocks.enter());
            assert_eq!(clocks.are_possible(), answer, "{clocks:?}");
            assert_eq!(answer.is_ok(), possible, "{clocks:?}");
        }
    }
}
