//! What `attach --kill` and `--stop` look at before the job ends: an image from which nothing can be
//! restored ends no job.

use std::fs;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::counter::counts;
use crate::common::look::{all_stopped, assert_let_go, await_rest, children, states};
use crate::common::refused::FAILED;
use crate::common::tool::{CKPT, leftovers};
use crate::common::{
    Case, Ended, Job, Looks, Output, attach, ckpt, isolated, isolated_as_user, restore_cmd,
    restored, run, start, until,
};

/// Counts in the file `count` and has the file `data` open.
const COUNTER: &str = r#"
echo contents > data; exec 7<> data
while :; do n=$((n + 1)); ln -sfn $n count; sleep 0.01; done
"#;

fn started(case: &Case) -> Job {
    let mut command = Command::new("bash");
    command.args(["-c", COUNTER]).current_dir(case.dir());
    let job = start(&mut command, &case.path("job.log"));
    counts(case);
    job
}

/// `data` becomes another file of the same contents.
fn replace(case: &Case) {
    fs::copy(case.path("data"), case.path("other")).expect("it is there");
    fs::rename(case.path("other"), case.path("data")).expect("it is there");
}

/// The process that looks at the image, waiting to do so.
fn prover(case: &Case, attach: i32) -> i32 {
    until("the check to begin", || {
        case.path("here").exists().then_some(())
    });
    until("the process that checks", || {
        let stopped = |pid: &i32| states(*pid).iter().any(|(_, state)| *state == 'T');
        children(attach).into_iter().find(stopped)
    })
}

fn attach_command(case: &Case, pid: i32, args: &[&str]) -> Command {
    let mut command = Command::new(CKPT);
    command
        .args(["attach", &pid.to_string()])
        .args(args)
        .current_dir(case.dir());
    command
}

/// An attach during whose check `data` is replaced.
fn attach_meanwhile(case: &Case, pid: i32, args: &[&str]) -> Output {
    let _ = fs::remove_file(case.path("here"));
    let mut command = attach_command(case, pid, args);
    let fault = format!("check:wait={}", case.path("here").display());
    std::thread::scope(|scope| {
        let attach = scope.spawn(|| run(case, command.env("CKPT_FAULT", fault)));
        until("the check to begin", || {
            case.path("here").exists().then_some(())
        });
        let waits = |pid: &i32| {
            fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| line.windows(6).any(|word| word == b"attach"))
                && states(*pid).iter().any(|(_, state)| *state == 'T')
        };
        let pids = || {
            let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
            entries.filter_map(|e| e.file_name().to_str()?.parse().ok())
        };
        let prover = until("the process that checks", || pids().find(waits));
        replace(case);
        kill(Pid::from_raw(prover), Signal::SIGCONT).expect("it waits");
        attach.join().expect("it does not panic")
    })
}

fn replaced_meanwhile(case: &Case) {
    let mut job = started(case);
    fs::write(case.path("job.ckpt"), "an older one").expect("the directory is writable");
    for after in ["--kill", "--stop"] {
        let out = attach_meanwhile(case, job.pid, &["-o", "job.ckpt", after]);
        let data = case.path("data");
        out.refused(
            1,
            &[&data.display().to_string(), "was replaced", "put the old"],
        );
        out.refused(1, &["the job continues", "--no-check"]);
        counts(case);
        assert_let_go(job.pid);
        let image = fs::read_to_string(case.path("job.ckpt"));
        assert_eq!(image.expect("it is there"), "an older one");
        assert_eq!(leftovers(case.dir()), ["job.ckpt"]);
        // The job has the file that was replaced, and is refused at once from now on: a new one.
        job.kill_and_forget();
        common_end(case);
        job = started(case);
    }
    let out = run(
        case,
        &mut attach_command(case, job.pid, &["-o", "job.ckpt", "--kill", "--no-check"]),
    );
    out.ok();
    until("its end", || job.ended());
    common_end(case);
    let job = restored(case, &case.path("job.ckpt"), &[]);
    counts(case);
    job.kill();
}

/// Children of a counter that was killed.
fn common_end(case: &Case) {
    crate::common::rounds::everybody_reaped();
    let _ = fs::remove_file(case.path("count"));
}

#[test]
fn a_file_replaced_meanwhile() {
    isolated("a_file_replaced_meanwhile", replaced_meanwhile);
}

#[test]
fn a_file_replaced_meanwhile_of_an_ordinary_user() {
    isolated_as_user(
        "a_file_replaced_meanwhile_of_an_ordinary_user",
        replaced_meanwhile,
    );
}

