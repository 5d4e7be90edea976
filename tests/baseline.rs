//! A job that was started for a baseline, and its guard: what programs see that ask the processor themselves,
//! whatever happens to them, to the guard and to `ckpt run`.
//!
//! Where the processor has CPUID faulting it is the real thing; elsewhere another instruction that raises the
//! same signal stands in for CPUID (feature `faults`), and all is the same but for one arch_prctl.

use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::common::fixture::killed;
use crate::common::job::spawn;
use crate::common::look::{children, status_field};
use crate::common::tool::{CKPT, RESTORE, source};
use crate::common::{
    Case, Ended, Job, attach, ckpt, holds_for, isolated, isolated_as_user, restore_cmd, restored,
    run, start, until,
};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// The program that asks, and the environment in which it is answered.
struct Asks {
    program: PathBuf,
    stands_in: bool,
}

impl Asks {
    fn built(case: &Case) -> Self {
        let stands_in = !ckpt::guard::Guard::is_possible();
        let program = case.path("asks");
        match std::env::var_os("CKPT_TEST_ASKS") {
            Some(ready) => drop(fs::copy(ready, &program).expect("it is readable")),
            None => {
                let mut gcc = Command::new("gcc");
                gcc.args(["-O1", "-pthread", "-o"]).arg(&program);
                gcc.args(stands_in.then_some("-DSTAND_IN"));
                run(case, gcc.arg(source("asks.c"))).ok();
            }
        }
        Self { program, stands_in }
    }

    fn in_its_place(&self, mut command: Command) -> Command {
        if self.stands_in {
            command.env("CKPT_FAULT_CPUID", "hlt");
        }
        command
    }

    fn command(&self, options: &[&str], args: &[&str]) -> Command {
        let mut command = self.in_its_place(Command::new(CKPT));
        command.args(["run", "--cpu-baseline=x86-64-v2"]);
        command.args(options).arg("--").arg(&self.program);
        command.args(args);
        command
    }
}

/// The program in its loop.
struct Loop<'a> {
    case: &'a Case,
    asks: Asks,
    /// `ckpt run`.
    run: Job,
    /// The program.
    root: i32,
}

impl<'a> Loop<'a> {
    fn start(case: &'a Case, options: &[&str]) -> Self {
        let asks = Asks::built(case);
        let file = case.path("counts");
        let mut command = asks.command(options, &["loop", file.to_str().expect("it is text")]);
        let run = start(command.current_dir(case.dir()), &case.path("run.log"));
        let root = until("the program", || {
            let all = run.descendants();
            let named = |pid: &&i32| name(**pid).as_deref() == Some("asks");
            all.iter().find(named).copied()
        });
        until("counts", || counts(&file).filter(|c| c.rounds > 0));
        Self {
            case,
            asks,
            run,
            root,
        }
    }

    fn counts(&self) -> Counts {
        counts(&self.case.path("counts")).expect("it was made")
    }

    /// Who traces it.
    fn guard(&self) -> i32 {
        guard_of(self.root)
    }

    /// Its guard is killed, and replaced.
    fn gets_another_guard(&self) {
        let guard = self.guard();
        kill(Pid::from_raw(guard), Signal::SIGKILL).expect("it lives");
        until("another guard", || {
            let now = self.guard();
            (now != 0 && now != guard).then_some(())
        });
    }

    /// All tasks are served while all execute CPUID continuously, and none sees more than the level has.
    fn is_guarded(&self) {
        until("questions that are answered", || {
            let before = self.counts();
            let asked = || {
                let now = self.counts();
                (now.asked > before.asked + 100 && now.rounds > before.rounds + 3).then_some(now)
            };
            let now = until("questions", asked);
            (now.above == before.above).then_some(())
        });
        assert_eq!(name(self.guard()).as_deref(), Some("ckpt-guard"));
        assert_eq!(self.counts().failed, 0, "a program was ended");
    }

