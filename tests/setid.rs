//! Set-user-ID programs, and programs that other users may not look
//! into: refused by name for their user, checkpointed and restored by root.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::look::{assert_let_go, assert_no_process_left, status_field};
use crate::common::tool::{CKPT, RESTORE, leftovers, nobody, source};
use crate::common::{
    Case, Ended, Job, Looks, attach, isolated_as_root, restored, run, start, until,
};
use nix::sys::signal::Signal;

/// `tests/programs/ids.c`, owned by these ids, with this mode.
fn program(case: &Case, uid: u32, gid: u32, mode: u32) -> PathBuf {
    let program = case.path("ids");
    let mut command = Command::new("gcc");
    command.args(["-O1", "-g", "-o"]).arg(&program);
    run(case, command.arg(source("ids.c"))).ok();
    chown(&program, Some(uid), Some(gid)).expect("we are root");
    fs::set_permissions(&program, PermissionsExt::from_mode(mode)).expect("it is ours");
    program
}

/// Starts it as nobody.
fn started(case: &Case, program: &Path, how: &str) -> Job {
    let log = case.open_log("ids.log");
    // By way of a process without capabilities: setpriv itself has those of root up to its exec,
    // and might read the program.
    let mut command = nobody(case, Path::new("bash"));
    command.args(["-c", "exec \"$@\"", "bash"]).arg(program);
    let job = start(command.arg(case.dir()).arg(how), &log);
    until("it to begin", || {
        let text = fs::read_to_string(case.path("before")).unwrap_or_default();
        text.ends_with('\n').then_some(())
    });
    job
}

/// What it said of itself.
fn said(case: &Case, name: &str) -> String {
    fs::read_to_string(case.path(name)).expect("it was written")
}

/// Its user's attach names these words, and does nothing.
fn refused_to_its_user(case: &Case, job: &Job, words: &[&str]) {
    let before = Looks::at(job.pid);
    let pid = job.pid.to_string();
    let out = run(
        case,
        nobody(case, Path::new(CKPT)).args(["attach", &pid, "-o", "mine.ckpt"]),
    );
    let object = format!("process {pid} (ids)");
    out.refused(
        1,
        &[&[object.as_str(), "CAP_SYS_PTRACE", "root"], words].concat(),
    );
    assert_let_go(job.pid);
    before.assert_same(job.pid, &[]);
    assert!(leftovers(case.dir()).is_empty());
}

/// Root's checkpoint and restore: everything is as it was, seen from inside and outside.
fn lives_again(case: &Case, mut job: Job) {
    let before = Looks::at(job.pid);
    let (image, _) = attach(case, job.pid, "job.ckpt", &["--kill"]);
    until("its end", || job.ended());
    let mut job = restored(case, &image, &["--pids", "keep"]);
    before.assert_same(job.pid, &[]);
    job.signal(Signal::SIGTERM);
    assert_eq!(until("its end", || job.ended()), Ended::Exited(7));
    assert_eq!(said(case, "after"), said(case, "before"));
    assert_no_process_left();
}

/// Skips on a file system mounted nosuid.
fn must_be(case: &Case, ids: &str) {
    if !said(case, "before").contains(ids) {
        case.skip("a temporary directory that is not mounted nosuid");
    }
}

#[test]
fn set_uid_root() {
    isolated_as_root("set_uid_root", |case| {
        let program = program(case, 0, 0, 0o4755);
        let job = started(case, &program, "");
        must_be(case, "uid 65534 0 0 gid 65534 65534 65534");
        let words = "set-uid program (real uid 65534, effective 0, saved 0)";
        refused_to_its_user(case, &job, &[words]);
        lives_again(case, job);
    });
}

/// The exec of the restore would make root another user, who then could rebuild nothing.
#[test]
fn set_uid_to_another_user() {
    isolated_as_root("set_uid_to_another_user", |case| {
        let program = program(case, 12345, 0, 0o4755);
        let job = started(case, &program, "");
        must_be(case, "uid 65534 12345 12345");
        refused_to_its_user(case, &job, &["real uid 65534, effective 12345"]);
        lives_again(case, job);
    });
}