/// What comes out of the pipe is no image if the job was not ended.
#[test]
fn into_a_pipe() {
    isolated("into_a_pipe", |case| {
        let mut job = started(case);
        let piped = |fault: &str| {
            let line = format!(
                "{CKPT} attach {} --kill -o - 2>err | cat > piped.ckpt; exit ${{PIPESTATUS[0]}}",
                job.pid
            );
            let mut command = Command::new("bash");
            command.args(["-c", &line]).current_dir(case.dir());
            run(case, command.env("CKPT_FAULT", fault)).code()
        };
        assert_eq!(piped("check"), 1);
        counts(case);
        assert_let_go(job.pid);
        ckpt(case, ["verify", "piped.ckpt"]).refused(1, &["piped.ckpt"]);
        let said = fs::read_to_string(case.path("err")).expect("it was written");
        assert!(said.contains("fault injected"), "{said}");
        assert_eq!(piped(""), 0);
        until("its end", || job.ended());
        common_end(case);
        let job = restored(case, &case.path("piped.ckpt"), &[]);
        counts(case);
        job.kill();
    });
}

/// Neither the death of the process that checks nor that of the attach meanwhile is the job's.
#[test]
fn killed_while_it_checks() {
    isolated("killed_while_it_checks", |case| {
        let job = started(case);
        let before = Looks::at(job.pid);
        let mut command = attach_command(case, job.pid, &["--kill", "-o", "job.ckpt"]);
        let out = run(case, command.env("CKPT_FAULT", "check:kill"));
        out.refused(1, &["checks the image", "killed"]);
        counts(case);
        assert_let_go(job.pid);
        assert!(leftovers(case.dir()).is_empty());
        let mut command = attach_command(case, job.pid, &["--kill", "-o", "job.ckpt"]);
        let fault = format!("check:wait={}", case.path("here").display());
        let mut attach = start(command.env("CKPT_FAULT", fault), &case.path("attach.log"));
        let prover = prover(case, attach.pid);
        kill(Pid::from_raw(attach.pid), Signal::SIGKILL).expect("it waits");
        assert_eq!(until("its end", || attach.ended()), Ended::Killed(9));
        crate::common::job::reap_orphans(&[prover]);
        counts(case);
        assert_let_go(job.pid);
        before.assert_same(job.pid, &["fd", "task", "maps"]);
        counts(case);
        assert!(!case.path("job.ckpt").exists());
        attach_and_restore(case, job);
    });
}

fn attach_and_restore(case: &Case, mut job: Job) {
    let (image, _) = attach(case, job.pid, "job.ckpt", &["--kill"]);
    until("its end", || job.ended());
    common_end(case);
    assert_eq!(leftovers(case.dir()), ["job.ckpt"]);
    let job = restored(case, &image, &[]);
    counts(case);
    job.kill();
}

/// The image of a job in a pid namespace is looked at from where `restore` will be called.
#[test]
fn in_a_pid_namespace() {
    isolated("in_a_pid_namespace", |case| {
        let mut command = Command::new(CKPT);
        command
            .args(["run", "--isolated", "--", "bash", "-c", COUNTER])
            .current_dir(case.dir());
        let mut outer = start(&mut command, &case.path("run.log"));
        counts(case);
        let find = || {
            let init = children(outer.pid).into_iter().next()?;
            children(init).into_iter().next()
        };
        let pid = until("the job", find);
        let out = attach_meanwhile(case, pid, &["-o", "job.ckpt", "--kill"]);
        out.refused(1, &["was replaced"]);
        counts(case);
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it lives");
        until("its end", || outer.ended());
        common_end(case);
        let mut outer = start(&mut command, &case.path("run.log"));
        counts(case);
        let pid = until("the job", || {
            let init = children(outer.pid).into_iter().next()?;
            children(init).into_iter().next()
        });
        let (image, _) = attach(case, pid, "job.ckpt", &["--kill"]);
        until("its end", || outer.ended());
        common_end(case);
        let out = run(case, &mut restore_cmd(&image, &["--detach"]));
        let pid: i32 = out.ok().trim().parse().expect("a pid");
        counts(case);
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it lives");
    });
}

/// What an option of `restore` settles is told, and keeps no job from its end.
#[test]
fn what_an_option_settles_is_told() {
    isolated("what_an_option_settles_is_told", |case| {
        let line = "mkfifo pipe; exec 8<> pipe; rm pipe; sleep 1000 8>&- | (exec 9<&0 0</dev/null; touch ready; \
                    exec sleep 1001)";
        let mut command = Command::new("bash");
        command.args(["-c", line]).current_dir(case.dir());
        let mut shell = start(&mut command, &case.path("job.log"));
        until("it to be ready", || {
            case.path("ready").exists().then_some(())
        });
        let is = |pid: &i32| {
            fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line == b"sleep\x001001\0")
        };
        let pid = until("it", || children(shell.pid).into_iter().find(is));
        let check = ckpt(case, ["check", &pid.to_string()]);
        let note =
            |line: &str| line.starts_with("at the restore: ") && line.contains("--fd 9=PATH");
        assert!(check.ok().lines().any(note), "{check:?}");
        let out = run(
            case,
            &mut attach_command(case, pid, &["--kill", "-o", "job.ckpt"]),
        );
        out.ok();
        let told = out.stderr.lines().find(|line| line.contains("--fd 9=PATH"));
        assert!(
            told.is_some_and(|line| line.starts_with("ckpt: warning: ")),
            "{out:?}"
        );
        let refused = run(case, &mut restore_cmd(&case.path("job.ckpt"), &[]));
        refused.refused(FAILED, &["fd 9", "--fd 9=PATH"]);
        shell.kill_and_forget();
    });
}

