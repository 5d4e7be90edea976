//! Files that moved, changed or went away between checkpoint and restore: `--map-path`, `--files`,
//! `--save-files` and `--put-files`.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use crate::common::logger::{Logger, STATE, expected, mapping, names};
use crate::common::look::assert_no_process_left;
use crate::common::tool::CKPT;
use crate::common::{
    Case, Ended, Job, ckpt, isolated, isolated_as_user, restore_cmd, run, start, until,
};

#[test]
fn a_whole_directory_moves() {
    isolated("a_whole_directory_moves", |case| {
        let mut logger = Logger::start(case, "a");
        let image = logger.killed_into(case, &[]);
        let (old, new) = (case.path("old"), case.path("new place"));
        fs::rename(&old, &new).expect("it is ours");
        logger.refused(
            case,
            &image,
            &[],
            &[&logger.path("out.log"), "No such file"],
        );
        let typo = mapping(&case.path("ol"), &new);
        let words = ["--map-path", &typo, "fits no path"];
        logger.refused(case, &image, &["--map-path", &typo], &words);
        logger.dir = new.clone();
        logger.goes_on(case, &image, &["--map-path", &mapping(&old, &new)]);
        let link = |name: &str| {
            fs::read_link(format!("/proc/{}/{name}", logger.job.pid)).expect("it runs")
        };
        assert_eq!(link("cwd"), new);
        assert_eq!(link("exe"), new.join("python"));
        let maps = fs::read_to_string(format!("/proc/{}/maps", logger.job.pid)).expect("it runs");
        assert!(maps.contains(&logger.path("table")), "{maps}");
        assert!(
            !maps.contains(&old.join("").display().to_string()),
            "{maps}"
        );
        assert!(!old.exists());
        // Nothing remembers where it once was.
        let again = logger.killed_into(case, &[]);
        logger.goes_on(case, &again, &[]);
        logger.passes();
    });
}

#[test]
fn the_longest_prefix_wins() {
    isolated("the_longest_prefix_wins", |case| {
        let mut logger = Logger::start(case, "a");
        let image = logger.killed_into(case, &[]);
        let (old, new) = (case.path("old"), case.path("new"));
        fs::rename(&old, &new).expect("it is ours");
        let programs = case.path("programs");
        fs::create_dir(&programs).expect("the test's directory is writable");
        fs::rename(new.join("python"), programs.join("py")).expect("it is ours");
        logger.dir = new.clone();
        let directory = mapping(&old, &new);
        let program = mapping(&old.join("python"), &programs.join("py"));
        let args = ["--map-path", &directory, "--map-path", &program];
        logger.goes_on(case, &image, &args);
        let exe = fs::read_link(format!("/proc/{}/exe", logger.job.pid)).expect("it runs");
        assert_eq!(exe, programs.join("py"));
        logger.passes();
    });
}

/// As on another machine: every file is a copy, with another inode.
#[test]
fn copies_elsewhere() {
    isolated("copies_elsewhere", |case| {
        let mut logger = Logger::start(case, "a");
        let image = logger.killed_into(case, &[]);
        let (old, new) = (case.path("old"), case.path("new"));
        let copy = |how: &str| {
            let _ = fs::remove_dir_all(&new);
            let mut command = Command::new("cp");
            run(case, command.arg(how).arg(&old).arg(&new)).ok();
        };
        logger.dir = new.clone();
        let map = mapping(&old, &new);
        // A copy with another time may be anything.
        copy("-r");
        let words = [&logger.path("out.log"), "replaced", "--files adopt"];
        logger.refused(case, &image, &["--map-path", &map], &words);
        copy("-a");
        fs::remove_dir_all(&old).expect("it is ours");
        logger.goes_on(case, &image, &["--map-path", &map]);
        logger.passes();
    });
}

