//! Interval timers (setitimer(2)) and POSIX timers (timer_create(2)).

use std::path::Path;

use ckpt_tracer::Pid;
use ckpt_tracer::proc::{self, timers::Notify};
use ckpt_tracer::remote::RemoteCalls;
use serde::{Deserialize, Serialize};

use super::Snapshot;
use super::process::Process;
use super::signals::{self, Action, Pending};
use crate::bounds;
use crate::error::Obstacle;
use crate::plan::Builder;
use crate::plan::PidMethod;
use crate::source::{Collector, Source};

type Result<T, E = ckpt_tracer::Error> = std::result::Result<T, E>;

/// The three interval timers: real, virtual, prof. Seconds and microseconds:
/// `[interval_s, interval_us, value_s, value_us]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct IntervalTimers(#[serde(deserialize_with = "bounds::timer")] pub [[i64; 4]; 3]);

/// A POSIX timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixTimer {
    /// The id by which the program refers to it.
    #[serde(deserialize_with = "bounds::id")]
    pub id: i32,
    /// `CLOCK_*`, or a process's or thread's CPU clock.
    pub clock: i32,
    /// `SIGEV_SIGNAL`, `SIGEV_NONE` or `SIGEV_THREAD_ID`.
    #[serde(deserialize_with = "bounds::choice")]
    pub notify: i32,
    /// The signal.
    #[serde(deserialize_with = "bounds::signal")]
    pub signal: i32,
    /// The signal's value.
    pub value: u64,
    /// The thread notified, with `SIGEV_THREAD_ID`.
    #[serde(default, deserialize_with = "bounds::pid")]
    pub thread: Option<i32>,
    /// Interval, seconds and nanoseconds.
    #[serde(deserialize_with = "bounds::timer")]
    pub interval: (i64, i64),
    /// Time until it fires; zero when it is disarmed.
    #[serde(deserialize_with = "bounds::timer")]
    pub remaining: (i64, i64),
    /// Overrun count of the last notification.
    pub overrun: i32,
}

/// Reads the interval timers without changing them.
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

/// The POSIX timers listed in `/proc/PID/timers`, with the remaining time of each.
pub fn capture_posix(
    calls: &mut RemoteCalls<'_>,
    listed: &[proc::timers::PosixTimer],
) -> Result<Vec<PosixTimer>> {
    let mut timers = seen(listed);
    for timer in &mut timers {
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
        timer.interval = (is, ins);
        timer.remaining = (vs, vns);
        timer.overrun = overrun as i32;
    }
    Ok(timers)
}

/// The same as listed: none is armed.
pub fn seen(listed: &[proc::timers::PosixTimer]) -> Vec<PosixTimer> {
    let timer = |timer: &proc::timers::PosixTimer| {
        let (notify, thread) = match timer.notify {
            Notify::Signal | Notify::LibraryThread => (libc::SIGEV_SIGNAL, None),
            Notify::Thread(tid) => (libc::SIGEV_THREAD_ID, Some(tid.raw())),
            Notify::None => (libc::SIGEV_NONE, None),
        };
        PosixTimer {
            id: timer.id,
            clock: timer.clock,
            notify,
            signal: timer.signal,
            value: timer.sigval,
            thread,
            interval: (0, 0),
            remaining: (0, 0),
            overrun: 0,
        }
    };
    listed.iter().map(timer).collect()
}

impl PosixTimer {
    /// Whether that pending signal is its own, which the restored timer sends again: it is queued at most once,
    /// discarded when the timer is set, and counts overruns until it is taken. A CPU-time timer might not fire before
    /// the program runs.
    pub fn sends_again(&self, info: &Pending) -> bool {
        info.timer() == Some(self.id) && info.signal() == self.signal && self.clock >= 0
    }

    /// Whether its signal is pending, for its process or a thread.
    fn waits(&self, process: &Process) -> bool {
        let of_threads = process.threads.iter().flat_map(|t| &t.pending);
        let mut all = process.pending.iter().chain(of_threads);
        all.any(|info| self.sends_again(info))
    }
}

/// The owner of the CPU time of a clock (`CPUCLOCK_PID`, linux/posix-timers.h).
#[derive(Clone, Copy, PartialEq, Eq)]
enum CpuTime {
    /// The creator of the timer.
    Own,
    Thread(i32),
    Process(i32),
}

impl CpuTime {
    fn of(clock: i32) -> Option<Self> {
        let id = !(clock >> 3);
        (clock < 0).then_some(match (id, clock & PER_THREAD != 0) {
            (0, _) => Self::Own,
            (tid, true) => Self::Thread(tid),
            (pid, false) => Self::Process(pid),
        })
    }
}