    /// All of the job.
    fn processes(&self) -> Vec<i32> {
        let mut all = self.run.descendants();
        all.retain(|pid| name(*pid).as_deref() != Some("ckpt-guard"));
        all
    }

    fn ends(self) {
        for pid in self.processes() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        assert_eq!(self.run.wait(), Ended::Exited(137));
        no_guard_is_left();
    }
}

#[derive(Clone, Copy, Debug)]
struct Counts {
    asked: u64,
    above: u64,
    rounds: u64,
    failed: u64,
}

fn counts(file: &Path) -> Option<Counts> {
    let bytes = fs::read(file).ok()?;
    let word = |at: usize| {
        Some(u64::from_le_bytes(
            bytes.get(at * 8..)?.first_chunk().copied()?,
        ))
    };
    Some(Counts {
        asked: word(0)?,
        above: word(1)?,
        rounds: word(2)?,
        failed: word(3)?,
    })
}

fn name(pid: i32) -> Option<String> {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(name.trim_end().to_owned())
}

fn guard_of(pid: i32) -> i32 {
    let tracer = status_field(pid, "TracerPid").unwrap_or_default();
    tracer.parse().unwrap_or(0)
}

fn guards() -> Vec<i32> {
    let all = fs::read_dir("/proc").expect("it is mounted").flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let living = |pid: &i32| status_field(*pid, "State").is_some_and(|s| !s.starts_with('Z'));
    pids.filter(|pid: &i32| name(*pid).as_deref() == Some("ckpt-guard"))
        .filter(living)
        .collect()
}

fn no_guard_is_left() {
    until("the guard's end", || guards().is_empty().then_some(()));
}

/// Orphans are reparented to us.
fn await_end_of_asking_programs() {
    until("the end of all that ask", || {
        while waitpid(None, Some(WaitPidFlag::WNOHANG)).is_ok_and(|s| s != WaitStatus::StillAlive) {
        }
        let all = fs::read_dir("/proc").expect("it is mounted").flatten();
        let mut pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let none = !pids.any(|pid: i32| name(pid).as_deref() == Some("asks"));
        none.then_some(())
    });
}

#[test]
fn cpuid_is_emulated() {
    isolated("cpuid_is_emulated", everybody);
}

#[test]
fn cpuid_is_emulated_for_a_user() {
    isolated_as_user("cpuid_is_emulated_for_a_user", everybody);
}

/// Threads, children, programs, signal handlers; faults of its own arrive as they are.
fn everybody(case: &Case) {
    let asks = Asks::built(case);
    for options in [&[][..], &["--isolated"]] {
        let out = run(case, &mut asks.command(options, &["all"]));
        assert_eq!(out.code(), 0, "{options:?} {out:#?}");
        assert!(out.stdout.ends_with("PASS\n"), "{out:#?}");
        no_guard_is_left();
    }
    // The program can tell the difference.
    let out = run(case, &mut asks.command(&["--cpuid=host"], &["all"]));
    assert_eq!(out.code(), 1, "{out:#?}");
    assert!(out.stdout.contains("FAIL in a thread"), "{out:#?}");
}

/// Registers as the program gets them, against what the processor says and the level lets through.
#[test]
fn answers_are_the_processors_but_for_what_is_above() {
    isolated("answers_are_the_processors_but_for_what_is_above", |case| {
        let asks = Asks::built(case);
        let answers = |options: &[&str]| -> Vec<Vec<u64>> {
            let out = run(case, &mut asks.command(options, &["leaves"]));
            let words = |line: &str| {
                let hex = line.split([' ', '.']).map(|w| u64::from_str_radix(w, 16));
                hex.collect::<Result<_, _>>().expect("numbers")
            };
            out.ok().lines().map(words).collect()
        };
        let (shown, raw) = (answers(&[]), answers(&["--cpuid=host"]));
        assert_eq!(shown.len(), 12);
        for (shown, raw) in shown.iter().zip(&raw) {
            let (leaf, subleaf) = (raw[0] as u32, raw[1] as u32);
            let of = |words: &[u64]| ckpt::objects::processor::Answer {
                eax: words[2] as u32,
                // The processor that is asked is one of several.
                ebx: words[3] as u32 & if leaf == 1 { 0xff_ffff } else { u32::MAX },
                ecx: words[4] as u32,
                edx: words[5] as u32,
            };
            let level = "x86-64-v2".parse().expect("it is one");
            let expected = ckpt::objects::processor::shown(level, leaf, subleaf, of(raw));
            assert_eq!(of(shown), expected, "{leaf:x} {subleaf}");
            assert!(shown.iter().all(|word| *word <= u32::MAX.into()));
        }
    });
}

