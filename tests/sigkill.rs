//! `ckpt attach` killed at random moments, and its target killed under it.
//!
//! `CKPT_KILLS` is how often (300), `CKPT_SEED` repeats a run.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::common::fixture::start_in;
use crate::common::job::appended;
use crate::common::look::{all_stopped, await_let_go};
use crate::common::tool::{CKPT, leftovers};
use crate::common::{Case, Ended, Fixture, Job, Looks, attach, ckpt, isolated, restored, until};
use nix::sys::signal::Signal;

/// Marsaglia's xorshift.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new() -> Self {
        let seed = std::env::var("CKPT_SEED")
            .ok()
            .and_then(|text| text.parse().ok());
        let seed = seed.unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.map_or(1, |now| now.as_nanos() as u64 | 1)
        });
        eprintln!("CKPT_SEED={seed}");
        Random(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 11
    }

    /// A moment between nothing and `most`.
    pub(crate) fn moment(&mut self, most: Duration) -> Duration {
        most.mul_f64(self.next() as f64 / (1u64 << 53) as f64)
    }

    /// A number below `most`.
    pub(crate) fn below(&mut self, most: usize) -> usize {
        (self.next() % most as u64) as usize
    }
}

fn times(most: u32) -> u32 {
    let wish = std::env::var("CKPT_KILLS")
        .ok()
        .and_then(|text| text.parse().ok());
    wish.unwrap_or(300).min(most)
}

/// `ckpt attach` in the background, its messages in `attach.log`.
fn begin(case: &Case, pid: i32, image: &str) -> Job {
    let log = case.path("attach.log");
    let mut command = Command::new(CKPT);
    command
        .args(["attach", &pid.to_string(), "-q", "-o", image])
        .current_dir(case.dir());
    command.stdout(appended(&log)).stderr(appended(&log));
    Job::of(command.spawn().expect("it was built").id() as i32)
}

/// How long an attach takes: the longest of a few.
fn duration(case: &Case, pid: i32) -> Duration {
    let measure = |_| {
        let begun = Instant::now();
        attach(case, pid, "job.ckpt", &[]);
        begun.elapsed()
    };
    (0..5).map(measure).max().expect("there are five")
}

/// Lets time pass: a wait for a random moment is what these tests are about.
pub(crate) fn pass(time: Duration) {
    /// By which a sleep may be too long.
    const LATE: Duration = Duration::from_micros(500);
    let begun = Instant::now();
    std::thread::sleep(time.saturating_sub(LATE));
    while begun.elapsed() < time {
        std::hint::spin_loop();
    }
}

#[test]
fn killed_at_any_moment() {
    isolated("killed_at_any_moment", |case| {
        let mut command = Command::new(case.fixtures().join("sleepers"));
        // There is an instant between the stop of a task and the look at what it was doing.
        command.env("SLEEPERS_STOPPABLE", "1");
        killed(case, start_in(case, "sleepers", "run", command), u32::MAX);
    });
}

#[test]
fn killed_at_any_moment_of_a_tree() {
    isolated("killed_at_any_moment_of_a_tree", |case| {
        let command = Command::new(case.fixtures().join("tree_pipe"));
        killed(case, start_in(case, "tree_pipe", "run", command), 100);
    });
}

#[test]
fn killed_at_any_moment_of_shared_memory() {
    isolated("killed_at_any_moment_of_shared_memory", |case| {
        let command = Command::new(case.fixtures().join("tree_vm_threads"));
        let target = start_in(case, "tree_vm_threads", "run", command);
        killed(case, target, 100);
    });
}

#[test]
fn killed_at_any_moment_of_aio() {
    isolated("killed_at_any_moment_of_aio", |case| {
        let command = Command::new(case.fixtures().join("aio_ring"));
        killed(case, start_in(case, "aio_ring", "run", command), 100);
    });
}

/// A thread waits for an event, and must not get one of ours when all tasks are let go in the middle
/// of a batch. The memory in which it was held back then stays mapped.
#[test]
fn killed_at_any_moment_of_aio_with_threads() {
    isolated("killed_at_any_moment_of_aio_with_threads", |case| {
        let mut command = Command::new(case.fixtures().join("aio"));
        command.env("AIO_STOPPABLE", "1");
        let target = start_in(case, "aio", "run", command);
        killed_except(case, target, 150, &["maps", "status VmSize"]);
    });
}

/// SIGTRAP and the like are blocked, wait, and have actions: no trap of ours may come then, which would reset them.
#[test]
fn killed_at_any_moment_of_blocked_traps() {
    isolated("killed_at_any_moment_of_blocked_traps", |case| {
        let command = Command::new(case.fixtures().join("sigpending_sync"));
        let target = start_in(case, "sigpending_sync", "run", command);
        killed(case, target, 50);
    });
}

/// A cookie that is taken back belongs to a thread that waits for it, and must not get there.
#[test]
fn killed_at_any_moment_of_notices() {
    isolated("killed_at_any_moment_of_notices", |case| {
        let command = Command::new(case.fixtures().join("mq_notify"));
        let target = start_in(case, "mq_notify", "run", command);
        killed_except(case, target, 100, &["maps", "status VmSize"]);
    });
}

