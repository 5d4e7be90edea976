//! What cannot be done is refused in one sentence that names the object and the remedy, before
//! anything is touched: the target goes on, and nothing is left behind.

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::isolate::{open_to_all, skipped};
use common::look::{assert_let_go, states, status_field};
use common::tool::{CKPT, leftovers, restored_in_front};
use common::{
    Case, Ended, Fixture, Looks, ckpt, fixture, isolated, isolated_as_user, odd, restore_cmd,
    restored, run, start, until,
};

/// What a supervisor returns when it failed itself.
const FAILED: i32 = 99;

/// `ckpt attach` of the fixture is refused with these words, and nothing happened to it.
fn attach_is_refused(case: &Case, fixture: Fixture, words: &[&str]) {
    let before = Looks::at(fixture.pid());
    ckpt(
        case,
        ["attach", &fixture.pid().to_string(), "-o", "job.ckpt"],
    )
    .refused(1, words);
    unharmed(case, fixture, &before);
}

fn unharmed(case: &Case, fixture: Fixture, before: &Looks) {
    assert_let_go(fixture.pid());
    before.assert_same(fixture.pid(), &[]);
    assert!(
        leftovers(case.dir()).is_empty(),
        "{:?}",
        leftovers(case.dir())
    );
    fixture.passes();
}

#[test]
fn no_such_process() {
    isolated("no_such_process", |case| {
        let out = ckpt(case, ["attach", "99999", "-o", "job.ckpt"]);
        out.refused(1, &["process 99999", "does not exist", "pgrep"]);
        let out = ckpt(case, ["check", "99999"]);
        assert_eq!(out.code(), 1);
        assert!(out.stdout.contains("does not exist"), "{out:?}");
        assert!(leftovers(case.dir()).is_empty());
    });
}

#[test]
fn kernel_thread() {
    // It is only seen from the first pid namespace, and nothing is started here.
    if fs::read_to_string("/proc/2/comm")
        .unwrap_or_default()
        .trim()
        != "kthreadd"
    {
        return skipped("refusals::kernel_thread", "sight of the kernel's threads");
    }
    let image = std::env::temp_dir().join(format!("kthreadd.{}.ckpt", std::process::id()));
    let out = Command::new(CKPT)
        .args(["attach", "2", "-o"])
        .arg(&image)
        .output();
    let out = out.expect("it was built");
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1));
    assert!(
        said.contains("process 2 (kthreadd)") && said.contains("thread of the kernel"),
        "{said}"
    );
    assert!(!image.exists());
}

#[test]
fn another_users_process() {
    isolated("another_users_process", |case| {
        case.needs_root();
        let fixture = fixture(case, "counter");
        let before = Looks::at(fixture.pid());
        open_to_all(case.dir());
        let out = run(
            case,
            Command::new("setpriv")
                .args([
                    "--reuid=65534",
                    "--regid=65534",
                    "--clear-groups",
                    CKPT,
                    "attach",
                ])
                .args([&fixture.pid().to_string(), "-o", "job.ckpt"])
                .current_dir(case.dir()),
        );
        let pid = format!("process {}", fixture.pid());
        out.refused(1, &[&pid, "uid 0", "uid 65534", "as that user or as root"]);
        unharmed(case, fixture, &before);
    });
}

#[test]
fn traced_already() {
    isolated("traced_already", |case| {
        case.needs_program("strace", "strace");
        let fixture = fixture(case, "counter");
        let pid = fixture.pid().to_string();
        let mut strace = Command::new("strace");
        let strace = start(
            strace.args(["-o", "/dev/null", "-p", &pid]),
            &case.path("strace.log"),
        );
        until("strace", || {
            status_field(fixture.pid(), "TracerPid").filter(|tracer| tracer != "0")
        });
        let tracer = format!("strace (pid {})", strace.pid);
        let out = ckpt(case, ["attach", &pid, "-o", "job.ckpt"]);
        out.refused(1, &["traced by", &tracer, "end that one first"]);
        let before = Looks::at(fixture.pid());
        strace.kill();
        unharmed(case, fixture, &before);
    });
}

