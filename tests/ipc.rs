//! Objects that outlive the job: what becomes of them when they are missing at the restore, or when
//! others use them meanwhile.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::fixture::start_in;
use crate::common::tool::{RESTORE, leftovers};
use crate::common::{
    Case, Fixture, Job, attach, ckpt, fixture, isolated, isolated_as_user, odd, restore_cmd,
    restored, run, start, until,
};

/// Fixtures whose objects the kernel keeps under numbers.
const NUMBERED: &[&str] = &[
    "sysv_shm",
    "sysv_sem",
    "sysv_sem_undo",
    "sysv_msg",
    "restart_sysv",
];

/// Starts a fixture beside others.
fn another(case: &Case, name: &str) -> Fixture {
    start_in(
        case,
        name,
        &format!("run-{name}"),
        Command::new(case.fixtures().join(name)),
    )
}

/// Of System V alone: since util-linux 2.41 it removes POSIX objects as well, unless told so.
fn remove_all(case: &Case) {
    for kind in ["--all=shm", "--all=msg", "--all=sem"] {
        run(case, Command::new("ipcrm").arg(kind)).ok();
    }
    assert_eq!(objects(), 0);
}

/// System V objects in the namespace.
fn objects() -> usize {
    let count = |kind: &&str| {
        let table = std::fs::read_to_string(format!("/proc/sysvipc/{kind}"));
        table.expect("/proc is mounted").lines().skip(1).count()
    };
    ["shm", "sem", "msg"].iter().map(count).sum()
}

/// The id of the one with a key.
fn keyed(kind: &str) -> String {
    let table = std::fs::read_to_string(format!("/proc/sysvipc/{kind}")).expect("/proc is mounted");
    let mut rows = table.lines().skip(1).map(|line| line.split_whitespace());
    let found = rows.find_map(|mut words| (words.next()? != "0").then(|| words.next())?);
    found.expect("the fixture made one with a key").to_owned()
}

fn outsider(case: &Case, what: &str, id: &str) -> Command {
    let program = case.path("outsider");
    if !program.exists() {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs/outsider.c");
        let mut command = Command::new("gcc");
        run(case, command.args(["-O1", "-o"]).arg(&program).arg(source)).ok();
    }
    let mut command = Command::new(program);
    command.args([what, id]).arg(case.path("held"));
    command
}

fn refused(case: &Case, image: &Path, words: &[&str]) {
    let before = objects();
    run(case, &mut restore_cmd(image, &[])).refused(99, words);
    assert_eq!(objects(), before, "a refused restore leaves nothing behind");
}

/// Restores in an IPC namespace of its own.
fn restored_elsewhere(case: &Case, image: &Path) -> Job {
    let mut command = Command::new("unshare");
    command.args(["--ipc", RESTORE]).arg(image).arg("--detach");
    let out = run(case, &mut command);
    Job::of(out.ok().trim().parse().expect("it prints the pid"))
}

fn missing(case: &Case) {
    for name in NUMBERED {
        let mut fixture = another(case, name);
        for _ in 0..2 {
            let image = fixture.killed_into(case, "job.ckpt");
            remove_all(case);
            fixture.continued_by(restored(case, &image, &[]));
        }
        fixture.passes();
        assert_eq!(objects(), 0, "{name} leaves nothing behind");
    }
}

#[test]
fn what_is_missing_is_created() {
    isolated("what_is_missing_is_created", missing);
}

#[test]
fn what_is_missing_is_created_by_an_ordinary_user() {
    isolated_as_user("what_is_missing_is_created_by_an_ordinary_user", missing);
}

#[test]
fn an_image_brings_back_what_the_job_changed_since() {
    isolated("an_image_brings_back_what_the_job_changed_since", |case| {
        let mut fixture = another(case, "sysv_shm");
        let (image, _) = attach(case, fixture.pid(), "job.ckpt", &[]);
        run(case, &mut outsider(case, "scribble", &keyed("shm"))).ok();
        let _ = fixture.killed_into(case, "later.ckpt");
        fixture.continued_by(restored(case, &image, &[]));
        fixture.passes();
    });
}

#[test]
fn memory_that_others_have_attached() {
    isolated("memory_that_others_have_attached", |case| {
        let mut fixture = fixture(case, "sysv_shm");
        let id = keyed("shm");
        let held = case.path("held");
        let hold = || {
            let job = start(&mut outsider(case, "hold", &id), &case.path("outsider.log"));
            until("it to be attached", || held.exists().then_some(()));
            let _ = std::fs::remove_file(&held);
            job
        };
        let other = hold();
        let words = [
            "shared memory",
            &id,
            "also attached by process",
            "(outsider)",
        ];
        ckpt(
            case,
            ["attach", &fixture.pid().to_string(), "-o", "job.ckpt"],
        )
        .refused(1, &words);
        assert!(leftovers(case.dir()).is_empty());
        other.kill();
        let image = fixture.killed_into(case, "job.ckpt");
        let other = hold();
        refused(case, &image, &words);
        other.kill();
        fixture.continued_by(restored(case, &image, &[]));
        fixture.passes();
    });
}

/// The job has ended, and another program has used its objects since.
fn changed(case: &Case, name: &str, what: &str, kind: &str, words: &[&str]) -> (Fixture, PathBuf) {
    let mut fixture = another(case, name);
    let id = keyed(kind);
    let image = fixture.killed_into(case, "job.ckpt");
    run(case, &mut outsider(case, what, &id)).ok();
    refused(case, &image, words);
    (fixture, image)
}

