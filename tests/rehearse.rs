//! `attach --rehearse`: a copy of the job is restored beside it and compared; an image whose copy is not as
//! the job is never gets its name.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::counter::counts;
use crate::common::look::{all_stopped, assert_let_go, children, status_field};
use crate::common::tool::{CKPT, leftovers};
use crate::common::{
    Case, Ended, Fixture, Looks, attach, ckpt, fixture, isolated, isolated_as_user, run, start,
    until,
};

/// One of each kind: registers and waiting calls, timers, signals, descriptors, memory, objects of the IPC
/// namespace, names of sockets, terminals, locks, trees; and what a copy would take from the job or give to it if it had
/// the job's own files, names and queues.
const KINDS: &[&str] = &[
    "counter",
    "fd_dir",
    "fd_hardlink",
    "fd_opath",
    "fd_removed",
    "fifo",
    "inotify",
    "inotify_nameless",
    "inotify_open",
    "lease",
    "mqueue",
    "mq_notify",
    "sock_urgent",
    "sock_filter",
    "sock_named",
    "sock_listen",
    "sock_dgram",
    "sysv_msg",
    "tree_fifo",
    "tree_locks",
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

/// Type and mode, inode, size, times but that of access, and contents of a file.
type Seen = (u32, u64, u64, [i64; 4], Vec<u8>);

/// All that is below a directory.
fn everything_in(directory: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut found = BTreeMap::new();
    let mut next = vec![directory.to_owned()];
    while let Some(path) = next.pop() {
        let meta = fs::symlink_metadata(&path).expect("it stays");
        if meta.is_dir() {
            let entries = fs::read_dir(&path).expect("it stays").flatten();
            next.extend(entries.map(|entry| entry.path()));
        }
        let contents = match meta.is_file() && meta.len() < 1 << 24 {
            true => fs::read(&path).unwrap_or_default(),
            false => Vec::new(),
        };
        let times = [
            meta.mtime(),
            meta.mtime_nsec(),
            meta.ctime(),
            meta.ctime_nsec(),
        ];
        let is = (meta.mode(), meta.ino(), meta.len(), times, contents);
        found.insert(path, is);
    }
    found
}

/// Everything comes back as it was, and the job, its files and its names are as before.
fn comes_back(case: &Case) {
    for name in KINDS {
        let target = start_here(case, name);
        let before = Looks::at(target.pid());
        let directory = case.path(&format!("run-{name}"));
        let files = match name.starts_with("inotify") || *name == "lease" {
            // Looking is what it watches, and what breaks a lease.
            true => BTreeMap::new(),
            false => everything_in(&directory),
        };
        let (image, figures) = attach(case, target.pid(), "job.ckpt", &["--rehearse"]);
        assert_eq!(figures["rehearsed"], true);
        assert_let_go(target.pid());
        if !files.is_empty() {
            assert_eq!(everything_in(&directory), files, "{name}");
        }
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
            ("rehearse-mask", ["signal mask was", "comes back as"]),
            ("rehearse-page", ["the page at", "comes back as"]),
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
            out.refused(1, &["the job continues", "no image is left"]);
            assert_let_go(target.pid());
            before.assert_same(target.pid(), &[]);
            assert!(leftovers(case.dir()).is_empty());
            target.passes();
            fs::remove_dir_all(case.path("run-counter")).expect("it is there");
        }
        nobody_else();
    });
}

