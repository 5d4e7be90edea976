//! A job in a namespace, as seen from outside.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use ckpt_tracer::Pid;
use ckpt_tracer::pidfd::PidFd;
use ckpt_tracer::proc::status::{Status, read_status};
use nix::errno::Errno;

use super::link::{Event, Link};
use crate::children::Change;
use crate::error::{Error, Result};
use crate::objects::job::Family;
use crate::supervise::Supervised;
use crate::supervise::foreground::{Foreground, JobTerminal};
use crate::supervise::signals::Received;

/// The first process of a namespace, a child of ours.
#[derive(Debug)]
pub struct Init {
    pid: i32,
    /// Its sibling that rebuilds the job, also our child. Then the first process is the job's root, and until the job
    /// runs only the link reports on it.
    builder: Option<i32>,
    link: Link,
    root: Option<PidFd>,
}

/// A running job.
#[derive(Debug)]
pub struct Running {
    /// Its root, in our pid namespace.
    pub pid: i32,
    /// Differences from the checkpointed state.
    pub warnings: Vec<String>,
    /// The job has our terminal until this is dropped.
    pub terminal: Option<Foreground>,
    /// The master of the job's terminal, if that is a new one.
    pub master: Option<OwnedFd>,
}

impl Init {
    pub(super) fn new(pid: i32, builder: Option<i32>, link: Link) -> Self {
        Self {
            pid,
            builder,
            link,
            root: None,
        }
    }

    /// Waits until the job runs.
    ///
    /// # Errors
    /// The error that the first process reports. Nothing is left of the namespace then.
    pub fn until_it_runs(&mut self) -> Result<Running> {
        let result = self.follow();
        if result.is_err() {
            self.end();
        }
        result
    }

    /// Ends it because of that error.
    pub(super) fn failed(mut self, error: Error) -> Error {
        self.end();
        error
    }

    fn follow(&mut self) -> Result<Running> {
        let mut terminal = None;
        loop {
            match self.link.hear_with().map_err(|_| killed())? {
                (Event::Ready(job_terminal), _) => {
                    let job_terminal =
                        job_terminal.and_then(|job_terminal| self.translated(job_terminal));
                    terminal = job_terminal.and_then(Foreground::lend);
                    self.link.go().map_err(|_| killed())?;
                }
                (Event::Running { pid, warnings }, mut master) => {
                    let pid = self.outer(pid).ok_or_else(killed)?;
                    self.root = Some(PidFd::open(Pid(pid))?);
                    self.link.go().map_err(|_| killed())?;
                    self.builder.iter().for_each(reap);
                    terminal.iter().for_each(Foreground::redraw);
                    return Ok(Running {
                        pid,
                        warnings,
                        terminal,
                        master: master.pop(),
                    });
                }
                (Event::Failed(text), _) => return Err(Error::Reported(text)),
                _ => return Err(killed()),
            }
        }
    }

    /// The status of a process inside for which `is` holds; zombies too.
    fn find(&self, is: impl Fn(&Status) -> bool) -> Option<Status> {
        let family = Family::of(Pid(self.pid)).ok()?;
        let all = family.living.into_iter().chain(family.ended);
        all.filter_map(|pid| read_status(pid).ok()).find(is)
    }

    /// The pid in our namespace of a process with that pid inside.
    fn outer(&self, inner: i32) -> Option<i32> {
        let found = self.find(|s| s.ns_tgid.get(1) == Some(&inner))?;
        Some(found.tgid.raw())
    }

    /// A request for the terminal, with ids in our namespace.
    fn translated(&self, job_terminal: JobTerminal) -> Option<JobTerminal> {
        let group = match job_terminal.group {
            Some(group) => {
                let member = self.find(|s| s.ns_pgid.get(1) == Some(&group))?;
                Some(*member.ns_pgid.first()?)
            }
            None => None,
        };
        Some(JobTerminal {
            root: self.outer(job_terminal.root)?,
            group,
            ..job_terminal
        })
    }

    /// Kills all remaining processes, and waits for their end.
    fn end(&mut self) {
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(self.pid),
            nix::sys::signal::Signal::SIGKILL,
        );
        // The first process of a namespace ends only after all others have been reaped.
        self.builder.iter().for_each(reap);
        reap(&self.pid);
    }
}

fn reap(pid: &i32) {
    let _ = ckpt_sys::process::end_of(*pid);
}

fn killed() -> Error {
    Error::Killed("the first process of the job's pid namespace")
}

impl Supervised for Init {
    fn pid(&self) -> i32 {
        self.root.as_ref().map_or(self.pid, |root| root.pid().raw())
    }

    fn child(&self) -> i32 {
        self.pid
    }

    fn changed(&mut self) -> nix::Result<Option<Change>> {
        if self.builder.is_some() {
            return crate::children::changed(self.pid);
        }
        if !self.link.is_ready() {
            return Ok(None);
        }
        match self.link.hear() {
            Ok(Event::Stopped(signal)) => Ok(Some(Change::Stopped(signal))),
            Ok(Event::Ended { code, last }) => {
                if last {
                    reap(&self.pid);
                }
                Ok(Some(Change::Ended(code)))
            }
            Ok(_) => Ok(None),
            // The end of the first process is that of all.
            Err(_) => {
                reap(&self.pid);
                Ok(Some(Change::Ended(128 + libc::SIGKILL)))
            }
        }
    }

    fn send(&self, received: &Received) -> nix::Result<()> {
        let root = self.root.as_ref().ok_or(Errno::ESRCH)?;
        let sent = match received.code {
            libc::SI_QUEUE => root.queue(received.signal, received.value),
            _ => root.signal(received.signal),
        };
        sent.map_err(|error| match error {
            ckpt_tracer::Error::Kernel { errno, .. } => errno,
            _ => Errno::ESRCH,
        })
    }

    fn wakes(&self) -> Option<BorrowedFd<'_>> {
        self.builder.is_none().then(|| self.link.as_fd())
    }
}
