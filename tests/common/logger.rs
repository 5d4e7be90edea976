//! `tests/programs/logger.py`: a job with files of every sort.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;

use super::isolate::Case;
use super::job::{Ended, Job, start};
use super::look::assert_no_process_left;
use super::tool::{attach, restore_cmd, restored, run};
use super::wait::until;

/// `tests/programs/logger.py` at work in a directory of its own, with an interpreter of its own.
pub struct Logger {
    pub job: Job,
    pub dir: PathBuf,
}

/// Contents of the file that the logger has open for writing and does not write.
pub const STATE: &[u8] = b"state of long ago";

impl Logger {
    /// `mode` is how it opens its log, as in Python.
    pub fn start(case: &Case, mode: &str) -> Self {
        let python = case.system_python();
        let dir = case.path("old");
        let write = |name: &str, bytes: &[u8]| {
            fs::write(dir.join(name), bytes).expect("the test's directory is writable");
        };
        fs::create_dir(&dir).expect("the test's directory is writable");
        fs::copy(python, dir.join("python")).expect("there is room");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs/logger.py");
        fs::copy(script, dir.join("logger.py")).expect("there is room");
        write("table", &[0; 4096]);
        write("input", b"what is read");
        write("state.bin", STATE);
        let mut command = Command::new(dir.join("python"));
        command.args(["logger.py", mode]).current_dir(&dir);
        let job = start(&mut command, &case.path("logger.log"));
        let logger = Logger { job, dir };
        logger.reaches(3);
        logger
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("out.log")).unwrap_or_default()
    }

    /// Waits until so many more lines have been written.
    pub fn writes(&self, more: usize) {
        self.reaches(self.log().lines().count() + more);
    }

    pub fn reaches(&self, lines: usize) {
        until(&format!("{lines} lines"), || {
            (self.log().lines().count() >= lines).then_some(())
        });
    }

    /// A checkpoint after which it is killed at once.
    pub fn killed_into(&mut self, case: &Case, args: &[&str]) -> PathBuf {
        let args = [&["--kill"], args].concat();
        let (image, _) = attach(case, self.job.pid, "job.ckpt", &args);
        self.reap();
        image
    }

    /// A checkpoint after which it goes on and writes more, before it is killed.
    pub fn crashed_after(&mut self, case: &Case, args: &[&str]) -> PathBuf {
        let (image, _) = attach(case, self.job.pid, "job.ckpt", args);
        self.writes(5);
        self.job.signal(Signal::SIGKILL);
        self.reap();
        image
    }

    pub fn reap(&mut self) {
        let ended = until("its end", || self.job.ended());
        assert_eq!(ended, Ended::Killed(9));
    }

    pub fn goes_on(&mut self, case: &Case, image: &Path, args: &[&str]) {
        self.job = restored(case, image, args);
        self.writes(3);
    }

    /// Lets it check itself and end; what it found in its files, and its log.
    pub fn finished(self) -> (String, String) {
        fs::write(self.dir.join("finish"), "").expect("the test's directory is writable");
        let (log, dir) = (self.dir.join("out.log"), self.dir.clone());
        assert_eq!(self.job.wait(), Ended::Exited(0));
        let result = fs::read_to_string(dir.join("result")).expect("it has a result");
        let (_, files) = result.trim().split_once(' ').expect("a number and words");
        let log = fs::read_to_string(log).expect("it is there");
        (files.to_owned(), log)
    }

    /// Likewise; every line must be there once, in order, and its files be what they were.
    pub fn passes(self) {
        let (files, log) = self.finished();
        assert_eq!(log, expected(log.lines().count()));
        assert_eq!(files, "what is read state");
    }

    pub fn refused(&self, case: &Case, image: &Path, args: &[&str], words: &[&str]) {
        run(case, &mut restore_cmd(image, args)).refused(99, words);
        assert_no_process_left();
    }

    pub fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }
}

pub fn expected(lines: usize) -> String {
    (1..=lines).map(|n| format!("line {n}\n")).collect()
}

pub fn mapping(old: &Path, new: &Path) -> String {
    format!("{}={}", old.display(), new.display())
}

/// What is in a directory, without what is written while the job runs.
pub fn names(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).expect("it is there").flatten();
    let mut names: Vec<String> = names
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}