/// `CPUCLOCK_PERTHREAD_MASK`.
const PER_THREAD: i32 = 4;

/// The same kind of clock for the CPU time of that thread, 0 for the calling one.
fn of_thread(clock: i32, tid: i32) -> i32 {
    !tid << 3 | PER_THREAD | clock & 3
}

/// Refuses a timer of the CPU time of a process outside the job.
pub fn judge(
    source: &Source,
    of_the_job: &dyn Fn(Pid) -> bool,
    collector: &mut Collector,
) -> Result<()> {
    for timer in proc::timers::read_timers(source.dir.clone())? {
        let Some(CpuTime::Process(pid)) = CpuTime::of(timer.clock) else {
            continue;
        };
        let pid = Pid(pid);
        let alive = || proc::status::read_status(pid).is_ok_and(|s| !s.state.has_ended());
        if !of_the_job(pid) && alive() {
            collector.findings.obstacles.push(Obstacle::new(
                source.title(),
                format!(
                    "has a POSIX timer (id {}) of the CPU time of {}, which is not part of the job",
                    timer.id,
                    crate::outsiders::process_name(pid)
                ),
                "let the program delete it",
            ));
        }
    }
    Ok(())
}

/// Starts the interval timers.
pub fn rebuild_interval(process: &Process, plan: &mut Builder) {
    for (which, timer) in process.interval_timers.0.iter().enumerate() {
        let object = || format!("interval timer {which}");
        let set = |timer: [i64; 4], plan: &mut Builder| {
            let at = plan.data(&timer.map(i64::to_le_bytes).concat());
            plan.syscall(libc::SYS_setitimer, &[which as u64, at, 0], object);
        };
        let [seconds, micros, value_s, value_us] = *timer;
        if (value_s, value_us) != (0, 0) {
            set(*timer, plan);
        } else if (seconds, micros) != (0, 0) {
            // Only ITIMER_REAL can have an interval and be stopped: it has expired, and restarts when its signal is
            // taken (`dequeue_signal`, kernel/signal.c).
            set([seconds, micros, 0, 1], plan);
            if !process.pending.iter().any(|p| p.signal() == libc::SIGALRM) {
                forget_alarm(process, plan);
            }
        }
    }
}

/// A dropped SIGALRM restarts no timer. Setting its action to ignore drops it.
fn forget_alarm(process: &Process, plan: &mut Builder) {
    let object = || "interval timer 0".to_owned();
    let moment = plan.data(&[0, 1_000_000u64].map(u64::to_le_bytes).concat());
    plan.syscall(libc::SYS_nanosleep, &[moment, 0], object);
    let signal = libc::SIGALRM as u32;
    let own = process.actions.iter().find(|a| a.signal == signal);
    let ignored = Action {
        signal,
        handler: libc::SIG_IGN as u64,
        ..Action::default()
    };
    let own = own.copied().unwrap_or(Action {
        signal,
        ..Action::default()
    });
    signals::rebuild_actions(&[ignored, own], plan);
}

/// A larger gap of ids is not made by creating and deleting timers.
const MAX_GAP: i32 = 10_000;

/// Creates the POSIX timers with their ids. In a new process the kernel counts ids up from 0, so gaps are filled with
/// temporary timers; each id is checked.
pub fn create_posix(
    process: &Process,
    snapshot: &Snapshot,
    plan: &mut Builder,
) -> Result<(), Obstacle> {
    let mut next = 0;
    for timer in &process.posix_timers {
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
        create(timer, process, snapshot, plan);
        // The id is in memory: timer_getoverrun of the required id fails with EINVAL if the kernel assigned another
        // one.
        // EINVAL if the kernel gave another.
        plan.syscall(libc::SYS_timer_getoverrun, &[timer.id as u64], object);
        next += 1;
    }
    Ok(())
}

