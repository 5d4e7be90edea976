//! POSIX shared memory and named semaphores: files of `/dev/shm`, which is empty after a reboot. And
//! other files that the job only has mapped.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::common::fixture::{killed, start_in};
use crate::common::refused::restore_is_refused;
use crate::common::tool::leftovers;
use crate::common::{
    Case, Fixture, attach, ckpt, fixture, isolated, isolated_as_user, restore_cmd, restored, run,
    until,
};

/// The objects of a fixture, as `fx_name` calls them.
fn objects(fixture: &Fixture) -> Vec<PathBuf> {
    let directory = fs::canonicalize(fixture.path(".")).expect("it is there");
    let dotted = directory.to_string_lossy()[1..].replace('/', ".");
    let all = fs::read_dir("/dev/shm").expect("it can be read").flatten();
    let of_it = all.filter(|e| e.file_name().to_string_lossy().contains(&dotted));
    of_it.map(|e| e.path()).collect()
}

/// As after a reboot: the names are gone, and the memory with the last process.
fn reboot(fixture: &Fixture) {
    let objects = objects(fixture);
    assert!(!objects.is_empty());
    for object in objects {
        fs::remove_file(object).expect("it is ours");
    }
}

fn comes_back(case: &Case, name: &str) {
    let (mut target, image) = killed(case, name);
    for _ in 0..2 {
        reboot(&target);
        target.continued_by(restored(case, &image, &[]));
        assert!(!objects(&target).is_empty());
        target.job.kill_and_forget();
    }
    reboot(&target);
    target.continued_by(restored(case, &image, &[]));
    target.passes();
}

#[test]
fn semaphores_after_a_reboot() {
    isolated("semaphores_after_a_reboot", |case| {
        comes_back(case, "sem_posix")
    });
}

#[test]
fn memory_after_a_reboot() {
    isolated("memory_after_a_reboot", |case| {
        comes_back(case, "shm_posix")
    });
}

#[test]
fn memory_after_a_reboot_as_user() {
    isolated_as_user("memory_after_a_reboot_as_user", |case| {
        comes_back(case, "shm_posix");
    });
}

/// What another program has made under the name in the meantime is nothing to be lost silently.
#[test]
fn what_is_there_stays() {
    isolated("what_is_there_stays", |case| {
        let (mut target, image) = killed(case, "shm_posix");
        let object = objects(&target).remove(0);
        reboot(&target);
        fs::write(&object, "another program's").expect("it is ours");
        let name = object.display().to_string();
        restore_is_refused(case, &image, &[&name, "was changed"]);
        let put = run(case, &mut restore_cmd(&image, &["--put-files"]));
        put.refused(99, &[&name, "was changed"]);
        assert_eq!(
            fs::read(&object).expect("it is there"),
            b"another program's"
        );
        target.continued_by(restored(case, &image, &["--put-files", "--overwrite"]));
        target.passes();
    });
}

/// A restore that fails takes back what it has put there.
#[test]
fn a_failed_restore_leaves_no_memory() {
    isolated("a_failed_restore_leaves_no_memory", |case| {
        let (target, image) = killed(case, "shm_posix");
        reboot(&target);
        let mut command = restore_cmd(&image, &[]);
        command.env("CKPT_FAULT", "restore-release");
        assert_eq!(run(case, &mut command).code(), 99);
        assert_eq!(objects(&target), [""; 0].map(PathBuf::from));
    });
}

/// Saved and put back like an open one, though only a mapping leads to it.
#[test]
fn a_mapped_file_is_saved() {
    isolated("a_mapped_file_is_saved", |case| {
        let mut target = fixture(case, "file_shared");
        let file = target.path("file");
        let pattern = file.display().to_string();
        let (image, _) = attach(
            case,
            target.pid(),
            "job.ckpt",
            &["--kill", "--save-files", &pattern],
        );
        until("its end", || target.job.ended());
        fs::remove_file(&file).expect("it is ours");
        restore_is_refused(case, &image, &[&pattern, "cannot be opened"]);
        target.continued_by(restored(case, &image, &["--put-files"]));
        target.passes();
        // Libraries are mapped as well, and not the job's to write.
        let counter = Command::new(case.fixtures().join("counter"));
        let target = start_in(case, "counter", "run-counter", counter);
        let out = ckpt(
            case,
            [
                "attach",
                &target.pid().to_string(),
                "-o",
                "other.ckpt",
                "--save-files",
                "/**/lib*",
            ],
        );
        out.ok();
        assert!(out.stderr.contains("matches no file"), "{out:?}");
        assert_eq!(leftovers(case.dir()).len(), 2);
    });
}
