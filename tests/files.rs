//! Open files on file systems that tests do not run on by themselves, and files whose names nobody
//! finds.

use crate::common;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::common::fixture::{killed, start_in};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::common::look::{assert_let_go, assert_no_process_left};
use crate::common::refused::{FAILED, attach_is_refused};
use crate::common::rounds::{gone, same_result};
use crate::common::tool::source;
use crate::common::{
    Case, Ended, Job, attach, ckpt, fixture, isolated, restore_cmd, restored, run, start, until,
};

/// Mounts a file system as DIR/name; without permission the test is skipped.
fn mounted(case: &Case, kind: &str, options: &str, name: &str) {
    let place = case.path(name);
    fs::create_dir(&place).expect("the test's directory is writable");
    let mut mount = Command::new("mount");
    mount.args(["-t", kind, "-o", options, kind]).arg(&place);
    let out = run(case, &mut mount);
    if out.code() != 0 {
        let why = out.stderr.trim();
        case.skip(&format!("permission to mount {kind} ({why})"));
    }
}

/// The fixture with its files in DIR/place: a checkpoint, then three lives.
fn lives_in(case: &Case, fixture: &str, place: &str) {
    let command = Command::new(case.fixtures().join(fixture));
    let mut target = start_in(case, fixture, &format!("{place}/run"), command);
    attach(case, target.pid(), "job.ckpt", &[]);
    assert_let_go(target.pid());
    for _ in 0..3 {
        let image = target.killed_into(case, "job.ckpt");
        target.continued_by(restored(case, &image, &[]));
        assert_let_go(target.pid());
    }
    target.passes();
}

fn on_tmpfs(case: &Case, fixture: &str) {
    mounted(case, "tmpfs", "size=64m", "mounted");
    lives_in(case, fixture, "mounted");
}

/// An overlay, as containers have it.
fn on_overlay(case: &Case, fixture: &str) {
    // Not on an overlay itself, which cannot be the upper part of another.
    mounted(case, "tmpfs", "size=64m", "parts");
    for part in ["lower", "upper", "work"] {
        let part = case.path("parts").join(part);
        fs::create_dir(part).expect("it was just mounted");
    }
    let parts = case.path("parts");
    let parts = parts.display();
    let options = format!("lowerdir={parts}/lower,upperdir={parts}/upper,workdir={parts}/work");
    mounted(case, "overlay", &options, "mounted");
    lives_in(case, fixture, "mounted");
}

/// A program of the user's serves this one, as with network file systems: the kernel knows its files by what it is told of them.
fn on_fuse(case: &Case, fixture: &str) {
    case.needs_program("bindfs", "bindfs");
    let (behind, place) = (case.path("behind"), case.path("mounted"));
    for dir in [&behind, &place] {
        fs::create_dir(dir).expect("the test's directory is writable");
    }
    let mut mount = Command::new("bindfs");
    let out = run(case, mount.arg(&behind).arg(&place));
    if out.code() != 0 {
        let why = out.stderr.trim();
        case.skip(&format!("permission to mount fuse ({why})"));
    }
    lives_in(case, fixture, "mounted");
    run(case, Command::new("umount").arg(&place)).ok();
}

macro_rules! elsewhere {
    ($module:ident: $($fixture:ident)*) => {
        mod $module {
            $(#[test]
            fn $fixture() {
                let name = concat!(stringify!($module), "::", stringify!($fixture));
                super::isolated(name, |case| super::$module(case, stringify!($fixture)));
            })*
        }
    };
}

elsewhere!(on_tmpfs: fd_dir fd_deleted fd_regular fd_tmpfile fifo file_deleted flock_self inotify inotify_deep lease);
elsewhere!(on_overlay: fd_dir fd_deleted fd_regular fd_tmpfile fifo file_deleted flock_self inotify inotify_deep lease);

elsewhere!(on_fuse: file_deleted fd_dir fd_regular fd_opath cwd flock_self file_private);

