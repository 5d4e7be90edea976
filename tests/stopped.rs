//! Processes that a signal has stopped, with several threads: a checkpoint leaves them stopped, a
//! restore brings them back stopped, and SIGCONT continues them, with the right result.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use crate::common::fixture::start_in;
use crate::common::job::Job;
use crate::common::look::{all_stopped, states, status_field};
use crate::common::tool::{CKPT, restored_in_front};
use crate::common::{
    Case, Ended, Fixture, Looks, attach, fixture, holds_for, isolated, isolated_as_user,
    restore_cmd, restored, start, until,
};
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

/// The fixture, stopped by this signal in all its threads. It has a process group of its own: the
/// signals of a terminal do not stop an orphaned one, as ours is.
fn stopped(case: &Case, signal: Signal) -> (Fixture, Looks) {
    let mut command = Command::new(case.fixtures().join("stopped"));
    command.process_group(0);
    let target = start_in(case, "stopped", "run", command);
    let before = Looks::at(target.pid());
    target.job.signal(signal);
    until("all its threads to be stopped", || {
        all_stopped(target.pid()).then_some(())
    });
    assert!(states(target.pid()).len() > 4);
    (target, before)
}

/// It is stopped and stays so, is not traced, and looks as before.
fn remains_stopped(target: &Fixture, before: &Looks) {
    let pid = target.pid();
    until("all its threads to be stopped", || {
        all_stopped(pid).then_some(())
    });
    assert!(holds_for(Duration::from_millis(100), || all_stopped(pid)));
    assert_eq!(status_field(pid, "TracerPid").as_deref(), Some("0"));
    before.assert_same(pid, &[]);
}

/// SIGCONT continues it, and it has seen just that one.
fn passes_when_continued(target: Fixture) {
    fs::write(target.path("continued"), "1").expect("the test's directory is writable");
    target.job.signal(Signal::SIGCONT);
    until("it to go on", || (!all_stopped(target.pid())).then_some(()));
    target.passes();
}

#[test]
fn attach_leaves_it_stopped() {
    isolated("attach_leaves_it_stopped", |case| {
        let (target, before) = stopped(case, Signal::SIGSTOP);
        for _ in 0..3 {
            attach(case, target.pid(), "job.ckpt", &[]);
            remains_stopped(&target, &before);
        }
        passes_when_continued(target);
    });
}

/// Also with `--stop`, which is what it is already.
#[test]
fn attach_and_stop() {
    isolated("attach_and_stop", |case| {
        let (target, before) = stopped(case, Signal::SIGSTOP);
        attach(case, target.pid(), "job.ckpt", &["--stop"]);
        remains_stopped(&target, &before);
        passes_when_continued(target);
    });
}

/// Three lives, each stopped at the checkpoint and at its beginning.
fn comes_back(case: &Case, signal: Signal) {
    let (mut target, before) = stopped(case, signal);
    for _ in 0..3 {
        let image = target.killed_into(case, "job.ckpt");
        target.continued_by(restored(case, &image, &[]));
        remains_stopped(&target, &before);
    }
    passes_when_continued(target);
}

#[test]
fn comes_back_stopped() {
    isolated("comes_back_stopped", |case| {
        comes_back(case, Signal::SIGSTOP);
    });
}

#[test]
fn comes_back_stopped_of_an_ordinary_user() {
    isolated_as_user("comes_back_stopped_of_an_ordinary_user", |case| {
        comes_back(case, Signal::SIGSTOP);
    });
}

/// By the signal of a terminal: Ctrl-Z.
#[test]
fn comes_back_stopped_from_the_keyboard() {
    isolated("comes_back_stopped_from_the_keyboard", |case| {
        comes_back(case, Signal::SIGTSTP);
    });
}

/// In the foreground `restore` stops with its job, as a shell expects it of a job of its own, and
/// continues it.
#[test]
fn comes_back_stopped_in_the_foreground() {
    isolated("comes_back_stopped_in_the_foreground", |case| {
        let (mut target, _) = stopped(case, Signal::SIGSTOP);
        let image = target.killed_into(case, "job.ckpt");
        target.continued_by(restored_in_front(case, &image, &[]));
        until("all its threads to be stopped", || {
            all_stopped(target.pid()).then_some(())
        });
        passes_when_continued(target);
    });
}

/// Its parent is told of the stop once, by wait(2), and of the continuation.
#[test]
fn the_parent_can_wait_for_both() {
    isolated("the_parent_can_wait_for_both", |case| {
        let (mut target, _) = stopped(case, Signal::SIGSTOP);
        let image = target.killed_into(case, "job.ckpt");
        target.continued_by(restored(case, &image, &[]));
        let pid = Pid::from_raw(target.pid());
        let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WCONTINUED | WaitPidFlag::WNOHANG;
        let told = until("the stop", || {
            match waitid(Id::Pid(pid), flags).expect("it is our child") {
                WaitStatus::StillAlive => None,
                status => Some(status),
            }
        });
        assert_eq!(told, WaitStatus::Stopped(pid, Signal::SIGSTOP));
        target.job.signal(Signal::SIGCONT);
        let told = until("the continuation", || {
            match waitid(Id::Pid(pid), flags).expect("it is our child") {
                WaitStatus::StillAlive => None,
                status => Some(status),
            }
        });
        assert_eq!(told, WaitStatus::Continued(pid));
        fs::write(target.path("continued"), "1").expect("the test's directory is writable");
        target.passes();
    });
}

