//! Jobs whose root is the first process of a pid namespace, as in a container: attached to from
//! outside, and restored as the first process of a new one.

use crate::common;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::common::counter::{count, counts};
use crate::common::look::{
    all_stopped, assert_let_go, assert_no_process_left, children, status_field,
};
use crate::common::refused::FAILED;
use crate::common::tool::{CKPT, RESTORE, leftovers, restored_in_front};
use crate::common::{
    Case, Ended, Job, attach, ckpt, isolated, isolated_as_user, restore_cmd, restored, run, start,
    until,
};
use ckpt_tracer::fault::Step;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Counts in the link `count`, is left orphans and has a child that does not end; when it is asked to
/// end it says who it is and what its session and group are. Its code is 7.
const COUNTER: &str = r#"
trap 'read -r _ _ _ parent group session _ < /proc/self/stat
      echo "$$ $parent $group $session" > result; exit 7' TERM
sleep 1000 &
while :; do n=$((n + 1)); ln -sfn $n count; (true &); sleep 0.01; done
"#;

/// What it says of itself, if it leads a session and if it does not.
const ALONE: &str = "1 0 0 0";
const LEADER: &str = "1 0 1 1";

/// `unshare` and the first process of its namespace.
struct Container {
    outer: Job,
    first: i32,
}

fn container(case: &Case, before: &[&str]) -> Container {
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--mount-proc"]);
    command.args(before).args(["bash", "-c", COUNTER]);
    let outer = start(command.current_dir(case.dir()), &case.path("job.log"));
    counts(case);
    let first = children(outer.pid)[0];
    Container { outer, first }
}

impl Container {
    /// An image of it, with which it ends, and so does who was brought into it.
    fn killed_with(self, case: &Case, entered: Job) {
        attach(case, self.first, "job.ckpt", &["--kill"]);
        self.outer.wait();
        entered.wait();
        assert_no_process_left();
    }

    /// An image of it, with which it ends.
    fn killed(self, case: &Case) -> PathBuf {
        let (image, figures) = attach(case, self.first, "job.ckpt", &["--kill"]);
        assert_eq!(figures["pid"], self.first);
        self.outer.wait();
        assert_no_process_left();
        image
    }
}

fn killed(case: &Case) -> PathBuf {
    container(case, &[]).killed(case)
}

fn result(case: &Case) -> String {
    let text = fs::read_to_string(case.path("result")).expect("it was asked to end");
    text.trim().into()
}

/// It is process 1 of another namespace than ours, and no process of ckpt is in it.
fn is_first(pid: i32) {
    let ids = status_field(pid, "NSpid").expect("it lives");
    assert_eq!(ids, format!("{pid}\t1"));
    for child in children(pid) {
        let name = status_field(child, "Name").unwrap_or_default();
        assert!(!name.contains("ckpt"), "{name}");
    }
}

/// A signal that it does not handle is ignored by a namespace's first process.
fn ignores(case: &Case, job: &Job) {
    job.signal(Signal::SIGHUP);
    job.signal(Signal::SIGUSR1);
    counts(case);
}

fn three_lives(case: &Case, before: &[&str], says: &str) {
    let container = container(case, before);
    ckpt(case, ["check", &container.first.to_string()]).ok();
    attach(case, container.first, "job.ckpt", &[]);
    assert_let_go(container.first);
    counts(case);
    let mut image = container.killed(case);
    for life in 1..=3 {
        let mut job = match life {
            2 => restored(case, &image, &[]),
            _ => restored_in_front(case, &image, &[]),
        };
        counts(case);
        is_first(job.pid);
        ignores(case, &job);
        if life == 3 {
            let restore: i32 = status_field(job.pid, "PPid").unwrap().parse().unwrap();
            kill(Pid::from_raw(restore), Signal::SIGTERM).expect("it waits");
            assert_eq!(until("its end", || job.ended()), Ended::Exited(7));
            assert_eq!(result(case), says);
        } else {
            image = attach(case, job.pid, "job.ckpt", &["--kill"]).0;
            let by_us = if life == 2 {
                Ended::Killed(9)
            } else {
                Ended::Exited(137)
            };
            assert_eq!(until("its end", || job.ended()), by_us);
        }
        // Its end is that of its child.
        assert_no_process_left();
    }
}

