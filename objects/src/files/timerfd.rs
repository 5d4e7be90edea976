//! timerfd_create(2).

use std::os::fd::OwnedFd;

use ckpt_tracer::proc::fdinfo::{self, FdDetail};
use ckpt_tracer::proc::fdlink::FdLink;
use serde::{Deserialize, Serialize};

use super::kind::{Captured, OpenFile, Place, Sight};
use crate::Host;
use crate::bounds;
use crate::error::Obstacle;
use crate::plan::Builder;
use crate::source::Collector;
use crate::timers;

/// A timerfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimerFd {
    /// `CLOCK_*`.
    #[serde(deserialize_with = "bounds::clock_id")]
    pub clock: i32,
    /// Expirations not yet read.
    pub ticks: u64,
    /// `TFD_TIMER_*` with which it was set.
    #[serde(deserialize_with = "bounds::choice")]
    pub settime_flags: u32,
    /// Time until it fires, seconds and nanoseconds; zero when disarmed.
    #[serde(deserialize_with = "bounds::timer")]
    pub remaining: (i64, i64),
    /// Interval.
    #[serde(deserialize_with = "bounds::timer")]
    pub interval: (i64, i64),
}

/// `TFD_IOC_SET_TICKS`, `_IOW('T', 0, u64)` (CONFIG_CHECKPOINT_RESTORE).
const TFD_IOC_SET_TICKS: u64 = 0x4008_5400;

/// Milliseconds within which a timer that is due has fired.
const DUE_MS: i32 = 2;

impl TimerFd {
    /// From its fdinfo; `copy` is our duplicate of it.
    fn of(timer: &fdinfo::TimerFd, copy: &OwnedFd) -> Self {
        let pair = |(s, ns): (u64, u64)| (s as i64, ns as i64);
        // A periodic timer with no remaining time and no unread expiration is either disarmed, or due right now and
        // fires within a moment.
        let unclear = timer.value == (0, 0) && timer.interval != (0, 0) && timer.ticks == 0;
        let fires =
            unclear && ckpt_sys::events::poll_for(copy, libc::POLLIN, DUE_MS) & libc::POLLIN != 0;
        Self {
            clock: timer.clockid,
            ticks: if fires { 1 } else { timer.ticks },
            settime_flags: timer.settime_flags,
            remaining: pair(timer.value),
            interval: pair(timer.interval),
        }
    }

    /// The time to set: relative, or for an absolute timer the expiration. On the wall clock that is the program's
    /// own value; on the other clocks, whose present values are in `host`, it follows from the remaining time.
    fn due(&self, remaining: (i64, i64), host: &Host) -> (i64, i64) {
        if self.settime_flags & libc::TFD_TIMER_ABSTIME as u32 == 0 {
            return remaining;
        }
        let from = match self.clock {
            libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_ALARM => host.realtime_ns,
            libc::CLOCK_BOOTTIME | libc::CLOCK_BOOTTIME_ALARM => host.boottime_ns,
            _ => host.monotonic_ns,
        };
        let at = from as i128 + i128::from(remaining.0) * 1_000_000_000 + i128::from(remaining.1);
        ((at / 1_000_000_000) as i64, (at % 1_000_000_000) as i64)
    }
}

impl OpenFile for TimerFd {
    fn capture(sight: &Sight, _: &mut Collector) -> Captured {
        match (&sight.look.link, &sight.look.info.detail) {
            (FdLink::AnonInode(_), FdDetail::TimerFd(timer)) => {
                Some(Ok(TimerFd::of(timer, &sight.look.copy).into()))
            }
            _ => None,
        }
    }

    fn anon_inode() -> Option<&'static str> {
        Some("timerfd")
    }

    fn class(&self) -> &'static str {
        "timerfd"
    }

    /// The remaining time decreases.
    fn make_comparable(&mut self, _: &mut u32) {
        let armed = timers::goes_on(self.remaining.0, self.interval != (0, 0));
        self.remaining = (i64::from(armed), 0);
        self.ticks = 0;
    }

    /// Creates it, running.
    fn open(&self, place: &Place, plan: &mut Builder) -> Result<(), Vec<Obstacle>> {
        let object = || "a timerfd".to_owned();
        let flags = place.flags & libc::O_NONBLOCK as u32;
        plan.expect(
            libc::SYS_timerfd_create,
            &[self.clock as u64, flags.into()],
            0,
            object,
        );
        // A periodic timer that has fired shows no remaining time until it is read; the smallest time starts it. A
        // disarmed one keeps its interval.
        let fired = self.remaining == (0, 0) && self.ticks != 0 && self.interval != (0, 0);
        let remaining = if fired { (0, 1) } else { self.remaining };
        if (remaining, self.interval) != ((0, 0), (0, 0)) {
            let due = match remaining {
                (0, 0) => (0, 0),
                _ => self.due(remaining, &place.snapshot.host),
            };
            let words = [self.interval.0, self.interval.1, due.0, due.1];
            let data = plan.data(&words.map(i64::to_le_bytes).concat());
            let args = [0, self.settime_flags.into(), data, 0];
            plan.syscall(libc::SYS_timerfd_settime, &args, object);
        }
        if self.ticks != 0 {
            let data = plan.data(&self.ticks.to_le_bytes());
            plan.syscall(libc::SYS_ioctl, &[0, TFD_IOC_SET_TICKS, data], object);
        }
        super::place(0, place.at, plan, object);
        Ok(())
    }
}
