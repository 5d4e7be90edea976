//! Descriptors that a job does without or that lead elsewhere: --drop-fd and --replace-fd of attach, check, run
//! and restore.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, RawFd};
use std::path::Path;
use std::process::Command;

use crate::common::fixture::start_in;
use crate::common::refused::FAILED;
use crate::common::tool::{CKPT, leftovers};
use crate::common::{
    Case, Fixture, Job, Looks, attach, ckpt, isolated, restore_cmd, restored, run, start, until,
};

/// Programs that are started have it too.
fn inherited(fd: &impl AsFd) -> RawFd {
    // Above what restore and the job have themselves.
    let high = nix::fcntl::FcntlArg::F_DUPFD(40);
    nix::fcntl::fcntl(fd, high).expect("a number is free")
}

/// A fixture that was started with a connection to the outside.
fn connected(case: &Case) -> (Fixture, RawFd, TcpStream, String) {
    let listener =
        TcpListener::bind("127.0.0.1:0").unwrap_or_else(|_| case.skip("a loopback device"));
    let at = listener.local_addr().expect("it is bound");
    let stream = TcpStream::connect(at).unwrap_or_else(|_| case.skip("a loopback device"));
    let (far, _) = listener.accept().expect("it is connected");
    let fd = inherited(&stream);
    let target = start_in(
        case,
        "counter",
        "run",
        Command::new(case.fixtures().join("counter")),
    );
    nix::unistd::close(fd).expect("it is ours");
    (target, fd, far, at.to_string())
}

/// What is dropped leaves no half of a connection behind.
#[test]
fn a_connection_of_which_one_end_cannot_be_captured() {
    isolated("a_connection_of_which_one_end_cannot_be_captured", |case| {
        let target = crate::common::fixture(case, "tcp_urgent");
        let pid = target.pid().to_string();
        let words = ["whose other end cannot be captured", "--drop-fd"];
        ckpt(case, ["attach", &pid, "-o", "job.ckpt"]).refused(1, &words);
        let (image, _) = attach(case, target.pid(), "job.ckpt", &["--drop-fd=inet"]);
        ckpt(case, ["verify".as_ref(), image.as_os_str()]).ok();
        target.passes();
    });
}

/// As inetd(8) starts programs.
#[test]
fn a_connection_to_the_outside_as_standard_input() {
    isolated("a_connection_to_the_outside_as_standard_input", |case| {
        let listener =
            TcpListener::bind("127.0.0.1:0").unwrap_or_else(|_| case.skip("a loopback device"));
        let stream = TcpStream::connect(listener.local_addr().expect("it is bound"));
        let stream = stream.expect("it listens");
        let _far = listener.accept().expect("it is connected");
        let fd = inherited(&stream);
        let mut command = Command::new("bash");
        command.args(["-c", &format!("exec \"$0\" \"$@\" <&{fd} {fd}<&-")]);
        command.arg(case.fixtures().join("counter"));
        let mut target = start_in(case, "counter", "run", command);
        nix::unistd::close(fd).expect("it is ours");
        let pid = target.pid().to_string();
        assert_eq!(ckpt(case, ["check", &pid]).code(), 0);
        let image = target.killed_into(case, "job.ckpt");
        let fds = ckpt(
            case,
            ["inspect".as_ref(), "--fds".as_ref(), image.as_os_str()],
        );
        let input = fds.stdout.lines().find(|line| line.contains(" 0  outside"));
        assert!(input.is_some(), "{fds:?}");
        target.continued_by(restored(case, &image, &[]));
        target.passes();
    });
}