/// A job that writes through a shared mapping, counts on, and has a pipe of others, beside which a copy is made: the
/// job goes on meanwhile, and what it has written there is there.
#[cfg(feature = "faults")]
fn goes_on_meanwhile(case: &Case) {
    let script = "import mmap, os, time\n\
                  f = open('data', 'wb+'); f.truncate(1 << 20); m = mmap.mmap(f.fileno(), 0)\n\
                  log = open('log', 'a', buffering=1); n = 0\n\
                  while True:\n n += 1; m[:8] = n.to_bytes(8, 'little'); log.write('%d\\n' % n); \
                  os.symlink(str(n), 'new'); os.rename('new', 'count'); time.sleep(0.005)";
    let line = format!(
        "sleep 1000 | (exec 9<&0 </dev/null; exec {} -c \"$0\")",
        case.system_python()
    );
    let mut command = Command::new("bash");
    command.args(["-c", &line, script]).current_dir(case.dir());
    let mut shell = start(&mut command, &case.path("job.log"));
    counts(case);
    let is =
        |pid: &i32| fs::read(format!("/proc/{pid}/comm")).is_ok_and(|c| c.starts_with(b"python"));
    let pid = until("it", || children(shell.pid).into_iter().find(is));
    let here = case.path("here");
    let mut command = Command::new(CKPT);
    command
        .args(["attach", &pid.to_string(), "--rehearse", "-o", "job.ckpt"])
        .current_dir(case.dir())
        .env(
            "CKPT_FAULT",
            format!("restore-filled:hold={}", here.display()),
        );
    std::thread::scope(|scope| {
        let attach = scope.spawn(|| run(case, &mut command));
        until("the copy", || here.exists().then_some(()));
        counts(case);
        fs::remove_file(&here).expect("it is ours");
        attach.join().expect("it does not panic").ok();
    });
    counts(case);
    let log = fs::read_to_string(case.path("log")).expect("it is written");
    let lines = log.lines().filter_map(|line| line.parse::<u32>().ok());
    assert!(lines.zip(1..).all(|(line, n)| line == n), "{log}");
    let all = shell.descendants();
    shell.kill_and_forget();
    for pid in all {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    nobody_else();
}

fn everybody() -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str()?.parse().ok());
    pids.collect()
}

#[test]
#[cfg(feature = "faults")]
fn the_job_goes_on_meanwhile() {
    isolated("the_job_goes_on_meanwhile", goes_on_meanwhile);
}

#[test]
#[cfg(feature = "faults")]
fn the_job_goes_on_meanwhile_of_an_ordinary_user() {
    isolated_as_user(
        "the_job_goes_on_meanwhile_of_an_ordinary_user",
        goes_on_meanwhile,
    );
}

/// Where no namespaces can be made it is said so, and what to do, before the job is touched.
#[test]
fn without_namespaces_it_is_refused() {
    isolated_as_user("without_namespaces_it_is_refused", |case| {
        case.needs_program("setpriv", "util-linux");
        let line = "echo 0 > /proc/sys/user/max_user_namespaces || exit 77\n\
                    exec setpriv --bounding-set -all --inh-caps -all --ambient-caps -all sh -c '\n\
                    sleep 1000 & \"$0\" attach $! --rehearse -o job.ckpt; code=$?\n\
                    grep -q \"TracerPid:.0$\" /proc/$!/status || code=50; kill $!; exit $code' \"$0\"";
        let mut command = Command::new("unshare");
        command
            .args(["--user", "--map-root-user", "sh", "-c", line, CKPT])
            .current_dir(case.dir());
        let out = run(case, &mut command);
        if out.code() == 77 {
            case.skip("/proc/sys/user");
        }
        out.refused(
            1,
            &[
                "a rehearsal needs",
                "namespace",
                "user.max_user_namespaces",
                "as root",
            ],
        );
        assert!(leftovers(case.dir()).is_empty());
    });
}