#[test]
fn set_gid() {
    isolated_as_root("set_gid", |case| {
        let program = program(case, 0, 4242, 0o2755);
        let job = started(case, &program, "");
        must_be(case, "gid 65534 4242 4242");
        let words = "set-gid program (real gid 65534, effective 4242, saved 4242)";
        refused_to_its_user(case, &job, &[words]);
        lives_again(case, job);
    });
}

/// It has nothing left of what its file gave it, and a restore gives it nothing again: neither root's,
/// nor that of its user, who may look into it now.
#[test]
fn set_uid_and_dropped() {
    isolated_as_root("set_uid_and_dropped", |case| {
        let program = program(case, 12345, 4242, 0o6755);
        let mut job = started(case, &program, "drop");
        let pid = job.pid.to_string();
        let args = ["attach", &pid, "-o", "mine.ckpt", "--kill"];
        run(case, nobody(case, Path::new(CKPT)).args(args)).ok();
        until("its end", || job.ended());
        let mut restore = nobody(case, Path::new(RESTORE));
        let out = run(case, restore.args(["mine.ckpt", "--detach"]));
        let outer: i32 = out.ok().trim().parse().expect("it is a pid");
        let init = status_field(outer, "PPid").expect("it lives");
        let job = Job::behind(outer, init.parse().expect("a pid"));
        let ids = "65534\t65534\t65534\t65534";
        for field in ["Uid", "Gid"] {
            assert_eq!(status_field(outer, field).as_deref(), Some(ids));
        }
        job.signal(Signal::SIGTERM);
        assert_eq!(job.wait(), Ended::Exited(7));
        assert_eq!(said(case, "after"), said(case, "before"));
        let _ = fs::remove_file(case.path("mine.ckpt"));
        fs::remove_file(case.path("before")).expect("it was written");
        lives_again(case, started(case, &program, "drop"));
    });
}

#[test]
fn capabilities_of_a_file() {
    isolated_as_root("capabilities_of_a_file", |case| {
        case.needs_program("setcap", "libcap2-bin");
        let program = program(case, 0, 0, 0o755);
        let set = run(
            case,
            Command::new("setcap").arg("cap_net_raw+ep").arg(&program),
        );
        if set.code() != 0 {
            case.skip("a temporary directory with extended attributes");
        }
        let job = started(case, &program, "");
        let permitted = status_field(job.pid, "CapPrm").expect("it lives");
        if permitted.trim_start_matches('0') != "2000" {
            case.skip("a temporary directory that is not mounted nosuid");
        }
        refused_to_its_user(case, &job, &["capabilities that you lack (net_raw)"]);
        lives_again(case, job);
    });
}

#[test]
fn not_dumpable() {
    isolated_as_root("not_dumpable", |case| {
        let program = program(case, 0, 0, 0o755);
        let job = started(case, &program, "undumpable");
        assert!(said(case, "before").contains("dumpable 0"));
        refused_to_its_user(
            case,
            &job,
            &["is not dumpable", "PR_SET_DUMPABLE", "run ckpt as root"],
        );
        lives_again(case, job);
    });
}

/// It may be executed and not be read, and so is not dumpable.
#[test]
fn unreadable() {
    isolated_as_root("unreadable", |case| {
        let program = program(case, 0, 0, 0o711);
        let job = started(case, &program, "");
        refused_to_its_user(
            case,
            &job,
            &["is not dumpable", "you may not read its program"],
        );
        lives_again(case, job);
    });
}

/// Nothing is given to a program that has forsworn it, and nothing by its restore.
#[test]
fn no_new_privs() {
    isolated_as_root("no_new_privs", |case| {
        let program = program(case, 12345, 0, 0o4755);
        let log = case.open_log("ids.log");
        let mut command = nobody(case, Path::new("setpriv"));
        command.arg("--no-new-privs").arg(&program).arg(case.dir());
        let job = start(&mut command, &log);
        until("it to begin", || {
            let text = fs::read_to_string(case.path("before")).unwrap_or_default();
            text.ends_with('\n').then_some(())
        });
        assert!(said(case, "before").starts_with("uid 65534 65534 65534"));
        assert_eq!(status_field(job.pid, "NoNewPrivs").as_deref(), Some("1"));
        lives_again(case, job);
    });
}
