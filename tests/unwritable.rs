//! An image that cannot be written where it shall go: refused in one sentence that names the place
//! and the remedy; the target goes on, an older image stays, and nothing is left behind.

use crate::common;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::common::isolate::open_to_all;
use crate::common::refused::unharmed;
use crate::common::tool::{CKPT, leftovers, nobody, restored_in_front};
use crate::common::{Case, Ended, Looks, ckpt, fixture, isolated, run, until};

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
        open_to_all(case.dir());
        let command = nobody(case, &case.fixtures().join("counter"));
        let target = common::fixture::start_in(case, "counter", "run", command);
        let before = Looks::at(target.pid());
        let closed = case.path("closed");
        fs::create_dir(&closed).expect("the test's directory is writable");
        let out = run(
            case,
            nobody(case, CKPT.as_ref())
                .arg("attach")
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
        let name = old.display().to_string();
        let remedy = "free some space there, or write the image elsewhere with -o";
        cannot_write(case, &old, &[&name, "No space left", remedy]);
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
        out.refused(1, &["job.ckpt", "File too large", "ulimit -f"]);
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
