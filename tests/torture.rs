//! The tool is killed, stopped, told to end, and made to fail or die at every step, while it takes checkpoints of targets that
//! judge themselves, and while it restores them: no target is harmed, and of a restore that did not succeed nothing is left.
//!
//! `CKPT_TORTURE_SECONDS` is for how long in all (60); `CKPT_TORTURE_KILLS` is instead how often the tool is killed in an attach of
//! each target, and how often in a restore. `CKPT_SEED` repeats a run as far as the machine allows, and figures are appended to
//! the file `CKPT_TORTURE_FIGURES` (docs/reliability.md).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use ckpt_tracer::fault::Step;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, waitpid};

use crate::common::fixture::start_in;
use crate::common::job::{appended, spawn, start};
use crate::common::look::{assert_no_process_left, numbers, states, status_field};
use crate::common::rounds::gone;
use crate::common::tool::{CKPT, source};
use crate::common::{
    Case, Ended, Fixture, Job, attach, holds_for, isolated, restore_cmd, restored, run, until,
};
use crate::sigkill::{Random, pass};

/// What has the twelve targets.
const TARGETS: u32 = 12;
/// Attaches that are harmed in one life of a target, at most.
const A_LIFE: u32 = 24;
/// Restores of one image that are harmed in a row, at most.
const IN_A_ROW: u32 = 12;

/// What is done to the tool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Harm {
    /// SIGKILL at a random moment.
    Killed,
    /// SIGSTOP at a random moment, then SIGCONT.
    Stopped,
    /// SIGTERM at a random moment.
    Ended,
    /// An error at a step.
    Fails(Step),
    /// SIGKILL at a step.
    Dies(Step),
}

impl Harm {
    fn name(self) -> &'static str {
        match self {
            Harm::Killed => "kill -9",
            Harm::Stopped => "SIGSTOP",
            Harm::Ended => "SIGTERM",
            Harm::Fails(_) => "error at a step",
            Harm::Dies(_) => "kill -9 at a step",
        }
    }
}

/// Steps of a restore and of an attach; the rest belongs to what is not done here.
fn steps(of_restore: bool) -> Vec<Step> {
    let elsewhere = [
        Step::Check,
        Step::RehearseMask,
        Step::RehearsePage,
        Step::Lending,
    ];
    let all = Step::ALL.iter().copied();
    all.filter(|s| !elsewhere.contains(s) && s.name().starts_with("restore-") == of_restore)
        .collect()
}

/// A target at work.
struct Target {
    job: Job,
    /// Lets it finish, and demands that it is content.
    judge: Box<dyn FnOnce(Job)>,
}

/// When a target has seen enough.
enum Enough {
    At(Instant),
    /// After so many kills of attach, and of restore.
    Kills(u32),
}

impl Enough {
    fn asked() -> Self {
        let number = |name: &str| std::env::var(name).ok()?.parse().ok();
        match number("CKPT_TORTURE_KILLS") {
            Some(kills) => Enough::Kills(kills),
            None => {
                let seconds = number("CKPT_TORTURE_SECONDS").unwrap_or(60);
                Enough::At(Instant::now() + Duration::from_secs(seconds.into()) / TARGETS)
            }
        }
    }
}

struct Torture<'a> {
    case: &'a Case,
    random: Random,
    enough: Enough,
    /// How long an attach takes, and a restore.
    longest: [Duration; 2],
    /// How many of them were killed.
    kills: [u32; 2],
    figures: BTreeMap<String, u32>,
}

fn torture(case: &Case, name: &str, begin: &dyn Fn(&str) -> Target) {
    let mut torture = Torture {
        case,
        random: Random::new(),
        enough: Enough::asked(),
        longest: [Duration::from_millis(50); 2],
        kills: [0; 2],
        figures: BTreeMap::new(),
    };
    let mut life = 0;
    while life == 0 || !torture.is_enough() {
        let mut target = begin(&format!("life{life}"));
        life += 1;
        for number in 1..=A_LIFE {
            torture.attach(&mut target.job);
            // The first one tells how long it takes.
            if number == 1 {
                torture.restore(&mut target.job, 0);
            } else if torture.kills[1] < torture.kills[0] {
                torture.restore(&mut target.job, IN_A_ROW);
            }
            if torture.is_enough() {
                break;
            }
        }
        (target.judge)(target.job);
    }
    torture.figures.insert("lives".into(), life);
    torture.tell(name);
}

