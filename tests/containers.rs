//! Jobs in a container such as docker makes by default (see `common/container.rs`), as root and as a
//! user in it: what is possible is done, and what is not is refused with the option that
//! permits it.

use crate::common;
use std::fs;
use std::process::Command;

use crate::common::container::{Container, cap, contained, kills_on};
use crate::common::edit::edited;
use crate::common::fixture::{exceptions, killed};
use crate::common::look::{assert_let_go, assert_no_process_left, await_let_go, status_field};
use crate::common::refused::{FAILED, attach_is_refused, restore_is_refused};
use crate::common::tool::{CKPT, descendants_in};
use crate::common::{
    Case, Ended, Job, Looks, attach, ckpt, fixture, isolated, odd, restore_cmd, restored, run,
    start, until,
};

/// Fixtures that live on there, each through a checkpoint, a kill and a restore.
const FIXTURES: &[&str] = &[
    "counter",
    "threads",
    "fd_regular",
    "fd_dup",
    "fd_deleted",
    "memfd",
    "pipe",
    "fifo",
    "eventfd",
    "timerfd",
    "inotify",
    "epoll",
    "sock_pair",
    "sock_listen",
    "sock_rights",
    "pty_pair",
    "timers_posix",
    "sigpending",
    "sigmask",
    "sleepers",
    "tree_pipe",
    "tree_sharedfd",
    "tree_exec",
    "tree_cow",
    "tree_shm",
    "tree_zombie",
    "tree_session_gone",
];

fn lives_on(case: &Case, name: &str) {
    let mut target = fixture(case, name);
    ckpt(case, ["check", &target.pid().to_string()]).ok();
    let before = Looks::at(target.pid());
    let (image, _) = attach(case, target.pid(), "first.ckpt", &[]);
    assert_let_go(target.pid());
    before.assert_same(target.pid(), &[]);
    fs::remove_file(image).expect("it was written");
    let image = target.killed_into(case, "job.ckpt");
    target.continued_by(restored(case, &image, &[]));
    before.assert_same(target.pid(), &exceptions(name));
    target.passes();
    fs::remove_dir_all(case.path("run")).expect("it was made by the fixture");
    assert_no_process_left();
}

/// One test a fixture would make a container each; here they follow each other.
pub(crate) fn all_live_on(case: &Case, which: impl Iterator<Item = &'static &'static str>) {
    for name in which {
        eprintln!("fixture {name}");
        lives_on(case, name);
    }
}

#[test]
fn fixtures_as_root() {
    let container = Container::root().aged();
    contained("fixtures_as_root", container, |case| {
        all_live_on(case, FIXTURES.iter());
    });
}

#[test]
fn fixtures_as_a_user() {
    let container = Container::user().aged();
    contained("fixtures_as_a_user", container, |case| {
        all_live_on(case, FIXTURES.iter());
    });
}

/// Programs with their results, which they write into `result` once there is a file `go`; until then they take steps.
const PYTHON: &str = "
import threading, time, hashlib, os
steps = [0, 0, 0]
def work(me):
    digest = b''
    while steps[me] < 400 or not os.path.exists('go'):
        if steps[me] < 400:
            digest = hashlib.sha256(digest + bytes([me])).digest()
        steps[me] += 1
        time.sleep(0.005)
    results[me] = digest.hex()
results = [None, None, None]
threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
[t.start() for t in threads]
while any(t.is_alive() for t in threads):
    open('steps', 'w').write(str(sum(steps)))
    time.sleep(0.01)
open('result', 'w').write(' '.join(results))
";
const PERL: &str = r#"
my ($sum, $pid) = (0, $$);
for (my $i = 1; $i <= 400 || !-e 'go'; $i++) {
    $sum = ($sum * 31 + $i) % 1000003 if $i <= 400;
    open my $f, '>', 'steps'; print $f $i; close $f;
    select undef, undef, undef, 0.005;
}
open my $f, '>', 'result'; print $f "$sum ", $pid == $$ ? 'same' : 'other'; close $f;
"#;
const PIPELINE: &str = r#"
i=0
while [ $((i += 1)) -le 300 ] || [ ! -e go ]; do
    if [ $i -le 300 ]; then echo $i; fi
    echo $i > steps
    read -t 0.005 < <(:)
done |
tee copy | { s=0; while read n; do s=$((s + n)); done; echo $s > sum; }
echo "$(cat sum) $(wc -l < copy)" > result
"#;

const PROGRAMS: [[&str; 3]; 3] = [
    ["python3", "-c", PYTHON],
    ["perl", "-e", PERL],
    ["bash", "-c", PIPELINE],
];