#[test]
fn three_lives_of_a_container() {
    isolated("three_lives_of_a_container", |case| {
        three_lives(case, &[], ALONE)
    });
}

#[test]
fn three_lives_of_a_session() {
    isolated("three_lives_of_a_session", |case| {
        three_lives(case, &["setsid"], LEADER);
    });
}

#[test]
fn three_lives_of_a_users_container() {
    isolated_as_user("three_lives_of_a_users_container", |case| {
        three_lives(case, &[], ALONE);
    });
}

/// A user namespace in ours: its owner has root's id only inside.
#[test]
fn three_lives_in_a_user_namespace() {
    isolated("three_lives_in_a_user_namespace", |case| {
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--pid", "--fork", "--mount-proc"]);
        command.args(["bash", "-c", COUNTER]);
        let outer = start(command.current_dir(case.dir()), &case.path("job.log"));
        counts(case);
        let first = children(outer.pid)[0];
        let image = Container { outer, first }.killed(case);
        let mut job = restored(case, &image, &[]);
        counts(case);
        is_first(job.pid);
        job.signal(Signal::SIGTERM);
        assert_eq!(until("its end", || job.ended()), Ended::Exited(7));
        assert_eq!(result(case), ALONE);
        assert_no_process_left();
    });
}

/// Only a part of what is in a container: as ever, with our own first process in front.
#[test]
fn a_child_of_the_first() {
    isolated("a_child_of_the_first", |case| {
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
        command.args(["bash", "-c", "bash -c \"$0\" & wait", COUNTER]);
        let outer = start(command.current_dir(case.dir()), &case.path("job.log"));
        counts(case);
        let first = children(outer.pid)[0];
        let inner = children(first)[0];
        let ids = status_field(inner, "NSpid");
        let (image, _) = attach(case, inner, "job.ckpt", &["--kill"]);
        outer.kill();
        assert_no_process_left();
        let mut job = restored(case, &image, &[]);
        counts(case);
        let last = |ids: Option<String>| ids.and_then(|i| Some(i.rsplit_once('\t')?.1.to_owned()));
        assert_eq!(last(status_field(job.pid, "NSpid")), last(ids));
        let parent: i32 = status_field(job.pid, "PPid").unwrap().parse().unwrap();
        assert_eq!(status_field(parent, "Name").as_deref(), Some("ckpt-init"));
        // The one in the foreground is no job.
        let out = ckpt(case, ["attach", &parent.to_string(), "-o", "init.ckpt"]);
        let remedy = format!("ckpt attach {}", job.pid);
        out.refused(
            1,
            &[&format!("process {parent}"), "belongs to ckpt", &remedy],
        );
        job.signal(Signal::SIGTERM);
        let orphan = until("its child to be left alone", || {
            let all = children(parent);
            (all.len() == 1 && all != [job.pid]).then(|| all[0])
        });
        kill(Pid::from_raw(orphan), Signal::SIGKILL).expect("it lives");
        assert_eq!(until("its end", || job.ended()), Ended::Exited(7));
        assert_no_process_left();
    });
}

#[test]
fn clones() {
    isolated("clones", |case| {
        let image = killed(case);
        // They write the same files, and what was just open may be another's by now.
        let clone = |_| restored(case, &image, &["--files=adopt"]);
        let mut all: Vec<Job> = (0..3).map(clone).collect();
        all.iter().for_each(|job| is_first(job.pid));
        counts(case);
        for job in &mut all {
            job.signal(Signal::SIGTERM);
            assert_eq!(until("its end", || job.ended()), Ended::Exited(7));
        }
        assert_no_process_left();
    });
}

