//! Sockets whose other side is outside the job, and names that others use.

mod common;

use std::fs;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;

use common::look::assert_let_go;
use common::tool::leftovers;
use common::{Case, Fixture, Looks, ckpt, isolated, odd, restore_cmd, restored, run};

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

#[test]
fn connected_to_somebody_outside() {
    isolated("connected_to_somebody_outside", |case| {
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
fn waiting_for_somebody_outside() {
    isolated("waiting_for_somebody_outside", |case| {
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
fn data_that_nobody_has_accepted() {
    isolated("data_that_nobody_has_accepted", |case| {
        let target = odd(case, "unix-unaccepted", Some(&short(case, "server")));
        refused(case, target, &["fd 4", "nobody has accepted", "try again"]);
    });
}

/// As with /dev/log.
#[test]
fn datagrams_to_somebody_outside() {
    isolated("datagrams_to_somebody_outside", |case| {
        let path = short(case, "log");
        let log = UnixDatagram::bind(&path).expect("it is free");
        let mut target = odd(case, "unix-datagram", Some(&path));
        let image = target.killed_into(case, "job.ckpt");
        drop(log);
        let name = path.display().to_string();
        run(case, &mut restore_cmd(&image, &[])).refused(99, &[&name, "nobody", "start"]);
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
