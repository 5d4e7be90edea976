//! Kills at random moments.

use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use super::isolate::Case;
use super::job::start;
use super::look::{assert_no_process_left, children, status_field};
use super::wait::until;

/// A restore of a job that is the first process of a namespace, and has that name, is killed so many
/// times, from its beginning to its end: afterwards either no process exists, or the job, which continues.
pub fn restore_is_killed(
    case: &Case,
    parts: u32,
    restore: &dyn Fn() -> Command,
    name: &str,
    count: &dyn Fn() -> u32,
) {
    let log = case.path("restore.log");
    let first = || {
        let is = |pid: &i32| {
            status_field(*pid, "NSpid").is_some_and(|ids| ids.ends_with("\t1"))
                && status_field(*pid, "TracerPid").as_deref() == Some("0")
                && status_field(*pid, "Name").as_deref() == Some(name)
        };
        children(1).into_iter().find(is)
    };
    let ends = |first: i32| {
        kill(Pid::from_raw(first), Signal::SIGKILL).expect("it lives");
        assert_no_process_left();
    };
    let begun = Instant::now();
    let out = super::tool::run(case, restore().arg("--detach"));
    let longest = begun.elapsed();
    ends(out.ok().trim().parse().expect("a pid"));
    for part in 0..parts {
        let before = count();
        let mut restore = start(&mut restore(), &log);
        let moment = longest.mul_f64(f64::from(part) / f64::from(parts));
        let begun = Instant::now();
        while begun.elapsed() < moment {
            std::thread::sleep(Duration::from_micros(50));
        }
        let _ = kill(Pid::from_raw(restore.pid), Signal::SIGKILL);
        until("its end", || restore.ended());
        let found = until("nobody or the whole job", || {
            let _ = waitpid(None, Some(WaitPidFlag::WNOHANG));
            match first() {
                Some(first) => (count() != before).then_some(Some(first)),
                None => children(1).is_empty().then_some(None),
            }
        });
        found.into_iter().for_each(ends);
        assert_no_process_left();
    }
}
