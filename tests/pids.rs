//! Jobs in pid namespaces of their own: when their pids are taken or may not be chosen, several of
//! one image at once, and from the beginning; each checkpoint is taken from outside.

use crate::common;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::counter::counts;
use crate::common::look::{assert_no_process_left, children, status_field};
use crate::common::refused::FAILED;
use crate::common::tool::{CKPT, RESTORE, nobody, restored_in_front};
use crate::common::{
    Case, Ended, Job, attach, ckpt, isolated, isolated_as_user, restore_cmd, restored, run, start,
    until,
};
use ckpt_tracer::fault::Step;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Counts in the link `count`, leaves an orphan behind each time, and when it is asked to end says
/// who it is; its code is 7.
const COUNTER: &str = r#"
trap 'echo "$$ $(id -u)" > result; exit 7' TERM
while :; do n=$((n + 1)); ln -sfn $n count; (true &); sleep 0.01; done
"#;

fn counter() -> Command {
    let mut command = Command::new("bash");
    command.args(["-c", COUNTER]);
    command
}

fn started(case: &Case) -> Job {
    let mut command = counter();
    let job = start(command.current_dir(case.dir()), &case.path("job.log"));
    counts(case);
    job
}

/// An image of a job that was killed.
fn killed(case: &Case) -> (i32, PathBuf) {
    let mut job = started(case);
    let pid = job.pid;
    let others = job.descendants();
    let (image, _) = attach(case, pid, "job.ckpt", &["--kill"]);
    until("its end", || job.ended());
    common::job::reap_orphans(&others);
    (pid, image)
}

/// A process with that pid.
fn occupy(case: &Case, pid: i32) -> Job {
    let last = "/proc/sys/kernel/ns_last_pid";
    until("the pid", || {
        fs::write(last, (pid - 1).to_string()).expect("we may choose in our namespace");
        let job = start(Command::new("sleep").arg("1000"), &case.path("sleep.log"));
        (job.pid == pid).then_some(job)
    })
}

fn init_of(job: &Job) -> i32 {
    let parent = status_field(job.pid, "PPid").expect("it lives");
    let init = parent.parse().expect("it is a pid");
    assert_eq!(status_field(init, "Name").as_deref(), Some("ckpt-init"));
    init
}

/// Its own view of itself at its end: pid and user.
fn result(case: &Case) -> String {
    let text = fs::read_to_string(case.path("result")).expect("it was asked to end");
    text.trim().into()
}

/// Another process has the pid, and keeps it: a new namespace without an option, with everything
/// that a restore does otherwise.
fn pid_is_taken(case: &Case) {
    let (pid, image) = killed(case);
    let squatter = occupy(case, pid);
    let keep = run(case, &mut restore_cmd(&image, &["--pids", "keep"]));
    let taken = format!("pid {pid}");
    keep.refused(FAILED, &[&taken, "taken", "(sleep)", "--pids namespace"]);
    let mut job = restored_in_front(case, &image, &[]);
    let said = fs::read_to_string(case.path("restore.log")).expect("it was written");
    let note = said.lines().find(|line| line.contains("pid namespace"));
    let note = note.expect("it is told");
    assert!(note.contains(&taken) && note.contains("(sleep)"), "{note}");
    counts(case);
    let init = init_of(&job);
    until("all orphans to be reaped", || {
        let all = children(init);
        (all == [job.pid]).then_some(())
    });
    assert_eq!(status_field(job.pid, "NSpid").map(last), Some(pid));
    // From outside through restore.
    let restore: i32 = status_field(init, "PPid").unwrap().parse().unwrap();
    kill(Pid::from_raw(restore), Signal::SIGTERM).expect("it waits");
    assert_eq!(until("its end", || job.ended()), Ended::Exited(7));
    let me = nix::unistd::geteuid();
    assert_eq!(result(case), format!("{pid} {me}"));
    assert!(squatter.descendants().is_empty());
    squatter.kill();
    assert_no_process_left();
}

