//! Clocks that begin with the machine, when a job is restored after a reboot or on another machine:
//! a time namespace around `restore` stands for that one.

use crate::common;
use std::path::Path;
use std::process::Command;

use crate::common::fixture::{fixture, killed, start_in};
use crate::common::look::status_field;
use crate::common::tool::RESTORE;
use crate::common::{Case, Ended, Job, attach, isolated, isolated_as_user, restored, run};

/// Runs a program where the machine's clocks are shifted by so many seconds.
fn shifted(seconds: i64) -> Command {
    let mut command = Command::new("unshare");
    let seconds = seconds.to_string();
    for clock in ["--monotonic", "--boottime"] {
        command.args([clock, &seconds]);
    }
    command.args(["--time", "--fork"]);
    command
}

/// `restore IMAGE` there.
fn restore_shifted(case: &Case, image: &Path, seconds: i64, args: &[&str]) -> common::Output {
    run(case, shifted(seconds).arg(RESTORE).arg(image).args(args))
}

/// A shift by which the clocks are nearly back at their beginning.
fn reboot() -> i64 {
    let uptime = std::fs::read_to_string("/proc/uptime").expect("/proc is mounted");
    let seconds: f64 = uptime
        .split(' ')
        .next()
        .unwrap_or("0")
        .parse()
        .expect("a number");
    -(seconds * 0.9) as i64
}

const DAY: i64 = 86_400;

/// One life after the other, each where the clocks are others.
fn lives(case: &Case, shifts: &[i64]) {
    let mut target = fixture(case, "clocks");
    for shift in shifts {
        let image = target.killed_into(case, "job.ckpt");
        let out = restore_shifted(case, &image, *shift, &["--detach"]);
        let pid = out.ok().trim().parse().expect("a pid");
        target.continued_by(Job::of(pid));
    }
    target.passes();
}

/// The same in pid namespaces, from which each checkpoint is taken from outside.
fn lives_in_namespaces(case: &Case, shifts: &[i64]) {
    let mut target = fixture(case, "clocks");
    let options = ["--detach", "--clock", "continue", "--pids", "namespace"];
    for (life, shift) in shifts.iter().enumerate() {
        let (image, _) = attach(case, target.pid(), "job.ckpt", &["--kill"]);
        let ended = common::rounds::gone(&mut target.job);
        assert_eq!(
            ended,
            if life == 0 {
                Ended::Killed(9)
            } else {
                Ended::Exited(137)
            }
        );
        let out = restore_shifted(case, &image, *shift, &options);
        let pid = out.ok().trim().parse().expect("a pid");
        assert_eq!(
            status_field(pid, "NSpid").map(|ids| ids.split('\t').count()),
            Some(2)
        );
        let init = status_field(pid, "PPid").and_then(|pid| pid.parse().ok());
        target.continued_by(Job::behind(pid, init.expect("it lives")));
    }
    target.passes();
}

#[test]
fn they_go_on_in_pid_namespaces() {
    isolated("they_go_on_in_pid_namespaces", |case| {
        lives_in_namespaces(case, &[DAY, reboot(), 3 * DAY])
    });
}

#[test]
fn they_go_on_in_pid_namespaces_of_an_ordinary_user() {
    isolated_as_user("they_go_on_in_pid_namespaces_of_an_ordinary_user", |case| {
        lives_in_namespaces(case, &[reboot(), DAY])
    });
}

/// Those of the first process of a container: it enters the time namespace itself.
#[test]
fn they_go_on_in_the_first_process() {
    isolated("they_go_on_in_the_first_process", |case| {
        first_process(case, &[reboot(), DAY])
    });
}

#[test]
fn they_go_on_in_the_first_process_of_an_ordinary_user() {
    isolated_as_user(
        "they_go_on_in_the_first_process_of_an_ordinary_user",
        |case| first_process(case, &[3 * DAY, reboot()]),
    );
}

fn first_process(case: &Case, shifts: &[i64]) {
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--mount-proc"]);
    command.arg(case.fixtures().join("clocks"));
    let mut target = start_in(case, "clocks", "run", command);
    let mut first = common::look::children(target.pid())[0];
    for shift in shifts {
        let (image, _) = attach(case, first, "job.ckpt", &["--kill"]);
        common::rounds::gone(&mut target.job);
        let options = ["--detach", "--clock", "continue"];
        let out = restore_shifted(case, &image, *shift, &options);
        first = out.ok().trim().parse().expect("a pid");
        let ids = format!("{first}\t1");
        assert_eq!(status_field(first, "NSpid"), Some(ids));
        target.continued_by(Job::of(first));
    }
    target.passes();
}

#[test]
fn they_go_on_after_a_reboot() {
    isolated("they_go_on_after_a_reboot", |case| lives(case, &[reboot()]));
}

#[test]
fn they_go_on_where_they_are_ahead() {
    isolated("they_go_on_where_they_are_ahead", |case| {
        lives(case, &[400 * DAY])
    });
}

#[test]
fn they_go_on_from_life_to_life() {
    isolated("they_go_on_from_life_to_life", |case| {
        lives(case, &[DAY, reboot(), 3 * DAY])
    });
}

#[test]
fn they_go_on_for_an_ordinary_user() {
    isolated_as_user("they_go_on_for_an_ordinary_user", |case| {
        lives(case, &[reboot(), DAY])
    });
}

#[test]
fn the_machines_do_not_go_back() {
    isolated("the_machines_do_not_go_back", |case| {
        let (mut target, image) = killed(case, "clocks");
        let out = restore_shifted(case, &image, reboot(), &["--clock", "host"]);
        out.refused(99, &["monotonic clock", "it would go back", "--clock host"]);
        assert!(!Path::new(&format!("/proc/{}", target.pid())).exists());
        let out = restore_shifted(case, &image, reboot(), &["--detach"]);
        target.continued_by(Job::of(out.ok().trim().parse().expect("a pid")));
        target.passes();
    });
}

/// A root without the privilege to set clocks, as in many containers.
#[test]
fn without_a_time_namespace() {
    isolated("without_a_time_namespace", |case| {
        let (mut target, image) = killed(case, "clocks");
        let powerless = |seconds: i64, clock: &str| {
            let mut command = shifted(seconds);
            command.args(["setpriv", "--bounding-set=-sys_time", RESTORE]);
            run(
                case,
                command.arg(&image).args(["--detach", "--clock", clock]),
            )
        };
        let out = powerless(DAY, "continue");
        out.refused(99, &["time namespace", "cannot be made", "--clock host"]);
        let out = powerless(reboot(), "auto");
        out.refused(99, &["monotonic clock", "it would go back", "as root"]);
        target.continued_by(restored(case, &image, &[]));
        target.passes();
    });
}
