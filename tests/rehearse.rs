//! `attach --rehearse`: a copy of the job is restored beside it and compared; an image whose copy is not as
//! the job is never gets its name.

use std::fs;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::look::{assert_let_go, children, status_field};
use crate::common::tool::{CKPT, leftovers};
use crate::common::{
    Case, Ended, Fixture, Looks, attach, ckpt, fixture, isolated, isolated_as_user, run, start,
    until,
};

/// One of each kind: registers and waiting calls, timers, signals, descriptors, memory, objects of the IPC
/// namespace, names of sockets, terminals, trees.
const KINDS: &[&str] = &[
    "counter",
    "threads",
    "restart_nanosleep",
    "timers_posix",
    "timerfd",
    "sigpending",
    "xstate",
    "epoll",
    "pipe",
    "memfd",
    "fd_deleted",
    "file_shared",
    "protnone",
    "sysv_shm",
    "sysv_sem",
    "sock_abstract",
    "sock_rights",
    "pty_pair",
    "flock_self",
    "limits",
    "tree_session_gone",
    "tree_vm_threads",
    "tree_cow",
];

fn start_here(case: &Case, name: &str) -> Fixture {
    let command = Command::new(case.fixtures().join(name));
    crate::common::fixture::start_in(case, name, &format!("run-{name}"), command)
}

/// Everything comes back as it was, and the job, its files and its names are as before.
fn comes_back(case: &Case) {
    for name in KINDS {
        let target = start_here(case, name);
        let before = Looks::at(target.pid());
        let (image, figures) = attach(case, target.pid(), "job.ckpt", &["--rehearse"]);
        assert_eq!(figures["rehearsed"], true);
        assert_let_go(target.pid());
        before.assert_same(target.pid(), &[]);
        assert_eq!(leftovers(case.dir()), ["job.ckpt"], "{name}");
        ckpt(case, ["verify", "-q", "job.ckpt"]).ok();
        target.passes();
        fs::remove_file(image).expect("it is there");
    }
    nobody_else();
}

/// Nothing is left of a copy.
fn nobody_else() {
    until("the copies to be gone", || {
        let _ = nix::sys::wait::waitpid(None, Some(nix::sys::wait::WaitPidFlag::WNOHANG));
        children(1).is_empty().then_some(())
    });
}

#[test]
fn comes_back_as_it_was() {
    isolated("comes_back_as_it_was", comes_back);
}

#[test]
fn comes_back_as_it_was_of_an_ordinary_user() {
    isolated_as_user("comes_back_as_it_was_of_an_ordinary_user", comes_back);
}

/// A restore that changes something is found out, by name, and the job goes on.
#[test]
#[cfg(feature = "faults")]
fn what_differs_is_told() {
    isolated("what_differs_is_told", |case| {
        for (fault, words) in [
            ("rehearse-mask", ["signal_mask was", "came back as"]),
            ("rehearse-page", ["the page at", "came back as"]),
        ] {
            let target = start_here(case, "counter");
            let before = Looks::at(target.pid());
            let mut command = Command::new(CKPT);
            command
                .args(["attach", &target.pid().to_string(), "--rehearse", "--kill"])
                .args(["-o", "job.ckpt"])
                .current_dir(case.dir());
            let out = run(case, command.env("CKPT_FAULT", fault));
            out.refused(
                1,
                &[&format!("process {}", target.pid()), words[0], words[1]],
            );
            out.refused(1, &["it goes on", "no image is left"]);
            assert_let_go(target.pid());
            before.assert_same(target.pid(), &[]);
            assert!(leftovers(case.dir()).is_empty());
            target.passes();
            fs::remove_dir_all(case.path("run-counter")).expect("it is there");
        }
        nobody_else();
    });
}

/// What a copy would take from the job is refused by name.
#[test]
fn what_cannot_be_rehearsed_is_refused() {
    isolated("what_cannot_be_rehearsed_is_refused", |case| {
        for name in ["fifo", "sock_named", "lease"] {
            let target = start_here(case, name);
            let before = Looks::at(target.pid());
            let pid = target.pid().to_string();
            let out = ckpt(case, ["attach", &pid, "--rehearse", "-o", "job.ckpt"]);
            out.refused(1, &["cannot be rehearsed", "leave --rehearse out"]);
            assert_let_go(target.pid());
            before.assert_same(target.pid(), &[]);
            assert!(leftovers(case.dir()).is_empty());
            target.passes();
        }
    });
}

