//! A channel between two of our processes: typed messages, whole and in order, with descriptors.
//!
//! It is a pair of connected unix sockets. A message is a frame: two 32-bit numbers, least significant byte first,
//! for the length of the body and the number of descriptors; then the descriptors; then the body, CBOR of a serde
//! type. The first [`MOST_RIGHTS`] descriptors are sent with the two numbers. The kernel limits the descriptors in
//! flight, so the receiver acknowledges each further batch with a byte; while a sender has more than one batch to
//! send, the other end must send nothing. Both ends are of the same build, so the frame has no version.
//!
//! Not used between fork and exec, where a child may only make system calls ([`exec`](crate::exec)), nor with
//! processes that may be of another version.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::control::{self, MOST_RIGHTS};
use crate::{Errno, errno_of, events};

/// Largest body, bytes.
const LARGEST: usize = 1 << 24;
/// Most descriptors a process may have by default (`fs.nr_open`).
const MOST_DESCRIPTORS: usize = 1 << 20;

/// Why a message could not be sent or received.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The other end is closed: its process has ended, or has hung up.
    #[error("the other process has ended")]
    Closed,
    /// A system call failed.
    #[error("{}", .0.desc())]
    Failed(Errno),
    /// The message is not of the expected type.
    #[error("the other process sent an unexpected message: {0}")]
    Malformed(String),
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::EPIPE | Errno::ECONNRESET => Error::Closed,
            errno => Error::Failed(errno),
        }
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Error::Closed,
            _ => errno_of(&error).into(),
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Closed => io::ErrorKind::UnexpectedEof.into(),
            Error::Failed(errno) => errno.into(),
            Error::Malformed(_) => io::Error::new(io::ErrorKind::InvalidData, error),
        }
    }
}

/// Result of a channel operation.
pub type Result<T> = std::result::Result<T, Error>;

/// One end. Dropping it, or the end of its process, closes the channel for the other end.
#[derive(Debug)]
pub struct Channel(UnixStream);

impl Channel {
    /// Creates both ends.
    ///
    /// # Errors
    /// `EMFILE` and `ENFILE` when there are no descriptors.
    pub fn pair() -> Result<(Self, Self)> {
        let (one, other) = UnixStream::pair()?;
        Ok((Self(one), Self(other)))
    }

    /// Sends a message.
    ///
    /// # Errors
    /// [`Error::Closed`] when the other end is closed.
    pub fn send(&self, message: &impl Serialize) -> Result<()> {
        self.send_with(message, &[])
    }

    /// Sends a message with copies of descriptors.
    ///
    /// # Errors
    /// As for [`send`](Self::send).
    pub fn send_with(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut body = Vec::new();
        ciborium::into_writer(message, &mut body).map_err(|e| Error::Malformed(e.to_string()))?;
        let numbers = [body.len() as u32, fds.len() as u32];
        let numbers = numbers.map(u32::to_le_bytes).concat();
        let (first, rest) = fds.split_at(fds.len().min(MOST_RIGHTS));
        let mut socket = &self.0;
        let sent = again(|| control::send(&self.0, &numbers, first))?;
        self.write(&numbers[sent..])?;
        for lot in rest.chunks(MOST_RIGHTS) {
            socket.read_exact(&mut [0])?;
            again(|| control::send(&self.0, &[0], lot))?;
        }
        self.write(&body)
    }

