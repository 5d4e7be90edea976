//! Jobs in user namespaces with several ids, as rootless containers have them. What an ordinary user
//! is given (`/etc/subuid`) is another file in each test's mount namespace.

use crate::common;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::isolate::open_to_all;
use crate::common::look::{assert_no_process_left, children, status_field};
use crate::common::refused::FAILED;
use crate::common::tool::{CKPT, RESTORE};
use crate::common::{Case, Ended, Job, isolated, run, start, until};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;

/// Root with a worker who is another user with groups, each of whom makes a new file all the time: a
/// symbolic link, which is never open when a checkpoint is taken.
const WORKERS: &str = r#"
import os, signal, sys, time
worker = os.fork()
if worker == 0:
    os.setgroups([33, 44])
    os.setresgid(33, 33, 33)
    os.setresuid(33, 33, 33)
name = "worker" if worker == 0 else "root"
def end(*_):
    if worker:
        os.kill(worker, signal.SIGTERM)
        os.waitpid(worker, 0)
    sys.exit(7)
signal.signal(signal.SIGTERM, end)
n = 0
while True:
    n += 1
    try:
        os.symlink(f"{n} {os.getresuid()} {os.getresgid()} {os.getgroups()}", f"{name}.next")
    except FileExistsError:
        pass  # Of one that was killed in between, or of a clone.
    try:
        os.rename(f"{name}.next", name)
    except FileNotFoundError:
        pass  # A clone was faster.
    time.sleep(0.01)
"#;

/// Who an ordinary user is here, and what that one is given.
const USER: u32 = 65534;
const FIRST: u32 = 200_000;

/// Those two files with these lines, for this test alone.
fn give(case: &Case, lines: &str) {
    for file in ["subuid", "subgid"] {
        let ours = case.path(file);
        fs::write(&ours, lines).expect("the test's directory is writable");
        let place = format!("/etc/{file}");
        if !Path::new(&place).exists() {
            case.skip(&format!("{place} (uidmap)"));
        }
        let none = None::<&str>;
        mount(Some(&ours), place.as_str(), none, MsFlags::MS_BIND, none).expect("we are root");
    }
}

fn take_away() {
    for file in ["/etc/subuid", "/etc/subgid"] {
        umount2(file, MntFlags::empty()).expect("it was mounted");
    }
}

fn prepare(case: &Case) {
    case.needs_root();
    case.needs_program("newuidmap", "uidmap");
    give(case, &format!("nobody:{FIRST}:65536\n"));
    open_to_all(case.dir());
}

/// A program of the ordinary user, with these groups.
fn by_user(case: &Case, program: &Path, groups: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", groups]);
    command.arg(program).current_dir(case.dir());
    command
}

const NO_GROUPS: &str = "--clear-groups";
const GROUPS: &str = "--groups=4242,65534";

/// Who takes checkpoints and restores.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Root,
    User(&'static str),
}

impl By {
    fn command(self, case: &Case, program: &str) -> Command {
        match self {
            By::Root => {
                let mut command = Command::new(program);
                command.current_dir(case.dir());
                command
            }
            By::User(groups) => by_user(case, Path::new(program), groups),
        }
    }
}

/// A program in a user and pid namespace, of which it is the first process if `first`.
fn contained(case: &Case, groups: &str, maps: &[&str], program: &[&str]) -> (Job, i32) {
    let mut command = by_user(case, Path::new("unshare"), groups);
    command.args(maps).args(["--pid", "--fork", "--mount-proc"]);
    let log = case.open_log("job.log");
    let outer = start(command.args(program), &log);
    let is_first = |pid: &i32| status_field(*pid, "NSpid").is_some_and(|i| i.ends_with("\t1"));
    // Other children map its ids.
    let first = until("the first process", || {
        children(outer.pid).into_iter().find(is_first)
    });
    (outer, first)
}

fn workers(case: &Case, groups: &str) -> (Job, i32) {
    let maps = ["--map-auto", "--map-root-user"];
    let found = contained(case, groups, &maps, &[case.system_python(), "-c", WORKERS]);
    both_write(case);
    found
}

fn both_write(case: &Case) {
    until("both", || {
        written(case, "root").and(written(case, "worker"))
    });
}

/// What one of them has written last, and who has it outside.
fn written(case: &Case, name: &str) -> Option<(u32, String, (u32, u32))> {
    let text = fs::read_link(case.path(name)).ok()?;
    let text = text.to_str().expect("it is ASCII");
    let (number, rest) = text.split_once(' ')?;
    let meta = fs::symlink_metadata(case.path(name)).ok()?;
    Some((number.parse().ok()?, rest.into(), (meta.uid(), meta.gid())))
}