/// The root has ended, and a process that it has started after the checkpoint is left in its session.
fn pid_is_a_session(case: &Case) {
    let line = "(while [ ! -e go ]; do sleep 0.01; done; exec sleep 1000) & echo $! > member; exec sleep 1001";
    let mut command = Command::new("setsid");
    command
        .args(["--fork", "sh", "-c", line])
        .current_dir(case.dir());
    start(&mut command, &case.path("job.log")).wait();
    let member = until("the job", || {
        let text = fs::read_to_string(case.path("member")).ok()?;
        text.trim().parse::<i32>().ok()
    });
    let pid: i32 = status_field(member, "PPid").unwrap().parse().unwrap();
    until("the program", || {
        (status_field(pid, "Name")? == "sleep").then_some(())
    });
    let (image, _) = attach(case, pid, "job.ckpt", &[]);
    // Only the root is killed; the other one goes on.
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it lives");
    common::job::reap_orphans(&[pid]);
    fs::write(case.path("go"), "").expect("the directory is writable");
    let session = format!("pid {pid}");
    let words = [&session, "session", "(s", "--pids namespace"];
    ckpt(case, ["check", "job.ckpt"]).ok();
    run(case, &mut restore_cmd(&image, &["--pids", "keep"])).refused(FAILED, &words);
    let job = restored_in_front(case, &image, &[]);
    let said = fs::read_to_string(case.path("restore.log")).expect("it was written");
    assert!(
        said.contains("session") && said.contains("pid namespace"),
        "{said}"
    );
    assert_eq!(status_field(job.pid, "NSpid").map(last), Some(pid));
    job.kill();
    kill(Pid::from_raw(member), Signal::SIGKILL).expect("it lives");
}

#[test]
fn taken_as_a_session() {
    isolated("taken_as_a_session", pid_is_a_session);
}

#[test]
fn taken_as_a_session_of_an_ordinary_user() {
    isolated_as_user("taken_as_a_session_of_an_ordinary_user", pid_is_a_session);
}

/// A restore right after the job's end awaits that its parent has waited for it, and else tells.
#[test]
fn not_waited_for() {
    isolated("not_waited_for", |case| {
        let mut job = started(case);
        let (image, _) = attach(case, job.pid, "job.ckpt", &["--kill"]);
        let others = common::tool::descendants_in(case, &image);
        let keep = run(case, &mut restore_cmd(&image, &["--pids", "keep"]));
        let pid = format!("pid {}", job.pid);
        keep.refused(FAILED, &[&pid, "its parent 1 has not waited for"]);
        let mut restore = start(&mut restore_cmd(&image, &["--detach"]), &case.path("r.log"));
        until("its end", || job.ended());
        common::job::reap_orphans(&others);
        assert_eq!(until("the restore", || restore.ended()), Ended::Exited(0));
        assert_eq!(status_field(job.pid, "Name").as_deref(), Some("bash"));
        counts(case);
        Job::of(job.pid).kill();
    });
}

fn last(numbers: String) -> i32 {
    let last = numbers
        .split_whitespace()
        .next_back()
        .expect("there is one");
    last.parse().expect("it is a pid")
}

#[test]
fn taken() {
    isolated("taken", pid_is_taken);
}

#[test]
fn taken_of_an_ordinary_user() {
    isolated_as_user("taken_of_an_ordinary_user", pid_is_taken);
}

/// A copy beside the job itself uses the same files, which is not what everybody wants.
#[test]
fn taken_by_the_job_itself() {
    isolated("taken_by_the_job_itself", |case| {
        let job = started(case);
        let (image, _) = attach(case, job.pid, "job.ckpt", &[]);
        let out = run(
            case,
            restore_cmd(&image, &["--detach"]).current_dir(case.dir()),
        );
        let warning = format!("warning: the job still runs, as process {}", job.pid);
        out.ok();
        assert!(out.stderr.contains(&warning), "{}", out.stderr);
        let copy = Pid::from_raw(out.stdout.trim().parse().expect("a pid"));
        kill(copy, Signal::SIGKILL).expect("it lives");
        until("its end", || kill(copy, None).is_err().then_some(()));
        job.kill();
    });
}

