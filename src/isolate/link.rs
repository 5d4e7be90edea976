//! What the process outside and the first one inside tell each other.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::de::DeserializeOwned;
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
    /// The job runs.
    Running {
        /// Its root.
        pid: i32,
        /// What could not be brought back exactly.
        warnings: Vec<String>,
        /// The number of a descriptor of whoever tells it: the master of the job's terminal.
        master: Option<i32>,
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
pub struct Link(UnixStream);

/// More bytes are not sent at once.
const LARGEST: usize = 1 << 24;

/// Sends one thing.
pub(crate) fn tell(stream: &mut impl Write, what: &impl Serialize) -> io::Result<()> {
    let mut body = Vec::new();
    ciborium::into_writer(what, &mut body).map_err(io::Error::other)?;
    let mut frame = (body.len() as u32).to_le_bytes().to_vec();
    frame.extend(body);
    stream.write_all(&frame)
}

/// Receives what was sent; waits for it.
pub(crate) fn hear<T: DeserializeOwned>(stream: &mut impl Read) -> io::Result<T> {
    let mut len = [0; 4];
    stream.read_exact(&mut len)?;
    let len = u32::from_le_bytes(len) as usize;
    if len > LARGEST {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body)?;
    ciborium::from_reader(&body[..]).map_err(io::Error::other)
}

impl Link {
    pub(super) fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = UnixStream::pair()?;
        Ok((Self(one), Self(other)))
    }

    /// Tells the process outside.
    ///
    /// # Errors
    /// When it is gone.
    pub(super) fn tell(&mut self, event: &Event) -> io::Result<()> {
        tell(&mut self.0, event)
    }

    /// Tells that the job is complete, and waits until the terminal is as it wants it. From then on
    /// the job does not end with whoever is outside.
    ///
    /// # Errors
    /// When that one is gone.
    pub fn ready(&mut self, wish: Option<JobTerminal>) -> io::Result<()> {
        self.tell(&Event::Ready(wish))?;
        self.wait()?;
        ckpt_sys::process::die_with_parent(false);
        Ok(())
    }

    /// Tells that the job runs, and waits until what goes with it has been taken.
    ///
    /// # Errors
    /// When whoever is outside is gone.
    pub fn running(
        &mut self,
        pid: i32,
        warnings: Vec<String>,
        master: Option<OwnedFd>,
    ) -> io::Result<()> {
        let number = master.as_ref().map(AsRawFd::as_raw_fd);
        self.tell(&Event::Running {
            pid,
            warnings,
            master: number,
        })?;
        self.wait()
    }

    /// The next event; waits for it.
    ///
    /// # Errors
    /// `UnexpectedEof` when the other end is gone.
    pub(super) fn hear(&mut self) -> io::Result<Event> {
        hear(&mut self.0)
    }

    /// Lets the other end go on.
    pub(super) fn go(&mut self) -> io::Result<()> {
        self.0.write_all(b"!")
    }

    /// Waits until the other end lets us go on.
    ///
    /// # Errors
    /// `UnexpectedEof` when it is gone.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        self.0.read_exact(&mut [0])
    }

    /// Whether there is something to hear, or the other end is gone.
    pub(super) fn is_ready(&self) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0)
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_arrive_whole_and_in_order() {
        let (mut outer, mut inner) = Link::pair().unwrap();
        assert!(!outer.is_ready());
        inner.tell(&Event::Failed("x".repeat(100_000))).unwrap();
        inner.tell(&Event::Stopped(20)).unwrap();
        assert!(outer.is_ready());
        assert!(matches!(outer.hear().unwrap(), Event::Failed(text) if text.len() == 100_000));
        assert!(matches!(outer.hear().unwrap(), Event::Stopped(20)));
        outer.go().unwrap();
        inner.wait().unwrap();
        drop(inner);
        assert!(outer.is_ready());
        let error = outer.hear().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
