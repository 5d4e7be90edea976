//! `restore` and its options, with the standard streams and signals of those who use it.

use crate::common;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::common::fixture::{killed, start_in};
use crate::common::group::Group;
use crate::common::job::appended;
use crate::common::look::{all_stopped, assert_let_go, assert_no_process_left, look, status_field};
use crate::common::tool::{RESTORE, restored_in_front};
use crate::common::{
    Case, Ended, Fixture, Job, Looks, attach, fixture, holds_for, isolated, isolated_as_user,
    restore_cmd, restored, run, start, until,
};
use nix::sys::signal::Signal;

#[test]
fn in_the_background() {
    isolated("in_the_background", |case| {
        let (mut target, image) = killed(case, "threads");
        let out = run(case, &mut restore_cmd(&image, &["--detach"]));
        assert_eq!(out.ok(), format!("{}\n", target.pid()));
        target.continued_by(Job::of(target.pid()));
        assert_eq!(status_field(target.pid(), "PPid").as_deref(), Some("1"));
        target.passes();
    });
}

#[test]
fn in_the_foreground() {
    isolated("in_the_foreground", |case| {
        let (mut target, image) = killed(case, "threads");
        target.continued_by(restored_in_front(case, &image, &[]));
        target.passes();
    });
}

/// As `ckpt restore`.
#[test]
fn by_either_name() {
    isolated("by_either_name", |case| {
        let (mut target, image) = killed(case, "counter");
        let mut command = Command::new(common::tool::CKPT);
        let out = run(case, command.args(["restore", "--detach"]).arg(&image));
        target.continued_by(Job::of(out.ok().trim().parse().expect("it is a pid")));
        target.passes();
    });
}

#[test]
fn stopped_for_a_debugger() {
    isolated("stopped_for_a_debugger", |case| {
        let mut target = fixture(case, "threads");
        let before = Looks::at(target.pid());
        let image = target.killed_into(case, "job.ckpt");
        let out = run(case, &mut restore_cmd(&image, &["--stopped"]));
        assert_eq!(out.ok(), format!("{}\n", target.pid()));
        assert!(
            out.stderr.contains(&format!("gdb -p {}", target.pid())),
            "{out:?}"
        );
        target.continued_by(Job::of(target.pid()));
        let pid = target.pid();
        let all_stopped = || all_stopped(pid);
        until("all its tasks to be stopped", || {
            all_stopped().then_some(())
        });
        assert!(holds_for(Duration::from_millis(100), all_stopped));
        assert_eq!(status_field(pid, "TracerPid").as_deref(), Some("0"));
        assert_eq!(before.differences(&look(pid), &[]), "");
        target.job.signal(Signal::SIGCONT);
        target.passes();
    });
}

#[test]
fn debugger_attaches() {
    isolated("debugger_attaches", |case| {
        case.needs_program("gdb", "gdb");
        let (mut target, image) = killed(case, "threads");
        target.continued_by(restored(case, &image, &["--stopped"]));
        let pid = target.pid().to_string();
        let mut gdb = Command::new("gdb");
        gdb.args([
            "-nx",
            "-batch",
            "-p",
            &pid,
            "-ex",
            "info threads",
            "-ex",
            "detach",
        ]);
        let out = run(case, &mut gdb);
        assert!(out.stdout.contains(&format!("(LWP {pid})")), "{out:#?}");
        target.job.signal(Signal::SIGCONT);
        target.passes();
    });
}

#[test]
fn left_stopped_by_attach() {
    isolated("left_stopped_by_attach", |case| {
        let target = fixture(case, "threads");
        let pid = target.pid();
        attach(case, pid, "job.ckpt", &["--stop"]);
        assert_eq!(status_field(pid, "TracerPid").as_deref(), Some("0"));
        let all_stopped = || all_stopped(pid);
        until("all its tasks to be stopped", || {
            all_stopped().then_some(())
        });
        target.job.signal(Signal::SIGCONT);
        until("it to go on", || (!all_stopped()).then_some(()));
        target.passes();
    });
}