/// With `--stop` it is stopped when the copy has been found to be as it is; while `ckpt run` takes checkpoints, by
/// itself, of the same job.
#[test]
fn with_stop_and_beside_an_interval() {
    isolated("with_stop_and_beside_an_interval", |case| {
        let target = fixture(case, "counter");
        let (_, figures) = attach(case, target.pid(), "job.ckpt", &["--rehearse", "--stop"]);
        assert_eq!(figures["rehearsed"], true);
        assert!(all_stopped(target.pid()));
        kill(Pid::from_raw(target.pid()), Signal::SIGCONT).expect("it is stopped");
        let args = ["--rehearse", "--kill", "--no-check"];
        let mut target = target;
        attach(case, target.pid(), "job.ckpt", &args);
        assert_eq!(until("its end", || target.job.ended()), Ended::Killed(9));
        target.continued_by(crate::common::restored(case, &case.path("job.ckpt"), &[]));
        target.passes();
        fs::create_dir(case.path("images")).expect("the directory is writable");
        let mut command = Command::new(CKPT);
        let line = "while :; do n=$((n + 1)); ln -sfn $n count; done";
        command
            .args([
                "run",
                "--interval",
                "1",
                "--dir",
                "images",
                "--",
                "sh",
                "-c",
                line,
            ])
            .current_dir(case.dir());
        let mut outer = start(&mut command, &case.path("run.log"));
        counts(case);
        until("a checkpoint", || {
            fs::read_dir(case.path("images"))
                .into_iter()
                .flatten()
                .flatten()
                .find(|e| e.path().extension().is_some_and(|x| x == "ckpt"))
        });
        let is = |pid: &i32| fs::read(format!("/proc/{pid}/comm")).is_ok_and(|c| c == b"sh\n");
        let pid = until("the job", || children(outer.pid).into_iter().find(is));
        let again = || {
            let out = ckpt(
                case,
                [
                    "attach",
                    &pid.to_string(),
                    "--rehearse",
                    "-o",
                    "second.ckpt",
                ],
            );
            // The other one may have it just now.
            (!out.stderr.contains("traced")).then_some(out)
        };
        until("a rehearsal", again).ok();
        counts(case);
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it lives");
        until("its end", || outer.ended());
        crate::common::rounds::everybody_reaped();
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
            counts(case);
            let pid = until("the job", || {
                (0..depth).try_fold(outer.pid, |pid, _| children(pid).first().copied())
            });
            let (_, figures) = attach(case, pid, "job.ckpt", &["--rehearse"]);
            assert_eq!(figures["rehearsed"], true);
            counts(case);
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
        dies_with_ckpt(case, target.pid(), Whole::One);
        dies_with_ckpt(case, target.pid(), Whole::All);
        target.passes();
    });
}

/// The same of a copy whose root is the first process of its namespace.
#[test]
#[cfg(feature = "faults")]
fn killed_meanwhile_of_a_first_process() {
    isolated("killed_meanwhile_of_a_first_process", |case| {
        const COUNT: &str = "while :; do n=$((n + 1)); ln -sfn $n count; done";
        let mut outer = Command::new("unshare");
        outer
            .args(["-p", "-f", "--mount-proc", "sh", "-c", COUNT])
            .current_dir(case.dir());
        let mut outer = start(&mut outer, &case.path("job.log"));
        counts(case);
        let pid = until("the job", || children(outer.pid).first().copied());
        dies_with_ckpt(case, pid, Whole::One);
        dies_with_ckpt(case, pid, Whole::All);
        counts(case);
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it lives");
        until("its end", || outer.ended());
        nobody_else();
    });
}

/// Who is killed: the process that was called, or everybody who executes `ckpt`.
#[derive(Clone, Copy, PartialEq)]
#[cfg(feature = "faults")]
enum Whole {
    One,
    All,
}

#[cfg(feature = "faults")]
fn dies_with_ckpt(case: &Case, pid: i32, whole: Whole) {
    let is_ckpt = |pid: &i32| {
        fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == Path::new(CKPT))
    };
    let before = Looks::at(pid);
    let all = everybody();
    for step in [
        "restore-spawned",
        "restore-filled",
        "restore-release",
        "rehearsed",
    ] {
        let here = case.path("here");
        let mut command = Command::new(CKPT);
        command
            .args(["attach", &pid.to_string(), "--rehearse"])
            .args(["--kill", "-o", "job.ckpt"])
            .current_dir(case.dir())
            .env("CKPT_FAULT", format!("{step}:wait={}", here.display()));
        let mut attach = start(&mut command, &case.path("attach.log"));
        until("the step", || here.exists().then_some(()));
        kill(Pid::from_raw(attach.pid), Signal::SIGKILL).expect("it waits");
        if whole == Whole::All {
            let new = everybody().into_iter().filter(|pid| !all.contains(pid));
            for pid in new.filter(is_ckpt) {
                // The end of one may have been that of others.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        assert_eq!(until("its end", || attach.ended()), Ended::Killed(9));
        until("the copy to be gone", || {
            let new = everybody().into_iter().filter(|pid| !all.contains(pid));
            let new: Vec<i32> = new.collect();
            for pid in &new {
                let _ = nix::sys::wait::waitpid(
                    Pid::from_raw(*pid),
                    Some(nix::sys::wait::WaitPidFlag::WNOHANG),
                );
            }
            new.is_empty().then_some(())
        });
        until("the job to be let go", || {
            (status_field(pid, "TracerPid")? == "0").then_some(())
        });
        before.assert_same(pid, &[]);
        assert!(!case.path("job.ckpt").exists());
        fs::remove_file(here).expect("it is there");
    }
}