/// A process that entered the namespace from outside is not part of the job, which is reported.
#[test]
fn process_from_outside() {
    isolated("process_from_outside", |case| {
        let container = container(case, &[]);
        let target = container.first.to_string();
        let mut command = Command::new("nsenter");
        command.args(["--target", &target, "--pid", "--mount", "sleep", "1000"]);
        let entered = start(&mut command, &case.path("nsenter.log"));
        let name = || status_field(*children(entered.pid).first()?, "Name");
        until("it to be there", || (name()? == "sleep").then_some(()));
        let out = ckpt(case, ["attach", &target, "-o", "job.ckpt"]);
        out.ok();
        let warned = |line: &str| line.contains("(sleep)") && line.contains("not in the image");
        let warnings: Vec<&str> = out.stderr.lines().filter(|line| warned(line)).collect();
        assert_eq!(warnings.len(), 1, "{}", out.stderr);
        container.killed_with(case, entered);
    });
}

/// Left stopped by an attach and by a restore; SIGCONT lets it go on.
#[test]
fn stopped() {
    isolated("stopped", |case| {
        let container = container(case, &[]);
        let (image, _) = attach(case, container.first, "job.ckpt", &["--stop"]);
        let stopped = |pid: i32| until("it to stop", || all_stopped(pid).then_some(()));
        stopped(container.first);
        kill(Pid::from_raw(container.first), Signal::SIGKILL).expect("it is there");
        container.outer.wait();
        let mut job = restored(case, &image, &["--stopped"]);
        stopped(job.pid);
        let before = count(case);
        for pid in [vec![job.pid], job.descendants()].concat() {
            // A child ends when it goes on, and may be waited for at once.
            let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
        }
        until("it to count", || (count(case) > before).then_some(()));
        job.signal(Signal::SIGTERM);
        assert_eq!(until("its end", || job.ended()), Ended::Exited(7));
        assert_no_process_left();
    });
}

/// At each step: a failure is told, and neither it nor a death leaves anything.
#[test]
fn failures() {
    isolated("failures", |case| {
        let image = killed(case);
        for step in Step::ALL.iter().filter(|s| s.name().starts_with("restore")) {
            let mut command = restore_cmd(&image, &[]);
            let out = run(case, command.env("CKPT_FAULT", step.name()));
            out.refused(FAILED, &["fault injected", step.name()]);
            assert_no_process_left();
            let mut command = restore_cmd(&image, &[]);
            let fault = format!("{}:kill", step.name());
            let out = run(case, command.env("CKPT_FAULT", fault));
            out.refused(FAILED, &["was killed"]);
            assert_no_process_left();
        }
        // What the first process itself finds in the way.
        let mut command = Command::new("prlimit");
        let out = run(case, command.args(["--nofile=9:9", RESTORE]).arg(&image));
        out.refused(FAILED, &["numbers of descriptors", "ulimit -n"]);
        assert_no_process_left();
        let keep = run(case, &mut restore_cmd(&image, &["--pids", "keep"]));
        keep.refused(FAILED, &["the pid 1", "taken"]);
        assert_no_process_left();
    });
}

#[test]
fn failures_of_an_attach() {
    isolated("failures_of_an_attach", |case| {
        let container = container(case, &[]);
        let first = container.first.to_string();
        // ckpt may take descriptors itself, nothing is rehearsed, and there is no message queue.
        let elsewhere = [Step::Lending, Step::Unregistered];
        let steps = Step::ALL.iter().filter(|step| !elsewhere.contains(step));
        let of_others = |name: &str| name.starts_with("restore") || name.starts_with("rehearse");
        for step in steps.filter(|s| !of_others(s.name())) {
            for fault in [step.name().to_owned(), format!("{}:kill", step.name())] {
                let mut command = Command::new(CKPT);
                command.args(["attach", &first, "-o", "job.ckpt"]);
                // With --kill no process continues.
                if *step != Step::ReleaseHalf {
                    command.arg("--kill");
                }
                let out = run(
                    case,
                    command.env("CKPT_FAULT", &fault).current_dir(case.dir()),
                );
                assert_ne!(out.code(), 0, "{fault} was not reached");
                until("it to be let go", || {
                    let tracer = status_field(container.first, "TracerPid")?;
                    (tracer == "0").then_some(())
                });
                counts(case);
                leftovers(case.dir())
                    .iter()
                    .for_each(|name| fs::remove_file(case.path(name)).unwrap());
            }
        }
        container.killed(case);
    });
}

