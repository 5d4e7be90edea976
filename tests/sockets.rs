//! Sockets whose other side is outside the job, and names that others use.

use crate::common;
use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::common::fixture::killed;
use crate::common::look::assert_let_go;
use crate::common::tool::leftovers;
use crate::common::{
    Case, Fixture, Looks, attach, ckpt, isolated, odd, restore_cmd, restored, run, until,
};
use nix::sys::signal::Signal;

/// A path short enough for an address.
fn short(case: &Case, name: &str) -> PathBuf {
    let path = case.path(name);
    assert!(path.as_os_str().len() < 100, "{}", path.display());
    path
}

fn refused(case: &Case, target: Fixture, words: &[&str]) {
    let before = Looks::at(target.pid());
    let pid = target.pid().to_string();
    let check = ckpt(case, ["check", &pid]);
    for word in words {
        assert!(check.stdout.contains(word), "{word}: {check:?}");
    }
    ckpt(case, ["attach", &pid, "-o", "job.ckpt"]).refused(1, words);
    assert_let_go(target.pid());
    before.assert_same(target.pid(), &[]);
    assert!(leftovers(case.dir()).is_empty());
    target.passes();
}

/// What can be seen only by taking it is refused, and not taken.
#[test]
fn what_cannot_be_peeked() {
    isolated("what_cannot_be_peeked", |case| {
        // Its place is looked for when the job is frozen.
        for situation in ["unix-urgent", "unix-urgent-first"] {
            let target = odd(case, situation, None);
            let pid = target.pid().to_string();
            let words = ["fd 4", "urgent byte (MSG_OOB) that came with descriptors"];
            ckpt(case, ["attach", &pid, "-o", "job.ckpt"]).refused(1, &words);
            assert_let_go(target.pid());
            target.passes();
        }
        let target = odd(case, "unix-ebpf", None);
        refused(
            case,
            target,
            &["fd 4", "eBPF filter (SO_ATTACH_BPF)", "SO_DETACH_FILTER"],
        );
        let target = odd(case, "unix-error", Some(&short(case, "other")));
        refused(
            case,
            target,
            &["fd 4", "error (ECONNRESET)", "let the program read it"],
        );
    });
}

#[test]
fn connected_to_a_process_outside() {
    isolated("connected_to_a_process_outside", |case| {
        let path = short(case, "server");
        let listener = UnixListener::bind(&path).expect("it is free");
        let target = odd(case, "unix-stream", Some(&path));
        let accepted = listener.accept().expect("it connected");
        let holder = format!("process {}", std::process::id());
        let name = path.display().to_string();
        let words = [
            "fd 3",
            "connected to",
            &name,
            &holder,
            "outside the job",
            "close it",
        ];
        refused(case, target, &words);
        drop(accepted);
    });
}

#[test]
fn waiting_for_a_process_outside() {
    isolated("waiting_for_a_process_outside", |case| {
        let path = short(case, "server");
        let listener = UnixListener::bind(&path).expect("it is free");
        let target = odd(case, "unix-stream", Some(&path));
        let name = path.display().to_string();
        let words = [
            "fd 3",
            "waiting to be accepted by",
            &name,
            "outside the job",
        ];
        refused(case, target, &words);
        drop(listener);
    });
}

#[test]
fn client_from_outside_in_the_backlog() {
    isolated("client_from_outside_in_the_backlog", |case| {
        let path = short(case, "server");
        let target = odd(case, "unix-listen", Some(&path));
        let client = UnixStream::connect(&path).expect("it listens");
        let words = [
            "fd 3",
            "waiting to be accepted",
            "outside the job",
            "try again",
        ];
        refused(case, target, &words);
        drop(client);
    });
}

#[test]
fn data_on_an_unaccepted_connection() {
    isolated("data_on_an_unaccepted_connection", |case| {
        let target = odd(case, "unix-unaccepted", Some(&short(case, "server")));
        refused(case, target, &["fd 4", "not accepted yet", "try again"]);
    });
}

/// The first checkpoint has it; the second one is not shown it any more, though several send to the
/// socket.
#[test]
fn empty_datagram_that_was_looked_at() {
    isolated("empty_datagram_that_was_looked_at", |case| {
        let mut target = odd(case, "unix-empty", Some(&short(case, "inbox")));
        let (image, _) = attach(case, target.pid(), "first.ckpt", &[]);
        let pid = target.pid().to_string();
        let words = ["fd 3", "empty messages", "read them"];
        ckpt(case, ["attach", &pid, "-o", "second.ckpt"]).refused(1, &words);
        assert_let_go(target.pid());
        target.job.signal(Signal::SIGKILL);
        until("its end", || target.job.ended());
        target.continued_by(restored(case, &image, &[]));
        target.passes();
    });
}