#[test]
fn read_only() {
    isolated("read_only", |case| {
        let python = case.system_python();
        mounted(case, "tmpfs", "size=64m", "mounted");
        let place = case.path("mounted");
        fs::copy(source("reader.py"), place.join("reader.py")).expect("it was just mounted");
        let data: Vec<u8> = (0..300_000u32)
            .map(|i| (i.wrapping_mul(i) >> 7) as u8)
            .collect();
        fs::write(place.join("data"), data).expect("it was just mounted");
        let remount = ["-o", "remount,bind,ro"];
        run(case, Command::new("mount").args(remount).arg(&place)).ok();
        same_result(case, &|| {
            let mut command = Command::new(python);
            command.arg("-B").arg(place.join("reader.py"));
            command
        });
    });
}

/// NFS gives a file that is removed while it is open another name, and removes it when the process ends.
#[test]
fn removed_on_a_network_file_system() {
    isolated("removed_on_a_network_file_system", |case| {
        let python = case.system_python();
        let place = case.path("place");
        fs::create_dir(&place).expect("the test's directory is writable");
        fs::copy(source("reader.py"), place.join("reader.py")).expect("it is ours");
        let mut results = Vec::new();
        for removed in [false, true] {
            fs::write(place.join("data"), [7; 300_000]).expect("it is ours");
            let dir = case.path(&format!("run-{removed}"));
            fs::create_dir(&dir).expect("the test's directory is writable");
            let mut command = Command::new(python);
            command.arg("-B").arg(place.join("reader.py")).arg(&dir);
            let mut job = start(&mut command, &case.path("reader.log"));
            until("some rounds", || {
                dir.join("progress").exists().then_some(())
            });
            if removed {
                let silly = place.join(".nfs000000000000a07f00000003");
                fs::rename(place.join("data"), &silly).expect("it is ours");
                let (image, _) = attach(case, job.pid, "job.ckpt", &["--kill"]);
                assert_eq!(gone(&mut job), Ended::Killed(9));
                fs::remove_file(&silly).expect("it is ours");
                job = restored(case, &image, &[]);
            }
            fs::write(dir.join("finish"), "").expect("the test's directory is writable");
            assert_eq!(job.wait(), Ended::Exited(0));
            results.push(fs::read_to_string(dir.join("result")).expect("it has a result"));
        }
        assert_eq!(results[0], results[1]);
    });
}

/// A file with a name that is nowhere near the one by which it was opened: not taken for a nameless
/// one, since what is written to a copy would never be seen under the name.
#[test]
fn name_that_is_not_found() {
    isolated("name_that_is_not_found", |case| {
        let target = fixture(case, "fd_tmpfile");
        let (from, to) = (target.path("below/deeper"), case.path("elsewhere"));
        fs::rename(&from, &to).expect("it is ours");
        let pid = target.pid().to_string();
        let out = ckpt(case, ["check", &pid]);
        assert_eq!(out.code(), 1);
        assert!(out.stdout.contains("was not found"), "{out:?}");
        assert!(!Path::new(&from).exists());
        fs::rename(&to, &from).expect("it is ours");
        attach(case, target.pid(), "job.ckpt", &[]);
        target.passes();
    });
}

/// A lease that is being broken: another open waits for it.
#[test]
fn lease_that_is_broken() {
    isolated("lease_that_is_broken", |case| {
        let file = case.path("leased");
        fs::write(&file, "").expect("the test's directory is writable");
        let target = common::odd(case, "breaking", Some(&file));
        attach_is_refused(case, target, &["fd 3", "lease", "try again"]);
    });
}

/// A descriptor that is refused by this word for its kind.
fn is_refused(case: &Case, situation: &str, words: &[&str]) {
    attach_is_refused(case, common::odd(case, situation, None), words);
}

/// Reading the events would take them from the program: an attach leaves them there.
#[test]
fn inotify_keeps_unread_events() {
    isolated("inotify_keeps_unread_events", |case| {
        let target = fixture(case, "inotify_unread");
        let pid = target.pid().to_string();
        ckpt(case, ["check", &pid]).ok();
        let out = ckpt(case, ["attach", &pid, "-o", "job.ckpt"]);
        out.ok();
        for word in ["fd 3 of process", "not read", "IN_Q_OVERFLOW"] {
            assert!(out.stderr.contains(word), "{out:?}");
        }
        let saw = target.path("saw");
        target.passes();
        assert_eq!(fs::read_to_string(saw).expect("it told"), "events");
    });
}