/// `restore` is killed at any moment: either the job is not there, or it runs.
#[test]
fn restore_is_killed_at_any_moment() {
    isolated("restore_is_killed_at_any_moment", |case| {
        let image = killed(case);
        let restore = || restore_cmd(&image, &[]);
        common::moments::restore_is_killed(case, 60, &restore, "bash", &|| count(case));
    });
}

/// Inside a container `ckpt` takes part of it as it takes anything anywhere.
#[test]
fn from_inside() {
    isolated("from_inside", |case| {
        let program = "bash -c \"$0\" & while :; do wait; sleep 1; done";
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
        command.args(["bash", "-c", program, COUNTER]);
        let outer = start(command.current_dir(case.dir()), &case.path("job.log"));
        counts(case);
        let first = children(outer.pid)[0];
        let inside = |program: &str, args: &[&str]| {
            let mut command = Command::new("nsenter");
            command.args(["--target", &first.to_string(), "--pid", "--mount"]);
            command.arg(format!("--wd={}", case.dir().display()));
            run(case, command.arg(program).args(args))
                .ok()
                .trim()
                .to_owned()
        };
        let job = children(first)[0];
        let pid = status_field(job, "NSpid").expect("it lives");
        let pid = pid.split('\t').next_back().expect("there is one");
        // All of it, from where its pids are, and a part.
        inside(CKPT, &["attach", "1", "-o", "all.ckpt"]);
        counts(case);
        inside(CKPT, &["attach", pid, "-o", "job.ckpt", "--kill"]);
        until("its end", || {
            status_field(job, "Pid").is_none().then_some(())
        });
        let restored = inside(RESTORE, &["job.ckpt", "--detach", "--pids", "keep"]);
        assert_eq!(restored, pid);
        counts(case);
        outer.kill();
        assert_no_process_left();
    });
}

/// A host name, System V objects and queues of its own.
const CONTAINED: &str = r#"
import ctypes, os, signal, socket, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def made(what):
    assert what >= 0, os.strerror(ctypes.get_errno())
    return what
CREATE = 0o1600
socket.sethostname("inside")
memory = made(libc.shmget(0x77, 4096, CREATE))
libc.shmat.restype = ctypes.c_void_p
at = libc.shmat(memory, None, 0)
ctypes.memmove(at, b"contents", 8)
made(libc.shmdt(ctypes.c_void_p(at)))
# Created by a process that has ended, with a key.
text = f"import ctypes; assert ctypes.CDLL(None).semget(0x78, 3, {CREATE}) >= 0"
subprocess.run([sys.executable, "-c", text], check=True)
queue = made(libc.mq_open(b"/own", os.O_RDWR | os.O_CREAT, 0o600, None))
ended = []
signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
def look():
    there = libc.shmat(made(libc.shmget(0x77, 4096, 0)), None, 0)
    return [socket.gethostname(), ctypes.string_at(there, 8).decode(), made(libc.semget(0x78, 3, 0)) >= 0,
            open("/proc/self/cgroup").read().count("..")]
before = look()
n = 0
while not ended:
    n += 1
    try: os.symlink(str(n), "next")
    except FileExistsError: pass  # Of a life that ended in between.
    os.rename("next", "count")
    time.sleep(0.01)
after = look()
with open("result", "w") as f: f.write("same" if before == after else f"{before} {after}")
sys.exit(7 if before == after else 1)
"#;