impl Torture<'_> {
    fn is_enough(&self) -> bool {
        match self.enough {
            Enough::At(moment) => Instant::now() >= moment,
            Enough::Kills(kills) => self.kills.iter().all(|killed| *killed >= kills),
        }
    }

    fn count(&mut self, what: &str) {
        *self.figures.entry(what.into()).or_default() += 1;
    }

    fn tell(&self, name: &str) {
        let mut text = format!("{name}:");
        for (what, number) in &self.figures {
            let _ = write!(text, " {what} {number};");
        }
        eprintln!("{text}");
        if let Some(path) = std::env::var_os("CKPT_TORTURE_FIGURES") {
            let file = File::options().create(true).append(true).open(path);
            writeln!(file.expect("it can be written"), "{text}").expect("it can be written");
        }
    }

    fn harm(&mut self, of_restore: bool) -> Harm {
        let steps = steps(of_restore);
        let step = steps[self.random.below(steps.len())];
        match self.random.below(12) {
            0..=5 => Harm::Killed,
            6 => Harm::Stopped,
            7 => Harm::Ended,
            8 => Harm::Fails(step),
            _ => Harm::Dies(step),
        }
    }

    /// Runs the tool and does it harm; how it ended.
    fn inflict(&mut self, harm: Harm, command: Command, of_restore: bool) -> Ended {
        let (ended, late) = self.run(harm, command, self.longest[usize::from(of_restore)]);
        let what = ["attach", "restore"][usize::from(of_restore)];
        self.count(&format!("{what}, {}", harm.name()));
        if late {
            self.count(&format!("{what}, {}, too late", harm.name()));
        }
        self.kills[usize::from(of_restore)] += u32::from(ended == Ended::Killed(9));
        ended
    }

    /// How it ended, and whether it had ended before it was harmed.
    fn run(&mut self, harm: Harm, mut command: Command, longest: Duration) -> (Ended, bool) {
        let log = self.case.path("tool.log");
        command.current_dir(self.case.dir());
        command.stdout(appended(&log)).stderr(appended(&log));
        match harm {
            Harm::Fails(step) => drop(command.env("CKPT_FAULT", step.name())),
            Harm::Dies(step) => drop(command.env("CKPT_FAULT", format!("{step}:kill"))),
            _ => {}
        }
        let mut tool = spawn(&mut command);
        if let Harm::Fails(_) | Harm::Dies(_) = harm {
            let ended = tool.wait();
            // The step did not come.
            return (ended, ended == Ended::Exited(0));
        }
        pass(self.random.moment(longest.mul_f64(1.1)));
        if let Some(ended) = tool.ended() {
            return (ended, true);
        }
        match harm {
            Harm::Killed => {
                let ended = tool.kill();
                return (ended, ended != Ended::Killed(9));
            }
            Harm::Stopped => {
                tool.signal(Signal::SIGSTOP);
                pass(Duration::from_millis(2));
                tool.signal(Signal::SIGCONT);
            }
            _ => tool.signal(Signal::SIGTERM),
        }
        (tool.wait(), false)
    }

    /// One attach is disturbed, the next one is not.
    fn attach(&mut self, job: &mut Job) {
        let harm = self.harm(false);
        let mut command = Command::new(CKPT);
        command.args(["attach", &job.pid.to_string(), "-q", "-o", "job.ckpt"]);
        let ended = self.inflict(harm, command, false);
        let expected = match harm {
            Harm::Killed | Harm::Dies(_) => [Ended::Killed(9), Ended::Exited(0)],
            Harm::Stopped => [Ended::Exited(0); 2],
            Harm::Ended => [Ended::Killed(15), Ended::Exited(0)],
            Harm::Fails(_) => [Ended::Exited(1), Ended::Exited(0)],
        };
        assert!(
            expected.contains(&ended),
            "{harm:?}: {ended:?}: {}",
            self.said()
        );
        assert_eq!(job.ended(), None, "{harm:?} harmed the target");
        nobody_is_held();
        let begun = Instant::now();
        attach(self.case, job.pid, "job.ckpt", &["-q"]);
        self.longest[0] = begun.elapsed();
        assert_eq!(
            job.ended(),
            None,
            "an attach after {harm:?} harmed the target"
        );
        self.count("attach, undisturbed");
    }

    /// It is killed, and so many restores at most are disturbed until one has succeeded.
    fn restore(&mut self, job: &mut Job, most: u32) {
        let pid = job.pid;
        let program = fs::read_link(format!("/proc/{pid}/exe")).expect("it lives");
        let (image, _) = attach(self.case, pid, "kept.ckpt", &["-q", "--kill"]);
        let ended = gone(job);
        assert!(
            matches!(ended, Ended::Killed(9) | Ended::Exited(137)),
            "{ended:?}"
        );
        for _ in 0..most {
            let harm = self.harm(true);
            let mut command = restore_cmd(&image, &["-q"]);
            command.arg("--detach");
            let ended = self.inflict(harm, command, true);
            let whole = ended == Ended::Exited(0);
            let alive = settled(pid, &program, whole);
            assert!(
                alive || !whole,
                "{harm:?}: nobody is there after success: {}",
                self.said()
            );
            assert!(
                whole || harm != Harm::Stopped,
                "{harm:?}: {ended:?}: {}",
                self.said()
            );
            if alive {
                *job = Job::of(pid);
                return;
            }
            assert_no_process_left();
        }
        let begun = Instant::now();
        *job = restored(self.case, &image, &["-q"]);
        self.longest[1] = begun.elapsed();
        self.count("restore, undisturbed");
    }

    fn said(&self) -> String {
        fs::read_to_string(self.case.path("tool.log")).unwrap_or_default()
    }
}

