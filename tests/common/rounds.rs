//! Programs that work in rounds (`tests/programs/README.md`), checkpointed, killed and restored in
//! the middle of them. Their result equals that of an undisturbed run.

use std::fs;
use std::path::Path;
use std::process::Command;

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, waitpid};

use super::isolate::Case;
use super::job::{Ended, Job, start};
use super::look::assert_let_go;
use super::tool::{attach, restored, restored_in_front, run};
use super::wait::until;

/// The line that the program promises, of a run in DIR/undisturbed.
fn undisturbed(case: &Case, program: &dyn Fn() -> Command) -> String {
    let dir = case.path("undisturbed");
    fs::create_dir(&dir).expect("the test's directory is writable");
    fs::write(dir.join("finish"), "").expect("the test's directory is writable");
    let out = run(case, program().arg(&dir));
    out.ok();
    fs::read_to_string(dir.join("result")).expect("it has a result")
}

/// The number of rounds that a program has done.
pub fn progress(dir: &Path) -> u32 {
    let text = fs::read_to_string(dir.join("progress")).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// Runs the program with a directory as its last argument, through an attach and three lives.
pub fn same_result(case: &Case, program: &dyn Fn() -> Command) {
    same_result_with(case, &[], program);
}

/// The same in pid namespaces of its own; each checkpoint is taken from outside.
pub fn same_result_in_namespaces(case: &Case, program: &dyn Fn() -> Command) {
    same_result_with(case, &["--pids", "namespace"], program);
}

fn same_result_with(case: &Case, options: &[&str], program: &dyn Fn() -> Command) {
    let dir = case.path("run");
    fs::create_dir(&dir).expect("the test's directory is writable");
    let mut job = start(
        program().arg(&dir).current_dir(case.dir()),
        &case.path("program.log"),
    );
    let round = |number: u32, job: &mut Job| {
        until(&format!("round {number}"), || {
            if progress(&dir) >= number {
                return Some(());
            }
            let ended = job.ended();
            assert!(ended.is_none(), "{ended:?} before round {number}");
            None
        });
    };
    round(2, &mut job);
    attach(case, job.pid, "job.ckpt", &[]);
    assert_let_go(job.pid);
    for life in 1..=3 {
        round(3 + 3 * life, &mut job);
        let (image, _) = attach(case, job.pid, "job.ckpt", &["--kill"]);
        let by_us = if life == 3 || life == 2 && !options.is_empty() {
            Ended::Exited(137)
        } else {
            Ended::Killed(9)
        };
        assert_eq!(gone(&mut job), by_us, "before life {life}");
        job = match life {
            2 => restored_in_front(case, &image, options),
            _ => restored(case, &image, options),
        };
    }
    round(15, &mut job);
    fs::write(dir.join("finish"), "").expect("the test's directory is writable");
    assert_eq!(job.wait(), Ended::Exited(0));
    let result = fs::read_to_string(dir.join("result")).expect("it has a result");
    assert_eq!(result, undisturbed(case, program));
}

/// The end of a job that was killed, with all its processes: their pids are free then. No other process
/// may be left in the test's namespace.
pub fn gone(job: &mut Job) -> Ended {
    let ended = until("its end", || job.ended());
    everybody_reaped();
    ended
}

/// Waits until no child of ours is left.
pub fn everybody_reaped() {
    until("the end of all its processes", || {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Err(Errno::ECHILD) => Some(()),
            Ok(_) => None,
            Err(error) => panic!("cannot wait: {error}"),
        }
    });
}
