//! Images that cannot be restored here, or not as they are: refused in one sentence that names the
//! object and the remedy, and no process is left behind.

use crate::common;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::fixture::killed;
use crate::common::isolate::open_to_all;
use crate::common::look::{assert_let_go, assert_no_process_left};
use crate::common::refused::{FAILED, restore_is_refused};
use crate::common::tool::{CKPT, nobody};
use crate::common::{
    Case, Ended, Fixture, Job, Looks, ckpt, fixture, isolated, odd, restore_cmd, restored, run,
    start, until,
};

#[test]
fn spoilt_images() {
    isolated("spoilt_images", |case| {
        let (mut target, image) = killed(case, "threads");
        let whole = fs::read(&image).expect("it was just written");
        let path = case.path("spoilt.ckpt");
        let spoilt = |bytes: &[u8], words: &[&str]| {
            fs::write(&path, bytes).expect("the test's directory is writable");
            let name = path.display().to_string();
            let mut words = words.to_vec();
            words.push(&name);
            run(case, &mut restore_cmd(&path, &[])).refused(FAILED, &words);
            ckpt(case, ["verify".as_ref(), path.as_os_str()]).refused(1, &words);
        };
        spoilt(b"", &["empty"]);
        spoilt(b"#!/bin/sh\necho not an image\n", &["not an image of ckpt"]);
        spoilt(&whole[..500], &["incomplete", "another image"]);
        spoilt(&whole[..whole.len() / 2], &["incomplete", "another image"]);
        spoilt(&whole[..whole.len() - 1], &["incomplete", "another image"]);
        let changed = |at: usize, bytes: &[u8], sealed: bool| {
            let mut image = whole.clone();
            image[at..at + bytes.len()].copy_from_slice(bytes);
            if sealed {
                seal(&mut image);
            }
            image
        };
        let flip = |at: usize| [whole[at] ^ 0x10];
        for at in [
            64,
            2000,
            whole.len() / 2,
            whole.len() - 200,
            whole.len() - 30,
        ] {
            spoilt(
                &changed(at, &flip(at), false),
                &["corrupted", "another image"],
            );
        }
        spoilt(
            &changed(8, &[2, 0], true),
            &["format 2.0", "newer", "newer ckpt"],
        );
        fs::write(&path, changed(16, &[2, 0], true)).expect("the test's directory is writable");
        let words = ["aarch64", "x86_64"];
        run(case, &mut restore_cmd(&path, &[])).refused(FAILED, &words);
        fs::remove_file(&path).expect("it is there");
        run(case, &mut restore_cmd(&path, &[])).refused(FAILED, &["no such image", "spoilt.ckpt"]);
        common::look::assert_no_process_left();
        // The whole one still works.
        target.continued_by(restored(case, &image, &[]));
        target.passes();
    });
}

/// Makes the digests of a changed header right again; see docs/image-format.md.
fn seal(image: &mut [u8]) {
    let digest = *blake3::hash(&image[..992]).as_bytes();
    image[992..1024].copy_from_slice(&digest);
    let footer = image.len() - 160;
    let number = |at: usize| {
        let bytes = image[footer + at..footer + at + 8].try_into();
        u64::from_le_bytes(bytes.expect("these are eight")) as usize
    };
    let (index, len) = (number(16), number(24));
    let mut root = blake3::Hasher::new();
    root.update(&image[..1024])
        .update(&image[index..index + len]);
    image[footer + 88..footer + 120].copy_from_slice(root.finalize().as_bytes());
    let seal = *blake3::hash(&image[footer..footer + 120]).as_bytes();
    image[footer + 120..footer + 152].copy_from_slice(&seal);
}

#[test]
fn damaged_page_found_during_the_restore() {
    isolated("damaged_page_found_during_the_restore", |case| {
        let (_target, image) = killed(case, "anon_private");
        let file = File::options()
            .read(true)
            .write(true)
            .open(&image)
            .expect("it is ours");
        let mut table = [0; 4];
        file.read_exact_at(&mut table, 1024 + 12)
            .expect("it is longer");
        // In the first chunk's stored bytes: not read before the process exists.
        let at = 1024 + 64 + u64::from(u32::from_le_bytes(table)) + 10;
        let mut bytes = [0; 1];
        file.read_exact_at(&mut bytes, at).expect("it is longer");
        file.write_all_at(&[bytes[0] ^ 1], at).expect("it is ours");
        restore_is_refused(case, &image, &["job.ckpt", "corrupted"]);
    });
}