#[test]
fn a_guarded_job_is_checkpointed_and_restored() {
    isolated("a_guarded_job_is_checkpointed_and_restored", checkpointed);
}

#[test]
fn a_guarded_job_is_checkpointed_and_restored_for_a_user() {
    isolated_as_user(
        "a_guarded_job_is_checkpointed_and_restored_for_a_user",
        checkpointed,
    );
}

fn checkpointed(case: &Case) {
    let mut job = Loop::start(case, &[]);
    job.is_guarded();
    let guard = job.guard();
    let pid = job.root.to_string();
    assert!(
        ckpt(case, ["check", &pid])
            .ok()
            .contains("can be checkpointed")
    );
    assert_eq!(job.guard(), guard, "a look disturbs nobody");
    for number in 0..3 {
        let (_, figures) = attach(case, job.root, format!("{number}.ckpt"), &[]);
        assert!(figures["processes"].as_u64() >= Some(2), "{figures}");
        job.is_guarded();
        assert_eq!(job.guard(), guard);
    }
    let (image, _) = attach(case, job.root, "last.ckpt", &["--kill"]);
    assert_eq!(until("the end", || job.run.ended()), Ended::Exited(137));
    no_guard_is_left();
    await_end_of_asking_programs();
    let before = job.counts().asked;
    for place in ["keep", "namespace"] {
        let mut command = job
            .asks
            .in_its_place(restore_cmd(&image, &["--pids", place]));
        let out = run(case, command.arg("--detach"));
        let root = out.ok().trim().parse().expect("it is a pid");
        assert_eq!(out.stderr, "");
        job.root = root;
        job.is_guarded();
        assert!(job.counts().asked > before);
        // From outside of its namespace as well.
        attach(case, root, "again.ckpt", &[]);
        job.is_guarded();
        attach(case, root, "end.ckpt", &["--kill"]);
        no_guard_is_left();
        await_end_of_asking_programs();
    }
}

/// In the foreground `restore` waits, and replaces a guard that is killed; the job's namespace is its own.
#[test]
fn a_restored_job_in_the_foreground_keeps_its_guard() {
    isolated("a_restored_job_in_the_foreground_keeps_its_guard", |case| {
        let mut job = Loop::start(case, &["--isolated"]);
        job.is_guarded();
        let (image, _) = attach(case, job.root, "job.ckpt", &["--kill"]);
        assert_eq!(until("the end", || job.run.ended()), Ended::Exited(137));
        no_guard_is_left();
        let mut command = job.asks.in_its_place(Command::new(RESTORE));
        let log = case.path("restore.log");
        let restore = start(
            command.args(["--pids=namespace", "--verbose"]).arg(&image),
            &log,
        );
        job.root = until("the job", || {
            let text = fs::read_to_string(&log).ok()?;
            let (_, pid) = text.split_once("running as process ")?;
            pid.lines().next()?.parse().ok()
        });
        job.run = restore;
        job.is_guarded();
        job.gets_another_guard();
        job.is_guarded();
        job.ends();
    });
}