#[test]
fn semaphores_that_others_used() {
    isolated("semaphores_that_others_used", |case| {
        let words = ["semaphore 3", "not only the job", "unshare --ipc"];
        let (mut fixture, image) = changed(case, "sysv_sem", "up", "sem", &words);
        fixture.continued_by(restored_elsewhere(case, &image));
        fixture.passes();
    });
}

#[test]
fn a_queue_that_others_used() {
    isolated("a_queue_that_others_used", |case| {
        let words = ["message queue", "40 messages", "ipcrm -q"];
        let (mut fixture, image) = changed(case, "sysv_msg", "send", "msg", &words);
        run(case, Command::new("ipcrm").args(["-q", &keyed("msg")])).ok();
        fixture.continued_by(restored(case, &image, &[]));
        fixture.passes();
    });
}

#[test]
fn an_id_that_another_object_has() {
    isolated("an_id_that_another_object_has", |case| {
        let mut fixture = another(case, "sysv_sem");
        let id = keyed("sem");
        let image = fixture.killed_into(case, "job.ckpt");
        remove_all(case);
        run(case, &mut outsider(case, "take-id", &id)).ok();
        refused(
            case,
            &image,
            &[
                "semaphore set",
                &id,
                "another object has its id",
                "ipcrm -s",
            ],
        );
        remove_all(case);
        fixture.continued_by(restored(case, &image, &[]));
        fixture.passes();
    });
}

#[test]
fn a_posix_queue_that_is_gone_with_its_messages() {
    isolated("a_posix_queue_that_is_gone_with_its_messages", |case| {
        let mut fixture = fixture(case, "mqueue");
        let image = fixture.killed_into(case, "job.ckpt");
        let mut elsewhere = Command::new("unshare");
        elsewhere.args(["--ipc", RESTORE]).arg(&image);
        let words = ["-full", "held 7 unread messages", "--files adopt"];
        run(case, &mut elsewhere).refused(99, &words);
        fixture.continued_by(restored(case, &image, &[]));
        fixture.passes();
    });
}

#[test]
fn posix_queues_that_cannot_come_back() {
    isolated("posix_queues_that_cannot_come_back", |case| {
        for (situation, words) in [
            ("mq-nameless", ["without a name", "1 unread messages"]),
            (
                "mq-notify",
                ["mq_notify with SIGEV_SIGNAL", "poll the queue"],
            ),
        ] {
            let fixture = odd(case, situation, None);
            let pid = fixture.pid().to_string();
            ckpt(case, ["attach", &pid, "-o", "job.ckpt"]).refused(1, &words);
            assert!(leftovers(case.dir()).is_empty());
            fixture.passes();
        }
    });
}

#[test]
fn a_set_that_the_job_only_created() {
    isolated("a_set_that_the_job_only_created", |case| {
        let mut fixture = odd(case, "sem-fresh", None);
        let image = fixture.killed_into(case, "job.ckpt");
        fixture.continued_by(restored(case, &image, &[]));
        // The set is older than the restored job, unless both are of the same second: the first image has it in any case.
        fixture.killed_into(case, "later.ckpt");
        // With a key it may as well be another program's.
        remove_all(case);
        let out = run(case, restore_cmd(&image, &[]).arg("--detach"));
        fixture.continued_by(Job::of(out.ok().trim().parse().expect("it prints the pid")));
        for words in ["key 0x46000001", "not used by it so far"] {
            assert!(out.stderr.contains(words), "{out:#?}");
        }
        assert_eq!(objects(), 0);
        fixture.passes();
    });
}

#[test]
fn refused_without_the_right_to_choose_ids() {
    isolated("refused_without_the_right_to_choose_ids", |case| {
        case.needs_root();
        let mut fixture = another(case, "sysv_msg");
        let image = fixture.killed_into(case, "job.ckpt");
        remove_all(case);
        let mut command = Command::new("setpriv");
        let without = "-checkpoint_restore,-sys_admin";
        command.args(["--bounding-set", without, "--inh-caps", without]);
        command.arg(RESTORE).arg(&image);
        let words = [
            "message queue",
            "you may not create",
            "--map-root-user --ipc",
        ];
        run(case, &mut command).refused(99, &words);
        fixture.continued_by(restored(case, &image, &[]));
        fixture.passes();
    });
}

#[cfg(feature = "faults")]
#[test]
fn a_restore_that_fails_leaves_everything_as_it_was() {
    isolated("a_restore_that_fails_leaves_everything_as_it_was", |case| {
        for name in NUMBERED {
            let mut fixture = another(case, name);
            let image = fixture.killed_into(case, "job.ckpt");
            for step in ["restore-spawned", "restore-filled", "restore-threads"] {
                let fail = || run(case, restore_cmd(&image, &[]).env("CKPT_FAULT", step));
                assert_eq!(fail().code(), 99, "{name} {step}");
            }
            remove_all(case);
            for step in ["restore-spawned", "restore-filled", "restore-threads"] {
                let fail = || run(case, restore_cmd(&image, &[]).env("CKPT_FAULT", step));
                assert_eq!(fail().code(), 99, "{name} {step}");
                assert_eq!(objects(), 0, "{name} {step}");
            }
            fixture.continued_by(restored(case, &image, &[]));
            fixture.passes();
        }
    });
}