#[test]
fn pid_taken() {
    isolated("pid_taken", |case| {
        let target = fixture(case, "counter");
        let (image, _) = common::attach(case, target.pid(), "job.ckpt", &[]);
        let before = Looks::at(target.pid());
        let pid = format!("pid {}", target.pid());
        let out = run(case, &mut restore_cmd(&image, &["--pids", "keep"]));
        out.refused(FAILED, &[&pid, "taken", "(counter)", "--pids namespace"]);
        assert_let_go(target.pid());
        before.assert_same(target.pid(), &[]);
        target.passes();
    });
}

#[test]
fn program_file_missing() {
    isolated("program_file_missing", |case| {
        let program = case.path("program");
        fs::copy(case.fixtures().join("counter"), &program).expect("there is room");
        let command = Command::new(&program);
        let mut target = common::fixture::start_in(case, "program", "run", command);
        let image = target.killed_into(case, "job.ckpt");
        let aside = case.path("aside");
        fs::rename(&program, &aside).expect("it is ours");
        let name = program.display().to_string();
        restore_is_refused(case, &image, &[&name, "No such file", "put it back"]);
        fs::rename(&aside, &program).expect("it is ours");
        target.continued_by(restored(case, &image, &[]));
        target.passes();
    });
}

#[test]
fn mapped_file_changed() {
    isolated("mapped_file_changed", |case| {
        let file = case.path("mapped");
        fs::write(&file, vec![b'a'; 9000]).expect("the test's directory is writable");
        let mut target = odd(case, "map", Some(&file));
        let image = target.killed_into(case, "job.ckpt");
        let mut changed = vec![b'a'; 9000];
        changed.extend([b'b'; 1000]);
        fs::write(&file, changed).expect("it is ours");
        let name = file.display().to_string();
        restore_is_refused(case, &image, &[&name, "changed", "--files adopt"]);
        target.continued_by(restored(case, &image, &["--files", "adopt"]));
        target.passes();
    });
}

/// A target with an open file of ten bytes, killed; the file then changes.
fn open_file(case: &Case, change: impl FnOnce(&Path)) -> (Fixture, PathBuf, PathBuf) {
    let file = case.path("opened");
    fs::write(&file, "0123456789").expect("the test's directory is writable");
    let mut target = odd(case, "file", Some(&file));
    let image = target.killed_into(case, "job.ckpt");
    change(&file);
    (target, image, file)
}

fn adopted(case: &Case, (mut target, image, file): (Fixture, PathBuf, PathBuf), reason: &str) {
    let name = file.display().to_string();
    restore_is_refused(case, &image, &[&name, reason, "--files adopt"]);
    target.continued_by(restored(case, &image, &["--files=adopt"]));
    target.passes();
    let text = fs::read_to_string(&file).expect("it is there");
    assert_eq!(&text[5..], "written");
}

#[test]
fn open_file_replaced() {
    isolated("open_file_replaced", |case| {
        let opened = open_file(case, |file| {
            fs::write(case.path("new"), "abcdefghij").expect("the test's directory is writable");
            fs::rename(case.path("new"), file).expect("it is ours");
        });
        adopted(case, opened, "replaced");
    });
}

#[test]
fn open_file_shrunk() {
    isolated("open_file_shrunk", |case| {
        let opened = open_file(case, |file| {
            let file = File::options().write(true).open(file).expect("it is ours");
            file.set_len(6).expect("it is ours");
        });
        adopted(case, opened, "shrunk from 10 to 6 bytes");
    });
}

#[test]
fn open_file_missing() {
    isolated("open_file_missing", |case| {
        let (mut target, image, file) =
            open_file(case, |file| fs::remove_file(file).expect("it is ours"));
        let name = file.display().to_string();
        restore_is_refused(case, &image, &[&name, "No such file", "put it back"]);
        fs::write(case.path("other"), "0123456789").expect("the test's directory is writable");
        // Another file takes its place.
        let other = format!("3={}", case.path("other").display());
        target.continued_by(restored(case, &image, &["--fd", &other]));
        target.go();
        let ended = until("its end", || target.job.ended());
        assert!(matches!(ended, Ended::Exited(_)), "{ended:?}");
    });
}