/// As with /dev/log.
#[test]
fn datagrams_to_a_socket_outside() {
    isolated("datagrams_to_a_socket_outside", |case| {
        let path = short(case, "log");
        let log = UnixDatagram::bind(&path).expect("it is free");
        let mut target = odd(case, "unix-datagram", Some(&path));
        let image = target.killed_into(case, "job.ckpt");
        drop(log);
        let name = path.display().to_string();
        run(case, &mut restore_cmd(&image, &[]))
            .refused(99, &[&name, "no socket is bound", "start"]);
        fs::remove_file(&path).expect("it was left behind");
        let log = UnixDatagram::bind(&path).expect("it is free");
        target.continued_by(restored(case, &image, &[]));
        target.passes();
        let mut buffer = [0; 10];
        assert_eq!(log.recv(&mut buffer).expect("it was sent"), 5);
    });
}

#[test]
fn name_that_another_one_has() {
    isolated("name_that_another_one_has", |case| {
        let path = short(case, "server");
        let mut target = odd(case, "unix-listen", Some(&path));
        let image = target.killed_into(case, "job.ckpt");
        fs::remove_file(&path).expect("it was left behind");
        let other = UnixListener::bind(&path).expect("it is free");
        let name = path.display().to_string();
        let holder = format!("process {}", std::process::id());
        run(case, &mut restore_cmd(&image, &[])).refused(99, &[&name, &holder, "live socket"]);
        drop(other);
        fs::remove_file(&path).expect("it was left behind");
        fs::write(&path, "precious").expect("the directory is writable");
        run(case, &mut restore_cmd(&image, &[])).refused(99, &[&name, "another file", "move"]);
        assert_eq!(fs::read(&path).expect("it is there"), b"precious");
        fs::remove_file(&path).expect("it is there");
        target.continued_by(restored(case, &image, &[]));
        UnixStream::connect(&path).expect("it listens again");
        target.passes();
    });
}

fn mapping(old: &Path, new: &Path) -> String {
    format!("{}={}", old.display(), new.display())
}

/// Bound to an absolute path, which is another one now.
#[test]
fn a_name_moves_with_its_directory() {
    isolated("a_name_moves_with_its_directory", |case| {
        let (old, new) = (case.path("old"), case.path("new"));
        fs::create_dir(&old).expect("the test's directory is writable");
        let mut target = odd(case, "unix-listen", Some(&short(case, "old/server")));
        let image = target.killed_into(case, "job.ckpt");
        fs::rename(&old, &new).expect("it is ours");
        let directory = old.display().to_string();
        let words = [&*directory, "no directory", "make that directory"];
        run(case, &mut restore_cmd(&image, &[])).refused(99, &words);
        let long = case.path(&"long".repeat(30));
        fs::create_dir(&long).expect("the test's directory is writable");
        let args = ["--map-path", &mapping(&old, &long)];
        let words = ["too long for the address", "--map-path"];
        run(case, &mut restore_cmd(&image, &args)).refused(99, &words);
        assert_eq!(fs::read_dir(&long).expect("it is there").count(), 0);
        let args = ["--map-path", &mapping(&old, &new)];
        target.continued_by(restored(case, &image, &args));
        let client = UnixStream::connect(new.join("server")).expect("it listens there");
        let name = client.peer_addr().expect("it is connected");
        assert_eq!(name.as_pathname(), Some(&*new.join("server")));
        assert!(!old.exists());
        target.passes();
    });
}

/// Names that are relative to a working directory that has moved; the old path leads there again
/// when all is restored, since the program has it in its memory.
#[test]
fn relative_names_move_with_their_directory() {
    isolated("relative_names_move_with_their_directory", |case| {
        let (mut target, image) = killed(case, "sock_dgram");
        let (old, new) = (target.path(""), case.path("elsewhere"));
        fs::rename(&old, &new).expect("it is ours");
        let args = ["--map-path", &mapping(&old, &new)];
        target.continued_by(restored(case, &image, &args));
        let cwd = fs::read_link(format!("/proc/{}/cwd", target.pid())).expect("it runs");
        assert_eq!(cwd, new);
        symlink(&new, old.components().as_path()).expect("the name is free");
        target.passes();
    });
}