#[test]
fn program_of_32_bits() {
    isolated("program_of_32_bits", |case| {
        let source = case.path("tiny.s");
        // pause() for ever.
        let text = ".globl _start\n_start: mov $29, %eax\n int $0x80\n jmp _start\n";
        fs::write(&source, text).expect("the test's directory is writable");
        let (object, program) = (case.path("tiny.o"), case.path("tiny"));
        run(
            case,
            Command::new("as")
                .arg("--32")
                .arg("-o")
                .arg(&object)
                .arg(&source),
        )
        .ok();
        let mut link = Command::new("ld");
        run(
            case,
            link.args(["-m", "elf_i386", "-o"])
                .arg(&program)
                .arg(&object),
        )
        .ok();
        let mut job = start(&mut Command::new(&program), &case.path("tiny.log"));
        until("the program to wait", || match states(job.pid).first() {
            Some((_, 'S')) => Some(()),
            _ if job.ended().is_some() => case.skip("a kernel that runs 32-bit programs"),
            _ => None,
        });
        let out = ckpt(case, ["attach", &job.pid.to_string(), "-o", "job.ckpt"]);
        out.refused(1, &["(tiny)", "32-bit", "64-bit build"]);
        assert_let_go(job.pid);
    });
}

#[test]
fn zombie() {
    isolated("zombie", |case| {
        let job = start(&mut Command::new("true"), &case.path("true.log"));
        until("a zombie", || {
            (states(job.pid) == [(job.pid, 'Z')]).then_some(())
        });
        let out = ckpt(case, ["attach", &job.pid.to_string(), "-o", "job.ckpt"]);
        out.refused(1, &["(true)", "already ended", "zombie"]);
    });
}

#[test]
fn ckpt_itself() {
    isolated("ckpt_itself", |case| {
        let script = format!("exec {CKPT} attach $$ -o job.ckpt");
        let out = run(
            case,
            Command::new("sh")
                .args(["-c", &script])
                .current_dir(case.dir()),
        );
        out.refused(1, &["is ckpt itself"]);
    });
}

#[test]
fn thread_of_a_process() {
    isolated("thread_of_a_process", |case| {
        let fixture = fixture(case, "threads");
        let before = Looks::at(fixture.pid());
        let threads = states(fixture.pid());
        let thread = threads
            .iter()
            .map(|(tid, _)| *tid)
            .find(|tid| *tid != fixture.pid());
        let thread = thread.expect("it has threads").to_string();
        let process = format!("thread of process {}", fixture.pid());
        let remedy = format!("ckpt attach {}", fixture.pid());
        let out = ckpt(case, ["attach", &thread, "-o", "job.ckpt"]);
        out.refused(1, &[&thread, &process, &remedy]);
        unharmed(case, fixture, &before);
    });
}

#[test]
fn listening_socket() {
    isolated("listening_socket", |case| {
        attach_is_refused(
            case,
            odd(case, "listen", None),
            &["fd 3", "socket", "not supported"],
        );
    });
}

#[test]
fn io_uring() {
    isolated("io_uring", |case| {
        attach_is_refused(
            case,
            odd(case, "uring", None),
            &["fd 3", "io_uring", "not supported"],
        );
    });
}

#[test]
fn process_with_a_child() {
    isolated("process_with_a_child", |case| {
        let target = odd(case, "child", None);
        let pid = format!("process {} (odd)", target.pid());
        attach_is_refused(
            case,
            target,
            &[&pid, "child process", "wait until it has ended"],
        );
    });
}

#[test]
fn thread_with_descriptors_of_its_own() {
    isolated("thread_with_descriptors_of_its_own", |case| {
        let target = odd(case, "own-files", None);
        let pid = format!("process {} (odd)", target.pid());
        attach_is_refused(case, target, &[&pid, "table of descriptors of its own"]);
    });
}

#[test]
fn another_namespace() {
    isolated("another_namespace", |case| {
        let target = odd(case, "own-uts", None);
        let pid = format!("process {} (odd)", target.pid());
        attach_is_refused(case, target, &[&pid, "uts namespace", "nsenter", "--uts"]);
    });
}

#[test]
fn several_obstacles_are_told_at_once() {
    isolated("several_obstacles_are_told_at_once", |case| {
        let target = odd(case, "child", None);
        let out = ckpt(case, ["check", "--json", &target.pid().to_string()]);
        assert_eq!(out.code(), 1);
        let told: serde_json::Value = serde_json::from_str(&out.stdout).expect("it is JSON");
        assert_eq!(told["possible"], false);
        assert!(told["obstacles"][0]["remedy"].is_string(), "{told}");
        target.passes();
    });
}

#[test]
fn seccomp_of_an_ordinary_user() {
    isolated_as_user("seccomp_of_an_ordinary_user", |case| {
        let target = fixture(case, "seccomp");
        attach_is_refused(case, target, &["seccomp", "CAP_SYS_ADMIN", "as root"]);
    });
}