/// They cannot be brought about again, and the program is told so.
#[test]
fn inotify_overflows_in_a_new_life() {
    isolated("inotify_overflows_in_a_new_life", |case| {
        let (mut target, image) = killed(case, "inotify_unread");
        let saw = target.path("saw");
        target.continued_by(restored(case, &image, &[]));
        target.passes();
        assert_eq!(fs::read_to_string(saw).expect("it told"), "overflow");
    });
}

#[test]
fn fanotify() {
    isolated("fanotify", |case| {
        is_refused(
            case,
            "fanotify",
            &["fd 3", "a fanotify group", "permission events", "close it"],
        );
    });
}

#[test]
fn userfaultfd() {
    isolated("userfaultfd", |case| {
        is_refused(
            case,
            "userfaultfd",
            &["fd 3", "userfaultfd", "not supported", "close it"],
        );
    });
}

#[test]
fn secret_memory() {
    isolated("secret_memory", |case| {
        is_refused(case, "secret", &["fd 3", "secret memory", "close it"]);
        is_refused(
            case,
            "secret-mapped",
            &[
                "memory 0x",
                "like 2 more mappings of it",
                "secret memory",
                "unmap it",
            ],
        );
    });
}

/// Of which changes it is told, the kernel does not show.
#[test]
fn notices_of_a_directory() {
    isolated("notices_of_a_directory", |case| {
        let target = common::odd(case, "dnotify", None);
        let out = ckpt(
            case,
            ["attach", &target.pid().to_string(), "-o", "job.ckpt"],
        );
        out.ok();
        for word in ["fd 3 of process", "F_NOTIFY", "gets no such signals"] {
            assert!(out.stderr.contains(word), "{out:?}");
        }
        target.passes();
    });
}

#[test]
fn perf_event() {
    isolated("perf_event", |case| {
        is_refused(
            case,
            "perf",
            &["fd 3", "perf_event", "not supported", "close it"],
        );
    });
}

#[test]
fn bpf_map() {
    isolated("bpf_map", |case| {
        is_refused(
            case,
            "bpf",
            &["fd 3", "bpf-map", "not supported", "close it"],
        );
    });
}

#[test]
fn namespace() {
    isolated("namespace", |case| {
        is_refused(
            case,
            "namespace",
            &["fd 3", "another uts namespace", "not supported", "close it"],
        );
    });
}

#[test]
fn pidfd_of_a_stranger() {
    isolated("pidfd_of_a_stranger", |case| {
        is_refused(
            case,
            "stranger",
            &[
                "fd 3",
                "pidfd of process 1 (",
                "not part of the job",
                "close it",
            ],
        );
    });
}

/// One end of a pipe inside the job becomes a file; the other end is still a pipe's.
#[test]
fn an_end_of_a_pipe_is_replaced() {
    isolated("an_end_of_a_pipe_is_replaced", |case| {
        let (mut target, image) = killed(case, "pipe");
        let given = case.path("given");
        fs::write(&given, "").expect("the test's directory is writable");
        let option = format!("3={}", given.display());
        target.continued_by(restored(case, &image, &["--fd", &option]));
        let link = |fd: i32| {
            let link = format!("/proc/{}/fd/{fd}", target.pid());
            fs::read_link(link).expect("it is open")
        };
        assert_eq!(link(3), given);
        assert!(link(4).to_string_lossy().starts_with("pipe:["));
    });
}

/// Each of two processes has `/dev/null` open many times; one closes and opens it all the time.
#[test]
fn descriptors_that_come_and_go() {
    isolated("descriptors_that_come_and_go", |case| {
        let mut python = Command::new(case.system_python());
        python.arg(source("comes_and_goes.py"));
        let job = start(&mut python, &case.path("python.log"));
        until("the child", || (job.descendants().len() == 1).then_some(()));
        for _ in 0..30 {
            attach(case, job.pid, "job.ckpt", &[]);
        }
        let child = job.descendants();
        job.kill();
        for pid in child {
            Job::of(pid).kill();
        }
    });
}