/// Connected to a path outside the job, which is another one now.
#[test]
fn a_peer_that_was_connected_to_moves() {
    isolated("a_peer_that_was_connected_to_moves", |case| {
        let (old, new) = (short(case, "log"), short(case, "log of today"));
        let log = UnixDatagram::bind(&old).expect("it is free");
        let mut target = odd(case, "unix-datagram", Some(&old));
        let image = target.killed_into(case, "job.ckpt");
        drop(log);
        let log = UnixDatagram::bind(&new).expect("it is free");
        let args = ["--map-path", &mapping(&old, &new)];
        target.continued_by(restored(case, &image, &args));
        target.passes();
        let mut buffer = [0; 10];
        assert_eq!(log.recv(&mut buffer).expect("it was sent"), 5);
    });
}

#[test]
fn credentials_with_a_pid_that_is_taken() {
    isolated("credentials_with_a_pid_that_is_taken", |case| {
        let (target, image) = killed(case, "sock_peercred");
        // The processes that it has let make its sockets, and that have ended, come behind it.
        let gone = target.pid() + 2;
        let next_pid = |pid: i32| {
            fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string())
                .expect("whoever is root in a pid namespace chooses pids");
        };
        next_pid(gone);
        let other = common::job::spawn(std::process::Command::new("sleep").arg("1000"));
        assert_eq!(other.pid, gone);
        // Not one of the job's for `restore` itself.
        next_pid(gone + 100);
        let out = run(case, &mut restore_cmd(&image, &["--detach"]));
        out.ok();
        let words = format!("and not pid {gone}, which another process has");
        assert!(out.stderr.contains(&words), "{out:?}");
        other.kill();
        for pid in [target.pid(), target.pid() + 3] {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
        }
        common::rounds::everybody_reaped();
    });
}

/// Messages are sent before any process but the first exists, and sets that only a message holds have no process
/// that could add a signalfd.
#[test]
fn in_flight_before_it_exists() {
    isolated("in_flight_before_it_exists", |case| {
        let python = case.system_python();
        for (name, what, close, words) in [
            (
                "pidfd",
                "os.pidfd_open(child)",
                "",
                ["unread message", "pidfd", "all processes are there"],
            ),
            (
                "set",
                "watching(os.pidfd_open(child))",
                "os.close(c)",
                [
                    "epoll set",
                    "in flight",
                    "signalfd or a handle of a process",
                ],
            ),
        ] {
            let script = format!(
                "import os, select, socket, time\n\
                child = os.fork()\n\
                if not child: time.sleep(1000)\n\
                def watching(fd):\n    e = select.epoll(); e.register(fd, 1); globals()['keep'] = fd; return e.detach() if hasattr(e, 'detach') else os.dup(e.fileno())\n\
                a, b = socket.socketpair(); c = {what}\n\
                socket.send_fds(a, [b'x'], [c]); {close}\n\
                open('{name}', 'w').close()\n\
                time.sleep(1000)\n"
            );
            let mut command = std::process::Command::new(python);
            command.args(["-c", &script]).current_dir(case.dir());
            let job = common::start(&mut command, &case.path("python.log"));
            until("it to be ready", || case.path(name).exists().then_some(()));
            let pid = job.pid.to_string();
            ckpt(case, ["attach", &pid, "-o", "job.ckpt"]).refused(1, &words);
            let children = job.descendants();
            job.kill();
            children.iter().for_each(|pid| {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), Signal::SIGKILL);
            });
            common::job::reap_orphans(&children);
        }
    });
}

/// A restore that fails when everything is there takes the files of its sockets away again.
#[cfg(feature = "faults")]
#[test]
fn a_failed_restore_leaves_no_file() {
    isolated("a_failed_restore_leaves_no_file", |case| {
        let (mut target, image) = killed(case, "sock_named");
        let sockets = || -> Vec<PathBuf> {
            let files = fs::read_dir(case.path("run")).expect("it is there");
            let files = files.map(|file| file.expect("it is there").path());
            files.filter(|path| is_socket(path)).collect()
        };
        let left = sockets();
        assert!(!left.is_empty());
        left.iter()
            .for_each(|path| fs::remove_file(path).expect("it is ours"));
        let mut command = restore_cmd(&image, &[]);
        let out = run(case, command.env("CKPT_FAULT", "restore-release"));
        out.refused(99, &["fault injected"]);
        assert!(sockets().is_empty(), "{:?}", sockets());
        target.continued_by(restored(case, &image, &[]));
        target.passes();
    });
}

#[cfg(feature = "faults")]
fn is_socket(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket())
}