/// Without any capability: a user namespace, in which the user is the user and may have groups.
#[test]
fn not_permitted() {
    isolated("not_permitted", |case| {
        case.needs_root();
        common::isolate::open_to_all(case.dir());
        let with_groups = |program: &Path| {
            let mut command = Command::new("setpriv");
            command.args(["--reuid=65534", "--regid=65534", "--groups=65534,4242"]);
            command.arg(program).current_dir(case.dir());
            command
        };
        let mut program = with_groups(Path::new("bash"));
        program.args(["-c", COUNTER]);
        let log = case.open_log("job.log");
        let mut job = start(&mut program, &log);
        counts(case);
        let pid = job.pid;
        for life in 1..=3 {
            let image = format!("{life}.ckpt");
            let outer = job.pid.to_string();
            let args = ["attach", &outer, "--kill", "-o", &image];
            run(case, with_groups(Path::new(CKPT)).args(args)).ok();
            until("its end", || job.ended());
            common::rounds::everybody_reaped();
            let mut command = with_groups(Path::new(RESTORE));
            let detached = run(case, command.args([&image, "--detach"]));
            let outer: i32 = detached.ok().trim().parse().expect("it is a pid");
            let init = status_field(outer, "PPid").unwrap().parse().unwrap();
            job = Job::behind(outer, init);
            counts(case);
            let ids = "65534\t65534\t65534\t65534";
            assert_eq!(status_field(outer, "Uid").as_deref(), Some(ids));
            assert_eq!(status_field(outer, "Gid").as_deref(), Some(ids));
            assert_eq!(status_field(outer, "Groups").as_deref(), Some("4242 65534"));
            assert_eq!(
                status_field(outer, "CapPrm").map(|c| c.trim_matches('0').len()),
                Some(0)
            );
            let owner = fs::symlink_metadata(case.path("count")).expect("it counts");
            assert_eq!(std::os::unix::fs::MetadataExt::uid(&owner), 65534);
        }
        // Another one, with other groups, cannot be that user.
        let image = case.path("3.ckpt");
        let out = run(case, nobody(case, Path::new(RESTORE)).arg(&image));
        out.refused(
            FAILED,
            &["process", "supplementary groups", "user namespace"],
        );
        job.signal(Signal::SIGTERM);
        assert_eq!(until("its end", || job.ended()), Ended::Exited(7));
        assert_eq!(result(case), format!("{pid} 65534"));
        assert_no_process_left();
    });
}

/// Root restores the job of a user who had it in namespaces of their own: nothing of root is in it.
#[test]
fn of_another_user() {
    isolated("of_another_user", |case| {
        case.needs_root();
        common::isolate::open_to_all(case.dir());
        let mut program = nobody(case, Path::new(CKPT));
        program.args(["run", "--isolated", "--", "bash", "-c", COUNTER]);
        let log = case.open_log("job.log");
        let mut front = start(&mut program, &log);
        counts(case);
        let pid = until("the program", || {
            let init = children(front.pid).first().copied()?;
            children(init).first().copied()
        });
        let (image, _) = attach(case, pid, "job.ckpt", &["--kill"]);
        assert_eq!(until("its end", || front.ended()), Ended::Exited(137));
        let mut job = restored(case, &image, &[]);
        counts(case);
        for field in ["Uid", "Gid"] {
            let ids = status_field(job.pid, field);
            assert_eq!(ids.as_deref(), Some("65534\t65534\t65534\t65534"));
        }
        assert_eq!(status_field(job.pid, "Groups").as_deref(), Some(""));
        assert_eq!(
            status_field(init_of(&job), "Uid"),
            status_field(job.pid, "Uid")
        );
        job.signal(Signal::SIGTERM);
        assert_eq!(until("its end", || job.ended()), Ended::Exited(7));
        assert_no_process_left();
    });
}

fn three_lives(case: &Case) {
    let mut command = Command::new(CKPT);
    command.args(["run", "--isolated", "--", "bash", "-c", COUNTER]);
    let mut front = start(command.current_dir(case.dir()), &case.path("job.log"));
    counts(case);
    let pid = until("the program", || {
        let init = children(front.pid).first().copied()?;
        children(init).first().copied()
    });
    let inner = status_field(pid, "NSpid").map(last);
    ckpt(case, ["check", &pid.to_string()]).ok();
    let mut job = Job::behind(pid, front.pid);
    front.ended_already();
    for life in 1..=3 {
        let (image, figures) = attach(case, job.pid, "job.ckpt", &["--kill"]);
        assert_eq!(figures["pid"], job.pid);
        assert_eq!(until("its end", || job.ended()), Ended::Exited(137));
        assert_no_process_left();
        job = match life {
            2 => restored(case, &image, &[]),
            _ => restored_in_front(case, &image, &[]),
        };
        counts(case);
        assert_eq!(status_field(job.pid, "NSpid").map(last), inner);
    }
    job.signal(Signal::SIGTERM);
    assert_eq!(until("its end", || job.ended()), Ended::Exited(7));
    assert_no_process_left();
}

#[test]
fn isolated_from_the_beginning() {
    isolated("isolated_from_the_beginning", three_lives);
}

#[test]
fn isolated_from_the_beginning_by_an_ordinary_user() {
    let name = "isolated_from_the_beginning_by_an_ordinary_user";
    isolated_as_user(name, three_lives);
}