/// Where nothing is free above the job's descriptors, a restore works in a gap between them.
#[test]
fn descriptors_at_the_limit() {
    isolated("descriptors_at_the_limit", |case| {
        let mut target = fixture(case, "fd_high");
        let image = target.killed_into(case, "job.ckpt");
        let restore = restore_cmd(&image, &["--detach"]);
        let mut command = Command::new("sh");
        command
            .args(["-c", "ulimit -n 1024; exec \"$0\" \"$@\""])
            .arg(restore.get_program())
            .args(restore.get_args());
        let out = run(case, &mut command);
        let pid = out.ok().trim().parse().expect("it is a pid");
        target.continued_by(Job::of(pid));
        target.passes();
    });
}

/// A FIFO or device in place of a file is reported, and neither opened nor read.
#[test]
fn fifo_or_device_in_place_of_a_file() {
    isolated("fifo_or_device_in_place_of_a_file", places_are_taken);
}

pub(crate) fn places_are_taken(case: &Case) {
    let python = case.system_python();
    let names = ["mapped", "open"];
    let program = case.path("prog");
    fs::copy("/usr/bin/sleep", &program).expect("coreutils");
    for name in names {
        fs::write(case.path(name), [7; 5000]).expect("it is ours");
    }
    let code = "import mmap, time\nd = open('mapped')\nm = mmap.mmap(d.fileno(), 0, prot=1)\nf = open('open', 'a+')\n\
                    open('ready', 'w').close()\nwhile True: time.sleep(1000)";
    let mut command = Command::new(python);
    command.args(["-c", code]).current_dir(case.dir());
    let mut reader = start(&mut command, &case.path("reader.log"));
    let mut sleeper = start(
        Command::new(&program).arg("1000"),
        &case.path("sleeper.log"),
    );
    until("it to begin", || case.path("ready").exists().then_some(()));
    until("it to run", || {
        let exe = fs::read_link(format!("/proc/{}/exe", sleeper.pid)).ok()?;
        (exe == program).then_some(())
    });
    let (reader_image, _) = attach(case, reader.pid, "reader.ckpt", &["--kill"]);
    let (sleeper_image, _) = attach(case, sleeper.pid, "sleeper.ckpt", &["--kill"]);
    until("its end", || reader.ended());
    until("its end", || sleeper.ended());
    let fifo = |at: &Path| mkfifo(at, Mode::S_IRWXU).expect("a FIFO can be made");
    let fifo_elsewhere = case.path("fifo");
    fifo(&fifo_elsewhere);
    let link =
        |to: &Path, at: &Path| std::os::unix::fs::symlink(to, at).expect("its place is free");
    type Taker<'a> = &'a dyn Fn(&Path);
    let takers: [Taker<'_>; 5] = [
        &fifo,
        &|at| link(&fifo_elsewhere, at),
        &|at| link(Path::new("/dev/zero"), at),
        &|at| link(Path::new("/proc/kallsyms"), at),
        &|at| fs::create_dir(at).expect("its place is free"),
    ];
    let images = [&reader_image, &reader_image, &sleeper_image];
    let names = ["mapped", "open", "prog"];
    for ((name, image), taker) in names
        .into_iter()
        .zip(images)
        .flat_map(|n| takers.map(|t| (n, t)))
    {
        let (path, aside) = (case.path(name), case.path("aside"));
        fs::rename(&path, &aside).expect("it is there");
        taker(&path);
        for policy in ["strict", "adopt"] {
            let words = [name, " by now"];
            let files = ["--files", policy];
            let out = ckpt(
                case,
                [
                    "check",
                    image.to_str().expect("it is text"),
                    files[0],
                    files[1],
                ],
            );
            assert_eq!(out.code(), 1, "{out:#?}");
            let told = |text: &str| {
                text.lines()
                    .any(|line| words.iter().all(|word| line.contains(word)))
            };
            assert!(told(&out.stdout), "{name}: {out:#?}");
            let out = run(
                case,
                &mut restore_cmd(image, &["--detach", files[0], files[1]]),
            );
            out.refused(FAILED, &words);
        }
        let is_dir = path.symlink_metadata().expect("it is there").is_dir();
        if is_dir {
            fs::remove_dir(&path)
        } else {
            fs::remove_file(&path)
        }
        .expect("it is ours");
        fs::rename(&aside, &path).expect("its place is free");
    }
    assert_no_process_left();
}