#[test]
fn dry_run_touches_nothing() {
    isolated("dry_run_touches_nothing", |case| {
        let (mut target, image) = killed(case, "threads");
        let before = fs::read(&image).expect("it is there");
        let out = run(case, &mut restore_cmd(&image, &["--dry-run"]));
        let plan = out.ok();
        for call in ["mmap", "clone3", "rt_sigaction"] {
            assert!(
                plan.lines().any(|line| line.contains(call)),
                "no {call} in the plan:\n{plan}"
            );
        }
        assert_no_process_left();
        assert_eq!(fs::read(&image).expect("it is there"), before);
        // The plan is the same each time.
        let again = run(case, &mut restore_cmd(&image, &["--dry-run"]));
        assert_eq!(again.ok(), plan);
        target.continued_by(restored(case, &image, &[]));
        target.passes();
    });
}

#[test]
fn exit_code_is_passed_on() {
    isolated("exit_code_is_passed_on", |case| {
        let fd = case.path("fed");
        let (mut target, image) = echo(case);
        fs::write(&fd, "text\n").expect("the test's directory is writable");
        let mut command = restore_cmd(&image, &["--fd", "0=fed"]);
        let job = start(command.current_dir(case.dir()), &case.path("restore.log"));
        assert_eq!(job.wait(), Ended::Exited(23));
        target.job.ended_already();
    });
}

/// A target that copies one line from standard input to standard output and exits with 23; both
/// are pipes to the outside.
fn echo(case: &Case) -> (Fixture, PathBuf) {
    let mut command = Command::new("sh");
    let script = "sleep 1000 | ODD=echo $0 $1 | cat";
    command.args(["-c", script]).arg(common::odd::build(case));
    let mut target = start_in(case, "echo", "run", command);
    let pid = fs::read_to_string(target.path("ready")).expect("it is ready");
    let pid: i32 = pid.trim().parse().expect("it is a pid");
    let (image, _) = attach(case, pid, "job.ckpt", &["--kill"]);
    // With the shell goes everything it is the parent of, by our own hand as the reaper.
    target.job.signal(Signal::SIGKILL);
    until("the shell's end", || target.job.ended());
    end_everybody();
    target.go();
    (target, image)
}

fn end_everybody() {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(-1), Signal::SIGKILL);
    assert_no_process_left();
}

#[test]
fn standard_streams_are_handed_over() {
    isolated("standard_streams_are_handed_over", |case| {
        let (mut target, image) = echo(case);
        let mut restore = Command::new(RESTORE)
            .arg(&image)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(appended(&case.path("restore.log")))
            .spawn()
            .expect("it was built");
        let mut to = restore.stdin.take().expect("it is piped");
        to.write_all(b"through a pipe\n").expect("it reads");
        drop(to);
        let mut said = String::new();
        let mut from = restore.stdout.take().expect("it is piped");
        std::io::Read::read_to_string(&mut from, &mut said).expect("it writes");
        assert_eq!(said, "through a pipe\n");
        let status = restore.wait().expect("it is our child");
        assert_eq!(status.code(), Some(23));
        target.job.ended_already();
    });
}

/// A closed stream gives the job one that refuses to be read or written: neither a file of `restore`, nor one in which
/// all that is written is lost.
#[test]
fn closed_streams_are_handed_over() {
    isolated("closed_streams_are_handed_over", |case| {
        let (mut target, image) = echo(case);
        let mut command = Command::new("sh");
        let script = "exec \"$1\" --stopped \"$0\" <&- >&- 2>&-";
        command.args(["-c", script]).arg(&image).arg(RESTORE);
        run(case, &mut command).ok();
        let pid = fs::read_to_string(target.path("ready")).expect("it is ready");
        let job = Job::of(pid.trim().parse().expect("it is a pid"));
        for (fd, access) in [(0, libc::O_WRONLY), (1, libc::O_RDONLY)] {
            let link = fs::read_link(format!("/proc/{}/fd/{fd}", job.pid)).expect("it is open");
            assert_eq!(link, Path::new("/dev/null"));
            let info = fs::read_to_string(format!("/proc/{}/fdinfo/{fd}", job.pid));
            let info = info.expect("it is open");
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:\t"));
            let flags = i32::from_str_radix(flags.expect("it has flags"), 8);
            assert_eq!(flags.expect("octal") & libc::O_ACCMODE, access, "fd {fd}");
        }
        job.kill();
        target.job.ended_already();
    });
}