fn steps(case: &Case) -> u32 {
    let text = fs::read_to_string(case.path("steps")).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

fn result(case: &Case) -> String {
    let text = fs::read_to_string(case.path("result")).expect("it has ended");
    for file in ["result", "steps", "copy", "sum", "go"] {
        let _ = fs::remove_file(case.path(file));
    }
    text.trim().into()
}

/// A run that is checkpointed, goes on, is killed, and goes on from the image has the result
/// of an undisturbed one.
fn programs_go_on(case: &Case) {
    for words in PROGRAMS {
        case.needs_program(words[0], words[0]);
        let begun = || {
            let mut command = Command::new(words[0]);
            command.args(&words[1..]).current_dir(case.dir());
            start(&mut command, &case.path("job.log"))
        };
        let ends = |mut job: Job| {
            fs::write(case.path("go"), "").expect("the directory is ours");
            let ended = until("its end", || job.ended());
            assert_eq!(ended, Ended::Exited(0), "{words:?}");
            result(case)
        };
        let undisturbed = ends(begun());
        let mut job = begun();
        until("some steps", || (steps(case) > 20).then_some(()));
        let (first, _) = attach(case, job.pid, "first.ckpt", &[]);
        let now = steps(case);
        until("more steps", || (steps(case) > now + 10).then_some(()));
        let (image, _) = attach(case, job.pid, "job.ckpt", &["--kill"]);
        let killed_at = steps(case);
        until("its end", || job.ended());
        common::job::reap_orphans(&descendants_in(case, &image));
        let again = restored(case, &image, &[]);
        assert_eq!(again.pid, job.pid, "{words:?}");
        until("more steps", || (steps(case) > killed_at).then_some(()));
        assert_eq!(ends(again), undisturbed, "{words:?}");
        assert_no_process_left();
        fs::remove_file(first)
            .and_then(|()| fs::remove_file(image))
            .expect("they are there");
    }
}

#[test]
fn programs_as_root() {
    contained("programs_as_root", Container::root().aged(), programs_go_on);
}

#[test]
fn programs_as_a_user() {
    contained(
        "programs_as_a_user",
        Container::user().aged(),
        programs_go_on,
    );
}

/// What `ckpt run` starts has an id that can be had again, and is under filters that an image tells of.
#[test]
fn run_leaves_the_ids_that_come_only_once() {
    let container = Container::user().few_pids();
    contained(
        "run_leaves_the_ids_that_come_only_once",
        container,
        |case| {
            let mut command = Command::new(CKPT);
            command.args(["run", "--interval", "200ms", "--name", "job", "--"]);
            command.args(["perl", "-e", PERL]).current_dir(case.dir());
            fs::write(case.path("go"), "").expect("the directory is ours");
            let run = start(&mut command, &case.path("run.log"));
            let image = case.path("job.1.ckpt");
            until("a checkpoint", || image.exists().then_some(()));
            let at = steps(case);
            let descendants = run.descendants();
            run.kill();
            common::job::reap_orphans(&descendants);
            let shown = ckpt(case, ["inspect", "job.1.ckpt"]);
            let line = shown.ok().lines().find(|line| line.starts_with("seccomp"));
            assert!(
                line.is_some_and(|line| line.contains("1 filter")),
                "{shown:?}"
            );
            let mut job = restored(case, &image, &[]);
            assert!(job.pid > 300, "{}", job.pid);
            until("more steps", || (steps(case) > at).then_some(()));
            assert_eq!(until("its end", || job.ended()), Ended::Exited(0));
            assert!(result(case).ends_with("same"));
        },
    );
}

/// Ends a job that this container could not give its pids again: `--kill` by itself refuses that.
const NOT_HERE: &[&str] = &["--kill", "--no-check"];

/// Without `--cap-add` and below 300.
#[test]
fn a_low_pid_comes_only_once() {
    contained(
        "a_low_pid_comes_only_once",
        Container::root().few_pids(),
        |case| {
            for id in 0..2 {
                // The second one is beyond them.
                let mut job = start(Command::new("sleep").arg("1000"), &case.path("job.log"));
                assert_eq!(job.pid < 300, id == 0, "{}", job.pid);
                let (image, _) = attach(case, job.pid, "job.ckpt", NOT_HERE);
                until("its end", || job.ended());
                if id == 0 {
                    let words = ["below 300", "--cap-add SYS_ADMIN", "systempaths=unconfined"];
                    restore_is_refused(case, &image, &words);
                    let keep = run(case, &mut restore_cmd(&image, &["--pids", "keep"]));
                    keep.refused(FAILED, &words);
                    let check = ckpt(case, ["check", "job.ckpt"]);
                    assert!(
                        check.code() == 1 && check.stdout.contains("below 300"),
                        "{check:?}"
                    );
                    until_pids_are_above_300(case);
                } else {
                    restored(case, &image, &[]).kill();
                }
            }
        },
    );
}

/// In a new container the job's pids are still to come.
#[test]
fn a_low_pid_that_was_not_given_yet() {
    contained(
        "a_low_pid_that_was_not_given_yet",
        Container::user(),
        |case| {
            let mut job = start(Command::new("sleep").arg("1000"), &case.path("job.log"));
            let (image, _) = attach(case, job.pid, "job.ckpt", NOT_HERE);
            until("its end", || job.ended());
            let later = edited(case, &image, "later.ckpt", |snapshot| {
                snapshot.processes[0].pid = 290;
                snapshot.processes[0].threads[0].tid = 290;
            });
            let again = restored(case, &later, &[]);
            assert_eq!(again.pid, 290);
            again.kill();
            assert_no_process_left();
        },
    );
}

/// Where millions of pids are given before it comes again.
#[test]
fn a_pid_that_is_too_far_away() {
    contained("a_pid_that_is_too_far_away", Container::root(), |case| {
        let highest = fs::read_to_string("/proc/sys/kernel/pid_max").expect("it is readable");
        if highest
            .trim()
            .parse()
            .is_ok_and(|highest: u32| highest < 600_000)
        {
            case.skip("a kernel.pid_max above 600000");
        }
        until_pids_are_above_300(case);
        let mut job = start(Command::new("sleep").arg("1000"), &case.path("job.log"));
        let (image, _) = attach(case, job.pid, "job.ckpt", NOT_HERE);
        until("its end", || job.ended());
        restore_is_refused(
            case,
            &image,
            &["comes only after", "others", "in a new container"],
        );
    });
}

fn until_pids_are_above_300(case: &Case) {
    until("the first ids to be over", || {
        let one = start(&mut Command::new("true"), &case.path("job.log"));
        let pid = one.pid;
        one.wait();
        (pid > 300).then_some(())
    });
}

/// The options that the refusal names permit it.
fn permits(name: &str, container: Container) {
    contained(name, container, |case| {
        let mut job = start(Command::new("sleep").arg("1000"), &case.path("job.log"));
        assert!(job.pid < 300);
        let (image, _) = attach(case, job.pid, "job.ckpt", &["--kill"]);
        until("its end", || job.ended());
        let again = restored(case, &image, &[]);
        let in_its_namespace = status_field(again.pid, "NSpid").expect("it runs");
        assert_eq!(in_its_namespace, job.pid.to_string());
        again.kill();
        let (target, image) = killed(case, "threads");
        let mut target = target;
        target.continued_by(restored(case, &image, &[]));
        target.passes();
    });
}

#[test]
fn a_low_pid_with_sys_admin() {
    permits(
        "a_low_pid_with_sys_admin",
        Container::with(&[cap::SYS_ADMIN]),
    );
}

#[test]
fn a_low_pid_with_checkpoint_restore_and_open_paths() {
    let container = Container::with(&[cap::CHECKPOINT_RESTORE]).open_paths();
    permits(
        "a_low_pid_with_checkpoint_restore_and_open_paths",
        container,
    );
}

#[test]
fn a_low_pid_with_checkpoint_restore_and_no_filter() {
    let container = Container::with(&[cap::CHECKPOINT_RESTORE]).open_calls();
    permits("a_low_pid_with_checkpoint_restore_and_no_filter", container);
}

#[test]
fn filters_of_its_own() {
    contained("filters_of_its_own", Container::root(), |case| {
        let words = [
            "filters of its own",
            "process 1 and ckpt have 1",
            "--privileged",
        ];
        attach_is_refused(case, fixture(case, "seccomp"), &words);
    });
}

/// A container whose filter kills on a call that would be made in the job.
#[test]
fn a_filter_that_kills() {
    contained("a_filter_that_kills", Container::root(), |case| {
        kills_on(libc::SYS_getitimer);
        let words = ["kill a process for calling getitimer", "--privileged"];
        attach_is_refused(case, fixture(case, "counter"), &words);
    });
}

/// Ckpt has added a filter to those of the container, or the job was started by a process that has.
#[test]
fn filters_of_another_number() {
    contained("filters_of_another_number", Container::root(), |case| {
        let target = fixture(case, "counter");
        let before = Looks::at(target.pid());
        let script = "import ctypes, os, struct, sys\n\
             libc = ctypes.CDLL(None)\n\
             code = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0x7fff0000))\n\
             prog = ctypes.create_string_buffer(struct.pack('HxxxxxxP', 1, ctypes.addressof(code)))\n\
             assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, prog) == 0\n\
             os.execv(sys.argv[1], sys.argv[1:])\n";
        let mut command = Command::new(case.system_python());
        command.args([
            "-c",
            script,
            CKPT,
            "attach",
            &target.pid().to_string(),
            "-o",
            "job.ckpt",
        ]);
        let out = run(case, command.current_dir(case.dir()));
        out.refused(
            1,
            &[
                "seccomp filters of unknown origin",
                "2 seccomp filters",
                "under 1",
            ],
        );
        common::refused::unharmed(case, target, &before);
    });
}

/// What kcmp(2) would tell, and what is refused in its absence.
#[test]
fn sharing_is_noticed() {
    contained("sharing_is_noticed", Container::root(), |case| {
        for (name, what) in [
            ("tree_files_struct", "shares its table of descriptors"),
            ("tree_fs_struct", "shares its working directory"),
            ("tree_vm", "shares its memory"),
            ("epoll_dup", "epoll set"),
        ] {
            attach_is_refused(case, fixture(case, name), &[what, "--cap-add SYS_PTRACE"]);
            fs::remove_dir_all(case.path("run")).expect("it was made by the fixture");
        }
    });
}

/// A thread that unshare(2) has given a table of its own, which takes CAP_SYS_ADMIN there.
#[test]
fn a_table_of_its_own_is_noticed() {
    let container = Container::with(&[cap::SYS_ADMIN]);
    contained("a_table_of_its_own_is_noticed", container, |case| {
        let words = ["its own descriptor table", "--cap-add SYS_PTRACE"];
        attach_is_refused(case, odd(case, "own-files", None), &words);
    });
}

#[test]
fn sharing_is_kept_with_sys_ptrace() {
    let container = Container::with(&[cap::SYS_PTRACE]).aged();
    contained("sharing_is_kept_with_sys_ptrace", container, |case| {
        let all = [
            "tree_files_struct",
            "tree_fs_struct",
            "tree_vm",
            "epoll_dup",
        ];
        for name in &all {
            lives_on(case, name);
        }
    });
}

/// Where there are fewer filters than at the checkpoint, that is told.
#[test]
fn fewer_filters_are_told() {
    isolated("fewer_filters_are_told", |case| {
        let (mut target, image) = killed(case, "counter");
        let image = edited(case, &image, "contained.ckpt", |snapshot| {
            snapshot.processes[0].threads[0].seccomp.around = 1;
        });
        let out = run(case, restore_cmd(&image, &[]).arg("--detach"));
        let pid = out.ok().trim().parse().expect("it prints the pid");
        assert!(
            out.stderr.contains("1 seccomp filter of its environment"),
            "{out:?}"
        );
        target.continued_by(Job::of(pid));
        target.passes();
    });
}

/// While the job hands out its descriptors ckpt fails, or dies: the calls are made to the end, and
/// nothing is left in the job. The last program leaves no signal by which their end could be told.
#[cfg(feature = "faults")]
#[test]
fn a_job_is_unharmed_by_lending() {
    contained(
        "a_job_is_unharmed_by_lending",
        Container::user().aged(),
        |case| {
            for name in ["threads", "tree_pipe", "sigmask"] {
                let target = fixture(case, name);
                let before = Looks::at(target.pid());
                for fault in [
                    "lending",
                    "lending:kill",
                    "remote-call:kill",
                    "cave-entered:kill",
                ] {
                    let pid = target.pid().to_string();
                    let mut command = Command::new(CKPT);
                    command
                        .args(["attach", &pid, "-o", "job.ckpt"])
                        .env("CKPT_FAULT", fault);
                    let out = run(case, command.current_dir(case.dir()));
                    match fault.ends_with("kill") {
                        true => assert_eq!(out.ended, Ended::Killed(9), "the step was not reached"),
                        false => out.refused(1, &["fault injected", "lending"]),
                    }
                    await_let_go(&target.job);
                    before.assert_same(target.pid(), &[]);
                }
                let (image, _) = attach(case, target.pid(), "job.ckpt", &[]);
                fs::remove_file(image).expect("it was written");
                before.assert_same(target.pid(), &[]);
                target.passes();
                fs::remove_dir_all(case.path("run")).expect("it was made by the fixture");
            }
        },
    );
}