#[test]
fn a_grown_log_is_cut() {
    isolated("a_grown_log_is_cut", |case| {
        for mode in ["a", "w"] {
            let mut logger = Logger::start(case, mode);
            let image = logger.crashed_after(case, &[]);
            let grown = logger.log();
            let cut = ["--files", "truncate"];
            let dry = run(case, restore_cmd(&image, &cut).arg("--dry-run"));
            let line = format!("# cut {} from {} to ", logger.path("out.log"), grown.len());
            assert!(dry.ok().contains(&line), "{line} is not in {dry:#?}");
            assert!(!dry.ok().contains("state.bin from"), "{dry:#?}");
            // A restore that fails in its last step has not cut it.
            if cfg!(feature = "faults") {
                let mut command = restore_cmd(&image, &cut);
                run(case, command.env("CKPT_FAULT", "restore-release"))
                    .refused(99, &["restore-release"]);
            }
            assert_eq!(logger.log(), grown);
            logger.goes_on(case, &image, &cut);
            logger.passes();
            fs::remove_dir_all(case.path("old")).expect("it is ours");
        }
    });
}

/// Without that, what came after the checkpoint is there twice: which proves that the test above can
/// fail.
#[test]
fn a_grown_log_is_not_cut_unasked() {
    isolated("a_grown_log_is_not_cut_unasked", |case| {
        let mut logger = Logger::start(case, "a");
        let image = logger.crashed_after(case, &[]);
        let grown = logger.log();
        logger.goes_on(case, &image, &[]);
        let (_, log) = logger.finished();
        assert!(log.starts_with(&grown));
        assert_ne!(log, expected(log.lines().count()));
    });
}

#[test]
fn what_has_shrunk_is_not_cut() {
    isolated("what_has_shrunk_is_not_cut", |case| {
        let mut logger = Logger::start(case, "a");
        let image = logger.killed_into(case, &[]);
        let log = File::options().write(true).open(logger.path("out.log"));
        log.and_then(|log| log.set_len(7)).expect("it is ours");
        let words = [&*logger.path("out.log"), "shrunk", "to 7 bytes"];
        logger.refused(case, &image, &["--files", "truncate"], &words);
        assert_eq!(logger.log(), "line 1\n");
    });
}

/// A file that the job only reads has to be as it was.
#[test]
fn what_is_read_was_written() {
    isolated("what_is_read_was_written", |case| {
        let mut logger = Logger::start(case, "a");
        let image = logger.killed_into(case, &[]);
        let file = File::options().write(true).open(logger.path("input"));
        let file = file.expect("it is ours");
        file.write_all_at(b"W", 0).expect("it is ours");
        let input = logger.path("input");
        for policy in ["strict", "truncate"] {
            let words = [&*input, "only reads", "rewritten", "--files adopt"];
            logger.refused(case, &image, &["--files", policy], &words);
        }
        file.set_len(20).expect("it is ours");
        logger.refused(
            case,
            &image,
            &[],
            &[&input, "only reads", "grown from 12 to 20 bytes"],
        );
        file.set_len(12).expect("it is ours");
        logger.goes_on(case, &image, &["--files", "adopt"]);
        let (files, _) = logger.finished();
        assert_eq!(files, "What is read state");
    });
}

/// The image of a logger that saved its log and its state, which then lost both: one is gone, one was
/// changed.
fn saved(case: &Case) -> (Logger, PathBuf, SystemTime) {
    let mut logger = Logger::start(case, "a");
    // Something for the holes to be in.
    let file = File::options().write(true).open(logger.path("state.bin"));
    let file = file.expect("it is ours");
    file.set_len(64 << 20).expect("it is ours");
    file.write_all_at(b"end", (64 << 20) - 3)
        .expect("it is ours");
    let modified = SystemTime::now() - Duration::from_secs(1000);
    file.set_modified(modified).expect("it is ours");
    fs::set_permissions(logger.path("state.bin"), fs::Permissions::from_mode(0o640))
        .expect("it is ours");
    let state = logger.path("state.bin");
    let args = ["--save-files", "*.log", "--save-files", &state];
    let image = logger.crashed_after(case, &args);
    fs::remove_file(logger.path("out.log")).expect("it is ours");
    fs::write(&state, "something else").expect("it is ours");
    (logger, image, modified)
}

#[test]
fn files_are_put_back() {
    isolated("files_are_put_back", put_back);
}

#[test]
fn files_are_put_back_by_an_ordinary_user() {
    isolated_as_user("files_are_put_back_by_an_ordinary_user", put_back);
}

