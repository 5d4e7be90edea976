//! `ckpt run`: a program under it behaves as it would alone.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

const CKPT: &str = env!("CARGO_BIN_EXE_ckpt");

/// A defect may leave a test waiting for ever; `ckpt run` then gets a signal, which ends the program.
#[allow(unsafe_code)]
fn watch(command: &mut Command) {
    const SECONDS: u32 = 120;
    // SAFETY: one system call; the alarm stays through the exec.
    unsafe {
        command.pre_exec(|| {
            libc::alarm(SECONDS);
            Ok(())
        })
    };
}

fn run(options: &[&str], program: &[&str]) -> Command {
    let mut command = Command::new(CKPT);
    watch(&mut command);
    command.arg("run").args(options).arg("--").args(program);
    command
        .env_remove("CKPT_FAIL_RC")
        .env_remove("DMTCP_FAIL_RC");
    command.stdin(Stdio::null());
    command
}

fn shell(script: &str) -> Command {
    run(&[], &["sh", "-c", script])
}

fn code(output: &Output) -> i32 {
    output
        .status
        .code()
        .expect("ckpt itself was not ended by a signal")
}

/// Starts with standard output piped and waits for the first line on it.
fn start(command: &mut Command) -> (Child, BufReader<std::process::ChildStdout>, String) {
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    (child, out, line)
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id() as i32)
}

/// A directory that goes when the test ends.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ckpt-run-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Directory(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn exit_codes_are_the_programs() {
    for (script, expected) in [
        ("exit 0", 0),
        ("exit 7", 7),
        ("exit 255", 255),
        ("kill -KILL $$", 137),
        ("kill -TERM $$", 143),
        ("kill -40 $$", 168),
    ] {
        assert_eq!(code(&shell(script).output().unwrap()), expected, "{script}");
    }
}

#[test]
fn a_program_that_cannot_start_is_our_own_failure() {
    let program = ["/nonexistent/program"];
    let output = run(&[], &program).output().unwrap();
    assert_eq!(code(&output), 99);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        text.starts_with("ckpt: ") && text.contains("/nonexistent/program"),
        "{text}"
    );
    assert_eq!(text.lines().count(), 1, "{text}");
    for (variable, value, expected) in [
        ("CKPT_FAIL_RC", "5", 5),
        ("DMTCP_FAIL_RC", "6", 6),
        ("CKPT_FAIL_RC", "0", 99),
    ] {
        let output = run(&[], &program).env(variable, value).output().unwrap();
        assert_eq!(code(&output), expected, "{variable}={value}");
    }
}

#[test]
fn standard_streams_pass_through() {
    let mut command = run(&[], &["cat"]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"through\0and through")
        .unwrap();
    assert_eq!(
        child.wait_with_output().unwrap().stdout,
        b"through\0and through"
    );
}

#[test]
fn a_closed_output_is_seen_while_the_program_goes_on() {
    // The end of the output comes before the program's end, which waits for our input.
    let mut command = shell("exec >&-; read line; exit 4");
    let (mut child, _, line) = start(command.stdin(Stdio::piped()));
    assert_eq!(line, "");
    drop(child.stdin.take());
    assert_eq!(child.wait().unwrap().code(), Some(4));
}

#[test]
fn the_program_inherits_what_we_inherited() {
    for program in [
        &["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"][..],
        // The process group.
        &["cut", "-d", " ", "-f", "5", "/proc/self/stat"],
    ] {
        let mut alone = Command::new(program[0]);
        // What a closure before exec changes, it changes for both.
        watch(&mut alone);
        let alone = alone.args(&program[1..]).output().unwrap();
        let under = run(&["--interval", "1h"], program).output().unwrap();
        assert_eq!(alone.stdout, under.stdout, "{program:?}");
    }
    let count = |mut command: Command| {
        let output = command.output().unwrap();
        String::from_utf8(output.stdout).unwrap().lines().count()
    };
    let mut alone = Command::new("ls");
    alone.arg("/proc/self/fd").stdin(Stdio::null());
    assert_eq!(count(alone), count(run(&[], &["ls", "/proc/self/fd"])));
}