#[test]
fn checkpoints_at_an_interval_are_taken_of_it() {
    isolated("checkpoints_at_an_interval_are_taken_of_it", |case| {
        // Long enough for some hundred questions between two checkpoints.
        let job = Loop::start(case, &["--name=job", "--interval=5s", "--keep=99"]);
        let guard = job.guard();
        let image = case.path("job.2.ckpt");
        until("the second image", || image.exists().then_some(()));
        job.is_guarded();
        assert_eq!(job.guard(), guard);
        // The guard is no part of the job.
        let shown = ckpt(case, ["inspect".as_ref(), image.as_os_str()]);
        assert!(!shown.ok().contains("ckpt-guard"), "{shown:#?}");
        let said = fs::read_to_string(case.path("run.log")).unwrap_or_default();
        assert_eq!(said, "");
        job.ends();
    });
}

#[test]
fn a_killed_guard_is_replaced() {
    isolated("a_killed_guard_is_replaced", |case| {
        let job = Loop::start(case, &[]);
        for _ in 0..3 {
            job.is_guarded();
            job.gets_another_guard();
        }
        job.is_guarded();
        job.ends();
    });
}

#[test]
fn the_guard_stays_when_ckpt_run_is_killed() {
    isolated("the_guard_stays_when_ckpt_run_is_killed", |case| {
        let mut job = Loop::start(case, &[]);
        job.is_guarded();
        let guard = job.guard();
        job.run.kill_and_forget();
        job.is_guarded();
        assert_eq!(job.guard(), guard);
        // Nor does what ends other programs end it.
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            kill(Pid::from_raw(guard), signal).expect("it lives");
        }
        job.is_guarded();
        let (image, _) = attach(case, job.root, "job.ckpt", &["--kill"]);
        no_guard_is_left();
        assert!(image.exists());
    });
}

/// `ckpt attach` is killed during a checkpoint.
#[test]
fn a_killed_checkpoint_brings_the_guard_back() {
    isolated("a_killed_checkpoint_brings_the_guard_back", |case| {
        let job = Loop::start(case, &[]);
        for step in ["frozen", "cave-entered", "state-captured", "before-rename"] {
            job.is_guarded();
            let mut command = job.asks.in_its_place(Command::new(CKPT));
            command.args(["attach", &job.root.to_string(), "-o", "x.ckpt"]);
            command.env("CKPT_FAULT", format!("{step}:kill"));
            let out = run(case, command.current_dir(case.dir()));
            assert_eq!(out.ended, Ended::Killed(9), "{step}: {out:#?}");
            job.is_guarded();
        }
        job.ends();
    });
}

#[test]
fn a_guarded_job_is_stopped_and_continued() {
    isolated("a_guarded_job_is_stopped_and_continued", |case| {
        let job = Loop::start(case, &[]);
        let state = |wanted: char| {
            until(&format!("the state {wanted}"), || {
                status_field(job.root, "State")?
                    .starts_with(wanted)
                    .then_some(())
            });
        };
        let send = |signal| kill(Pid::from_raw(job.root), signal).expect("it lives");
        let stands = || {
            let before = job.counts().rounds;
            assert!(holds_for(Duration::from_millis(200), || job
                .counts()
                .rounds
                <= before + 1));
        };
        for _ in 0..2 {
            job.is_guarded();
            send(Signal::SIGSTOP);
            // In its stop it is its tracer's.
            state('t');
            stands();
            attach(case, job.root, "stopped.ckpt", &[]);
            until("the guard", || (guard_of(job.root) != 0).then_some(()));
            stands();
            send(Signal::SIGCONT);
        }
        job.is_guarded();
        attach(case, job.root, "stop.ckpt", &["--stop"]);
        until("the guard", || (guard_of(job.root) != 0).then_some(()));
        stands();
        // It has stopped every process, also one that the root waits for.
        for pid in job.processes() {
            // One that has ended may have been waited for by one that goes on already.
            let sent = kill(Pid::from_raw(pid), Signal::SIGCONT);
            assert!(matches!(sent, Ok(()) | Err(Errno::ESRCH)), "{sent:?}");
        }
        job.is_guarded();
        job.ends();
    });
}