/// A timer that notifies a thread that has ended, or measures the CPU time of an ended task, is created by a
/// temporary thread: the kernel keeps it, it notifies no thread, and in the second case it cannot be set any more.
fn create(timer: &PosixTimer, process: &Process, snapshot: &Snapshot, plan: &mut Builder) {
    /// Offset of the thread in `struct sigevent`.
    const THREAD_AT: u64 = 16;
    let object = format!("POSIX timer {}", timer.id);
    let has = |tid: i32| process.threads.iter().any(|t| t.tid == tid);
    let lives = |pid: i32| snapshot.processes.iter().any(|p| p.pid == pid);
    let notified_gone = timer.thread.filter(|tid| !has(*tid));
    let (mut clock, mut measured_gone) = (timer.clock, None);
    match (CpuTime::of(clock), timer.thread) {
        // Its creator is unknown; a timer of a thread's own CPU time normally notifies that thread.
        (Some(CpuTime::Own), Some(tid)) if clock & PER_THREAD != 0 => {
            // The leader creates them all.
            if tid != process.pid {
                clock = of_thread(clock, tid);
            }
            measured_gone = notified_gone;
        }
        (Some(CpuTime::Thread(tid)), _) => measured_gone = Some(tid).filter(|tid| !has(*tid)),
        (Some(CpuTime::Process(pid)), _) => measured_gone = Some(pid).filter(|pid| !lives(*pid)),
        _ => {}
    }
    let gone = notified_gone.or(measured_gone);
    let passing = gone.map(|id| free_id(id, snapshot));
    let chosen = plan.host().pid_method == PidMethod::SetTid;
    let thread = match (notified_gone, passing) {
        (Some(_), Some(id)) => id,
        _ => timer.thread.unwrap_or(0),
    };
    if let (Some(_), Some(id)) = (measured_gone, passing) {
        clock = of_thread(clock, if chosen { id } else { 0 });
    }
    let event = plan.data(&sigevent(timer.notify, timer.signal, timer.value, thread));
    let out = plan.reserve(8);
    let create = |plan: &mut Builder| {
        let args = [clock as u64, event, out];
        plan.syscall(libc::SYS_timer_create, &args, || object.clone());
    };
    let Some(id) = passing else {
        return create(plan);
    };
    let id_at = match notified_gone {
        Some(_) => event + THREAD_AT,
        None => plan.reserve(4),
    };
    plan.passing_thread((id, id_at), &object, create);
}

/// That id if it can be assigned, otherwise another one.
fn free_id(id: i32, snapshot: &Snapshot) -> i32 {
    let mut ids: Vec<i32> = snapshot.zombies.iter().map(|z| z.pid).collect();
    let threads = snapshot.processes.iter().flat_map(|p| &p.threads);
    ids.extend(threads.map(|t| t.tid));
    let highest = std::fs::read_to_string("/proc/sys/kernel/pid_max");
    let highest: i32 = highest.map_or(32768, |text| text.trim().parse().unwrap_or(32768));
    let free = |id: &i32| {
        *id < highest && !ids.contains(id) && !Path::new(&format!("/proc/{id}")).exists()
    };
    let above = ids.iter().max().map_or(300, |id| id + 1);
    std::iter::once(id)
        .chain(above..highest)
        .chain(300..above)
        .find(free)
        .unwrap_or(id)
}

fn sigevent(notify: i32, signal: i32, value: u64, thread: i32) -> Vec<u8> {
    let mut bytes = vec![0; 64];
    bytes[0..8].copy_from_slice(&value.to_le_bytes());
    bytes[8..12].copy_from_slice(&signal.to_le_bytes());
    bytes[12..16].copy_from_slice(&notify.to_le_bytes());
    bytes[16..20].copy_from_slice(&thread.to_le_bytes());
    bytes
}

/// Starts the POSIX timers; one whose signal is pending fires at once.
pub fn start_posix(process: &Process, plan: &mut Builder) {
    for timer in &process.posix_timers {
        let remaining = match timer.waits(process) {
            true => (0, 1),
            false => timer.remaining,
        };
        if remaining == (0, 0) {
            continue;
        }
        let words = [timer.interval.0, timer.interval.1, remaining.0, remaining.1];
        let at = plan.data(&words.map(i64::to_le_bytes).concat());
        let object = || format!("POSIX timer {}", timer.id);
        plan.syscall(
            libc::SYS_timer_settime,
            &[timer.id as u64, 0, at, 0],
            object,
        );
    }
}

/// Whether a timer of which so many seconds remain, or that repeats, is armed for as long as a rehearsal takes. One that is due before
/// may fire meanwhile, once or again and again.
pub fn goes_on(remaining: i64, repeats: bool) -> bool {
    /// Longer than a rehearsal takes, in seconds.
    const LONG: i64 = 3600;
    remaining > LONG || repeats
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_of_cpu_time_name_their_task() {
        // CLOCK_PROCESS_CPUTIME_ID and CLOCK_THREAD_CPUTIME_ID as the kernel shows them.
        assert!(CpuTime::of(-6) == Some(CpuTime::Own));
        assert!(CpuTime::of(-2) == Some(CpuTime::Own));
        assert!(CpuTime::of(of_thread(-2, 77)) == Some(CpuTime::Thread(77)));
        assert!(CpuTime::of(!77 << 3 | 2) == Some(CpuTime::Process(77)));
        assert!(CpuTime::of(libc::CLOCK_MONOTONIC).is_none());
        assert_eq!(of_thread(!77 << 3 | 2, 0), -2);
    }
}