/// The loopback device of a test's network namespace may be down; tests share the machine's.
#[test]
fn a_connection_to_the_outside() {
    isolated("a_connection_to_the_outside", |case| {
        let (mut target, fd, far, peer) = connected(case);
        let pid = target.pid().to_string();
        let drop = format!("--drop-fd={fd}");
        let (object, peer) = (
            format!("fd {fd} of process {pid}"),
            format!("connected to {peer}"),
        );
        let words = [&*object, "IPv4 TCP", &*peer, "ESTABLISHED", "--drop-fd"];
        ckpt(case, ["attach", &pid, "-o", "job.ckpt"]).refused(1, &words);
        let check = |options: &[&str]| ckpt(case, [&["check", &*pid], options].concat()).code();
        assert_eq!(check(&[]), 1);
        assert_eq!(check(&["--drop-fd=unix"]), 1);
        for options in [&[&*drop][..], &["--drop-fd=inet"], &["--drop-fd=socket"]] {
            assert_eq!(check(options), 0, "{options:?}");
        }
        let before = Looks::at(target.pid());
        let words = ["attach", &pid, "-o", "job.ckpt", "--drop-fd=inet"];
        let out = ckpt(case, words);
        out.ok();
        let note = out
            .stderr
            .lines()
            .find(|line| line.contains("is not in the image"));
        let note = note.unwrap_or_else(|| panic!("no note: {out:?}"));
        assert!(note.contains(&object) && note.contains(&peer), "{note}");
        before.assert_same(target.pid(), &[]);

        attach(case, target.pid(), "job.ckpt", &[&drop, "--kill"]);
        let ended = until("its end", || target.job.ended());
        assert_eq!(ended, crate::common::Ended::Killed(9));
        std::mem::drop(far);
        target.continued_by(restored(case, &case.path("job.ckpt"), &[]));
        let name = format!("fd {fd}");
        assert!(!Path::new(&format!("/proc/{pid}/fd/{fd}")).exists());
        before.assert_same(target.pid(), &[&name]);
        target.passes();
    });
}

#[test]
fn another_file_in_its_place() {
    isolated("another_file_in_its_place", |case| {
        let (mut target, fd, _far, _) = connected(case);
        fs::write(case.path("instead"), "").expect("the test's directory is writable");
        let words = format!("--replace-fd={fd}=instead");
        let mut command = Command::new(CKPT);
        command.args([
            "attach",
            &target.pid().to_string(),
            "--kill",
            "-o",
            "job.ckpt",
            &words,
        ]);
        run(case, command.current_dir(case.dir())).ok();
        until("its end", || target.job.ended());
        target.continued_by(restored(case, &case.path("job.ckpt"), &[]));
        let link = fs::read_link(format!("/proc/{}/fd/{fd}", target.pid()));
        assert_eq!(link.expect("it is open"), case.path("instead"));
        target.passes();
    });
}

/// Those who take the checkpoint and restore it may have no more descriptors than the job, unless they may raise that limit.
#[test]
fn as_many_as_the_limit_allows() {
    isolated("as_many_as_the_limit_allows", |case| {
        let few = |command: &Command| {
            let mut limited = Command::new("prlimit");
            limited.arg("--nofile=9000:9000");
            limited.arg(command.get_program()).args(command.get_args());
            limited
        };
        let program = Command::new(case.fixtures().join("fd_many"));
        let mut target = start_in(case, "fd_many", "run", program);
        let image = case.path("job.ckpt");
        let mut attach = Command::new(CKPT);
        attach.args(["attach", &target.pid().to_string(), "--kill", "-o"]);
        let taken = run(case, &mut few(attach.arg(&image)));
        let raised = run(
            case,
            &mut few(Command::new("prlimit").args(["--nofile=9001", "true"])),
        );
        if raised.code() != 0 {
            let words = ["below the limit of open files, 9000", "ulimit -n"];
            taken.refused(1, &words);
            return target.passes();
        }
        taken.ok();
        until("its end after attach --kill", || target.job.ended());
        let out = run(case, &mut few(restore_cmd(&image, &[]).arg("--detach")));
        let pid = out.ok().trim().parse().expect("it prints the pid");
        target.continued_by(Job::of(pid));
        target.passes();
    });
}

/// A number that is not there is told, and does no harm; a wrong word is.
#[test]
fn words_that_name_nothing() {
    isolated("words_that_name_nothing", |case| {
        let target = crate::common::fixture(case, "counter");
        let pid = target.pid().to_string();
        let out = ckpt(case, ["attach", &pid, "-o", "job.ckpt", "--drop-fd=77"]);
        out.ok();
        assert!(
            out.stderr.contains("--drop-fd 77 names a descriptor"),
            "{out:?}"
        );
        let out = ckpt(case, ["attach", &pid, "-o", "job.ckpt", "--drop-fd=tcp"]);
        out.refused(2, &["tcp", "drop-fd"]);
        target.passes();
    });
}