#[test]
fn signals_are_passed_on() {
    for (signal, name) in [
        (Signal::SIGTERM, "TERM"),
        (Signal::SIGHUP, "HUP"),
        (Signal::SIGINT, "INT"),
        (Signal::SIGUSR2, "USR2"),
    ] {
        let script = format!(
            "sleep 1000 & trap 'kill $!; echo got {name}; exit 3' {name}; echo ready; wait"
        );
        let (mut child, mut out, line) = start(&mut shell(&script));
        assert_eq!(line, "ready\n");
        kill(pid(&child), signal).unwrap();
        let mut rest = String::new();
        out.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, format!("got {name}\n"));
        assert_eq!(child.wait().unwrap().code(), Some(3));
    }
}

#[test]
fn what_the_program_sends_us_does_not_come_back() {
    // Signals are dealt with in the order of their numbers: when USR2 arrives, USR1 would have.
    let script = "sleep 1000 & trap 'kill $!; exit 9' USR1; trap 'kill $!; exit 4' USR2; \
                  kill -USR1 $PPID; echo ready; wait";
    let (mut child, _, line) = start(&mut shell(script));
    assert_eq!(line, "ready\n");
    kill(pid(&child), Signal::SIGUSR2).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(4));
}

#[test]
fn we_stop_when_the_program_is_stopped_by_its_terminal() {
    let mut command = shell("kill -TSTP $$; exit 5");
    let mut child = command.process_group(0).spawn().unwrap();
    let group = pid(&child);
    let stopped = waitpid(group, Some(WaitPidFlag::WUNTRACED)).unwrap();
    assert_eq!(stopped, WaitStatus::Stopped(group, Signal::SIGTSTP));
    killpg(group, Signal::SIGCONT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(5));
}

#[test]
fn images_are_taken_at_the_interval_and_the_newest_kept() {
    let directory = Directory::new("interval");
    // The counter goes on after an image that is there, good or not.
    std::fs::write(directory.0.join("job.4.ckpt"), b"no image").unwrap();
    let options = [
        "--interval",
        "100ms",
        "--dir",
        directory.path(),
        "--name",
        "job",
        "--keep",
        "2",
    ];
    let mut command = run(&options, &["sleep", "1000"]);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let images = || names(&directory.0);
    // Until the one that is no image has become superfluous.
    while images().contains(&"job.4.ckpt".to_owned()) || images().len() < 2 {
        assert!(child.try_wait().unwrap().is_none(), "ckpt ended early");
        std::thread::yield_now();
    }
    kill(pid(&child), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
    let left: Vec<String> = images()
        .into_iter()
        .filter(|name| !name.starts_with('.'))
        .collect();
    assert_eq!(left.len(), 2, "{left:?}");
    for name in &left {
        let counter = name
            .strip_prefix("job.")
            .and_then(|rest| rest.strip_suffix(".ckpt"));
        assert!(counter.unwrap().parse::<u64>().unwrap() > 4, "{name}");
        let image = directory.0.join(name);
        let verified = Command::new(CKPT)
            .arg("verify")
            .arg(image)
            .output()
            .unwrap();
        assert!(
            verified.status.success(),
            "{}",
            String::from_utf8_lossy(&verified.stderr)
        );
    }
}

#[test]
fn a_failed_checkpoint_is_one_line_and_the_program_goes_on() {
    let directory = Directory::new("failure");
    let options = ["--interval", "100ms", "--dir", directory.path()];
    let mut command = run(&options, &["sh", "-c", "echo ready; read line; exit 7"]);
    command.stdin(Stdio::piped()).stderr(Stdio::piped());
    // From here on no image can be made; the directory cannot even be read.
    let (mut child, _, _) = start(&mut command);
    std::fs::remove_dir_all(&directory.0).unwrap();
    let mut err = BufReader::new(child.stderr.take().unwrap());
    let failures: Vec<String> = (0..2)
        .map(|_| {
            let mut line = String::new();
            err.read_line(&mut line).unwrap();
            line
        })
        .collect();
    for line in &failures {
        assert!(
            line.starts_with("ckpt: ") && line.contains("the job continues"),
            "{line}"
        );
    }
    drop(child.stdin.take());
    assert_eq!(child.wait().unwrap().code(), Some(7));
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