/// Waits until no task is traced or stopped.
fn nobody_is_held() {
    until("everybody to be let go", || {
        let mut others = numbers("/proc").into_iter().filter(|pid| *pid != 1);
        let held = others.any(|pid| {
            let traced = status_field(pid, "TracerPid").is_some_and(|tracer| tracer != "0");
            traced || states(pid).iter().any(|(_, state)| "tT".contains(*state))
        });
        (!held).then_some(())
    });
}

/// Waits until either no process exists, or the job, which is not about to be killed. Before it executes its program it is
/// a child of `restore`, which ends by itself. `whole` is whether `restore` has said that the job runs.
fn settled(pid: i32, program: &Path, whole: bool) -> bool {
    const KILL: u64 = 1 << 8;
    let dies = |pid: i32| {
        let pending = ["SigPnd", "ShdPnd"].map(|key| status_field(pid, key));
        let words = pending.iter().flatten();
        let mut sets = words.filter_map(|word| u64::from_str_radix(word.trim(), 16).ok());
        sets.any(|set| set & KILL != 0)
    };
    let lives = |pid: i32| {
        let now = states(pid);
        let born = fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program);
        born && !now.is_empty() && now.iter().all(|(_, state)| !"tZX".contains(*state))
    };
    // What is killed is woken.
    let sleeps = |pid: &i32| states(*pid).iter().all(|(_, state)| *state == 'S');
    let found = until("nobody, or the whole job", || {
        let _ = waitpid(None, Some(WaitPidFlag::WNOHANG));
        let others: Vec<i32> = numbers("/proc")
            .into_iter()
            .filter(|pid| *pid != 1)
            .collect();
        if others.is_empty() {
            return Some(None);
        }
        let traced = |pid: i32| status_field(pid, "TracerPid").is_some_and(|t| t != "0");
        let free = others.iter().all(|pid| !traced(*pid) && !dies(*pid));
        let alive = free && others.contains(&pid) && lives(pid);
        alive.then(|| Some(whole || others.iter().all(sleeps)))
    });
    // One that has just taken a SIGKILL shows nothing of it until it is a zombie.
    found.is_some_and(|certain| certain || holds_for(Duration::from_millis(300), || lives(pid)))
}

