//! Checkpoints at an interval, each taken by a separate process: `ckpt attach`.
//!
//! That process is in a process group of its own, so that signals of the terminal to the job do not interrupt it. Its
//! output goes to memfds: no pipe has to be emptied, and no output is lost.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ckpt_image::Codec;
use ckpt_sys::files::memfd;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::interval::next_due;
use super::retention::Images;
use crate::children::{Change, changed};
use crate::objects::save_files::Pattern;

/// Options of the checkpoints of a program.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The time between the starts of two checkpoints.
    pub interval: Duration,
    /// Names of the images.
    pub images: Images,
    /// Number of images to keep.
    pub keep: usize,
    /// Compression of memory.
    pub codec: Codec,
    /// Open files whose contents are stored.
    pub save_files: Vec<Pattern>,
    /// Options about single descriptors.
    pub descriptors: Vec<OsString>,
    /// Whether to store programs, libraries and files that are only read.
    pub bundle: bool,
}

/// Receives messages while the program runs.
pub type Tell = Box<dyn Fn(&str)>;

/// Checkpoints of one program.
pub struct Periodic {
    plan: Plan,
    pid: i32,
    /// `None` when the clock cannot represent the time.
    due: Option<Instant>,
    running: Option<Helper>,
    /// The warning of the last checkpoint.
    warning: String,
    failed: Tell,
    done: Tell,
}

/// A running `ckpt attach`.
struct Helper {
    pid: i32,
    counter: u64,
    out: File,
    err: File,
}

impl Periodic {
    /// Checkpoints of `pid` from now on. `failed` and `done` get one line about each.
    pub fn new(plan: Plan, pid: i32, failed: Tell, done: Tell) -> Self {
        let due = Instant::now().checked_add(plan.interval);
        Periodic {
            plan,
            pid,
            due,
            running: None,
            warning: String::new(),
            failed,
            done,
        }
    }

    /// Whether a checkpoint is in progress.
    pub(super) fn is_busy(&self) -> bool {
        self.running.is_some()
    }

    /// The process of the checkpoint in progress.
    pub(super) fn helper(&self) -> Option<i32> {
        self.running.as_ref().map(|helper| helper.pid)
    }

    /// Starts a checkpoint when one is due; returns the time until the next. During one only its end, a `SIGCHLD`, is
    /// waited for.
    pub(super) fn begin_if_due(&mut self, now: Instant) -> Option<Duration> {
        if self.is_busy() {
            return None;
        }
        let due = self.due?;
        if now < due {
            return Some(due - now);
        }
        self.due = next_due(due, self.plan.interval, now);
        match self.begin() {
            Ok(helper) => {
                self.running = Some(helper);
                None
            }
            Err(error) => {
                self.fail(&format!("cannot begin a checkpoint: {error}"));
                self.due.map(|due| due.saturating_duration_since(now))
            }
        }
    }

    fn begin(&self) -> io::Result<Helper> {
        let counter = self.plan.images.next_counter()?;
        // The command's ordinary output, not messages of a channel.
        let memory = |name| Ok::<_, io::Error>(File::from(memfd(name, 0)?));
        let (out, err) = (memory(c"ckpt-report")?, memory(c"ckpt-errors")?);
        let mut command = Command::new("/proc/self/exe");
        command.arg0("ckpt").arg("attach").arg(self.pid.to_string());
        command.arg(format!("--codec={}", self.plan.codec));
        // Adopted orphans of the program belong to the job too.
        command.arg(format!("--adopted-by={}", std::process::id()));
        let patterns = self.plan.save_files.iter();
        command.args(patterns.map(|pattern| format!("--save-files={}", pattern.text())));
        command.args(&self.plan.descriptors);
        command.args(self.plan.bundle.then_some("--bundle"));
        command
            .arg("-o")
            .arg(std::path::absolute(self.plan.images.path(counter))?);
        command
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(err.try_clone()?);
        let pid = command.process_group(0).spawn()?.id() as i32;
        Ok(Helper {
            pid,
            counter,
            out,
            err,
        })
    }

    /// Handles the end of a checkpoint, if it has ended.
    pub(super) fn reap(&mut self, now: Instant) -> nix::Result<()> {
        let Some(helper) = &self.running else {
            return Ok(());
        };
        let Some(Change::Ended(code)) = changed(helper.pid)? else {
            return Ok(());
        };
        let Some(mut helper) = self.running.take() else {
            return Ok(());
        };
        // Missed intervals are skipped.
        if let Some(due) = self.due.filter(|due| *due <= now) {
            self.due = next_due(due, self.plan.interval, now);
        }
        if code != 0 {
            let reason = match one_line(&mut helper.err) {
                text if !text.is_empty() => text,
                _ if code > 128 => format!("its process was ended by signal {}", code - 128),
                _ => format!("its process ended with code {code}"),
            };
            self.fail(&format!("checkpoint {} failed: {reason}", helper.counter));
            return Ok(());
        }
        // A warning that does not change is reported once.
        let warning = one_line(&mut helper.err);
        if !warning.is_empty() && warning != self.warning {
            (self.failed)(&warning);
        }
        self.warning = warning;
        (self.done)(&one_line(&mut helper.out));
        if let Err(error) = self.plan.images.prune(self.plan.keep) {
            (self.failed)(&format!("cannot remove older images: {error}"));
        }
        Ok(())
    }

    /// Aborts the checkpoint in progress; its image is discarded.
    pub(super) fn abandon(&mut self) {
        if let Some(helper) = &self.running {
            // It is not reaped, so the pid is still its own.
            let _ = kill(Pid::from_raw(helper.pid), Signal::SIGKILL);
        }
    }

    fn fail(&self, what: &str) {
        (self.failed)(&format!(
            "{what}; the job continues, the next interval tries again"
        ));
    }
}

/// Its output, as one line without the prefix of each line.
fn one_line(file: &mut File) -> String {
    let mut bytes = Vec::new();
    // Unreadable output is lost; the result of the checkpoint is known without it.
    let _ = file.rewind().and_then(|()| file.read_to_end(&mut bytes));
    let text = String::from_utf8_lossy(&bytes);
    let lines = text
        .lines()
        .map(|line| line.strip_prefix("ckpt: ").unwrap_or(line).trim());
    lines
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join("; ")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn errors_become_one_line() {
        let mut file = File::from(memfd(c"test", 0).unwrap());
        file.write_all(b"ckpt: first\nckpt: second\n\n").unwrap();
        assert_eq!(one_line(&mut file), "first; second");
    }
}