#[test]
fn open_file_grown() {
    isolated("open_file_grown", |case| {
        let (mut target, image, file) = open_file(case, |file| {
            let mut file = File::options().append(true).open(file).expect("it is ours");
            file.write_all(b"more").expect("it is ours");
        });
        target.continued_by(restored(case, &image, &[]));
        target.passes();
        assert_eq!(
            fs::read_to_string(&file).expect("it is there"),
            "01234writtenre"
        );
    });
}

/// A pipe or FIFO outside of the job as fd 3; the script makes it, and `$0 $1` of it is the program.
fn to_the_outside(case: &Case, script: &str, name: &str) {
    let dir = case.path("run");
    fs::create_dir(&dir).expect("the test's directory is writable");
    let mut shell = Command::new("sh");
    shell
        .args(["-c", script])
        .arg(common::odd::build(case))
        .arg(&dir)
        .current_dir(case.dir());
    let shell = start(&mut shell, &case.path("shell.log"));
    let pid = until("the program", || fs::read_to_string(dir.join("ready")).ok());
    let pid: i32 = pid.trim().parse().expect("it is a pid");
    let (image, _) = common::attach(case, pid, "job.ckpt", &["--kill"]);
    assert!(matches!(shell.wait(), Ended::Exited(_)));
    restore_is_refused(case, &image, &["fd 3", name, "outside", "--fd 3=PATH"]);
    let given = case.path("given");
    File::create(&given).expect("the test's directory is writable");
    let job = restored(case, &image, &["--fd", &format!("3={}", given.display())]);
    fs::write(dir.join("go"), "").expect("the test's directory is writable");
    assert_eq!(job.wait(), Ended::Exited(0));
    assert_eq!(fs::read_to_string(&given).expect("it is there"), "hello\n");
}

#[test]
fn pipe_to_the_outside() {
    isolated("pipe_to_the_outside", |case| {
        let script = "(ODD=fd3 exec $0 $1 3>&1 >>odd.log) | cat >before";
        to_the_outside(case, script, "pipe");
    });
}

#[test]
fn fifo_to_the_outside() {
    isolated("fifo_to_the_outside", |case| {
        let script = "mkfifo fifo; cat fifo >before & ODD=fd3 $0 $1 3>fifo >>odd.log; wait";
        to_the_outside(case, script, "/fifo");
    });
}

/// As standard output a FIFO becomes that of `restore`, which says how to get it back.
#[test]
fn fifo_to_the_outside_as_standard_output() {
    isolated("fifo_to_the_outside_as_standard_output", |case| {
        let fifo = case.path("fifo");
        run(case, Command::new("mkfifo").arg(&fifo)).ok();
        let mut cat = start(Command::new("cat").arg(&fifo), &case.path("cat.log"));
        let mut shell = Command::new("sh");
        shell.args(["-c", "exec sleep 1000 >fifo"]);
        let mut job = start(shell.current_dir(case.dir()), &case.path("shell.log"));
        until("the FIFO to be open", || {
            let open = fs::read_link(format!("/proc/{}/fd/1", job.pid)).ok()?;
            (open == fifo).then_some(())
        });
        let (image, _) = common::attach(case, job.pid, "job.ckpt", &["--kill"]);
        until("its end", || job.ended());
        until("its end", || cat.ended());
        let out = run(case, &mut restore_cmd(&image, &["--detach"]));
        let pid = out.ok().trim().parse().expect("it is a pid");
        let option = format!("--fd 1={}", fifo.display());
        assert!(out.stderr.contains(&option), "{out:?}");
        Job::of(pid).kill();
    });
}

#[test]
fn fifo_missing() {
    isolated("fifo_missing", |case| {
        let (mut target, image) = killed(case, "fifo");
        let fifo = target.path("lonely");
        fs::remove_file(&fifo).expect("it is ours");
        let name = fifo.display().to_string();
        let remedy = format!("mkfifo {name}");
        restore_is_refused(case, &image, &[&name, "No such file", &remedy]);
        fs::write(&fifo, "").expect("the test's directory is writable");
        restore_is_refused(case, &image, &[&name, "something else", &remedy]);
        fs::remove_file(&fifo).expect("it is ours");
        run(case, Command::new("mkfifo").arg(&fifo)).ok();
        target.continued_by(restored(case, &image, &[]));
        target.passes();
    });
}