#[test]
fn signals_are_passed_on() {
    isolated("signals_are_passed_on", |case| {
        let (mut target, image) = killed(case, "counter");
        let log = case.path("restore.log");
        let job = restored_in_front(case, &image, &[]);
        let restore: i32 = status_field(job.pid, "PPid")
            .expect("it runs")
            .parse()
            .expect("a pid");
        assert_ne!(restore, 1);
        // SIGTERM to `restore` ends the job, and so `restore`.
        let pid = nix::unistd::Pid::from_raw(restore);
        nix::sys::signal::kill(pid, Signal::SIGTERM).expect("it runs");
        assert_eq!(job.wait(), Ended::Exited(128 + 15), "{}", text(&log));
        target.job.ended_already();
    });
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[test]
fn stops_and_goes_on_with_its_job() {
    isolated("stops_and_goes_on_with_its_job", |case| {
        let (mut target, image) = killed(case, "threads");
        target.continued_by(restored_in_front(case, &image, &[]));
        target.job.signal(Signal::SIGSTOP);
        until("the job to be stopped", || {
            all_stopped(target.pid()).then_some(())
        });
        target.job.signal(Signal::SIGCONT);
        until("the job to go on", || {
            (!all_stopped(target.pid())).then_some(())
        });
        target.passes();
    });
}

/// The job has the descriptors that it had, none of `restore` and none that `restore` inherited.
#[test]
fn no_descriptor_leaks_in() {
    isolated("no_descriptor_leaks_in", |case| {
        let mut target = fixture(case, "fd_dup");
        let before = Looks::at(target.pid());
        let image = target.killed_into(case, "job.ckpt");
        let mut command = Command::new("bash");
        let script = "exec 7<$0 55</dev/null 99>>leak.log; exec $1 --detach $0";
        command
            .args(["-c", script])
            .arg(&image)
            .arg(RESTORE)
            .current_dir(case.dir());
        let out = run(case, &mut command);
        target.continued_by(Job::of(out.ok().trim().parse().expect("it is a pid")));
        before.assert_same(target.pid(), &[]);
        target.passes();
    });
}

#[test]
fn nothing_is_inherited_but_the_image() {
    isolated("nothing_is_inherited_but_the_image", |case| {
        let mut target = fixture(case, "counter");
        let before = Looks::at(target.pid());
        let image = target.killed_into(case, "job.ckpt");
        // Another directory, umask, environment, nice value, and signals ignored and blocked.
        // Only root may give back a lower one than it has.
        let nice = if case.is_root() { "5" } else { "0" };
        let mut command = Command::new("bash");
        let script = "cd /; umask 0; trap '' USR1 PIPE HUP; ulimit -Sn 64; ulimit -Sc 0;
            exec env -i OTHER=1 nice -n $2 $1 --detach $0";
        command
            .args(["-c", script])
            .arg(&image)
            .args([RESTORE, nice]);
        let out = run(case, &mut command);
        target.continued_by(Job::of(out.ok().trim().parse().expect("it is a pid")));
        before.assert_same(target.pid(), &[]);
        target.passes();
    });
}

#[test]
fn lower_hard_limits_are_warned_of() {
    isolated("lower_hard_limits_are_warned_of", |case| {
        let caps = status_field(1, "CapEff").expect("we run");
        let caps = u64::from_str_radix(&caps, 16).expect("it is a number");
        if caps & 1 << 24 != 0 && case.is_root() {
            case.skip("a machine on which root may not raise limits");
        }
        lower_hard_limits(case);
    });
}

/// In a user namespace there is the capability, and it does not count.
#[test]
fn lower_hard_limits_of_an_ordinary_user() {
    isolated_as_user("lower_hard_limits_of_an_ordinary_user", lower_hard_limits);
}

fn lower_hard_limits(case: &Case) {
    let mut command = Command::new("bash");
    let script = "ulimit -n 512; exec $0 --detach $1";
    let (mut target, image) = killed(case, "counter");
    let out = run(case, command.args(["-c", script]).arg(RESTORE).arg(&image));
    assert!(out.stderr.contains("warning:"), "{out:?}");
    assert!(out.stderr.contains("limit"), "{out:?}");
    target.continued_by(Job::of(out.ok().trim().parse().expect("it is a pid")));
    assert_let_go(target.pid());
    target.passes();
}

/// A job of one terminal goes on at another.
#[test]
fn on_another_terminal() {
    isolated("on_another_terminal", |case| {
        case.needs_program("script", "bsdutils");
        let mut target = on_terminal(case, "first");
        let pid = fs::read_to_string(target.path("ready")).expect("it is ready");
        let pid: i32 = pid.trim().parse().expect("it is a pid");
        let (image, _) = attach(case, pid, "job.ckpt", &["--kill"]);
        until("the end of the first terminal", || target.job.ended());
        let line = format!("exec {RESTORE} {} --verbose", image.display());
        let second = start(
            &mut terminal(&line, &case.path("second.log")),
            &case.path("script.log"),
        );
        until("the job on the second terminal", || {
            text(&case.path("second.log"))
                .contains("running as process")
                .then_some(())
        });
        let fd = fs::read_link(format!("/proc/{pid}/fd/0")).expect("it runs");
        assert!(fd.starts_with("/dev/pts"), "{}", fd.display());
        target.go();
        assert_eq!(second.wait(), Ended::Exited(0));
        let verdict = fs::read_to_string(target.path("verdict")).expect("it judged itself");
        assert_eq!(verdict.trim(), "PASS");
    });
}

/// And in the background at a new one of its own.
#[test]
fn terminal_is_gone() {
    isolated("terminal_is_gone", |case| {
        case.needs_program("script", "bsdutils");
        let mut target = on_terminal(case, "first");
        let pid = fs::read_to_string(target.path("ready")).expect("it is ready");
        let pid: i32 = pid.trim().parse().expect("it is a pid");
        let (image, _) = attach(case, pid, "job.ckpt", &["--kill"]);
        until("the end of the terminal", || target.job.ended());
        target.continued_by(restored(case, &image, &[]));
        let fd = fs::read_link(format!("/proc/{pid}/fd/0")).expect("it runs");
        assert!(fd.starts_with("/dev/pts"), "{}", fd.display());
        target.passes();
    });
}

/// `counter` as it runs in a terminal, under `script`.
fn on_terminal(case: &Case, name: &str) -> Fixture {
    let program = case.fixtures().join("counter");
    let dir = case.path("run");
    let line = format!("exec {} {}", program.display(), dir.display());
    let log = case.path(&format!("{name}-terminal.log"));
    let script = format!(
        "exec script --quiet --return --flush --command '{line}' --log-out {}",
        log.display()
    );
    // A fixture is given its directory as the last word, which `sh` takes as its name.
    let mut command = Command::new("sh");
    command.env("SHELL", "/bin/sh").args(["-c", &script]);
    start_in(case, name, "run", command)
}

fn terminal(line: &str, log: &Path) -> Command {
    File::create(log).expect("the test's directory is writable");
    let mut command = Command::new("script");
    command
        .env("SHELL", "/bin/sh")
        .args(["--quiet", "--return", "--flush", "--command", line]);
    command.arg("--log-out").arg(log);
    command
}

/// In its own control group, where one can be made.
#[test]
fn control_group() {
    isolated("control_group", |case| {
        let group = Group::with(case, &["cgroup.procs"]);
        let mut target = fixture(case, "tree_deep");
        let tree = [vec![target.pid()], target.job.descendants()].concat();
        group.take(&tree);
        let groups = || {
            tree.iter()
                .map(|pid| fs::read_to_string(format!("/proc/{pid}/cgroup")))
        };
        let before: Vec<_> = groups().map(Result::unwrap).collect();
        let image = target.killed_into(case, "job.ckpt");
        target.continued_by(restored(case, &image, &[]));
        let after: Vec<_> = groups().map(Result::unwrap).collect();
        assert_eq!(before, after);
        target.passes();
        group.remove();
    });
}
