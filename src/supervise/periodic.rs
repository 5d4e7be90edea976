//! Checkpoints at an interval, each taken by a process of its own: `ckpt attach`.
//!
//! That process is in a process group of its own, so that what the terminal sends to the job does
//! not interrupt it. What it says goes into memory files: no pipe has to be emptied, and nothing
//! of it is lost.

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

/// How checkpoints of a program are taken.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The time between the beginnings of two checkpoints.
    pub interval: Duration,
    /// Where the images go.
    pub images: Images,
    /// How many are kept.
    pub keep: usize,
    /// How memory is compressed.
    pub codec: Codec,
    /// Open files that go into the images.
    pub save_files: Vec<Pattern>,
    /// Options about single descriptors.
    pub descriptors: Vec<OsString>,
    /// Programs, libraries and what is only read go into the images.
    pub bundle: bool,
}

/// What is told while the program runs.
pub type Tell = Box<dyn Fn(&str)>;

/// Checkpoints of one program.
pub struct Periodic {
    plan: Plan,
    pid: i32,
    /// `None` when the interval leads beyond what the clock can show.
    due: Option<Instant>,
    running: Option<Helper>,
    /// What the last checkpoint warned of.
    warning: String,
    failed: Tell,
    done: Tell,
}

/// `ckpt attach`, at work.
struct Helper {
    pid: i32,
    counter: u64,
    out: File,
    err: File,
}

impl Periodic {
    /// Checkpoints of `pid` from now on. `failed` and `done` are told one line about each.
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

    /// Whether a checkpoint is being taken.
    pub(super) fn is_busy(&self) -> bool {
        self.running.is_some()
    }

    /// The process that takes a checkpoint now.
    pub(super) fn helper(&self) -> Option<i32> {
        self.running.as_ref().map(|helper| helper.pid)
    }

    /// Begins a checkpoint when one is due; how long there is to wait until the next. While one
    /// is being taken its end, a `SIGCHLD`, is all there is to wait for.
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
        // What the command prints, which is for everybody who runs it and no channel's message.
        let memory = |name| Ok::<_, io::Error>(File::from(memfd(name, 0)?));
        let (out, err) = (memory(c"ckpt-report")?, memory(c"ckpt-errors")?);
        let mut command = Command::new("/proc/self/exe");
        command.arg0("ckpt").arg("attach").arg(self.pid.to_string());
        command.arg(format!("--codec={}", self.plan.codec));
        // What the program's end has left to us belongs to the job as well.
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

    /// Deals with the end of a checkpoint, if it has ended.
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
        // What became due meanwhile is not made up for.
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
        // A warning that does not change is told once.
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

    /// Ends the checkpoint that is being taken; the image then does not come to be.
    pub(super) fn abandon(&mut self) {
        if let Some(helper) = &self.running {
            // Not yet waited for, so the pid is still its own.
            let _ = kill(Pid::from_raw(helper.pid), Signal::SIGKILL);
        }
    }

    fn fail(&self, what: &str) {
        (self.failed)(&format!(
            "{what}; the job goes on, the next interval tries again"
        ));
    }
}

/// All that was written, as one line without the name that each of its lines begins with.
fn one_line(file: &mut File) -> String {
    let mut bytes = Vec::new();
    // What was written and cannot be read is lost; the checkpoint's fate is known without it.
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
