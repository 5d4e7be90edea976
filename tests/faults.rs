//! A failure, or death, at each step of attach and restore: the target of an attach is unharmed
//! and the next attach works; of a failed restore nothing is left.

use crate::common;
use std::process::Command;

use crate::common::look::{assert_let_go, assert_no_process_left, await_let_go};
use crate::common::tool::{CKPT, leftovers};
use crate::common::{Case, Ended, Fixture, Looks, attach, isolated, restore_cmd, restored, run};
use ckpt_tracer::fault::Step;

/// Timers and sleeps notice what happens to them, computations when a register is lost, parents
/// when one of their children is not as it was, all who share a memory when one is in it that
/// should not be, rings of events when an event or the tail is not where it was, and a program whose
/// system calls are dispatched dies of one that it does not make itself.
fn targets(case: &Case) -> [Fixture; 6] {
    let names = [
        "sleepers",
        "timers_posix",
        "tree_pipe",
        "tree_vm_threads",
        "aio_ring",
        "dispatch",
    ];
    names.map(|name| {
        let command = Command::new(case.fixtures().join(name));
        common::fixture::start_in(case, name, &format!("run-{name}"), command)
    })
}

fn attach_with(case: &Case, target: &Fixture, fault: &str) -> common::Output {
    let pid = target.pid().to_string();
    let mut command = Command::new(CKPT);
    command
        .args(["attach", &pid, "-o", "job.ckpt"])
        .env("CKPT_FAULT", fault);
    run(case, command.current_dir(case.dir()))
}

fn attach_fails(case: &Case, step: &str) {
    for target in targets(case) {
        let before = Looks::at(target.pid());
        let out = attach_with(case, &target, step);
        out.refused(1, &["fault injected", step]);
        assert_let_go(target.pid());
        before.assert_same(target.pid(), &[]);
        assert!(
            leftovers(case.dir()).is_empty(),
            "{:?}",
            leftovers(case.dir())
        );
        works(case, target);
    }
}

fn attach_dies(case: &Case, step: &str) {
    for target in targets(case) {
        let before = Looks::at(target.pid());
        let out = attach_with(case, &target, &format!("{step}:kill"));
        assert_eq!(out.ended, Ended::Killed(9), "the step was not reached");
        await_let_go(&target.job);
        before.assert_same(target.pid(), &[]);
        assert!(!case.path("job.ckpt").exists(), "half an image");
        works(case, target);
    }
}

/// The next checkpoint works, and clears away what a killed one left.
fn works(case: &Case, mut target: Fixture) {
    attach(case, target.pid(), "job.ckpt", &[]);
    assert_let_go(target.pid());
    assert_eq!(leftovers(case.dir()), ["job.ckpt"]);
    let image = target.killed_into(case, "job.ckpt");
    target.continued_by(restored(case, &image, &[]));
    target.passes();
    std::fs::remove_file(image).expect("it is there");
}

fn restore_ends(case: &Case, fault: &str) {
    // Programs that are executed, processes that stand in for those that have gone, and some that
    // are in the memory of others.
    for name in [
        "threads",
        "tree_exec",
        "tree_session_gone",
        "tree_vm_threads",
    ] {
        restore_of_ends(case, name, fault);
    }
}

fn restore_of_ends(case: &Case, name: &str, fault: &str) {
    let command = Command::new(case.fixtures().join(name));
    let mut target = common::fixture::start_in(case, name, &format!("run-{name}"), command);
    let image = target.killed_into(case, "job.ckpt");
    let out = run(case, restore_cmd(&image, &[]).env("CKPT_FAULT", fault));
    if fault.ends_with(":kill") {
        assert_eq!(out.ended, Ended::Killed(9), "the step was not reached");
    } else {
        out.refused(99, &["fault injected", fault]);
    }
    assert_no_process_left();
    target.continued_by(restored(case, &image, &[]));
    target.passes();
}

macro_rules! steps {
    (attach $($attach:ident)*; restore $($restore:ident)*; elsewhere $($other:ident)*) => {
        const LISTED: &[&str] =
            &[$(stringify!($attach),)* $(stringify!($restore),)* $(stringify!($other),)*];
        mod attach_fails {
            $(#[test] fn $attach() { super::at("attach_fails", stringify!($attach), super::attach_fails) })*
        }
        mod attach_dies {
            $(#[test] fn $attach() { super::at("attach_dies", stringify!($attach), super::attach_dies) })*
        }
        mod restore_fails {
            $(#[test] fn $restore() { super::at("restore_fails", stringify!($restore), super::restore_ends) })*
        }
        mod restore_dies {
            $(#[test] fn $restore() {
                super::at("restore_dies", stringify!($restore), |case, step| {
                    super::restore_ends(case, &format!("{step}:kill"));
                })
            })*
        }
    };
}

steps! {
attach
    seized frozen cave_written cave_entered remote_call cave_leaving state_captured pages_half
    release release_half before_sync before_rename;
restore
    restore_spawned restore_mapped restore_filled restore_threads restore_release;
elsewhere
    check // in tests/kill.rs
    rehearse_mask rehearse_page rehearsed // in tests/rehearse.rs
    unregistered // in tests/notices.rs
    lending // in tests/containers.rs
}

fn at(module: &str, step: &str, body: impl FnOnce(&Case, &str)) {
    isolated(&format!("{module}::{step}"), |case| {
        body(case, &step.replace('_', "-"))
    });
}

#[test]
fn every_step_is_listed() {
    let all: Vec<String> = Step::ALL
        .iter()
        .map(|step| step.name().replace('-', "_"))
        .collect();
    assert_eq!(LISTED, all);
}