/// `ckpt run --isolated` takes its checkpoints from outside, of orphans as well.
#[test]
fn at_an_interval() {
    isolated("at_an_interval", |case| {
        let mut command = Command::new(CKPT);
        let program = format!("(sleep 1000 &); {COUNTER}");
        command.args(["run", "--isolated", "--interval", "0.2", "--name", "job"]);
        command.args(["--", "bash", "-c", &program]);
        let front = start(command.current_dir(case.dir()), &case.path("job.log"));
        until("two checkpoints", || {
            case.path("job.2.ckpt").exists().then_some(())
        });
        assert_eq!(front.kill(), Ended::Killed(9));
        // The job continues without the process that started it.
        counts(case);
        let init = until("its init", || {
            let mut inits = children(1).into_iter();
            inits.find(|pid| status_field(*pid, "Name").as_deref() == Some("ckpt-init"))
        });
        let all = children(init);
        assert!(all.len() > 1, "the orphan is not there: {all:?}");
        kill(Pid::from_raw(init), Signal::SIGKILL).expect("it is ours");
        assert_no_process_left();
        let last = fs::read_dir(case.dir()).expect("it is there").flatten();
        let last = last.filter_map(|entry| entry.file_name().into_string().ok());
        let last = last.filter(|name| name.ends_with(".ckpt")).max();
        let image = case.path(&last.expect("there are images"));
        let job = restored(case, &image, &[]);
        counts(case);
        let init = init_of(&job);
        let named = |pid: &i32| status_field(*pid, "Name").as_deref() == Some("sleep");
        until("the orphan", || {
            children(init).iter().any(named).then_some(())
        });
        // The namespace goes with the last of the job, and not before.
        job.signal(Signal::SIGTERM);
        until("the root's end", || {
            (!children(init).contains(&job.pid)).then_some(())
        });
        let orphan = children(init).into_iter().find(named).expect("it lives on");
        kill(Pid::from_raw(orphan), Signal::SIGKILL).expect("it is ours");
        assert_eq!(job.wait(), Ended::Exited(7));
        assert_no_process_left();
    });
}

/// Clones of one job at once; each may have its own output.
#[test]
fn clones() {
    isolated("clones", |case| {
        let program = "trap 'echo $$; exit 7' TERM; echo begun; while :; do sleep 0.01; done";
        let mut command = Command::new("bash");
        command.args(["-c", program]);
        let mut job = start(command.current_dir(case.dir()), &case.path("job.log"));
        until("it to begin", || {
            let text = fs::read_to_string(case.path("job.log")).unwrap_or_default();
            text.contains("begun").then_some(())
        });
        let pid = job.pid;
        let (image, _) = attach(case, pid, "job.ckpt", &[]);
        let outputs = [case.path("1.log"), case.path("2.log"), case.path("3.log")];
        let clones = outputs.each_ref().map(|output| {
            fs::write(output, "").expect("the test's directory is writable");
            let fd = format!("1={}", output.display());
            restored(case, &image, &["--pids", "namespace", "--fd", &fd])
        });
        for (mut clone, output) in clones.into_iter().zip(&outputs) {
            clone.signal(Signal::SIGTERM);
            assert_eq!(until("its end", || clone.ended()), Ended::Exited(7));
            let text = fs::read_to_string(output).expect("it was written");
            assert_eq!(text.trim(), pid.to_string());
        }
        job.signal(Signal::SIGTERM);
        assert_eq!(until("its end", || job.ended()), Ended::Exited(7));
        assert_no_process_left();
    });
}

/// The death of `restore` is not that of the job, once it runs.
#[test]
fn restore_is_killed() {
    isolated("restore_is_killed", |case| {
        let (_, image) = killed(case);
        let mut job = restored_in_front(case, &image, &["--pids", "namespace"]);
        let init = init_of(&job);
        let restore: i32 = status_field(init, "PPid").unwrap().parse().unwrap();
        kill(Pid::from_raw(restore), Signal::SIGKILL).expect("it waits");
        assert_eq!(until("its end", || job.ended()), Ended::Killed(9));
        counts(case);
        kill(Pid::from_raw(job.pid), Signal::SIGTERM).expect("it lives");
        assert_no_process_left();
        assert!(case.path("result").exists());
    });
}

/// A restore that fails in a namespace leaves nothing, and says why.
#[test]
fn failures() {
    isolated("failures", |case| {
        let (_, image) = killed(case);
        for step in Step::ALL.iter().filter(|s| s.name().starts_with("restore")) {
            let mut command = restore_cmd(&image, &["--pids", "namespace"]);
            let out = run(case, command.env("CKPT_FAULT", step.name()));
            out.refused(FAILED, &["fault injected", step.name()]);
            assert_no_process_left();
        }
        let settings = "/proc/sys/user/max_pid_namespaces";
        if fs::write(settings, "0").is_ok() {
            let out = run(case, &mut restore_cmd(&image, &["--pids", "namespace"]));
            out.refused(FAILED, &["cannot make a pid namespace"]);
            assert_no_process_left();
        }
    });
}