/// A checkpoint that cannot be written there; the target goes on, an older image stays.
fn cannot_write(case: &Case, image: &Path, words: &[&str]) {
    let target = fixture(case, "threads");
    let before = Looks::at(target.pid());
    let dir = image.parent().expect("it is in a directory");
    let files = |dir: &Path| {
        let names = fs::read_dir(dir).map(|entries| entries.count());
        names.unwrap_or(0)
    };
    let count = files(dir);
    let pid = target.pid().to_string();
    let mut attach = Command::new(CKPT);
    attach
        .args(["attach", &pid, "--codec=none", "-o"])
        .arg(image);
    let out = run(case, &mut attach);
    out.refused(1, words);
    assert_eq!(files(dir), count, "something was left in {}", dir.display());
    unharmed(case, target, &before);
}

#[test]
fn no_such_directory() {
    isolated("no_such_directory", |case| {
        let image = case.path("nowhere/job.ckpt");
        cannot_write(case, &image, &["nowhere", "No such file"]);
    });
}

#[test]
fn image_is_a_directory() {
    isolated("image_is_a_directory", |case| {
        let image = case.path("some/directory");
        fs::create_dir_all(&image).expect("the test's directory is writable");
        cannot_write(
            case,
            &image,
            &["some/directory", "not a regular file", "another name"],
        );
        assert!(image.is_dir());
    });
}

#[test]
fn directory_without_permission() {
    isolated("directory_without_permission", |case| {
        case.needs_root();
        let target = {
            open_to_all(case.dir());
            let mut command = Command::new("setpriv");
            command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
            command.arg(case.fixtures().join("counter"));
            common::fixture::start_in(case, "counter", "run", command)
        };
        let before = Looks::at(target.pid());
        let closed = case.path("closed");
        fs::create_dir(&closed).expect("the test's directory is writable");
        let out = run(
            case,
            Command::new("setpriv")
                .args([
                    "--reuid=65534",
                    "--regid=65534",
                    "--clear-groups",
                    CKPT,
                    "attach",
                ])
                .args([&target.pid().to_string(), "-o", "closed/job.ckpt"])
                .current_dir(case.dir()),
        );
        out.refused(1, &["closed/job.ckpt", "ermission denied"]);
        assert!(leftovers(&closed).is_empty());
        unharmed(case, target, &before);
    });
}

#[test]
fn full_disk() {
    isolated("full_disk", |case| {
        let disk = case.path("disk");
        fs::create_dir(&disk).expect("the test's directory is writable");
        let mut mount = Command::new("mount");
        let out = run(
            case,
            mount
                .args(["-t", "tmpfs", "-o", "size=32k", "tmpfs"])
                .arg(&disk),
        );
        if out.code() != 0 {
            case.skip(&format!(
                "permission to mount a tmpfs ({})",
                out.stderr.trim()
            ));
        }
        let old = disk.join("job.ckpt");
        fs::write(&old, "older").expect("there is room for that");
        cannot_write(
            case,
            &old,
            &["the image", "No space left", "free some space"],
        );
        assert_eq!(
            fs::read_to_string(&old).expect("it is still there"),
            "older"
        );
    });
}

#[test]
fn limited_file_size() {
    isolated("limited_file_size", |case| {
        let target = fixture(case, "threads");
        let before = Looks::at(target.pid());
        let script = format!(
            "ulimit -f 8; exec {CKPT} attach {} -o job.ckpt",
            target.pid()
        );
        let out = run(
            case,
            Command::new("bash")
                .args(["-c", &script])
                .current_dir(case.dir()),
        );
        out.refused(1, &["the image", "File too large"]);
        unharmed(case, target, &before);
    });
}

#[test]
fn reader_of_the_stream_goes_away() {
    isolated("reader_of_the_stream_goes_away", |case| {
        let target = fixture(case, "threads");
        let before = Looks::at(target.pid());
        let script = "$0 attach $1 -o - --codec none 2>ckpt.log | head -c 100 >/dev/null
            echo ${PIPESTATUS[0]}";
        let mut bash = Command::new("bash");
        bash.args(["-c", script, CKPT, &target.pid().to_string()])
            .current_dir(case.dir());
        let out = run(case, &mut bash);
        assert_eq!(out.ok().trim(), "1");
        let said = fs::read_to_string(case.path("ckpt.log")).expect("it was written");
        assert!(said.contains("Broken pipe"), "{said}");
        unharmed(case, target, &before);
    });
}

/// An image of a killed fixture, and the fixture, whose life may go on.
fn image_of(case: &Case, name: &str) -> (Fixture, PathBuf) {
    let mut target = fixture(case, name);
    let image = target.killed_into(case, "job.ckpt");
    (target, image)
}