/// Names and objects that the job itself has, when it is stopped, are not in its own way.
#[test]
fn what_the_job_has_is_free() {
    isolated("what_the_job_has_is_free", |case| {
        let names = [
            "sock_named",
            "sock_abstract",
            "sock_listen",
            "sysv_shm",
            "sysv_sem",
            "sysv_msg",
            "mqueue",
            "mq_notify",
            "flock_self",
            "lease",
            "fifo",
            "aio_ring",
        ];
        for name in names {
            let dir = format!("run-{name}");
            let command = Command::new(case.fixtures().join(name));
            let target = crate::common::fixture::start_in(case, name, &dir, command);
            attach(case, target.pid(), "job.ckpt", &["--stop"]);
            assert!(all_stopped(target.pid()));
            kill(Pid::from_raw(target.pid()), Signal::SIGCONT).expect("it is stopped");
            target.passes();
        }
    });
}

/// An image that would go nowhere ends no job: standard output is closed, and so are the others.
#[test]
fn a_closed_standard_output_takes_no_image() {
    isolated("a_closed_standard_output_takes_no_image", |case| {
        let mut job = started(case);
        for closed in [">&-", "<&- >&-", "<&- >&- 2>&-"] {
            let script = format!("exec \"$0\" attach --kill -q -o - $1 {closed}");
            let mut command = Command::new("sh");
            command.args(["-c", &script, CKPT, &job.pid.to_string()]);
            let out = run(case, &mut command);
            assert_eq!(out.ended, Ended::Exited(1), "{closed}: {}", out.stderr);
            assert!(job.ended().is_none(), "{closed}: the job is gone");
            assert_let_go(job.pid);
            counts(case);
        }
        // Where the image does not go there, closed descriptors are no obstacle.
        let script = "exec \"$0\" attach -q -o job.ckpt $1 <&- >&- 2>&-";
        let mut command = Command::new("sh");
        command.args(["-c", script, CKPT, &job.pid.to_string()]);
        run(case, command.current_dir(case.dir())).ok();
        ckpt(case, ["verify", "-q", "job.ckpt"]).ok();
        job.kill();
    });
}

/// What `--kill` refuses by the plan of the restore, `check` tells beforehand in the same words, and the job takes no
/// notice of it.
fn told_beforehand(case: &Case, job: &Job, reason: &str) {
    await_rest(job.pid);
    let before = Looks::at(job.pid);
    let pid = job.pid.to_string();
    let attach = ckpt(case, ["attach", &pid, "--kill", "-o", "job.ckpt"]);
    attach.refused(1, &[reason]);
    attach.refused(1, &["the job continues", "--no-check"]);
    assert!(leftovers(case.dir()).is_empty());
    let check = ckpt(case, ["check", &pid]);
    assert_eq!(check.code(), 1, "{check:?}");
    let told: Vec<&str> = check.stdout.lines().collect();
    let by_attach = attach
        .stderr
        .lines()
        .filter_map(|l| l.strip_prefix("ckpt: "));
    let by_attach: Vec<&str> = by_attach.filter(|l| l.contains(reason)).collect();
    assert_eq!(told, by_attach, "{attach:?}");
    let json = ckpt(case, ["check", "--json", &pid]);
    assert_eq!(json.code(), 1);
    let json: serde_json::Value = serde_json::from_str(&json.stdout).expect("it is JSON");
    assert_eq!(json["obstacles"].as_array().map(Vec::len), Some(told.len()));
    assert_let_go(job.pid);
    before.assert_same(job.pid, &[]);
}

