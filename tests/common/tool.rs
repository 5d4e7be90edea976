//! The command lines.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;

use super::isolate::Case;
use super::job::{Ended, Job, appended, spawn};
use super::wait::until;

pub const CKPT: &str = env!("CARGO_BIN_EXE_ckpt");
pub const RESTORE: &str = env!("CARGO_BIN_EXE_restore");

/// What a finished command said.
#[derive(Debug)]
pub struct Output {
    pub ended: Ended,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    pub fn code(&self) -> i32 {
        match self.ended {
            Ended::Exited(code) => code,
            Ended::Killed(signal) => 128 + signal,
        }
    }

    /// Demands success; what it printed.
    pub fn ok(&self) -> &str {
        assert_eq!(self.code(), 0, "{self:#?}");
        &self.stdout
    }

    /// Demands this exit code and these words in one and the same line of standard error, which
    /// also may not be longer than a person reads.
    pub fn refused(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code(), code, "{words:?} were expected: {self:#?}");
        let line = self
            .stderr
            .lines()
            .find(|line| words.iter().all(|word| line.contains(word)));
        let line = line.unwrap_or_else(|| panic!("no line with {words:?}: {self:#?}"));
        assert!(line.starts_with("ckpt: "), "{line}");
        assert!(line.len() < 500, "{line}");
        assert!(!self.stderr.contains("panicked"), "{self:#?}");
    }
}

/// Runs a command to its end, with its output in files: a job left behind may hold them open.
pub fn run(case: &Case, command: &mut Command) -> Output {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let out = case.path(&format!(".out{number}"));
    let err = case.path(&format!("command{number}.log"));
    command
        .stdin(Stdio::null())
        .stdout(appended(&out))
        .stderr(appended(&err));
    let ended = spawn(command).wait();
    let text = |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into();
    let output = Output {
        ended,
        stdout: text(&out),
        stderr: text(&err),
    };
    let _ = fs::remove_file(&out);
    if output.stderr.is_empty() {
        let _ = fs::remove_file(&err);
    }
    output
}

/// A program run in the test's directory by a user without any privilege.
pub fn nobody(case: &Case, program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(program);
    command.current_dir(case.dir()).stdin(Stdio::null());
    command
}

/// A source file of `tests/programs`.
pub fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/programs")
        .join(name)
}

/// `ckpt` with these arguments.
pub fn ckpt<S: AsRef<OsStr>>(case: &Case, args: impl IntoIterator<Item = S>) -> Output {
    run(case, Command::new(CKPT).args(args).current_dir(case.dir()))
}

/// `restore IMAGE` with these arguments, to be run or spawned.
pub fn restore_cmd(image: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(RESTORE);
    command.arg(image).args(args);
    command
}

/// A checkpoint that must succeed, as `image` in the test's directory; the figures.
pub fn attach(case: &Case, pid: i32, image: impl AsRef<Path>, args: &[&str]) -> (PathBuf, Value) {
    let path = case.dir().join(image);
    let out = run(
        case,
        Command::new(CKPT)
            .args(["attach", &pid.to_string(), "--json", "-o"])
            .arg(&path)
            .args(args),
    );
    let figures = serde_json::from_str(out.ok());
    (
        path,
        figures.unwrap_or_else(|error| panic!("{error}: {out:#?}")),
    )
}

/// Everybody in an image but its first process; those that have ended, too.
pub fn descendants_in(case: &Case, image: &Path) -> Vec<i32> {
    let words: [&OsStr; 3] = ["inspect".as_ref(), "--json".as_ref(), image.as_os_str()];
    let shown: Value = serde_json::from_str(ckpt(case, words).ok()).expect("inspect prints JSON");
    let summary = &shown["summary"];
    let pids = |list: &str| {
        let list = summary[list].as_array().expect("it is an array").clone();
        list.into_iter()
            .map(|one| one["pid"].as_i64().expect("it is a number") as i32)
    };
    pids("process_list")
        .skip(1)
        .chain(pids("zombies"))
        .collect()
}

/// A restore in the background that must succeed.
pub fn restored(case: &Case, image: &Path, args: &[&str]) -> Job {
    let out = run(case, restore_cmd(image, args).arg("--detach"));
    let pid = out.ok().trim().parse();
    let pid = pid.unwrap_or_else(|error| panic!("{error}: {out:#?}"));
    // In a namespace of its own it is a child of that one's first process, which is ours.
    match common_parent(pid) {
        1 => Job::of(pid),
        init => Job::behind(pid, init),
    }
}

fn common_parent(pid: i32) -> i32 {
    let parent = super::look::status_field(pid, "PPid");
    parent.map_or(1, |text| text.parse().expect("it is a pid"))
}

/// A restore in the foreground that must succeed, and the pid of the job. Its messages are
/// appended to `restore.log`.
pub fn restored_in_front(case: &Case, image: &Path, args: &[&str]) -> Job {
    let log = case.path("restore.log");
    let seen = fs::metadata(&log).map_or(0, |meta| meta.len() as usize);
    let mut command = restore_cmd(image, args);
    command
        .arg("--verbose")
        .stdin(Stdio::null())
        .stdout(appended(&log))
        .stderr(appended(&log));
    let mut restore = spawn(&mut command);
    let pid = until("the restored job to run", || {
        let text = fs::read(&log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text[seen.min(text.len())..]).into_owned();
        let pid = text
            .split("running as process ")
            .nth(1)
            .and_then(|rest| rest.split('\n').next());
        if pid.is_none() {
            let ended = restore.ended();
            assert!(ended.is_none(), "restore {ended:?}: {text}");
        }
        pid?.trim().parse().ok()
    });
    let front = restore.pid;
    std::mem::forget(restore);
    Job::behind(pid, front)
}

/// What `attach` leaves beside the image when it is interrupted.
pub fn leftovers(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir)
        .expect("the directory is readable")
        .flatten();
    let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.contains(".ckpt")).collect()
}