/// `restore` of this image is refused with these words, by `verify` as well when `verify`.
fn restore_is_refused(case: &Case, image: &Path, words: &[&str]) {
    run(case, &mut restore_cmd(image, &[])).refused(FAILED, words);
    common::look::assert_nobody_left();
}

#[test]
fn spoilt_images() {
    isolated("spoilt_images", |case| {
        let (mut target, image) = image_of(case, "threads");
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
        common::look::assert_nobody_left();
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
        let (_target, image) = image_of(case, "anon_private");
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
        let out = run(case, &mut restore_cmd(&image, &[]));
        out.refused(FAILED, &[&pid, "taken", "(counter)", "unshare"]);
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

/// A pipe outside of the job as fd 3; its other end is read by `cat`.
#[test]
fn pipe_to_the_outside() {
    isolated("pipe_to_the_outside", |case| {
        let dir = case.path("run");
        fs::create_dir(&dir).expect("the test's directory is writable");
        let script = "ODD=fd3 exec $0 $1 3>&1 >>odd.log";
        let script = format!("({script}) | cat >before");
        let mut shell = Command::new("sh");
        shell
            .args(["-c", &script])
            .arg(common::odd::build(case))
            .arg(&dir)
            .current_dir(case.dir());
        let pipeline = start(&mut shell, &case.path("shell.log"));
        let pid = until("the program", || fs::read_to_string(dir.join("ready")).ok());
        let pid: i32 = pid.trim().parse().expect("it is a pid");
        let (image, _) = common::attach(case, pid, "job.ckpt", &["--kill"]);
        assert!(matches!(pipeline.wait(), Ended::Exited(_)));
        restore_is_refused(case, &image, &["fd 3", "pipe", "outside", "--fd 3=PATH"]);
        let given = case.path("given");
        File::create(&given).expect("the test's directory is writable");
        let job = restored(case, &image, &["--fd", &format!("3={}", given.display())]);
        fs::write(dir.join("go"), "").expect("the test's directory is writable");
        assert_eq!(job.wait(), Ended::Exited(0));
        assert_eq!(fs::read_to_string(&given).expect("it is there"), "hello\n");
    });
}

#[test]
fn image_through_a_pipe() {
    isolated("image_through_a_pipe", |case| {
        let mut target = fixture(case, "threads");
        let image = case.path("piped.ckpt");
        let script = "set -o pipefail; $0 attach $1 -o - --kill | cat >piped.ckpt";
        let mut bash = Command::new("bash");
        bash.args(["-c", script, CKPT, &target.pid().to_string()])
            .current_dir(case.dir());
        let out = run(case, &mut bash);
        assert_eq!(out.code(), 0, "{out:?}");
        assert_eq!(until("its end", || target.job.ended()), Ended::Killed(9));
        ckpt(case, ["verify".as_ref(), image.as_os_str()]).ok();
        target.continued_by(restored_in_front(case, &image, &[]));
        target.passes();
    });
}

/// A user without any privilege, who may not choose pids: told so, with the way out, which works.
#[test]
fn pid_may_not_be_chosen() {
    isolated("pid_may_not_be_chosen", |case| {
        case.needs_root();
        open_to_all(case.dir());
        let nobody = |program: &Path| {
            let mut command = Command::new("setpriv");
            command
                .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
                .arg(program);
            command.current_dir(case.dir()).stdin(Stdio::null());
            command
        };
        let log = case.path("counter.log");
        File::create(&log).expect("the test's directory is writable");
        open_to_all(&log);
        let command = nobody(&case.fixtures().join("counter"));
        let mut target = common::fixture::start_in(case, "counter", "run", command);
        let pid = target.pid().to_string();
        let mut attach = nobody(Path::new(CKPT));
        run(
            case,
            attach.args(["attach", &pid, "-o", "job.ckpt", "--kill"]),
        )
        .ok();
        assert_eq!(until("its end", || target.job.ended()), Ended::Killed(9));
        let mut restore = nobody(Path::new(common::tool::RESTORE));
        let out = run(case, restore.arg("job.ckpt"));
        let pid = format!("process {pid}");
        out.refused(
            FAILED,
            &[&pid, "CAP_CHECKPOINT_RESTORE", "unshare", "restore IMAGE"],
        );
        // What the message advises, word for word.
        target.go();
        let advice = out
            .stderr
            .split("unshare ")
            .nth(1)
            .expect("it was looked for just now");
        let (advice, _) = advice.split_once("restore IMAGE").expect("likewise");
        let mut unshare = nobody(Path::new("unshare"));
        unshare
            .args(advice.split_whitespace())
            .arg(common::tool::RESTORE)
            .arg("job.ckpt");
        run(case, &mut unshare).ok();
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