/// The image has to be a file.
#[test]
fn not_into_a_pipe() {
    isolated("not_into_a_pipe", |case| {
        let target = fixture(case, "counter");
        let line = format!(
            "{CKPT} attach {} --rehearse -o - | cat; exit ${{PIPESTATUS[0]}}",
            target.pid()
        );
        let out = run(case, Command::new("bash").args(["-c", &line]));
        out.refused(2, &["--rehearse", "-o FILE"]);
        target.passes();
    });
}

/// Rehearsed, killed, restored.
#[test]
fn then_killed() {
    isolated("then_killed", |case| {
        let mut target = fixture(case, "tree_pipe");
        let (image, _) = attach(case, target.pid(), "job.ckpt", &["--rehearse", "--kill"]);
        let ended = until("its end", || target.job.ended());
        assert_eq!(ended, Ended::Killed(9));
        crate::common::job::reap_orphans(&crate::common::tool::descendants_in(case, &image));
        target.continued_by(crate::common::restored(case, &image, &[]));
        target.passes();
    });
}

/// A job in a pid namespace of its own, and one that is its first process.
#[test]
fn in_namespaces() {
    isolated("in_namespaces", |case| {
        const COUNT: &str = "while :; do n=$((n + 1)); ln -sfn $n count; done";
        let isolated: &[&str] = &[CKPT, "run", "--isolated", "--", "sh", "-c", COUNT];
        let first: &[&str] = &["unshare", "-p", "-f", "--mount-proc", "sh", "-c", COUNT];
        for (command, depth) in [(isolated, 2), (first, 1)] {
            let mut outer = Command::new(command[0]);
            outer.args(&command[1..]).current_dir(case.dir());
            let mut outer = start(&mut outer, &case.path("job.log"));
            crate::common::counter::counts(case);
            let pid = until("the job", || {
                (0..depth).try_fold(outer.pid, |pid, _| children(pid).first().copied())
            });
            let (_, figures) = attach(case, pid, "job.ckpt", &["--rehearse"]);
            assert_eq!(figures["rehearsed"], true);
            crate::common::counter::counts(case);
            kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it lives");
            until("its end", || outer.ended());
            nobody_else();
            fs::remove_file(case.path("count")).expect("it is there");
        }
    });
}

/// At whatever step of the copy's restore `ckpt` is killed, nothing is left of it, and the job goes on.
#[test]
#[cfg(feature = "faults")]
fn killed_meanwhile() {
    isolated("killed_meanwhile", |case| {
        let target = fixture(case, "tree_pipe");
        let before = Looks::at(target.pid());
        let ours = children(1);
        for step in ["restore-spawned", "restore-filled", "restore-release"] {
            let here = case.path(&format!("here-{step}"));
            let mut command = Command::new(CKPT);
            command
                .args(["attach", &target.pid().to_string(), "--rehearse"])
                .args(["--kill", "-o", "job.ckpt"])
                .current_dir(case.dir())
                .env("CKPT_FAULT", format!("{step}:wait={}", here.display()));
            let mut attach = start(&mut command, &case.path("attach.log"));
            until("the step", || here.exists().then_some(()));
            kill(Pid::from_raw(attach.pid), Signal::SIGKILL).expect("it waits");
            assert_eq!(until("its end", || attach.ended()), Ended::Killed(9));
            until("the copy to be gone", || {
                for pid in children(1).into_iter().filter(|pid| !ours.contains(pid)) {
                    let _ = nix::sys::wait::waitpid(
                        Pid::from_raw(pid),
                        Some(nix::sys::wait::WaitPidFlag::WNOHANG),
                    );
                }
                (children(1) == ours).then_some(())
            });
            until("the job to be let go", || {
                (status_field(target.pid(), "TracerPid")? == "0").then_some(())
            });
            before.assert_same(target.pid(), &[]);
            assert!(!case.path("job.ckpt").exists());
        }
        target.passes();
    });
}