fn put_back(case: &Case) {
    let (mut logger, image, modified) = saved(case);
    let (log, state) = (logger.path("out.log"), logger.path("state.bin"));
    logger.refused(case, &image, &[], &[&log, "No such file"]);
    let words = [&*state, "changed after the checkpoint", "--overwrite"];
    logger.refused(case, &image, &["--put-files"], &words);
    let put = ["--put-files", "--overwrite"];
    let dry = run(case, restore_cmd(&image, &put).arg("--dry-run"));
    assert!(dry.ok().contains(&format!("# create {log} ")), "{dry:#?}");
    assert!(
        dry.ok().contains(&format!("# overwrite {state} ")),
        "{dry:#?}"
    );
    assert!(!Path::new(&log).exists());
    let before = names(&logger.dir);
    logger.goes_on(case, &image, &put);
    let mut with_log = before.clone();
    with_log.push("out.log".into());
    with_log.sort();
    assert_eq!(names(&logger.dir), with_log);
    let meta = fs::metadata(&state).expect("it is there");
    assert_eq!(meta.len(), 64 << 20);
    assert_eq!(meta.mode() & 0o7777, 0o640);
    assert_eq!(meta.modified().expect("it has one"), modified);
    assert!(
        meta.blocks() < 100,
        "holes stay holes: {} blocks",
        meta.blocks()
    );
    let bytes = fs::read(&state).expect("it is there");
    assert!(bytes.starts_with(STATE) && bytes.ends_with(b"end"));
    logger.passes();
}

#[test]
fn an_image_without_files_is_told() {
    isolated("an_image_without_files_is_told", |case| {
        let mut logger = Logger::start(case, "a");
        let image = logger.killed_into(case, &[]);
        let out = run(case, restore_cmd(&image, &["--put-files"]).arg("--detach"));
        let pid = out.ok().trim().parse().expect("it is a pid");
        assert!(
            out.stderr.contains("warning: the image has no file for"),
            "{out:#?}"
        );
        logger.job = Job::of(pid);
        logger.passes();
    });
}

/// The files are as they were at the checkpoint, so nothing is written and nothing refused.
#[test]
fn files_that_are_there_are_left() {
    isolated("files_that_are_there_are_left", |case| {
        let mut logger = Logger::start(case, "a");
        let image = logger.killed_into(case, &["--save-files", "*"]);
        let inode = |name: &str| fs::metadata(logger.path(name)).expect("it is there").ino();
        let names = ["out.log", "state.bin", "input", "table"];
        let before = names.map(inode);
        let dry = run(case, restore_cmd(&image, &["--put-files"]).arg("--dry-run"));
        assert!(!dry.ok().contains("# create"), "{dry:#?}");
        assert!(!dry.ok().contains("# overwrite"), "{dry:#?}");
        assert_eq!(before, names.map(inode));
        // A file of another inode with the same contents is as good.
        let state = logger.path("state.bin");
        fs::remove_file(&state).expect("it is ours");
        fs::write(&state, STATE).expect("it is ours");
        logger.refused(case, &image, &[], &[&state, "replaced"]);
        logger.goes_on(case, &image, &["--put-files"]);
        logger.passes();
    });
}

#[cfg(feature = "faults")]
#[test]
fn a_failed_restore_takes_files_back() {
    isolated("a_failed_restore_takes_files_back", |case| {
        let (mut logger, image, _) = saved(case);
        let before = names(&logger.dir);
        let inode = || {
            fs::metadata(logger.path("state.bin"))
                .expect("it is there")
                .ino()
        };
        let was = inode();
        for step in ["restore-spawned", "restore-filled", "restore-release"] {
            let mut command = restore_cmd(&image, &["--put-files", "--overwrite"]);
            run(case, command.env("CKPT_FAULT", step)).refused(99, &[step]);
            assert_no_process_left();
            assert_eq!(names(&logger.dir), before, "{step}");
            assert_eq!(inode(), was, "{step}");
            let state = fs::read_to_string(logger.path("state.bin"));
            assert_eq!(state.expect("it is there"), "something else", "{step}");
        }
        logger.goes_on(case, &image, &["--put-files", "--overwrite"]);
        logger.passes();
    });
}