    /// Writes all bytes, without SIGPIPE.
    fn write(&self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let sent = again(|| control::send(&self.0, bytes, &[]))?;
            bytes = &bytes[sent..];
        }
        Ok(())
    }

    /// Waits for the next message. Descriptors sent with it are closed.
    ///
    /// # Errors
    /// [`Error::Closed`] when the other end is closed, [`Error::Malformed`] for a message of another type.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<T> {
        self.receive_with().map(|(message, _)| message)
    }

    /// Waits for the next message and its descriptors, which are close-on-exec.
    ///
    /// # Errors
    /// As for [`receive`](Self::receive).
    pub fn receive_with<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>)> {
        let mut socket = &self.0;
        let (mut numbers, mut filled, mut fds) = ([0u8; 8], 0, Vec::new());
        while filled < numbers.len() {
            filled += self.take(&mut numbers[filled..], &mut fds)?;
        }
        let [a, b, c, d, e, f, g, h] = numbers;
        let len = u32::from_le_bytes([a, b, c, d]) as usize;
        let count = u32::from_le_bytes([e, f, g, h]) as usize;
        if len > LARGEST || count > MOST_DESCRIPTORS {
            return Err(Error::Malformed("a message that is too long".into()));
        }
        while fds.len() < count && fds.len() >= MOST_RIGHTS {
            socket.write_all(&[0])?;
            self.take(&mut [0], &mut fds)?;
        }
        if fds.len() != count {
            return Err(Error::Malformed("descriptors are missing".into()));
        }
        let mut body = vec![0; len];
        socket.read_exact(&mut body)?;
        let message = ciborium::from_reader(&body[..]);
        let message = message.map_err(|e| Error::Malformed(e.to_string()))?;
        Ok((message, fds))
    }

    /// Receives the next bytes, at least one, with the descriptors sent along.
    fn take(&self, room: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<usize> {
        let came = again(|| control::receive(&self.0, room, 0))?;
        if came.flags & libc::MSG_CTRUNC != 0 {
            return Err(Error::Failed(Errno::EMFILE));
        }
        fds.extend(came.rights);
        match came.len {
            0 => Err(Error::Closed),
            len => Ok(len),
        }
    }

    /// Whether a message can be received, or the other end is closed.
    pub fn is_ready(&self) -> bool {
        events::poll_now(&self.0, libc::POLLIN) != 0
    }

    /// Closes both directions, for all processes that have this end.
    pub fn hang_up(&self) {
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }

    /// Waits until the other end is closed.
    pub fn wait_for_hangup(&self) {
        events::wait_for_hangup(&self.0);
    }
}

/// Repeats a call for as long as a signal interrupts it.
fn again<T>(mut call: impl FnMut() -> crate::Result<T>) -> Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            other => return Ok(other?),
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<UnixStream> for Channel {
    fn from(end: UnixStream) -> Self {
        Self(end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn messages_arrive_whole_and_in_order() {
        let (one, other) = Channel::pair().unwrap();
        assert!(!other.is_ready());
        let sender = std::thread::spawn(move || {
            one.send(&"x".repeat(1 << 20)).unwrap();
            one.send(&(7, Some("seven"))).unwrap();
            one.send(&()).unwrap();
        });
        assert_eq!(other.receive::<String>().unwrap().len(), 1 << 20);
        let pair: (i32, Option<String>) = other.receive().unwrap();
        assert_eq!(pair, (7, Some("seven".into())));
        sender.join().unwrap();
        other.receive::<()>().unwrap();
        assert!(other.is_ready());
        assert_eq!(other.receive::<()>(), Err(Error::Closed));
        assert_eq!(other.send(&()), Err(Error::Closed));
    }

    #[test]
    fn descriptors_arrive_in_order_more_than_go_at_once() {
        let (one, other) = Channel::pair().unwrap();
        let files = [
            std::fs::File::open("/dev/null").unwrap(),
            std::fs::File::open("/dev/zero").unwrap(),
        ];
        let inodes = files.each_ref().map(|f| f.metadata().unwrap().ino());
        let counts = [0, 1, MOST_RIGHTS, MOST_RIGHTS + 1, 2 * MOST_RIGHTS + 7];
        let sender = std::thread::spawn(move || {
            for count in counts {
                let fds: Vec<_> = (0..count).map(|i| files[i % 2].as_fd()).collect();
                one.send_with(&count, &fds).unwrap();
            }
        });
        for count in counts {
            let (told, fds): (usize, _) = other.receive_with().unwrap();
            assert_eq!((told, fds.len()), (count, count));
            for (i, fd) in fds.into_iter().enumerate() {
                let inode = std::fs::File::from(fd).metadata().unwrap().ino();
                assert_eq!(inode, inodes[i % 2]);
            }
        }
        sender.join().unwrap();
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        let (mut raw, end) = UnixStream::pair().unwrap();
        let end = Channel::from(end);
        let malformed = |raw: &mut UnixStream, bytes: &[u8]| {
            raw.write_all(bytes).unwrap();
            matches!(end.receive::<u32>(), Err(Error::Malformed(_)))
        };
        assert!(malformed(&mut raw, &[0xff; 8]));
        // A descriptor is announced and does not come.
        assert!(malformed(&mut raw, &[1, 0, 0, 0, 1, 0, 0, 0]));
        // A text instead of a number.
        assert!(malformed(&mut raw, &[2, 0, 0, 0, 0, 0, 0, 0, 0x61, b'x']));
        raw.write_all(&[9, 0, 0]).unwrap();
        drop(raw);
        assert_eq!(end.receive::<u32>(), Err(Error::Closed));
    }
}