/// No task walks home while the job is stopped: it is the next attach that meets them in the cave of one that was
/// killed, and it is killed as well.
#[test]
fn killed_at_any_moment_of_a_stopped_job() {
    isolated("killed_at_any_moment_of_a_stopped_job", |case| {
        let mut command = Command::new(case.fixtures().join("sleepers"));
        command.env("SLEEPERS_STOPPABLE", "1");
        let target = start_in(case, "sleepers", "run", command);
        let longest = duration(case, target.pid());
        target.job.signal(Signal::SIGSTOP);
        let stopped = || {
            until("it to be stopped", || {
                all_stopped(target.pid()).then_some(())
            })
        };
        stopped();
        let before = Looks::at(target.pid());
        let mut random = Random::new();
        for _ in 0..times(200) {
            let tool = begin(case, target.pid(), "job.ckpt");
            pass(random.moment(longest));
            tool.kill();
            stopped();
        }
        attach(case, target.pid(), "job.ckpt", &["-q"]);
        stopped();
        before.assert_same(target.pid(), &[]);
        target.job.signal(Signal::SIGCONT);
        target.passes();
    });
}

pub(crate) fn is_stopped(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ")
        .next()
        .is_some_and(|rest| rest.starts_with('T'))
}

/// A signal comes while a thread stands in the cave and its tracer dies: its handler will return into the cave. The
/// next attach, and a restore of its image, come before it does.
#[test]
fn killed_while_a_handler_is_at_work() {
    isolated("killed_while_a_handler_is_at_work", |case| {
        for (step, restore) in [
            ("cave-entered", false),
            ("remote-call", false),
            ("cave-leaving", false),
            ("remote-call", true),
        ] {
            let place = format!("{step}-{restore}");
            let command = Command::new(case.fixtures().join("handler_slow"));
            let mut target = start_in(case, "handler_slow", &place, command);
            killed_at(case, &target, step, Signal::SIGUSR1);
            until("the handler to be at work", || {
                target.path("entered").exists().then_some(())
            });
            attach(case, target.pid(), "job.ckpt", &[]);
            attach(case, target.pid(), "job.ckpt", &[]);
            if restore {
                let image = target.killed_into(case, "job.ckpt");
                target.continued_by(restored(case, &image, &[]));
            }
            std::fs::write(target.path("leave"), "").expect("the test's directory is writable");
            target.passes();
        }
    });
}

/// Takes an attach to that step, sends the target a signal, and kills the attach.
fn killed_at(case: &Case, target: &Fixture, step: &str, signal: Signal) {
    let reached = case.path("reached");
    let mut command = Command::new(CKPT);
    command
        .args(["attach", &target.pid().to_string(), "-q", "-o", "job.ckpt"])
        .env("CKPT_FAULT", format!("{step}:wait={}", reached.display()))
        .current_dir(case.dir());
    let tool = Job::of(command.spawn().expect("it was built").id() as i32);
    until(step, || {
        (reached.exists() && is_stopped(tool.pid)).then_some(())
    });
    target.job.signal(signal);
    assert_eq!(tool.kill(), Ended::Killed(9));
    await_let_go(&target.job);
    std::fs::remove_file(reached).expect("it is there");
}

fn killed(case: &Case, target: Fixture, most: u32) {
    killed_except(case, target, most, &[]);
}

fn killed_except(case: &Case, mut target: Fixture, most: u32, looks: &[&str]) {
    let mut random = Random::new();
    let longest = duration(case, target.pid());
    let before = Looks::at(target.pid());
    let mut early = 0;
    for number in 0..times(most) {
        let _ = std::fs::remove_file(case.path("job.ckpt"));
        let tool = begin(case, target.pid(), "job.ckpt");
        pass(random.moment(longest.mul_f64(1.1)));
        let whole = tool.kill() == Ended::Exited(0);
        early += u32::from(!whole);
        if let Some(ended) = target.job.ended() {
            panic!("the target {ended:?} after kill {number}, ckpt ended itself: {whole}");
        }
        await_let_go(&target.job);
        before.assert_same(target.pid(), looks);
        if case.path("job.ckpt").exists() {
            ckpt(case, ["verify", "-q", "job.ckpt"]).ok();
        } else {
            assert!(!whole, "an exit code of 0 without an image");
        }
        // What was killed leaves a temporary file, which the next attach sweeps away; a child that it
        // had forked in that instant may hold it still.
        until("the leavings to be swept away", || {
            attach(case, target.pid(), "job.ckpt", &["-q"]);
            (leftovers(case.dir()) == ["job.ckpt"]).then_some(())
        });
    }
    eprintln!("{early} attaches were killed before their end");
    target.passes();
}

#[test]
fn target_killed_at_any_moment() {
    isolated("target_killed_at_any_moment", |case| {
        let mut random = Random::new();
        let mut longest = None;
        for number in 0..times(50) {
            let place = format!("run{number}");
            let command = Command::new(case.fixtures().join("sleepers"));
            let mut target = start_in(case, "sleepers", &place, command);
            let longest = *longest.get_or_insert_with(|| duration(case, target.pid()));
            let _ = std::fs::remove_file(case.path("job.ckpt"));
            let _ = std::fs::remove_file(case.path("attach.log"));
            let tool = begin(case, target.pid(), "job.ckpt");
            pass(random.moment(longest));
            target.job.signal(Signal::SIGKILL);
            let code = tool.wait();
            let ended = until("the target's end", || target.job.ended());
            assert_eq!(ended, Ended::Killed(9));
            let said = std::fs::read_to_string(case.path("attach.log")).unwrap_or_default();
            match code {
                Ended::Exited(0) => {
                    assert_eq!(leftovers(case.dir()), ["job.ckpt"]);
                    ckpt(case, ["verify", "-q", "job.ckpt"]).ok();
                }
                Ended::Exited(1) => {
                    assert!(
                        leftovers(case.dir()).is_empty(),
                        "{:?}",
                        leftovers(case.dir())
                    );
                    assert!(said.starts_with("ckpt: "), "{said}");
                    assert_eq!(said.lines().count(), 1, "{said}");
                    assert!(!said.contains("panicked"), "{said}");
                }
                other => panic!("ckpt {other:?} after kill {number}: {said}"),
            }
        }
    });
}