/// They go on, each as the one who it is.
fn work(case: &Case, outside: u32) {
    for (name, who, ids) in [
        ("root", "(0, 0, 0) (0, 0, 0)", (USER, USER)),
        (
            "worker",
            "(33, 33, 33) (33, 33, 33) [33, 44]",
            (outside, outside),
        ),
    ] {
        let number = || written(case, name).map_or(0, |w| w.0);
        let before = number();
        until(name, || (number() > before + 5).then_some(()));
        let (_, says, owner) = written(case, name).expect("it writes");
        assert!(says.starts_with(who), "{name} says {says}");
        assert_eq!(owner, ids, "{name}");
    }
}

fn id_map(pid: i32) -> Vec<String> {
    ["uid_map", "gid_map", "setgroups"]
        .map(|file| fs::read_to_string(format!("/proc/{pid}/{file}")).expect("it lives"))
        .to_vec()
}

fn killed(case: &Case, by: By, pid: i32) -> PathBuf {
    let image = case.path("job.ckpt");
    let _ = fs::remove_file(&image);
    let mut command = by.command(case, CKPT);
    command.args(["attach", &pid.to_string(), "--kill", "-o", "job.ckpt"]);
    run(case, &mut command).ok();
    image
}

fn restored(case: &Case, by: By) -> Job {
    let out = run(
        case,
        by.command(case, RESTORE).args(["job.ckpt", "--detach"]),
    );
    Job::of(out.ok().trim().parse().expect("a pid"))
}

/// Images change hands between root and the user.
fn owned_by(case: &Case, by: By) {
    let owner = match by {
        By::Root => 0,
        By::User(_) => USER,
    };
    std::os::unix::fs::chown(case.path("job.ckpt"), Some(owner), Some(owner)).expect("we are root");
}

fn lives(case: &Case, all: &[By]) {
    prepare(case);
    let (outer, first) = workers(case, NO_GROUPS);
    let outside = FIRST + 32;
    work(case, outside);
    let maps = id_map(first);
    killed(case, all[0], first);
    outer.wait();
    assert_no_process_left();
    for (life, &by) in all.iter().enumerate() {
        owned_by(case, by);
        let mut job = restored(case, by);
        work(case, outside);
        assert_eq!(id_map(job.pid), maps);
        assert_eq!(status_field(job.pid, "Groups").as_deref(), Some(""));
        match all.get(life + 1) {
            Some(&next) => {
                killed(case, next, job.pid);
                assert_eq!(until("its end", || job.ended()), Ended::Killed(9));
            }
            None => {
                job.signal(Signal::SIGTERM);
                assert_eq!(until("its end", || job.ended()), Ended::Exited(7));
            }
        }
        assert_no_process_left();
    }
}

#[test]
fn several_ids_of_an_ordinary_user() {
    isolated("several_ids_of_an_ordinary_user", |case| {
        lives(case, &[By::User(NO_GROUPS); 3]);
    });
}

#[test]
fn several_ids_by_root_and_user() {
    isolated("several_ids_by_root_and_user", |case| {
        lives(case, &[By::Root, By::User(NO_GROUPS), By::Root]);
    });
}

/// A program below the first process; and clones of it at once.
#[test]
fn clones_of_a_part() {
    isolated("clones_of_a_part", |case| {
        prepare(case);
        let python = format!("{} -c \"$0\" & wait", case.system_python());
        let maps = ["--map-auto", "--map-root-user"];
        let (outer, first) = contained(case, NO_GROUPS, &maps, &["bash", "-c", &python, WORKERS]);
        both_write(case);
        let part = children(first)[0];
        killed(case, By::User(NO_GROUPS), part);
        outer.kill();
        assert_no_process_left();
        let all = [(); 3].map(|()| restored(case, By::User(NO_GROUPS)));
        for job in all {
            work(case, FIRST + 32);
            let init = status_field(job.pid, "PPid").unwrap().parse().unwrap();
            let job = Job::behind(std::mem::ManuallyDrop::new(job).pid, init);
            job.signal(Signal::SIGTERM);
            assert_eq!(job.wait(), Ended::Exited(7));
        }
        assert_no_process_left();
    });
}