/// A stop from outside that comes while it is being restored is put off until it is let go.
fn stopped_meanwhile(case: &Case, step: &str) {
    let mut command = Command::new(case.fixtures().join("stopped"));
    command.process_group(0);
    let mut target = start_in(case, "stopped", "run", command);
    let before = Looks::at(target.pid());
    let image = target.killed_into(case, "job.ckpt");
    let here = case.path("here");
    let mut command = restore_cmd(&image, &["--detach"]);
    command.env("CKPT_FAULT", format!("{step}:wait={}", here.display()));
    let mut restore = start(&mut command, &case.path("restore.log"));
    until("the restore to wait", || {
        (here.exists() && all_stopped(restore.pid)).then_some(())
    });
    let job = Job::of(target.pid());
    job.signal(Signal::SIGSTOP);
    restore.signal(Signal::SIGCONT);
    let ended = until("the restore to be done", || restore.ended());
    assert_eq!(ended, Ended::Exited(0));
    target.continued_by(job);
    remains_stopped(&target, &before);
    passes_when_continued(target);
}

#[test]
fn stopped_while_it_is_mapped() {
    isolated("stopped_while_it_is_mapped", |case| {
        stopped_meanwhile(case, "restore-mapped");
    });
}

#[test]
fn stopped_while_its_threads_are_parked() {
    isolated("stopped_while_its_threads_are_parked", |case| {
        stopped_meanwhile(case, "restore-threads");
    });
}

#[test]
fn stopped_just_before_it_is_let_go() {
    isolated("stopped_just_before_it_is_let_go", |case| {
        stopped_meanwhile(case, "restore-release");
    });
}

/// Likewise while it is attached to: it stops at once, or when it is let go.
fn stopped_at_an_attach(case: &Case, step: &str) {
    let mut command = Command::new(case.fixtures().join("stopped"));
    command.process_group(0);
    let target = start_in(case, "stopped", "run", command);
    let before = Looks::at(target.pid());
    let here = case.path("here");
    let mut command = Command::new(CKPT);
    command
        .args(["attach", &target.pid().to_string(), "-o", "job.ckpt"])
        .current_dir(case.dir())
        .env("CKPT_FAULT", format!("{step}:wait={}", here.display()));
    let mut attach = start(&mut command, &case.path("attach.log"));
    until("the attach to wait", || {
        (here.exists() && all_stopped(attach.pid)).then_some(())
    });
    target.job.signal(Signal::SIGSTOP);
    // It may pass the step several times.
    let ended = until("the attach to be done", || {
        attach.signal(Signal::SIGCONT);
        attach.ended()
    });
    assert_eq!(ended, Ended::Exited(0));
    remains_stopped(&target, &before);
    passes_when_continued(target);
}

#[test]
fn stopped_while_it_is_seized() {
    isolated("stopped_while_it_is_seized", |case| {
        stopped_at_an_attach(case, "seized");
    });
}

#[test]
fn stopped_when_it_is_frozen() {
    isolated("stopped_when_it_is_frozen", |case| {
        stopped_at_an_attach(case, "frozen");
    });
}

#[test]
fn stopped_between_remote_calls() {
    isolated("stopped_between_remote_calls", |case| {
        stopped_at_an_attach(case, "remote-call");
    });
}

/// As soon as `--stop` is done, every thread has stopped.
#[test]
fn stopped_when_attach_ends() {
    isolated("stopped_when_attach_ends", |case| {
        let target = fixture(case, "threads");
        for _ in 0..20 {
            attach(case, target.pid(), "job.ckpt", &["--stop"]);
            let now = states(target.pid());
            assert!(now.iter().all(|(_, state)| *state == 'T'), "{now:?}");
            target.job.signal(Signal::SIGCONT);
            until("it to go on", || (!all_stopped(target.pid())).then_some(()));
        }
        target.passes();
    });
}

/// Sleeps that were interrupted, at the point at which the kernel has made restart_syscall(2) of them, and the call
/// is not made yet.
#[test]
fn a_call_about_to_be_restarted_is_made_as_a_whole() {
    isolated("a_call_about_to_be_restarted_is_made_as_a_whole", |case| {
        let mut target = fixture(case, "restart_nanosleep");
        assert!(restarts(target.pid()) >= 4);
        let image = target.killed_into(case, "job.ckpt");
        target.continued_by(restored(case, &image, &[]));
        target.job.signal(Signal::SIGCONT);
        target.passes();
    });
}

/// Does in every thread that sleeps what the kernel does to restart its call, and stops the process before one
/// executes an instruction; how many there were.
fn restarts(pid: i32) -> usize {
    use ckpt_tracer::task::Running;
    let pid = ckpt_tracer::Pid(pid);
    let tids = ckpt_tracer::proc::tasks::list_tasks(pid).expect("it lives");
    let stop = |tid| {
        let task = Running::seize(tid).expect("it lives");
        task.interrupt().expect("it lives");
        task.wait_stopped().expect("it lives")
    };
    let tasks: Vec<_> = tids.into_iter().map(stop).collect();
    let mut count = 0;
    for task in &tasks {
        let mut regs = task.regs().expect("it is stopped");
        if regs.rax as i64 == -ckpt_tracer::abi::ERESTART_RESTARTBLOCK {
            count += 1;
            regs.rax = 219; // restart_syscall
            regs.orig_rax = u64::MAX;
            regs.rip -= 2;
            task.set_regs(&regs).expect("it is stopped");
        }
    }
    let raw = Pid::from_raw(pid.raw());
    nix::sys::signal::kill(raw, Signal::SIGSTOP).expect("it lives");
    for task in tasks {
        task.detach(0).expect("it is stopped");
    }
    until("all its threads to be stopped", || {
        all_stopped(pid.raw()).then_some(())
    });
    count
}
