//! The terminal of `restore`, lent to the job while both are in the foreground.

use std::fs::File;

use ckpt_sys::tty::{self, Modes};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, getpgrp};
use serde::{Deserialize, Serialize};

use super::Terminal;

/// A job's request for the terminal at its release.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JobTerminal {
    /// Its root.
    pub root: i32,
    /// Its foreground process group; `None` if that is ours.
    pub group: Option<i32>,
    /// It has descriptors of the terminal.
    pub shown: bool,
    /// Its modes.
    pub modes: Option<Modes>,
}

/// Our terminal, with the modes and the foreground process group of the job while it is lent; restored when this is
/// dropped.
#[derive(Debug)]
pub struct Foreground {
    terminal: File,
    ours: i32,
    job: JobTerminal,
    /// Our own modes, while it is lent.
    before: Option<Modes>,
}

impl Foreground {
    /// Lends the terminal to a job that is about to run, if we have one.
    pub fn lend(job: JobTerminal) -> Option<Self> {
        let mut lent = Self {
            terminal: tty::ours()?,
            ours: getpgrp().as_raw(),
            job,
            before: None,
        };
        lent.take();
        Some(lent)
    }

    /// Gives the terminal to the job, unless we are not in the foreground.
    fn take(&mut self) {
        if tty::foreground(&self.terminal) != Some(self.ours) {
            return;
        }
        let Ok(before) = tty::modes(&self.terminal) else {
            return;
        };
        self.before = Some(before);
        if let Some(modes) = self.job.modes {
            // Speed and format of a serial line are kept.
            let modes = Modes {
                control: before.control,
                line: before.line,
                input_speed: before.input_speed,
                output_speed: before.output_speed,
                ..modes
            };
            let _ = tty::set_modes(&self.terminal, &modes);
        }
        if let Some(group) = self.job.group {
            let _ = tty::set_foreground(&self.terminal, group);
        }
    }

    /// Takes it back; the job's settings are saved.
    fn give_back(&mut self) {
        let Some(before) = self.before.take() else {
            return;
        };
        self.job.modes = tty::modes(&self.terminal).ok().or(self.job.modes);
        let group = tty::foreground(&self.terminal);
        if self.job.group.is_some() && group.is_some_and(|g| g != self.ours) {
            self.job.group = group;
        }
        let _ = tty::set_foreground(&self.terminal, self.ours);
        let _ = tty::set_modes(&self.terminal, &before);
    }

    /// Makes the job redraw its screen.
    pub fn redraw(&self) {
        if self.job.shown && self.before.is_some() {
            let _ = match self.job.group {
                Some(group) => killpg(Pid::from_raw(group), Signal::SIGWINCH),
                None => kill(Pid::from_raw(self.job.root), Signal::SIGWINCH),
            };
        }
    }
}

impl Terminal for Foreground {
    fn before_stop(&mut self) {
        self.give_back();
    }

    fn after_stop(&mut self) {
        self.take();
        if let Some(group) = self.job.group {
            let _ = killpg(Pid::from_raw(group), Signal::SIGCONT);
        }
    }
}

impl Drop for Foreground {
    fn drop(&mut self) {
        self.give_back();
    }
}
