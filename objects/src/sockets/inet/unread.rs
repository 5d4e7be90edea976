//! Unread bytes of sockets on their way into the image: one file for all sockets of a job, which becomes a space.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use ckpt_sys::control;
use ckpt_sys::sockets;
use nix::errno::Errno;

use super::super::offset::PeekOffset;
use super::{Address, Unread};
use crate::source::{Collector, Contents};
use crate::{Result, SpaceId};

/// The largest datagram, and more than the largest piece of a stream that one call copies.
const PIECE: usize = 1 << 20;

/// The file.
#[derive(Default)]
pub(super) struct Store {
    made: Option<(File, SpaceId)>,
    len: u64,
}

impl Store {
    fn add(&mut self, bytes: &[u8], collector: &mut Collector) -> Result<SpaceId, Errno> {
        if self.made.is_none() {
            let file = ckpt_sys::files::memfd(c"ckpt-unread", libc::MFD_CLOEXEC)?;
            self.made = Some((file.into(), collector.new_space()));
        }
        let Some((file, space)) = &self.made else {
            return Err(Errno::EIO);
        };
        file.write_all_at(bytes, self.len)
            .map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))?;
        self.len += bytes.len() as u64;
        Ok(*space)
    }

    /// Hands the file over.
    pub(super) fn finish(self, collector: &mut Collector) {
        if let Some((file, space)) = self.made {
            collector
                .contents
                .push((space, Contents::File(file, self.len)));
        }
    }

    /// Copies the unread bytes of a stream, which are `len`.
    pub(super) fn stream(
        &mut self,
        socket: &OwnedFd,
        len: usize,
        collector: &mut Collector,
    ) -> Result<Vec<Unread>, Errno> {
        if len == 0 {
            return Ok(Vec::new());
        }
        let mut offset = PeekOffset::of(socket)?;
        if offset.before() >= 0 {
            offset.set(0)?;
        }
        let at = self.len;
        // A peek begins at the first byte unless there is an offset, which then moves with it.
        let mut bytes = vec![0; len];
        let mut space = None;
        if len <= PIECE {
            if sockets::peek(socket, &mut bytes)? != len {
                return Err(Errno::EBADMSG);
            }
            space = Some(self.add(&bytes, collector)?);
        } else {
            let mut done = 0;
            while done < len {
                offset.set(done)?;
                let most = (len - done).min(PIECE);
                match sockets::peek(socket, &mut bytes[..most])? {
                    0 => return Err(Errno::EBADMSG),
                    got => {
                        space = Some(self.add(&bytes[..got], collector)?);
                        done += got;
                    }
                }
            }
        }
        let space = space.ok_or(Errno::EBADMSG)?;
        Ok(vec![Unread {
            space,
            at,
            len: len as u64,
            from: None,
        }])
    }

    /// Copies the datagrams of a socket, the oldest first.
    ///
    /// The kernel marks an empty datagram that was peeked at and skips it at later peeks with an offset; so the first
    /// is peeked at without one.
    pub(super) fn datagrams(
        &mut self,
        socket: &OwnedFd,
        collector: &mut Collector,
    ) -> Result<Vec<Unread>, Errno> {
        let mut offset = PeekOffset::of(socket)?;
        let mut found = Vec::new();
        let mut buffer = vec![0; 1 << 16];
        let mut passed = 0;
        if offset.before() >= 0 {
            offset.set(0)?;
        }
        loop {
            let how = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_TRUNC;
            let seen = match control::receive(socket, &mut buffer, how) {
                Err(Errno::EAGAIN) => return Ok(found),
                other => other?,
            };
            if seen.len > buffer.len() {
                buffer.resize(seen.len, 0);
                continue;
            }
            let at = self.len;
            let space = self.add(&buffer[..seen.len], collector)?;
            found.push(Unread {
                space,
                at,
                len: seen.len as u64,
                from: Address::parse(&seen.address),
            });
            passed += seen.len;
            offset.set(passed)?;
        }
    }
}
