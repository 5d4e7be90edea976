//! Unread bytes of streams, which the other ends send again.

use std::os::fd::OwnedFd;
use std::time::Instant;

use ckpt_sys::{events, sockets};
use nix::errno::Errno;

use super::super::{InetSocket, Protocol, State, Unread};
use super::{Maker, PATIENCE, failed};
use crate::error::{Error, Result};
use crate::files::kind::OpenFile;

impl Maker<'_> {
    /// Sends what is unread, from the other ends.
    pub(super) fn send_all(&mut self) -> Result<()> {
        for (at, socket) in self.sockets.clone() {
            if socket.protocol != Protocol::Tcp || socket.unread.is_empty() {
                continue;
            }
            let other = match socket.state {
                State::Connected {
                    other: Some(inode), ..
                } => self
                    .by_inode
                    .get(&inode)
                    .and_then(|at| self.made.all.get(at)),
                _ => self.ends.get(&at),
            };
            let (Some(own), Some(other)) = (self.made.all.get(&at), other) else {
                return Err(Error::Bug(format!(
                    "the {} has no other end",
                    socket.label()
                )));
            };
            for piece in &socket.unread {
                self.send(own, other, piece, socket)?;
            }
        }
        Ok(())
    }

    fn send(
        &self,
        to: &OwnedFd,
        from: &OwnedFd,
        piece: &Unread,
        socket: &InetSocket,
    ) -> Result<()> {
        let total = piece.len as usize;
        let mark = |bytes: usize| {
            let bytes = i32::try_from(bytes).unwrap_or(i32::MAX);
            let _ = sockets::set_int_option(to, libc::SO_RCVLOWAT, bytes);
        };
        let mut buffer = vec![0; total.min(1 << 18)];
        let (mut sent, mut progress, mut last) = (0, 0, Instant::now());
        loop {
            let arrived = ckpt_sys::files::unread(to);
            if sent == total && arrived == total {
                mark(1);
                return Ok(());
            }
            if sent + arrived > progress {
                (progress, last) = (sent + arrived, Instant::now());
            } else if last.elapsed() > PATIENCE {
                return Err(Error::object(
                    format!("the {}", socket.label()),
                    "made",
                    format!("only {arrived} of its {total} unread bytes arrive"),
                ));
            }
            let most = (total - sent).min(buffer.len());
            if most > 0 {
                self.bytes(piece, sent as u64, &mut buffer[..most])?;
                match sockets::send_some(from, &buffer[..most]) {
                    Ok(n) => {
                        sent += n;
                        continue;
                    }
                    Err(Errno::EAGAIN) => {}
                    Err(errno) => return Err(failed(socket, errno)),
                }
            }
            // The window is closed, or the last bytes are on their way. The kernel rounds windows down.
            mark(2 * total + (512 << 10));
            mark(1);
            let _ = sockets::peek(to, &mut [0]);
            if arrived + (64 << 10) > total {
                std::thread::yield_now();
                continue;
            }
            events::poll_for(from, libc::POLLOUT, 1);
        }
    }
}
