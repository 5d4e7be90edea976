//! Peeking at messages after the first one, which needs the socket's own `SO_PEEK_OFF`.
//!
//! The option belongs to the socket and so to the job. It is changed only while the job is frozen, and restored at
//! the end. If ckpt is killed in between, a helper process restores it: it waits for the end of a pipe, which our
//! death brings.

use std::os::fd::{AsFd, OwnedFd};

use ckpt_sys::helper::Helper;
use ckpt_sys::sockets;
use nix::errno::Errno;

/// `SO_PEEK_OFF` of a socket of the job, changed temporarily.
pub(super) struct PeekOffset<'a> {
    socket: &'a OwnedFd,
    before: i32,
    guard: Option<(Helper, OwnedFd)>,
}

impl<'a> PeekOffset<'a> {
    /// Prepares; the option is unchanged until [`set`](Self::set).
    pub(super) fn of(socket: &'a OwnedFd) -> Result<Self, Errno> {
        Ok(Self {
            socket,
            before: sockets::int_option(socket, libc::SO_PEEK_OFF)?,
            guard: None,
        })
    }

    /// The job's own value; -1 for off.
    pub(super) fn before(&self) -> i32 {
        self.before
    }

    /// Sets where the next peek starts.
    pub(super) fn set(&mut self, offset: usize) -> Result<(), Errno> {
        if self.guard.is_none() {
            self.guard = Some(guard(self.socket, self.before)?);
        }
        let offset = i32::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        sockets::set_int_option(self.socket, libc::SO_PEEK_OFF, offset)
    }
}

impl Drop for PeekOffset<'_> {
    fn drop(&mut self) {
        if let Some((guard, pipe)) = self.guard.take() {
            // It cannot fail where setting it did not.
            let _ = sockets::set_int_option(self.socket, libc::SO_PEEK_OFF, self.before);
            // The helper does the same once more and ends.
            drop(pipe);
            let _ = guard.wait();
        }
    }
}

/// A process that restores the option when the pipe ends, that is, when we drop it or die.
fn guard(socket: &OwnedFd, before: i32) -> Result<(Helper, OwnedFd), Errno> {
    let (read, write) = ckpt_sys::pipes::pipe()?;
    let guard = Helper::start_with(&[socket.as_fd(), read.as_fd()], || {
        ckpt_sys::events::poll_for(&read, libc::POLLIN, -1);
        let _ = sockets::set_int_option(socket, libc::SO_PEEK_OFF, before);
        0
    })?;
    Ok((guard, write))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn pair() -> (OwnedFd, OwnedFd) {
        let (a, b) = UnixStream::pair().expect("a pair");
        (a.into(), b.into())
    }

    fn option(socket: &OwnedFd) -> i32 {
        sockets::int_option(socket, libc::SO_PEEK_OFF).expect("it has it")
    }

    #[test]
    fn the_offset_is_put_back() {
        for before in [-1, 3] {
            let (socket, _other) = pair();
            sockets::set_int_option(&socket, libc::SO_PEEK_OFF, before).expect("it has it");
            let mut offset = PeekOffset::of(&socket).expect("it has it");
            offset.set(7).expect("it has it");
            assert_eq!(option(&socket), 7);
            drop(offset);
            assert_eq!(option(&socket), before);
        }
    }

    #[test]
    fn the_guard_puts_it_back_when_we_die() {
        let (socket, _other) = pair();
        let mut offset = PeekOffset::of(&socket).expect("it has it");
        offset.set(7).expect("it has it");
        // What our death does: it closes the pipe, and nothing more.
        let (guard, pipe) = offset.guard.take().expect("it is guarded");
        drop(pipe);
        assert_eq!(guard.wait(), Ok(0));
        assert_eq!(option(&socket), -1);
    }
}
