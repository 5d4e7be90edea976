//! Ordinary users with one capability and no other: each widens what works, and nothing else
//! (`docs/privileges.md`).

use crate::common;
use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::counter::counts;
use crate::common::look::{assert_let_go, assert_no_process_left, status_field};
use crate::common::refused::FAILED;
use crate::common::tool::{CKPT, Output, RESTORE, nobody};
use crate::common::{Case, Ended, Job, ckpt, fixture, isolated_as_root, run, start, until};
use nix::sys::signal::Signal;

const NOBODY: u32 = 65534;

/// Counts in the link `count`; its code is 7 when it is asked to end.
const COUNTER: &str = "trap 'exit 7' TERM
while :; do n=$((n + 1)); ln -sfn $n count; sleep 0.01; done";

/// A program of an ordinary user that has these capabilities in every set, and no other.
fn with(case: &Case, capabilities: &[&str], program: &str) -> Command {
    let own = status_field(std::process::id() as i32, "CapBnd").expect("it is there");
    let own = u64::from_str_radix(&own, 16).expect("it is a number");
    for name in capabilities {
        if own & 1 << number(name) == 0 {
            case.skip(&format!("CAP_{}", name.to_uppercase()));
        }
    }
    let names: Vec<String> = capabilities.iter().map(|name| format!("+{name}")).collect();
    let set = [vec!["-all".to_owned()], names].concat().join(",");
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    command.args([
        format!("--inh-caps={set}"),
        format!("--ambient-caps={set}"),
        program.into(),
    ]);
    command.current_dir(case.dir());
    command
}

fn number(name: &str) -> u32 {
    match name {
        "dac_override" => 1,
        "setgid" => 6,
        "setuid" => 7,
        "sys_ptrace" => 19,
        "sys_nice" => 23,
        "sys_resource" => 24,
        "checkpoint_restore" => 40,
        other => panic!("{other} has no number here"),
    }
}

/// The counter, started by `command`, and its image, taken and owned by nobody.
fn killed(case: &Case, mut command: Command) -> (i32, PathBuf) {
    command
        .args(["bash", "-c", COUNTER])
        .current_dir(case.dir());
    let mut job = start(&mut command, &case.open_log("job.log"));
    counts(case);
    let image = case.path("job.ckpt");
    let out = ckpt(
        case,
        ["attach", &job.pid.to_string(), "--kill", "-o", "job.ckpt"],
    );
    out.ok();
    chown(&image, Some(NOBODY), Some(NOBODY)).expect("we are root");
    until("its end", || job.ended());
    common::job::reap_orphans(&common::tool::descendants_in(case, &image));
    (job.pid, image)
}

fn setpriv(ids: &[&str]) -> Command {
    let mut command = Command::new("setpriv");
    command.args(ids);
    command
}

fn of_nobody() -> Command {
    setpriv(&["--reuid=65534", "--regid=65534", "--clear-groups"])
}

/// `restore --detach` that succeeded: the job.
fn detached(out: &Output) -> Job {
    Job::of(out.ok().trim().parse().expect("it is a pid"))
}

fn ends_as_it_should(case: &Case, mut job: Job) {
    counts(case);
    job.signal(Signal::SIGTERM);
    assert_eq!(until("its end", || job.ended()), Ended::Exited(7));
    assert_no_process_left();
}

/// No capability in any set of the job that restores it.
fn assert_has_none(pid: i32) {
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        let set = status_field(pid, set).expect("it lives");
        assert_eq!(set.trim_matches('0'), "", "a capability was left to it");
    }
}