/// A pipe that the program closes is closed, and signals and exit codes are the program's.
#[test]
fn the_guard_holds_nothing_of_the_jobs() {
    isolated("the_guard_holds_nothing_of_the_jobs", |case| {
        let asks = Asks::built(case);
        let script = "trap 'exit 7' TERM; exec >/dev/null; echo > ready; \
                      while :; do sleep 0.02; done";
        let mut command = asks.in_its_place(Command::new(CKPT));
        command.args(["run", "--cpu-baseline=x86-64-v3", "--", "sh", "-c", script]);
        let (mut pipe, theirs) = UnixStream::pair().expect("descriptors are free");
        command.current_dir(case.dir()).stdin(Stdio::null());
        let run = spawn(command.stdout(Stdio::from(OwnedFd::from(theirs))));
        drop(command);
        let mut text = String::new();
        pipe.read_to_string(&mut text).expect("it ends");
        until("the program", || case.path("ready").exists().then_some(()));
        let guard = guards()[0];
        let known = ["/dev/null", "socket:", "anon_inode:[signalfd]"];
        // While it answers it has the memory of the task that asks open.
        until("nothing else open in it", || {
            let fds = fs::read_dir(format!("/proc/{guard}/fd"));
            let fds = fds.expect("it lives").flatten();
            let mut targets = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
            let all_known = targets.all(|target| {
                let target = target.display().to_string();
                known.iter().any(|known| target.starts_with(known))
            });
            all_known.then_some(())
        });
        assert_eq!(
            fs::read_link(format!("/proc/{guard}/cwd")).ok(),
            Some("/".into())
        );
        run.signal(Signal::SIGTERM);
        assert_eq!(run.wait(), Ended::Exited(7));
        no_guard_is_left();
    });
}

#[test]
fn what_cannot_be_started_is_told_as_ever() {
    isolated("what_cannot_be_started_is_told_as_ever", |case| {
        let asks = Asks::built(case);
        let mut command = asks.in_its_place(Command::new(CKPT));
        command.args(["run", "--cpu-baseline=x86-64-v2", "--", "/nowhere/at/all"]);
        run(case, &mut command).refused(99, &["cannot start", "/nowhere/at/all"]);
        no_guard_is_left();
        for (script, code) in [("exit 3", 3), ("kill -9 $$", 137), ("kill -SEGV $$", 139)] {
            let mut command = asks.in_its_place(Command::new(CKPT));
            command.args(["run", "--cpu-baseline=x86-64-v2", "--", "sh", "-c", script]);
            assert_eq!(run(case, &mut command).code(), code, "{script}");
        }
    });
}

/// SIGSEGV that was blocked when the program began is so afterwards: the kernel unblocks it when CPUID faults.
#[test]
fn what_a_program_inherits_of_sigsegv_stays() {
    isolated("what_a_program_inherits_of_sigsegv_stays", |case| {
        case.needs_program("python3", "python3");
        let asks = Asks::built(case);
        for (how, said) in [
            ("pass", "blocked 0 ignored 0"),
            (
                "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGSEGV])",
                "blocked 1 ignored 0",
            ),
        ] {
            let program = asks.program.display();
            let script =
                format!("import os, signal; {how}; os.execv('{program}', ['asks', 'inherited'])");
            let mut command = asks.in_its_place(Command::new(CKPT));
            command.args([
                "run",
                "--cpu-baseline=x86-64-v2",
                "--",
                "python3",
                "-c",
                &script,
            ]);
            let out = run(case, &mut command);
            assert_eq!(out.ok().trim(), said, "{how}");
        }
    });
}

/// Without the option nothing of it is there.
#[test]
fn other_jobs_have_no_guard() {
    isolated("other_jobs_have_no_guard", |case| {
        let (mut target, image) = killed(case, "counter");
        let job = restored(case, &image, &[]);
        assert_eq!(guard_of(job.pid), 0);
        assert_eq!(guards(), [0; 0]);
        assert_eq!(children(job.pid), [0; 0]);
        target.continued_by(job);
        target.passes();
    });
}