fn of_fixture(case: &Case, name: &'static str, place: &str) -> Target {
    let mut command = Command::new(case.fixtures().join(name));
    command.env("SLEEPERS_STOPPABLE", "1");
    let fixture = start_in(case, name, place, command);
    let dir = case.path(place);
    let Fixture { job, .. } = fixture;
    let judge = move |mut job: Job| {
        fs::write(dir.join("go"), "").expect("the test's directory is writable");
        let ended = until("the verdict", || job.ended());
        let verdict = fs::read_to_string(dir.join("verdict")).unwrap_or_default();
        assert_eq!(verdict.trim(), "PASS", "and {ended:?}");
        assert_eq!(ended, Ended::Exited(0));
    };
    Target {
        job,
        judge: Box::new(judge),
    }
}

/// A program that works in rounds (`tests/programs/README.md`).
fn of_program(case: &Case, program: &dyn Fn() -> Command, place: &str, result: &str) -> Target {
    let (dir, result) = (case.path(place), result.to_owned());
    fs::create_dir(&dir).expect("the test's directory is writable");
    let mut command = program();
    command.arg(&dir).current_dir(case.dir());
    let job = start(&mut command, &case.path("program.log"));
    until("its first round", || {
        dir.join("progress").exists().then_some(())
    });
    let judge = move |mut job: Job| {
        fs::write(dir.join("finish"), "").expect("the test's directory is writable");
        assert_eq!(until("its end", || job.ended()), Ended::Exited(0));
        let now = fs::read_to_string(dir.join("result")).expect("it has a result");
        assert_eq!(now, result);
    };
    Target {
        job,
        judge: Box::new(judge),
    }
}

fn programs(case: &Case, name: &str, program: &dyn Fn() -> Command) {
    let dir = case.path("undisturbed");
    fs::create_dir(&dir).expect("the test's directory is writable");
    fs::write(dir.join("finish"), "").expect("the test's directory is writable");
    run(case, program().arg(&dir)).ok();
    let result = fs::read_to_string(dir.join("result")).expect("it has a result");
    torture(case, name, &|place| {
        of_program(case, program, place, &result)
    });
}

macro_rules! fixtures {
    ($($test:ident = $fixture:literal)*) => {
        $(#[test]
        fn $test() {
            isolated(stringify!($test), |case| {
                torture(case, stringify!($test), &|place| of_fixture(case, $fixture, place));
            });
        })*
    };
}

fixtures! {
    threads = "sleepers"
    queued_signals = "signal_sequence"
    timers = "timers_posix"
    shared_memory = "tree_futex"
    storms = "storm"
    files_appended = "fd_appended"
    mappings_changing = "maps_changing"
}

fn interpreted(case: &Case, name: &str, interpreter: &str, file: &str) {
    case.needs_program(interpreter, interpreter);
    programs(case, name, &|| {
        let mut command = Command::new(interpreter);
        command.arg(source(file));
        command
    });
}

#[test]
fn go() {
    isolated("go", |case| {
        let program = crate::programs::pool(case);
        programs(case, "go", &|| Command::new(&program));
    });
}

#[test]
fn java() {
    isolated("java", |case| {
        case.needs_program("javac", "default-jdk-headless");
        let classes = case.path("classes");
        let mut build = Command::new("javac");
        build.arg("-d").arg(&classes).arg(source("Sums.java"));
        run(case, &mut build).ok();
        let classes: &Path = &classes;
        programs(case, "java", &|| {
            let mut command = Command::new("java");
            command
                .args(["-XX:-UsePerfData", "-cp"])
                .arg(classes)
                .arg("Sums");
            command
        });
    });
}

#[test]
fn node() {
    isolated("node", |case| interpreted(case, "node", "node", "sums.js"));
}

#[test]
fn python() {
    isolated("python", |case| {
        let python = case.system_python();
        programs(case, "python", &|| {
            let mut command = Command::new(python);
            command.arg(source("threads.py"));
            command
        });
    });
}

#[test]
fn ruby() {
    isolated("ruby", |case| interpreted(case, "ruby", "ruby", "words.rb"));
}