/// The old pids beside all other processes, also for children: no namespace is made.
#[test]
fn checkpoint_restore_alone() {
    isolated_as_root("checkpoint_restore_alone", |case| {
        let (pid, image) = killed(case, of_nobody());
        let restore = |capabilities: &[&str]| {
            let mut command = with(case, capabilities, RESTORE);
            run(
                case,
                command.arg(&image).args(["--pids", "keep", "--detach"]),
            )
        };
        restore(&[]).refused(
            FAILED,
            &["choosing a pid needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN"],
        );
        assert_no_process_left();
        let job = detached(&restore(&["checkpoint_restore"]));
        assert_eq!(job.pid, pid);
        let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).expect("it lives");
        assert_eq!(namespace(&pid.to_string()), namespace("self"));
        assert_has_none(pid);
        let ids = "65534\t65534\t65534\t65534";
        assert_eq!(status_field(pid, "Uid").as_deref(), Some(ids));
        ends_as_it_should(case, job);
    });
}

/// Another user's process: the right to trace is one, that to open its files in `/proc` another one.
#[test]
fn sys_ptrace_alone() {
    isolated_as_root("sys_ptrace_alone", |case| {
        let target = fixture(case, "counter");
        let pid = target.pid().to_string();
        let attach = |capabilities: &[&str]| {
            let mut command = with(case, capabilities, CKPT);
            run(case, command.args(["attach", &pid, "-o", "other.ckpt"]))
        };
        let object = format!("process {pid}");
        attach(&[]).refused(
            1,
            &[&object, "uid 0", "uid 65534", "CAP_SYS_PTRACE", "as root"],
        );
        attach(&["sys_ptrace"]).refused(1, &[&object, "in /proc", "CAP_DAC_OVERRIDE"]);
        attach(&["dac_override"]).refused(1, &[&object, "needs CAP_SYS_PTRACE"]);
        assert_let_go(target.pid());
        assert!(!case.path("other.ckpt").exists());
        attach(&["sys_ptrace", "dac_override"]).ok();
        assert!(case.path("other.ckpt").exists());
        assert_let_go(target.pid());
        target.passes();
    });
}

fn nice_of(pid: i32) -> i32 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it lives");
    let (_, rest) = text.rsplit_once(") ").expect("it has a name");
    let field = rest.split_whitespace().nth(16).expect("it has fields");
    field.parse().expect("it is a number")
}

#[test]
fn sys_nice_alone() {
    isolated_as_root("sys_nice_alone", |case| {
        let own = nice_of(std::process::id() as i32);
        let mut program = Command::new("nice");
        program.args([
            "-n",
            "-5",
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
        ]);
        let (pid, image) = killed(case, program);
        let restore = |capabilities: &[&str]| {
            let mut command = with(case, capabilities, RESTORE);
            run(
                case,
                command.arg(&image).args(["--pids", "keep", "--detach"]),
            )
        };
        let out = restore(&["checkpoint_restore"]);
        let job = detached(&out);
        assert!(
            out.stderr.contains("warning: ") && out.stderr.contains("CAP_SYS_NICE"),
            "{out:?}"
        );
        assert_eq!(nice_of(pid), own);
        ends_as_it_should(case, job);
        let out = restore(&["checkpoint_restore", "sys_nice"]);
        let job = detached(&out);
        assert!(!out.stderr.contains("nice"), "{out:?}");
        assert_eq!(nice_of(pid), own - 5);
        assert_has_none(pid);
        ends_as_it_should(case, job);
    });
}

fn open_files(pid: i32) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/limits")).expect("it lives");
    let line = text.lines().find(|line| line.starts_with("Max open files"));
    let numbers = line
        .expect("it is there")
        .split_whitespace()
        .skip(3)
        .take(2);
    numbers.collect::<Vec<_>>().join(" ")
}

/// A restore by a user whose hard limit is lower.
fn lower_limit(case: &Case, image: &Path, capabilities: &[&str]) -> Output {
    let mut command = Command::new("prlimit");
    let inner = with(case, capabilities, RESTORE);
    command.arg("--nofile=500:500").arg(inner.get_program());
    command.args(inner.get_args()).current_dir(case.dir());
    run(
        case,
        command.arg(image).args(["--pids", "keep", "--detach"]),
    )
}

fn limited(case: &Case) -> (i32, PathBuf) {
    let mut program = Command::new("prlimit");
    program.args([
        "--nofile=700:900",
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
    ]);
    killed(case, {
        program.arg("--clear-groups");
        program
    })
}