#[test]
fn values_without_a_file() {
    isolated("values_without_a_file", |case| {
        let (_, image) = killed(case);
        let out = run(case, &mut restore_cmd(&image, &["--env", "SEED=7"]));
        out.refused(FAILED, &["--env", "CKPT_RESTORE_ENV"]);
        assert_no_process_left();
    });
}

/// Root does not restore an image of another user unless asked to, and then as that user; others never
/// do.
#[test]
fn image_of_another_user() {
    isolated("image_of_another_user", |case| {
        case.needs_root();
        let (_, image) = killed(case);
        std::os::unix::fs::chown(&image, Some(65534), Some(65534)).expect("we are root");
        let args = ["--any-owner", "--pids", "keep"];
        let out = run(case, &mut restore_cmd(&image, &args));
        out.refused(FAILED, &["process", "has the uid 0", "you are uid 65534"]);
        assert_no_process_left();
        common::isolate::open_to_all(case.dir());
        fs::remove_file(case.path("count")).expect("it counted");
        let mut program = Command::new("setpriv");
        program.args(["--reuid=65534", "--regid=65534", "--init-groups", "bash"]);
        program.current_dir(case.dir());
        let log = case.open_log("nobody.log");
        let mut job = start(program.args(["-c", COUNTER]), &log);
        counts(case);
        let (image, _) = attach(case, job.pid, "nobody.ckpt", &["--kill"]);
        until("its end", || job.ended());
        common::job::reap_orphans(&common::tool::descendants_in(case, &image));
        std::os::unix::fs::chown(&image, Some(65534), Some(65534)).expect("we are root");
        let out = run(case, &mut restore_cmd(&image, &[]));
        out.refused(
            FAILED,
            &["nobody.ckpt", "belongs to uid 65534", "--any-owner"],
        );
        let mut job = restored(case, &image, &["--any-owner"]);
        counts(case);
        job.signal(Signal::SIGTERM);
        assert_eq!(until("its end", || job.ended()), Ended::Exited(7));
        std::os::unix::fs::chown(&image, Some(0), Some(0)).expect("we are root");
        common::isolate::open_to_all(&image);
        common::isolate::open_to_all(case.dir());
        let mut other = nobody(case, Path::new(RESTORE));
        let out = run(case, other.arg(&image).arg("--any-owner"));
        out.refused(FAILED, &["nobody.ckpt", "belongs to uid 0", "copy"]);
        assert_no_process_left();
    });
}

/// Pids that lead to other processes in the `/proc` that is there.
#[test]
fn refused_from_outside() {
    isolated("refused_from_outside", |case| {
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child"]);
        command.args(["bash", "-c", "sleep 1000 & wait"]);
        let outer = start(&mut command, &case.path("job.log"));
        let (first, second) = until("both processes", || {
            let first = children(outer.pid).first().copied()?;
            Some((first, children(first).first().copied()?))
        });
        let attach = |pid: i32| ckpt(case, ["attach", &pid.to_string(), "-o", "job.ckpt"]);
        for pid in [first, second] {
            let object = format!("process {pid}");
            attach(pid).refused(1, &[&object, "no /proc for it", "--mount-proc"]);
            common::look::assert_let_go(pid);
        }
        assert!(common::tool::leftovers(case.dir()).is_empty());
        outer.kill();
        assert_no_process_left();
    });
}

/// Who starts us may ignore the end of its children, and so do we then; exit codes are told all the
/// same.
#[test]
fn children_ignored() {
    isolated("children_ignored", |case| {
        let (_, image) = killed(case);
        let line = format!(
            "trap '' CHLD; exec {RESTORE} --pids namespace {}",
            image.display()
        );
        let mut job = start(
            Command::new("bash").args(["-c", &line]),
            &case.path("job.log"),
        );
        // Until the job counts, children of the first process help it and are gone soon.
        counts(case);
        let restored = until("the job", || {
            let init = children(job.pid).first().copied()?;
            let root = children(init).first().copied()?;
            (status_field(init, "PPid")? == job.pid.to_string()).then_some(root)
        });
        kill(Pid::from_raw(restored), Signal::SIGTERM).expect("it lives");
        assert_eq!(until("its end", || job.ended()), Ended::Exited(7));
        assert_no_process_left();
    });
}