fn with_all_namespaces(case: &Case, before: &[&str]) {
    let python = case.system_python();
    let names = || {
        let host = fs::read_to_string("/proc/sys/kernel/hostname").expect("it is there");
        let objects = fs::read_to_string("/proc/sysvipc/shm").expect("/proc is mounted");
        (host, objects)
    };
    let ours = names();
    let mut command = Command::new("unshare");
    command.args([
        "--uts",
        "--ipc",
        "--cgroup",
        "--pid",
        "--fork",
        "--mount-proc",
    ]);
    command.args(before).args([python, "-c", CONTAINED]);
    let outer = start(command.current_dir(case.dir()), &case.path("job.log"));
    counts(case);
    let first = children(outer.pid)[0];
    ckpt(case, ["check", &first.to_string()]).ok();
    let mut image = Container { outer, first }.killed(case);
    for life in 1..=2 {
        let mut job = restored(case, &image, &[]);
        counts(case);
        let own = |kind: &str| {
            let link =
                |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("it lives");
            link(&job.pid.to_string()) != link("self")
        };
        assert!(["uts", "ipc", "cgroup", "pid", "mnt"].into_iter().all(own));
        if life == 1 {
            image = attach(case, job.pid, "job.ckpt", &["--kill"]).0;
            until("its end", || job.ended());
        } else {
            job.signal(Signal::SIGTERM);
            let ended = until("its end", || job.ended());
            assert_eq!((result(case).as_str(), ended), ("same", Ended::Exited(7)));
        }
        assert_no_process_left();
    }
    assert_eq!(names(), ours);
}

#[test]
fn other_namespaces() {
    isolated("other_namespaces", |case| with_all_namespaces(case, &[]));
}

#[test]
fn other_namespaces_of_an_ordinary_user() {
    isolated("other_namespaces_of_an_ordinary_user", |case| {
        with_all_namespaces(case, &["--map-root-user"]);
    });
}

/// What is not made again is refused by name, and the container goes on.
#[test]
fn refused() {
    isolated("refused", |case| {
        let refuse = |options: &[&str], program: &str, words: &[&str]| {
            let mut command = Command::new("unshare");
            command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
            command.args(options).args(["bash", "-c", program, COUNTER]);
            let outer = start(command.current_dir(case.dir()), &case.path("job.log"));
            counts(case);
            let first = children(outer.pid)[0];
            let target = match program.contains("& wait") {
                // Orphans of the counting one, which is the second, come behind.
                true => children(first)[1],
                false => first,
            };
            let out = ckpt(case, ["attach", &target.to_string(), "-o", "job.ckpt"]);
            out.refused(1, words);
            assert!(leftovers(case.dir()).is_empty());
            counts(case);
            outer.kill();
            assert_no_process_left();
            fs::remove_file(case.path("count")).expect("it counted");
        };
        refuse(
            &["--net"],
            "eval \"$0\"",
            &["process", "another net namespace", "--net ckpt"],
        );
        // A process of the job that has a namespace to itself.
        let program = "unshare --pid --fork --kill-child sh -c 'echo > ready; exec sleep 1000' & \
                       until [ -e ready ]; do :; done; eval \"$0\"";
        refuse(&[], program, &["another pid namespace"]);
        let program = "sleep 1000 & bash -c \"$0\" & wait";
        refuse(
            &["--ipc"],
            program,
            &["shares it with process", "outside the job"],
        );
        let program = "here=$PWD; mkdir root; mount -t tmpfs none root; cd root; \
                       for dir in usr tmp proc dev \"$here\"; do \
                           mkdir -p ./$dir; mount --rbind /$dir ./$dir; done; \
                       ln -s usr/bin usr/lib usr/lib64 .; mkdir old; \
                       /usr/sbin/pivot_root . old; cd \"$here\"; eval \"$0\"";
        refuse(
            &[],
            program,
            &["its own root file system", "inside that container"],
        );
        let queue = "python3 -c 'import ctypes, os; assert ctypes.CDLL(None).mq_open(b\"/left\", \
                     os.O_RDWR | os.O_CREAT, 0o600, None) >= 0'; eval \"$0\"";
        refuse(
            &["--ipc"],
            queue,
            &["queue /left", "no process of the job has it open"],
        );
    });
}