#[test]
fn without_sys_resource() {
    isolated_as_root("without_sys_resource", |case| {
        let (pid, image) = limited(case);
        let out = lower_limit(case, &image, &["checkpoint_restore"]);
        let job = detached(&out);
        let warning =
            "the hard limit of open files is 500 instead of 900: raising it needs CAP_SYS_RESOURCE";
        assert!(out.stderr.contains(warning), "{out:?}");
        assert_eq!(open_files(pid), "500 500");
        ends_as_it_should(case, job);
    });
}

#[test]
fn sys_resource_alone() {
    isolated_as_root("sys_resource_alone", |case| {
        let (pid, image) = limited(case);
        let out = lower_limit(case, &image, &["checkpoint_restore", "sys_resource"]);
        let job = detached(&out);
        assert!(!out.stderr.contains("hard limit"), "{out:?}");
        assert_eq!(open_files(pid), "700 900");
        assert_has_none(pid);
        ends_as_it_should(case, job);
    });
}

/// A job of one ordinary user, restored by another one with the capabilities for its ids, and refused without them.
#[test]
fn setuid_and_what_goes_with_it() {
    isolated_as_root("setuid_and_what_goes_with_it", |case| {
        let (pid, image) = killed(
            case,
            setpriv(&["--reuid=12345", "--regid=12345", "--clear-groups"]),
        );
        let restore = |capabilities: &[&str]| {
            let mut command = with(case, capabilities, RESTORE);
            run(
                case,
                command.arg(&image).args(["--pids", "keep", "--detach"]),
            )
        };
        let object = format!("process {pid}");
        restore(&["checkpoint_restore"]).refused(FAILED, &[&object, "uid 12345", "CAP_SETUID"]);
        restore(&["checkpoint_restore", "setuid"])
            .refused(FAILED, &[&object, "gid 12345", "CAP_SETGID"]);
        assert_no_process_left();
        let able = ["checkpoint_restore", "setuid", "setgid"];
        restore(&able).refused(FAILED, &[&object, "CAP_SYS_PTRACE and CAP_DAC_OVERRIDE"]);
        assert_no_process_left();
        let able = [able.as_slice(), &["sys_ptrace", "dac_override"]].concat();
        let job = detached(&restore(&able));
        for field in ["Uid", "Gid"] {
            let ids = "12345\t12345\t12345\t12345";
            assert_eq!(status_field(pid, field).as_deref(), Some(ids));
        }
        assert_has_none(pid);
        ends_as_it_should(case, job);
    });
}

/// `ckpt check` says of each use whether it is held.
#[test]
fn listed() {
    isolated_as_root("listed", |case| {
        let held = |capabilities: &[&str]| -> Vec<String> {
            let mut command = with(case, capabilities, CKPT);
            let out = run(case, command.args(["check", "--json"]));
            let told: serde_json::Value = serde_json::from_str(&out.stdout).expect("it is JSON");
            let uses = told["capabilities"]
                .as_array()
                .expect("it is a list")
                .clone();
            assert!(uses.len() > 20, "{told}");
            let held = uses.into_iter().filter(|one| one["held"] == true);
            held.map(|one| one["takes"].as_str().expect("a text").to_owned())
                .collect()
        };
        assert_eq!(held(&[]), [""; 0]);
        let either = "CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN";
        assert_eq!(
            held(&["checkpoint_restore"]),
            [either, either, "CAP_CHECKPOINT_RESTORE", either]
        );
        assert_eq!(held(&["sys_ptrace"]), ["CAP_SYS_PTRACE"]);
        let mut command = nobody(case, Path::new(CKPT));
        let text = run(case, command.arg("check"));
        let row = text
            .stdout
            .lines()
            .find(|l| l.starts_with("CAP_SYS_PTRACE"));
        let mut words = row.expect("it has a row").split_whitespace();
        assert_eq!(words.nth(1), Some("no"), "{row:?}");
    });
}
