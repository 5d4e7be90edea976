//! Notices of POSIX message queues, mq_notify(3): an attach takes them back for a moment, to learn what the kernel sends.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;

use crate::common::fixture::start_in;
use crate::common::look::{assert_let_go, await_let_go};
use crate::common::odd::build;
use crate::common::tool::CKPT;
use crate::common::{
    Case, Ended, Fixture, Job, attach, ckpt, isolated, isolated_as_user, odd, restore_cmd,
    restored, run, start, until,
};
use crate::sigkill::is_stopped;

const QUEUE: &CStr = c"/odd";

/// A queue of another process, which is this one.
struct Outsider(i32);

impl Outsider {
    fn open() -> Self {
        // SAFETY: a C string.
        let queue = unsafe { libc::mq_open(QUEUE.as_ptr(), libc::O_WRONLY) };
        assert!(queue >= 0, "{}", std::io::Error::last_os_error());
        Self(queue)
    }

    fn send(&self) {
        // SAFETY: one byte is read.
        let sent = unsafe { libc::mq_send(self.0, c"x".as_ptr(), 1, 0) };
        assert_eq!(sent, 0, "{}", std::io::Error::last_os_error());
    }

    /// Registers itself, if no other process is registered.
    fn registers(&self) -> bool {
        // SAFETY: integers, for which zero is valid.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_NONE;
        // SAFETY: one structure is read.
        unsafe { libc::mq_notify(self.0, &raw const event) == 0 }
    }
}

impl Drop for Outsider {
    fn drop(&mut self) {
        // SAFETY: it is ours.
        unsafe { libc::mq_close(self.0) };
    }
}

fn attach_with(case: &Case, target: &Fixture, fault: &str) -> Command {
    let mut command = Command::new(CKPT);
    command
        .args(["attach", "-q", "-o", "job.ckpt"])
        .arg(target.pid().to_string())
        .env("CKPT_FAULT", fault)
        .current_dir(case.dir());
    command
}

/// Lives again, and is told once.
fn told_once(case: &Case, mut target: Fixture) {
    let image = target.killed_into(case, "job.ckpt");
    target.continued_by(restored(case, &image, &[]));
    Outsider::open().send();
    target.passes();
}

/// Where each thread of a process waits, its stack and instruction pointer (proc_pid_syscall(5)): the same again when it
/// waits again after an interruption.
fn waits(pid: i32) -> Vec<String> {
    until("its threads to wait", || {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?;
        let all = tasks.map(|task| {
            let text = std::fs::read_to_string(task.ok()?.path().join("syscall")).ok()?;
            let words: Vec<&str> = text.split_whitespace().collect();
            Some(words.get(words.len().checked_sub(2)?..)?.join(" "))
        });
        all.collect()
    })
}

fn taken_back_for_a_moment(case: &Case) {
    for situation in ["mq-told", "mq-told-loud"] {
        let target = odd(case, situation, None);
        ckpt(case, ["check", &target.pid().to_string()]).ok();
        let before = waits(target.pid());
        let out = run(case, &mut attach_with(case, &target, "unregistered:kill"));
        assert_eq!(out.ended, Ended::Killed(9), "the step was not reached");
        await_let_go(&target.job);
        // What was begun goes on by itself.
        until("its threads to wait where they did", || {
            (waits(target.pid()) == before).then_some(())
        });
        assert!(!Outsider::open().registers(), "nobody is told any more");
        let out = run(case, &mut attach_with(case, &target, "unregistered"));
        out.refused(1, &["fault injected", "unregistered"]);
        assert_let_go(target.pid());
        attach(case, target.pid(), "job.ckpt", &[]);
        assert!(!Outsider::open().registers(), "nobody is told any more");
        told_once(case, target);
    }
}

/// Registrations that were removed are made again, also if ckpt was killed or failed meanwhile.
#[test]
fn taken_back_and_registered_again() {
    isolated("taken_back_and_registered_again", taken_back_for_a_moment);
}

#[test]
fn taken_back_and_registered_again_as_user() {
    let name = "taken_back_and_registered_again_as_user";
    isolated_as_user(name, taken_back_for_a_moment);
}

/// A message comes before the registration is taken back, and before it is registered again. It is told in either
/// case, and once.
#[test]
fn a_message_at_that_moment() {
    isolated("a_message_at_that_moment", |case| {
        for step in ["cave-written", "unregistered"] {
            let mut program = Command::new(build(case));
            program.env("ODD", "mq-told");
            let target = start_in(case, "mq-told", &format!("run-{step}"), program);
            let here = case.path("here");
            let fault = format!("{step}:wait={}", here.display());
            let mut command = attach_with(case, &target, &fault);
            let mut tool = start(&mut command, &case.path("attach.log"));
            let waits = |tool: &Job| (here.exists() && is_stopped(tool.pid)).then_some(());
            until(step, || waits(&tool));
            Outsider::open().send();
            let ended = until("the end of attach", || {
                if is_stopped(tool.pid) {
                    tool.signal(Signal::SIGCONT);
                }
                tool.ended()
            });
            assert_eq!(ended, Ended::Exited(0), "{}", log(case));
            assert_let_go(target.pid());
            std::fs::remove_file(here).expect("it is there");
            target.passes();
        }
    });
}

fn log(case: &Case) -> String {
    std::fs::read_to_string(case.path("attach.log")).unwrap_or_default()
}

/// A queue tells one process only.
#[test]
fn another_process_is_told_now() {
    isolated("another_process_is_told_now", |case| {
        let mut target = odd(case, "mq-told", None);
        let image = target.killed_into(case, "job.ckpt");
        let other = Outsider::open();
        assert!(other.registers());
        let words = ["/odd", "notifies", "let that one remove the registration"];
        run(case, &mut restore_cmd(&image, &[])).refused(99, &words);
        drop(other);
        target.continued_by(restored(case, Path::new(&image), &[]));
        Outsider::open().send();
        target.passes();
    });
}
