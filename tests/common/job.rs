//! A process under test, and its end. A killed process keeps its pid until it is reaped, so the
//! tests reap at once; in their namespaces they are pid 1 and may wait for orphans as well.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::wait::until;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    Exited(i32),
    Killed(i32),
}

/// A running process.
#[derive(Debug)]
pub struct Job {
    /// Its pid.
    pub pid: i32,
    /// The child of ours whose end is its end: itself, or the `restore` that waits for it.
    waited: i32,
    reaped: bool,
}

/// Starts a program with nothing to read, and its output appended to `log`.
pub fn start(command: &mut Command, log: &Path) -> Job {
    command
        .stdin(Stdio::null())
        .stdout(appended(log))
        .stderr(appended(log));
    spawn(command)
}

/// Starts a program as it is set up.
#[expect(clippy::zombie_processes, reason = "the job is waited for by its pid")]
pub fn spawn(command: &mut Command) -> Job {
    let child = command.spawn();
    let child = child.unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    Job::of(child.id() as i32)
}

/// A file to write to at its end.
pub fn appended(path: &Path) -> File {
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()))
}

impl Job {
    /// A child of ours, or an orphan of our namespace.
    pub fn of(pid: i32) -> Self {
        Job {
            pid,
            waited: pid,
            reaped: false,
        }
    }

    /// A process that `restore`, a child of ours, waits for.
    pub fn behind(pid: i32, restore: i32) -> Self {
        Job {
            pid,
            waited: restore,
            reaped: false,
        }
    }

    pub fn signal(&self, signal: Signal) {
        if let Err(error) = kill(Pid::from_raw(self.pid), signal) {
            panic!("cannot send {signal} to {}: {error}", self.pid);
        }
    }

    /// Its end, if it has come.
    pub fn ended(&mut self) -> Option<Ended> {
        let status = waitpid(Pid::from_raw(self.waited), Some(WaitPidFlag::WNOHANG));
        let ended = match status {
            Ok(WaitStatus::Exited(_, code)) => Ended::Exited(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => Ended::Killed(signal as i32),
            Ok(_) => return None,
            Err(error) => panic!("cannot wait for {}: {error}", self.waited),
        };
        self.reaped = true;
        Some(ended)
    }

    /// Another process has reaped it.
    pub fn ended_already(&mut self) {
        self.reaped = true;
    }

    /// Its children, their children, and so on; zombies too.
    pub fn descendants(&self) -> Vec<i32> {
        let mut found = vec![self.pid];
        let mut next = 0;
        while let Some(pid) = found.get(next).copied() {
            next += 1;
            let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
            for task in tasks.into_iter().flatten().flatten() {
                let children = std::fs::read_to_string(task.path().join("children"));
                let children = children.unwrap_or_default();
                found.extend(children.split_whitespace().flat_map(str::parse::<i32>));
            }
        }
        found.split_off(1)
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Ended {
        let what = format!("the end of {}", self.pid);
        until(&what, || self.ended())
    }

    /// Kills it with SIGKILL and reaps it; its pid is free then.
    pub fn kill(mut self) -> Ended {
        self.kill_and_reap()
    }

    /// The same where its descendants go on.
    pub fn kill_and_forget(&mut self) {
        self.kill_and_reap();
    }

    fn kill_and_reap(&mut self) -> Ended {
        let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        let what = format!("the end of {} after SIGKILL", self.pid);
        until(&what, || self.ended())
    }
}

/// Waits for processes that have become ours when their parents ended.
pub fn reap_orphans(pids: &[i32]) {
    for &pid in pids {
        until(&format!("the end of {pid}, a descendant"), || {
            match waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => None,
                // Waited for by its own parent, before that one ended.
                _ => (!Path::new(&format!("/proc/{pid}")).exists()).then_some(()),
            }
        });
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if !self.reaped && !std::thread::panicking() {
            self.kill_and_reap();
        }
    }
}
