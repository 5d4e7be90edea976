//! `ckpt run` and what it leaves: images to restore from, and a program that outlives it.

use crate::common;
use std::fs;
use std::process::Command;

use crate::common::fixture::start_in;
use crate::common::look::{assert_let_go, status_field};
use crate::common::tool::{CKPT, leftovers};
use crate::common::{Case, Ended, Fixture, Job, isolated, restored, until};
use nix::sys::signal::Signal;

/// A fixture under `ckpt run` with an interval, and its own pid.
fn supervised(case: &Case, name: &str) -> (Fixture, i32) {
    let mut command = Command::new(CKPT);
    command.args(["run", "--name=job", "--interval=1s", "--keep=2", "--dir"]);
    command
        .arg(case.path("images"))
        .arg("--")
        .arg(case.fixtures().join(name));
    let run = start_in(case, name, "run", command);
    let pid = fs::read_to_string(run.path("ready")).expect("it is ready");
    (run, pid.trim().parse().expect("it is a pid"))
}

fn images(case: &Case) -> Vec<String> {
    let mut names = leftovers(&case.path("images"));
    names.retain(|name| !name.starts_with('.'));
    names.sort();
    names
}

#[test]
fn newest_images_are_kept_and_the_last_restores() {
    isolated("newest_images_are_kept_and_the_last_restores", |case| {
        let (mut run, pid) = supervised(case, "threads");
        until("the fourth image", || {
            case.path("images/job.4.ckpt").exists().then_some(())
        });
        // The older one goes after the newer has come.
        until("two images", || (images(case).len() == 2).then_some(()));
        assert_let_go(pid);
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL).expect("it runs");
        assert_eq!(
            until("the end of ckpt run", || run.job.ended()),
            Ended::Exited(137)
        );
        let kept = images(case);
        assert_eq!(kept.len(), 2, "{kept:?}");
        run.continued_by(restored(case, &case.path("images").join(&kept[1]), &[]));
        assert_eq!(run.pid(), pid);
        run.passes();
    });
}

#[test]
fn exit_code_after_checkpoints() {
    isolated("exit_code_after_checkpoints", |case| {
        let (run, _) = supervised(case, "sleepers");
        until("an image", || {
            case.path("images/job.1.ckpt").exists().then_some(())
        });
        run.passes();
    });
}

#[test]
fn program_outlives_a_killed_supervisor() {
    isolated("program_outlives_a_killed_supervisor", |case| {
        let (mut run, pid) = supervised(case, "sleepers");
        until("an image", || {
            case.path("images/job.1.ckpt").exists().then_some(())
        });
        run.job.signal(Signal::SIGKILL);
        assert_eq!(until("its end", || run.job.ended()), Ended::Killed(9));
        // We are the reaper of the namespace, and now its parent.
        until("a new parent", || {
            (status_field(pid, "PPid")? == "1").then_some(())
        });
        run.continued_by(Job::of(pid));
        run.passes();
    });
}

/// A grandchild whose parent has ended is in the image as well, and is back after the restore.
#[test]
fn orphans_belong_to_the_job() {
    isolated("orphans_belong_to_the_job", |case| {
        let script = "sh -c 'sh orphan.sh & echo $! > orphan.pid'; echo > ready; \
                      until [ -s out ]; do sleep 0.02; done; exit 7";
        let orphan = "until [ -e go ]; do sleep 0.02; done; echo $$ > out.tmp; mv out.tmp out";
        fs::write(case.path("orphan.sh"), orphan).expect("the test's directory is writable");
        let mut command = Command::new(CKPT);
        command
            .args(["run", "--name=job", "--interval=1s", "--dir=.", "--"])
            .args(["sh", "-c", script])
            .current_dir(case.dir());
        let mut run = common::start(&mut command, &case.path("run.log"));
        let image = case.path("job.1.ckpt");
        until("an image", || image.exists().then_some(()));
        let orphan = fs::read_to_string(case.path("orphan.pid")).expect("it was written");
        let orphan: i32 = orphan.trim().parse().expect("it is a pid");
        let root = status_field(orphan, "PPid").expect("it lives");
        assert_eq!(root, run.pid.to_string(), "ckpt run has adopted the orphan");
        let children = run.descendants();
        for pid in &children {
            let pid = nix::unistd::Pid::from_raw(*pid);
            let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
        }
        assert_eq!(
            until("the end of ckpt run", || run.ended()),
            Ended::Exited(137)
        );
        common::job::reap_orphans(&children);

        let mut job = restored(case, &image, &[]);
        assert!(status_field(orphan, "PPid").is_some(), "the orphan is back");
        fs::write(case.path("go"), "").expect("the test's directory is writable");
        assert_eq!(until("its end", || job.ended()), Ended::Exited(7));
        let out = fs::read_to_string(case.path("out")).expect("the orphan wrote it");
        assert_eq!(out.trim(), orphan.to_string());
        common::job::reap_orphans(&[orphan]);
    });
}

/// Two orphans that share memory: no common ancestor is left that could map it for both.
#[test]
fn memory_shared_by_orphans_is_refused() {
    isolated("memory_shared_by_orphans_is_refused", |case| {
        case.needs_program("python3", "python3");
        let share = "import mmap, os, time\n\
                     shared = mmap.mmap(-1, 4096)\n\
                     for _ in range(2):\n    \
                         if os.fork() == 0:\n        \
                             while not os.path.exists('go'): time.sleep(0.02)\n        \
                             os._exit(0)\n";
        fs::write(case.path("share.py"), share).expect("the test's directory is writable");
        let mut command = Command::new(CKPT);
        let script = "python3 share.py; until [ -e go ]; do sleep 0.02; done; exit 5";
        command
            .args(["run", "--name=job", "--interval=1s", "--dir=.", "--"])
            .args(["sh", "-c", script])
            .current_dir(case.dir());
        let log = case.path("run.log");
        let job = common::start(&mut command, &log);
        let refused = |times: usize| {
            until("the refusal", || {
                let said = fs::read_to_string(&log).unwrap_or_default();
                let said = said.matches("shares anonymous memory").count();
                (said >= times).then(|| fs::read_dir(case.dir()).expect("it is ours").count())
            })
        };
        // On a slow machine an image may have been taken before there was anything to refuse.
        assert_eq!(refused(1), refused(3), "an image in spite of it");
        fs::write(case.path("go"), "").expect("the test's directory is writable");
        assert_eq!(job.wait(), Ended::Exited(5));
        common::look::assert_no_process_left();
    });
}