#[test]
fn files_are_put_back_elsewhere() {
    isolated("files_are_put_back_elsewhere", |case| {
        let mut logger = Logger::start(case, "w");
        let image = logger.killed_into(case, &["--save-files", "**/old/*"]);
        let (old, new) = (case.path("old"), case.path("new"));
        let map = mapping(&old, &new);
        logger.refused(
            case,
            &image,
            &["--put-files", "--map-path", &map],
            &["saved file", "no directory", "--map-path"],
        );
        fs::create_dir(&new).expect("the test's directory is writable");
        // What is not an open file is brought by hand.
        fs::copy(old.join("python"), new.join("python")).expect("there is room");
        fs::remove_dir_all(&old).expect("it is ours");
        logger.dir = new;
        logger.goes_on(case, &image, &["--put-files", "--map-path", &map]);
        logger.passes();
    });
}

#[test]
fn what_is_saved_is_shown() {
    isolated("what_is_saved_is_shown", |case| {
        let mut logger = Logger::start(case, "a");
        let mut command = Command::new(CKPT);
        let pid = logger.job.pid.to_string();
        command.args(["attach", &pid, "--kill", "-o", "job.ckpt"]);
        command.args(["--save-files", "state.*", "--save-files", "*.nothing"]);
        let out = run(case, command.current_dir(case.dir()));
        out.ok();
        let warning = "warning: --save-files *.nothing matches no file";
        assert!(out.stderr.contains(warning), "{out:#?}");
        assert_eq!(out.stderr.lines().count(), 1, "{out:#?}");
        logger.reap();
        let out = ckpt(case, ["inspect", "--fds", "--json", "job.ckpt"]);
        let json: serde_json::Value = serde_json::from_str(out.ok()).expect("it is JSON");
        let fds = json["fds"].as_array().expect("it is a list");
        let saved: Vec<_> = fds
            .iter()
            .filter(|fd| !fd["saved_bytes"].is_null())
            .collect();
        assert_eq!(saved.len(), 1, "{saved:#?}");
        assert_eq!(saved[0]["path"], logger.path("state.bin"));
        assert_eq!(saved[0]["saved_bytes"], STATE.len());
        let table = ckpt(case, ["inspect", "--fds", "job.ckpt"]);
        let row = table.ok().lines().find(|line| line.contains("state.bin"));
        assert!(row.is_some_and(|row| row.contains("17 B")), "{table:#?}");
        ckpt(case, ["verify", "job.ckpt"]).ok();
    });
}

#[test]
fn saved_at_an_interval() {
    isolated("saved_at_an_interval", |case| {
        let mut command = Command::new(CKPT);
        command.args(["run", "--interval", "0.2", "--name", "job"]);
        command.args(["--save-files", "kept", "--save-files", "nothing", "--"]);
        command.args([
            "sh",
            "-c",
            "exec 3<kept; while [ ! -e finish ]; do sleep 0.01; done",
        ]);
        fs::write(case.path("kept"), "kept").expect("the test's directory is writable");
        let log = case.path("run.log");
        let job = start(command.current_dir(case.dir()), &log);
        let image = case.path("job.3.ckpt");
        until("the third checkpoint", || image.exists().then_some(()));
        fs::write(case.path("finish"), "").expect("the test's directory is writable");
        assert_eq!(job.wait(), Ended::Exited(0));
        let text = fs::read_to_string(&log).expect("it is there");
        assert_eq!(
            text.matches("--save-files nothing matches no").count(),
            1,
            "{text}"
        );
        let out = ckpt(case, ["inspect", "--fds", "--json", "job.3.ckpt"]);
        assert!(out.ok().contains("\"saved_bytes\": 4"), "{out:#?}");
    });
}

#[test]
fn patterns_and_mappings_that_are_wrong() {
    isolated("patterns_and_mappings_that_are_wrong", |case| {
        let attach = |pattern: &str| ckpt(case, ["attach", "1", "--save-files", pattern]);
        assert_eq!(attach("out/*.log").code(), 2);
        assert!(attach("out/*.log").stderr.contains("**/out/*.log"));
        assert_eq!(attach("[").code(), 2);
        let restore = |args: &[&str]| run(case, &mut restore_cmd(Path::new("x.ckpt"), args));
        assert_eq!(restore(&["--map-path", "old=/new"]).code(), 2);
        let twice = ["--map-path", "/a=/b", "--map-path", "/a=/c"];
        assert_eq!(restore(&twice).code(), 2);
        assert_eq!(restore(&["--overwrite"]).code(), 2);
    });
}
