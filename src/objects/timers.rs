//! Interval timers (setitimer(2)) and POSIX timers (timer_create(2)).

use ckpt_tracer::proc::{self, timers::Notify};
use ckpt_tracer::remote::RemoteCalls;
use serde::{Deserialize, Serialize};

use crate::error::Obstacle;
use crate::restore::plan::Builder;

type Result<T, E = ckpt_tracer::Error> = std::result::Result<T, E>;

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

/// The interval timers; each is read without being changed.
pub fn capture_interval(calls: &mut RemoteCalls<'_>) -> Result<IntervalTimers> {
    let mut timers = IntervalTimers::default();
    for which in 0..3 {
        let out = calls.scratch().raw();
        calls.call(
            "getitimer",
            libc::SYS_getitimer,
            [which as u64, out, 0, 0, 0, 0],
        )?;
        timers.0[which] = four(calls.read_scratch(0)?);
    }
    Ok(timers)
}

fn four(bytes: [u8; 32]) -> [i64; 4] {
    std::array::from_fn(|i| i64::from_le_bytes(bytes[i * 8..][..8].try_into().unwrap_or([0; 8])))
}

/// The POSIX timers that `/proc/PID/timers` lists, with what remains of each.
pub fn capture_posix(
    calls: &mut RemoteCalls<'_>,
    listed: &[proc::timers::PosixTimer],
) -> Result<Vec<PosixTimer>> {
    let mut timers = Vec::with_capacity(listed.len());
    for timer in listed {
        let id = timer.id as u64;
        let out = calls.scratch().raw();
        calls.call(
            "timer_gettime",
            libc::SYS_timer_gettime,
            [id, out, 0, 0, 0, 0],
        )?;
        let [is, ins, vs, vns] = four(calls.read_scratch(0)?);
        let overrun = calls.call(
            "timer_getoverrun",
            libc::SYS_timer_getoverrun,
            [id, 0, 0, 0, 0, 0],
        )?;
        let (notify, thread) = match timer.notify {
            Notify::Signal | Notify::LibraryThread => (libc::SIGEV_SIGNAL, None),
            Notify::Thread(tid) => (libc::SIGEV_THREAD_ID, Some(tid.raw())),
            Notify::None => (libc::SIGEV_NONE, None),
        };
        timers.push(PosixTimer {
            id: timer.id,
            clock: timer.clock,
            notify,
            signal: timer.signal,
            value: timer.sigval,
            thread,
            interval: (is, ins),
            remaining: (vs, vns),
            overrun: overrun as i32,
        });
    }
    Ok(timers)
}

/// Starts the interval timers.
pub fn rebuild_interval(timers: &IntervalTimers, plan: &mut Builder) {
    for (which, timer) in timers.0.iter().enumerate() {
        if *timer != [0; 4] {
            let at = plan.data(&timer.map(i64::to_le_bytes).concat());
            let object = || format!("interval timer {which}");
            plan.syscall(libc::SYS_setitimer, &[which as u64, at, 0], object);
        }
    }
}

/// A gap of ids larger than this is not made by creating and deleting timers.
const MAX_GAP: i32 = 10_000;

/// Creates the POSIX timers under their ids. The kernel counts ids up from 0 in a new process,
/// so that the gaps are filled with timers that go again; each id is checked.
pub fn create_posix(timers: &[PosixTimer], plan: &mut Builder) -> Result<(), Obstacle> {
    let mut next = 0;
    for timer in timers {
        let object = || format!("POSIX timer {}", timer.id);
        if timer.id - next > MAX_GAP {
            return Err(Obstacle::without_remedy(
                format!("POSIX timer {}", timer.id),
                "has an id that this version does not reach (the process created and deleted \
                 very many timers)",
            ));
        }
        let out = plan.reserve(8);
        let none = plan.data(&sigevent(libc::SIGEV_NONE, 0, 0, 0));
        while next < timer.id {
            let args = [libc::CLOCK_MONOTONIC as u64, none, out];
            plan.syscall(libc::SYS_timer_create, &args, object);
            plan.syscall(libc::SYS_timer_delete, &[next as u64], object);
            next += 1;
        }
        let event = plan.data(&sigevent(
            timer.notify,
            timer.signal,
            timer.value,
            timer.thread.unwrap_or(0),
        ));
        plan.syscall(
            libc::SYS_timer_create,
            &[timer.clock as u64, event, out],
            object,
        );
        // The id is in memory: asking for the overrun of the id that must be there fails with
        // EINVAL if the kernel gave another.
        plan.syscall(libc::SYS_timer_getoverrun, &[timer.id as u64], object);
        next += 1;
    }
    Ok(())
}

fn sigevent(notify: i32, signal: i32, value: u64, thread: i32) -> Vec<u8> {
    let mut bytes = vec![0; 64];
    bytes[0..8].copy_from_slice(&value.to_le_bytes());
    bytes[8..12].copy_from_slice(&signal.to_le_bytes());
    bytes[12..16].copy_from_slice(&notify.to_le_bytes());
    bytes[16..20].copy_from_slice(&thread.to_le_bytes());
    bytes
}

/// Starts the POSIX timers.
pub fn start_posix(timers: &[PosixTimer], plan: &mut Builder) {
    for timer in timers.iter().filter(|t| t.remaining != (0, 0)) {
        let words = [
            timer.interval.0,
            timer.interval.1,
            timer.remaining.0,
            timer.remaining.1,
        ];
        let at = plan.data(&words.map(i64::to_le_bytes).concat());
        let object = || format!("POSIX timer {}", timer.id);
        plan.syscall(
            libc::SYS_timer_settime,
            &[timer.id as u64, 0, at, 0],
            object,
        );
    }
}
