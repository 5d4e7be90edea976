//! Messages between the process outside and the first one inside.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use ckpt_sys::channel::{Channel, Result};
use serde::{Deserialize, Serialize};

use crate::supervise::foreground::JobTerminal;

/// Messages to the process outside. Pids are those inside.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Event {
    /// The namespaces exist; their ids have to be mapped.
    Made,
    /// The first process exists: its pid in the outer namespace.
    Born {
        /// The first process.
        first: i32,
        /// The building process beside it, if the first one is the job's root.
        builder: Option<i32>,
    },
    /// The job is complete and about to be released, with this request for the terminal.
    Ready(Option<JobTerminal>),
    /// The job runs; the master of its terminal is attached, if that is a new one.
    Running {
        /// Its root.
        pid: i32,
        /// Differences from the checkpointed state.
        warnings: Vec<String>,
    },
    /// There is no job, for this reason.
    Failed(String),
    /// The root was stopped by this signal.
    Stopped(i32),
    /// The root has ended.
    Ended {
        /// Its exit code, or 128 plus the signal that ended it.
        code: i32,
        /// No other process is left.
        last: bool,
    },
}

/// One end.
#[derive(Debug)]
pub struct Link(Channel);

impl Link {
    pub(super) fn pair() -> Result<(Self, Self)> {
        let (one, other) = Channel::pair()?;
        Ok((Self(one), Self(other)))
    }

    /// Sends a message to the process outside.
    ///
    /// # Errors
    /// [`Error::Closed`](ckpt_sys::channel::Error::Closed) when it has ended, as for all that follows.
    pub(super) fn tell(&self, event: &Event) -> Result<()> {
        self.0.send(event)
    }

    /// Reports that the job is complete, and waits until the terminal is set up. From then on the job survives the
    /// process outside.
    ///
    /// # Errors
    /// When that process has ended.
    pub fn ready(&self, job_terminal: Option<JobTerminal>) -> Result<()> {
        self.tell(&Event::Ready(job_terminal))?;
        self.wait()?;
        ckpt_sys::prctl::die_with_parent(false);
        Ok(())
    }

    /// Reports that the job runs, and waits for an acknowledgement.
    ///
    /// # Errors
    /// When the process outside has ended.
    pub fn running(&self, pid: i32, warnings: Vec<String>, master: Option<OwnedFd>) -> Result<()> {
        let master: Vec<BorrowedFd<'_>> = master.iter().map(AsFd::as_fd).collect();
        self.0
            .send_with(&Event::Running { pid, warnings }, &master)?;
        self.wait()
    }

    /// Waits for the next message.
    pub(super) fn hear(&self) -> Result<Event> {
        self.0.receive()
    }

    /// The same with its descriptors.
    pub(super) fn hear_with(&self) -> Result<(Event, Vec<OwnedFd>)> {
        self.0.receive_with()
    }

    /// Lets the other end continue.
    pub(super) fn go(&self) -> Result<()> {
        self.0.send(&())
    }

    /// Waits until the other end lets us continue.
    pub(super) fn wait(&self) -> Result<()> {
        self.0.receive()
    }

    /// Whether there is a message, or the other end is closed.
    pub(super) fn is_ready(&self) -> bool {
        self.0.is_ready()
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