/// A user without any privilege, who may not choose pids: told so, with the way out, which works.
#[test]
fn pid_may_not_be_chosen() {
    isolated("pid_may_not_be_chosen", |case| {
        case.needs_root();
        open_to_all(case.dir());
        case.open_log("counter.log");
        let command = nobody(case, &case.fixtures().join("counter"));
        let mut target = common::fixture::start_in(case, "counter", "run", command);
        let pid = target.pid().to_string();
        let mut attach = nobody(case, Path::new(CKPT));
        run(
            case,
            attach.args(["attach", &pid, "-o", "job.ckpt", "--kill"]),
        )
        .ok();
        assert_eq!(until("its end", || target.job.ended()), Ended::Killed(9));
        let mut restore = nobody(case, Path::new(common::tool::RESTORE));
        let out = run(case, restore.args(["job.ckpt", "--pids", "keep"]));
        let pid = format!("process {pid}");
        out.refused(
            FAILED,
            &[&pid, "CAP_CHECKPOINT_RESTORE", "--pids namespace"],
        );
        // What the message advises, and what is done without an option.
        target.go();
        let mut restore = nobody(case, Path::new(common::tool::RESTORE));
        run(case, restore.args(["job.ckpt", "--pids", "namespace"])).ok();
        let verdict = fs::read_to_string(target.path("verdict")).expect("it has judged itself");
        assert_eq!(verdict.trim(), "PASS");
        // An unprivileged reader of the image is its owner only.
        let mode = fs::metadata(case.path("job.ckpt"))
            .expect("it is there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    });
}

/// What others may write to, or put into its place, is not restored as one's own.
#[test]
fn written_by_others() {
    isolated("written_by_others", |case| {
        let (_, image) = killed(case, "counter");
        let refused = |image: &Path, words: &[&str]| {
            for args in [&[][..], &["--dry-run"]] {
                run(case, &mut restore_cmd(image, args)).refused(FAILED, words);
            }
            let image = image.to_str().expect("it is text");
            let out = ckpt(case, ["check", image]);
            assert_eq!(out.code(), 1, "{out:#?}");
            assert_no_process_left();
        };
        let mode = |path: &Path, mode: u32| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("it is ours");
        };
        mode(&image, 0o602);
        refused(
            &image,
            &["job.ckpt", "can be written by all users", "chmod go-w"],
        );
        mode(&image, 0o600);
        if case.is_root() {
            let group = Some(nix::unistd::Gid::from_raw(4242));
            nix::unistd::chown(&image, None, group).expect("we are root");
            mode(&image, 0o620);
            refused(
                &image,
                &["job.ckpt", "members of the group 4242", "chmod go-w"],
            );
            mode(&image, 0o600);
            let open = case.path("open");
            fs::create_dir(&open).expect("the test's directory is writable");
            mode(&open, 0o777);
            let moved = open.join("moved.ckpt");
            fs::rename(&image, &moved).expect("it is there");
            refused(
                &moved,
                &["moved.ckpt", "any user may replace it", "belongs to root"],
            );
            // In a sticky directory only owners may remove files; this user is not one.
            mode(&open, 0o1777);
            run(case, &mut restore_cmd(&moved, &["--dry-run"])).ok();
        }
    });
}

/// What is in the place of an image and is no file is neither waited for nor read.
#[test]
fn no_file_is_no_image() {
    isolated("no_file_is_no_image", |case| {
        let path = case.path("job.ckpt");
        let fifo = case.path("fifo");
        run(case, Command::new("mkfifo").arg(&fifo)).ok();
        let directory = case.path("directory");
        fs::create_dir(&directory).expect("the test's directory is writable");
        for place in [
            &*fifo,
            &directory,
            Path::new("/dev/zero"),
            Path::new("/dev/tty"),
        ] {
            std::os::unix::fs::symlink(place, &path).expect("its place is free");
            for image in [place, &path] {
                let text = image.to_str().expect("it is text");
                let words = [text];
                for args in [&["--detach"][..], &["--dry-run"], &["--any-owner"]] {
                    run(case, &mut restore_cmd(image, args)).refused(FAILED, &words);
                }
                for command in ["verify", "inspect", "check"] {
                    let out = ckpt(case, [command, text]);
                    assert_ne!(out.code(), 0, "{command}: {out:#?}");
                    assert!(
                        out.stderr.contains(text) || out.stdout.contains(text),
                        "{out:#?}"
                    );
                }
            }
            fs::remove_file(&path).expect("it is ours");
        }
        common::look::assert_no_process_left();
    });
}