/// A program that lost its permission after it was begun.
fn no_program_any_more(case: &Case) {
    use std::os::unix::fs::PermissionsExt;
    let program = case.path("program");
    fs::copy("/bin/sleep", &program).expect("it is there");
    let mut command = Command::new(&program);
    let job = start(
        command.arg("1000").current_dir(case.dir()),
        &case.path("job.log"),
    );
    let is = format!("{}\0", program.display()).into_bytes();
    let line = format!("/proc/{}/cmdline", job.pid);
    until("the program to begin", || {
        fs::read(&line)
            .is_ok_and(|l| l.starts_with(&is))
            .then_some(())
    });
    let is_possible = ckpt(case, ["check", &job.pid.to_string()]);
    assert!(
        is_possible
            .ok()
            .contains("can be checkpointed and restored")
    );
    fs::set_permissions(&program, PermissionsExt::from_mode(0o644)).expect("it is ours");
    told_beforehand(case, &job, "cannot be executed");
    fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).expect("it is ours");
    let mut job = job;
    attach(case, job.pid, "job.ckpt", &["--kill"]);
    until("its end", || job.ended());
}

#[test]
fn no_program_is_told_beforehand() {
    isolated("no_program_is_told_beforehand", no_program_any_more);
}

#[test]
fn no_program_is_told_beforehand_of_an_ordinary_user() {
    isolated_as_user(
        "no_program_is_told_beforehand_of_an_ordinary_user",
        no_program_any_more,
    );
}

/// A socket whose directory has another name by now.
#[test]
fn no_directory_is_told_beforehand() {
    isolated("no_directory_is_told_beforehand", |case| {
        case.needs_root();
        let python = case.system_python();
        let script = "import os, socket, time\n\
                      s = socket.socket(socket.AF_UNIX); os.mkdir('d'); s.bind(os.getcwd() + '/d/s'); s.listen(1)\n\
                      os.rename('d', 'e'); open('ready', 'w')\n\
                      while True: time.sleep(1000)";
        let mut command = Command::new(python);
        command.args(["-c", script]).current_dir(case.dir());
        let job = start(&mut command, &case.path("job.log"));
        until("it to be ready", || {
            case.path("ready").exists().then_some(())
        });
        told_beforehand(case, &job, "there is no directory for");
        job.kill();
    });
}

/// In a job with namespaces of its own, whose orphans the first process has adopted.
#[test]
fn in_a_pid_namespace_it_is_told_beforehand() {
    isolated("in_a_pid_namespace_it_is_told_beforehand", |case| {
        use std::os::unix::fs::PermissionsExt;
        let program = case.path("program");
        fs::copy("/bin/sleep", &program).expect("it is there");
        let line = "(./program 1000 & echo > ready) & wait; exec sleep 1001";
        let mut command = Command::new(CKPT);
        command
            .args(["run", "--isolated", "--", "bash", "-c", line])
            .current_dir(case.dir());
        let mut outer = start(&mut command, &case.path("run.log"));
        let is = |pid: &i32, line: &[u8]| {
            fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|is| is == line)
        };
        let pid = until("the job", || {
            let init = children(outer.pid).into_iter().next()?;
            let all = children(init);
            let adopted = all.iter().any(|pid| is(pid, b"./program\x001000\0"));
            all.into_iter()
                .find(|pid| adopted && is(pid, b"sleep\x001001\0"))
        });
        fs::set_permissions(&program, PermissionsExt::from_mode(0o644)).expect("it is ours");
        let check = ckpt(case, ["check", &pid.to_string()]);
        assert_eq!(check.code(), 1, "{check:?}");
        assert!(check.stdout.contains("cannot be executed"), "{check:?}");
        let init = children(outer.pid)[0];
        kill(Pid::from_raw(init), Signal::SIGKILL).expect("it lives");
        until("its end", || outer.ended());
        common_end(case);
    });
}

/// The mode forbids opening it for writing, as of git's objects; it is the same afterwards.
#[test]
fn a_file_whose_mode_forbids_to_write() {
    isolated_as_user("a_file_whose_mode_forbids_to_write", |case| {
        use std::os::unix::fs::MetadataExt;
        let code = "import mmap, os, time\n\
                    fd = os.open('object', os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o444)\n\
                    os.write(fd, b'x' * 4096)\n\
                    m = mmap.mmap(fd, 4096)\n\
                    os.chmod(os.open('unread', os.O_RDONLY | os.O_CREAT), 0)\n\
                    while True: os.write(fd, b'x'); m[0] ^= 1; time.sleep(0.005)";
        let mut command = Command::new(case.system_python());
        command.args(["-c", code]).current_dir(case.dir());
        let mut job = start(&mut command, &case.path("job.log"));
        let look = || fs::metadata(case.path("object")).ok();
        let grows = || {
            let before = look().map_or(0, |meta| meta.len());
            until("the file to grow", || {
                look().filter(|meta| meta.len() > before.max(4096))
            })
        };
        let mode = grows().mode();
        for life in 0..2 {
            let image = format!("job.{life}.ckpt");
            let (image, _) = attach(case, job.pid, &image, &["--kill"]);
            until("its end", || job.ended());
            job = restored(case, &image, &[]);
            assert_eq!(grows().mode(), mode);
        }
        job.kill();
    });
}