/// The creator of the namespace has no id inside.
#[test]
fn without_the_owners_id() {
    isolated("without_the_owners_id", |case| {
        prepare(case);
        let program = "trap 'exit 7' TERM; while :; do echo > next; mv next file; sleep 0.01; done";
        let maps = ["--map-auto", "--setuid=5", "--setgid=6"];
        let (outer, first) = contained(case, NO_GROUPS, &maps, &["bash", "-c", program]);
        let writes = || {
            let _ = fs::remove_file(case.path("file"));
            let owner = || {
                let meta = fs::metadata(case.path("file")).ok()?;
                Some((meta.uid(), meta.gid()))
            };
            assert_eq!(until("its file", owner), (FIRST + 5, FIRST + 6));
        };
        writes();
        killed(case, By::Root, first);
        outer.wait();
        for by in [By::User(NO_GROUPS), By::Root] {
            owned_by(case, by);
            let mut job = restored(case, by);
            writes();
            if by == By::Root {
                job.signal(Signal::SIGTERM);
                assert_eq!(until("its end", || job.ended()), Ended::Exited(7));
            } else {
                killed(case, by, job.pid);
                assert_eq!(until("its end", || job.ended()), Ended::Killed(9));
            }
            assert_no_process_left();
        }
    });
}

/// Groups that the user had outside, and that nothing inside has a number for.
#[test]
fn groups_from_outside() {
    isolated("groups_from_outside", |case| {
        prepare(case);
        let (outer, first) = workers(case, GROUPS);
        assert_eq!(status_field(first, "Groups").as_deref(), Some("4242 65534"));
        killed(case, By::User(GROUPS), first);
        outer.wait();
        let out = run(
            case,
            By::User(NO_GROUPS).command(case, RESTORE).arg("job.ckpt"),
        );
        out.refused(
            FAILED,
            &["process 1", "[4242, 65534]", "yours are []", "as root"],
        );
        assert_no_process_left();
        for by in [By::User(GROUPS), By::Root] {
            owned_by(case, by);
            let mut job = restored(case, by);
            work(case, FIRST + 32);
            assert_eq!(
                status_field(job.pid, "Groups").as_deref(),
                Some("4242 65534")
            );
            let worker = children(job.pid)[0];
            let groups = format!("{} {}", FIRST + 32, FIRST + 43);
            assert_eq!(status_field(worker, "Groups"), Some(groups));
            job.signal(Signal::SIGTERM);
            assert_eq!(until("its end", || job.ended()), Ended::Exited(7));
            assert_no_process_left();
        }
    });
}

/// With the set-uid helpers at work, too.
#[test]
fn restore_is_killed_at_any_moment() {
    isolated("restore_is_killed_at_any_moment", |case| {
        prepare(case);
        let (outer, first) = workers(case, NO_GROUPS);
        killed(case, By::User(NO_GROUPS), first);
        outer.wait();
        case.open_log("restore.log");
        let restore = || {
            let mut command = By::User(NO_GROUPS).command(case, RESTORE);
            command.arg("job.ckpt");
            command
        };
        let count = || written(case, "worker").map_or(0, |w| w.0);
        common::moments::restore_is_killed(case, 40, &restore, "python3", &count);
    });
}

/// What is missing is told before anything is created.
#[test]
fn not_given() {
    isolated("not_given", |case| {
        prepare(case);
        let (outer, first) = workers(case, NO_GROUPS);
        killed(case, By::User(NO_GROUPS), first);
        outer.wait();
        let refused = |words: &[&str], program: &str, path: Option<&Path>| {
            let mut command = By::User(NO_GROUPS).command(case, program);
            if let Some(path) = path {
                command.env("PATH", path);
            }
            let code = if program == CKPT { 1 } else { FAILED };
            if program == CKPT {
                command.arg("check");
            }
            let out = run(case, command.arg("job.ckpt"));
            match program == CKPT {
                true => assert!(words.iter().all(|w| out.stdout.contains(w)), "{out:?}"),
                false => out.refused(code, words),
            }
            assert_no_process_left();
        };
        // setpriv is found by its whole path.
        let setpriv = case.path("setpriv");
        std::os::unix::fs::symlink("/usr/bin/setpriv", &setpriv).expect("it is writable");
        refused(
            &["no newuidmap", "package uidmap"],
            RESTORE,
            Some(case.dir()),
        );
        take_away();
        give(case, &format!("nobody:{FIRST}:1000\n"));
        let line = format!("nobody:{FIRST}:");
        refused(&["/etc/subuid does not give", &line], RESTORE, None);
        refused(&["/etc/subgid does not give", &line], RESTORE, None);
        refused(&["/etc/subuid does not give", &line], CKPT, None);
        // By number as by name.
        take_away();
        give(case, &format!("{USER}:{FIRST}:65536\n"));
        let mut job = restored(case, By::User(NO_GROUPS));
        work(case, FIRST + 32);
        job.signal(Signal::SIGTERM);
        assert_eq!(until("its end", || job.ended()), Ended::Exited(7));
        assert_no_process_left();
    });
}
