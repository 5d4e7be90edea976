//! What the process outside and the first one inside tell each other.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use ckpt_sys::channel::{Channel, Result};
use serde::{Deserialize, Serialize};

use crate::supervise::foreground::JobTerminal;

/// Told to the process outside. Pids are those inside.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Event {
    /// The namespaces are there, and want their ids mapped.
    Made,
    /// The first process is there: its pid as whoever is outside sees it.
    Born {
        /// The first process.
        first: i32,
        /// The process beside it that rebuilds the job, if the first one is the job's.
        builder: Option<i32>,
    },
    /// The job is complete and about to be let go, with this wish for the terminal.
    Ready(Option<JobTerminal>),
    /// The job runs; the master of its terminal comes with it, when that is a new one.
    Running {
        /// Its root.
        pid: i32,
        /// What could not be brought back exactly.
        warnings: Vec<String>,
    },
    /// There will be no job, for this reason.
    Failed(String),
    /// The root was stopped by this signal.
    Stopped(i32),
    /// The root has ended.
    Ended {
        /// Its exit code, or 128 plus the signal that ended it.
        code: i32,
        /// Nobody else is left.
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

    /// Tells the process outside.
    ///
    /// # Errors
    /// [`Error::Closed`](ckpt_sys::channel::Error::Closed) when it is gone, as for all that follows.
    pub(super) fn tell(&self, event: &Event) -> Result<()> {
        self.0.send(event)
    }

    /// Tells that the job is complete, and waits until the terminal is as it wants it. From then on
    /// the job does not end with whoever is outside.
    ///
    /// # Errors
    /// When that one is gone.
    pub fn ready(&self, wish: Option<JobTerminal>) -> Result<()> {
        self.tell(&Event::Ready(wish))?;
        self.wait()?;
        ckpt_sys::prctl::die_with_parent(false);
        Ok(())
    }

    /// Tells that the job runs, and waits until that is known.
    ///
    /// # Errors
    /// When whoever is outside is gone.
    pub fn running(&self, pid: i32, warnings: Vec<String>, master: Option<OwnedFd>) -> Result<()> {
        let master: Vec<BorrowedFd<'_>> = master.iter().map(AsFd::as_fd).collect();
        self.0
            .send_with(&Event::Running { pid, warnings }, &master)?;
        self.wait()
    }

    /// The next event; waits for it.
    pub(super) fn hear(&self) -> Result<Event> {
        self.0.receive()
    }

    /// The same with the descriptors that come with it.
    pub(super) fn hear_with(&self) -> Result<(Event, Vec<OwnedFd>)> {
        self.0.receive_with()
    }

    /// Lets the other end go on.
    pub(super) fn go(&self) -> Result<()> {
        self.0.send(&())
    }

    /// Waits until the other end lets us go on.
    pub(super) fn wait(&self) -> Result<()> {
        self.0.receive()
    }

    /// Whether there is something to hear, or the other end is gone.
    pub(super) fn is_ready(&self) -> bool {
        self.0.is_ready()
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