/// A pipe whose other end stays outside: the image has it, and the restore may do without.
#[test]
fn dropped_by_the_restore() {
    isolated("dropped_by_the_restore", |case| {
        let (reader, _writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).expect("a pipe");
        let fd = inherited(&reader);
        let mut target = start_in(
            case,
            "counter",
            "run",
            Command::new(case.fixtures().join("counter")),
        );
        nix::unistd::close(fd).expect("it is ours");
        let image = target.killed_into(case, "job.ckpt");
        let wanted = format!("--fd {fd}=PATH");
        run(case, &mut restore_cmd(&image, &[])).refused(FAILED, &[&wanted]);
        let nobodys = ["--drop-fd 77", "does not have", "ckpt inspect IMAGE --fds"];
        run(case, &mut restore_cmd(&image, &["--drop-fd=77"])).refused(FAILED, &nobodys);
        for drop in [format!("--drop-fd={fd}"), "--drop-fd=pipe".into()] {
            target.continued_by(restored(case, &image, &[&drop]));
            assert!(!Path::new(&format!("/proc/{}/fd/{fd}", target.pid())).exists());
            target.killed_into(case, "again.ckpt");
        }
        target.continued_by(restored(case, &case.path("again.ckpt"), &[]));
        target.passes();
    });
}

/// A pair of the job loses one end: the other one sees it closed, and an epoll set does not watch it any more.
#[test]
fn what_else_refers_to_it() {
    isolated("what_else_refers_to_it", |case| {
        let python = case.system_python();
        let script = "import os, select, socket, sys, time\n\
            a, b = socket.socketpair(); c, d = socket.socketpair()\n\
            os.dup2(b.fileno(), 50); b.close(); e = select.epoll(); e.register(50, 1); e.register(c, 1)\n\
            r, w = os.pipe(); os.dup2(w, 51); os.close(w)\n\
            d.send(b'x'); open('ready', 'w').close()\n\
            while not os.path.exists('go'): time.sleep(.01)\n\
            seen = [a.recv(1), os.read(r, 1), e.poll(0) == [(c.fileno(), 1)], os.path.exists('/proc/self/fd/50')]\n\
            open('seen', 'w').write(repr(seen)); os._exit(0)\n";
        let mut command = Command::new(python);
        command.args(["-c", script]).current_dir(case.dir());
        let mut job = start(&mut command, &case.path("python.log"));
        until("it to be ready", || {
            case.path("ready").exists().then_some(())
        });
        let drop = ["--drop-fd=50", "--drop-fd=51", "--kill"];
        let (image, _) = attach(case, job.pid, "job.ckpt", &drop);
        until("its end", || job.ended());
        job = restored(case, &image, &[]);
        fs::write(case.path("go"), "").expect("the test's directory is writable");
        assert_eq!(job.wait(), crate::common::Ended::Exited(0));
        let seen = fs::read_to_string(case.path("seen")).expect("it was written");
        assert_eq!(seen, "[b'', b'', True, False]");
    });
}

/// `ckpt run` hands the options to its checkpoints.
#[test]
fn of_ckpt_run() {
    isolated("of_ckpt_run", |case| {
        let listener =
            TcpListener::bind("127.0.0.1:0").unwrap_or_else(|_| case.skip("a loopback device"));
        let fd = inherited(&listener);
        let mut command = Command::new(CKPT);
        command
            .args([
                "run",
                "--interval",
                "0.2s",
                "--drop-fd=inet",
                "--",
                "sleep",
                "1000",
            ])
            .current_dir(case.dir());
        let job = start(&mut command, &case.path("run.log"));
        nix::unistd::close(fd).expect("it is ours");
        until("an image", || {
            leftovers(case.dir())
                .iter()
                .any(|name| name == "sleep.1.ckpt")
                .then_some(())
        });
        job.signal(nix::sys::signal::Signal::SIGTERM);
        assert_eq!(job.wait(), crate::common::Ended::Exited(128 + 15));
    });
}
