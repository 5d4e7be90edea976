//! Contents of a pipe or FIFO, buffer by buffer.
//!
//! A pipe has a buffer for each page of its size: small writes share one as far as they fit, while splice(2),
//! vmsplice(2) and tee(2) use one for each piece of a page, however short. So a pipe may be full with few bytes in it
//! (`pipe_full`, `pipe_write` in fs/pipe.c).

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::Look;
use crate::index::DescriptionId;
use crate::plan::Builder;
use crate::references::{Faults, require};

/// Bytes that fit into a buffer.
const BUFFER: usize = 4096;

/// The contents of one buffer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// Its bytes.
    pub bytes: ByteBuf,
    /// A packet (`O_DIRECT`): a read ends at its end, and discards the unread rest.
    pub packet: bool,
}

/// Why the contents cannot be copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyError {
    /// Buffers hold more than a page, after a splice from a socket, and more in total than a new pipe of that size
    /// accepts.
    Large,
    /// A call failed.
    Failed(Errno),
}

impl CopyError {
    /// The rest of a sentence that begins with the pipe.
    pub fn reason(self) -> String {
        match self {
            CopyError::Large => {
                "with more in it than can be put back (spliced from a socket)".to_owned()
            }
            CopyError::Failed(errno) => {
                format!("whose contents cannot be copied: {}", errno.desc())
            }
        }
    }
}

impl From<Errno> for CopyError {
    fn from(errno: Errno) -> Self {
        CopyError::Failed(errno)
    }
}

impl From<std::io::Error> for CopyError {
    fn from(error: std::io::Error) -> Self {
        CopyError::Failed(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
    }
}

/// Number of buffers for these pieces.
fn buffers(pieces: &[Piece]) -> usize {
    pieces.iter().map(|p| p.bytes.len().div_ceil(BUFFER)).sum()
}

/// Whether the pieces fit into a pipe of that capacity in bytes.
fn fit(pieces: &[Piece], capacity: u32) -> bool {
    buffers(pieces) <= capacity as usize / BUFFER
}

/// Checks the contents of the pipe or FIFO in description `number`.
pub(super) fn check(number: DescriptionId, unread: &[Piece], capacity: u32, faults: &mut Faults) {
    let buffers = buffers(unread);
    require!(
        faults,
        fit(unread, capacity),
        "the pipe in description {number} has {buffers} pages in it and room for {capacity} bytes"
    );
    require!(
        faults,
        unread.iter().all(|piece| !piece.bytes.is_empty()),
        "the pipe in description {number} has an empty buffer"
    );
}

/// Copies the contents of a pipe of that capacity without consuming them.
pub fn capture(look: &Look, capacity: i32) -> Result<Vec<Piece>, CopyError> {
    let unread = ckpt_sys::files::unread(&look.copy);
    if unread == 0 {
        return Ok(Vec::new());
    }
    let (copy, write) = ckpt_sys::pipes::pipe_of(capacity as usize)?;
    let mut left = ckpt_sys::pipes::tee(&look.copy, &write, unread)?;
    if left < unread {
        return Err(Errno::EAGAIN.into());
    }
    let mut single = Single::new()?;
    let mut pieces = Vec::new();
    while left > 0 {
        let piece = single.take(&copy, left)?;
        left -= piece.bytes.len();
        pieces.push(piece);
    }
    match fit(&pieces, capacity as u32) {
        true => Ok(pieces),
        false => Err(CopyError::Large),
    }
}

/// A pipe with room for one buffer after a first one, which shows where a buffer ends.
struct Single {
    read: File,
    write: OwnedFd,
}

impl Single {
    fn new() -> Result<Self, Errno> {
        let (read, write) = ckpt_sys::pipes::pipe_of(2 * BUFFER)?;
        Ok(Self {
            read: read.into(),
            write,
        })
    }

    /// Takes the first buffer from a pipe that holds `most` bytes.
    fn take(&mut self, from: &OwnedFd, most: usize) -> Result<Piece, CopyError> {
        let mut writer = File::from(self.write.try_clone()?);
        let mut byte = [0];
        writer.write_all(&byte)?;
        let len = ckpt_sys::pipes::splice(from, &self.write, most)?;
        self.read.read_exact(&mut byte)?;
        // A read continues with the next buffer, except after a packet.
        writer.write_all(&byte)?;
        let mut bytes = vec![0; len + 1];
        let packet = self.read.read(&mut bytes)? == len;
        if packet {
            self.read.read_exact(&mut byte)?;
        }
        bytes.truncate(len);
        Ok(Piece {
            bytes: bytes.into(),
            packet,
        })
    }
}

/// Writes pieces to an empty pipe through its write end `fd`, which has no status flags before and after.
pub fn rebuild(pieces: &[Piece], fd: u64, plan: &mut Builder, object: &dyn Fn() -> String) {
    let mut mode = false;
    let mut set_mode = |wanted: bool, plan: &mut Builder| {
        if std::mem::replace(&mut mode, wanted) != wanted {
            let flags = if wanted { libc::O_DIRECT as u64 } else { 0 };
            plan.syscall(libc::SYS_fcntl, &[fd, libc::F_SETFL as u64, flags], object);
        }
    };
    for (number, piece) in pieces.iter().enumerate() {
        let next = pieces.get(number + 1);
        let len = piece.bytes.len() as u64;
        if !piece.packet && next.is_some_and(|next| would_join(piece, next)) {
            let data = plan.pages(&piece.bytes);
            let part = plan.data(&[data, len].map(u64::to_le_bytes).concat());
            let args = [fd, part, 1, libc::SPLICE_F_NONBLOCK.into()];
            plan.expect(libc::SYS_vmsplice, &args, len, object);
        } else {
            set_mode(piece.packet, plan);
            let data = plan.data(&piece.bytes);
            plan.expect(libc::SYS_write, &[fd, data, len], len, object);
        }
    }
    set_mode(false, plan);
}

/// Whether a write of the second would be merged into the last buffer of the first.
fn would_join(first: &Piece, second: &Piece) -> bool {
    let (filled, begins) = (first.bytes.len() % BUFFER, second.bytes.len() % BUFFER);
    filled > 0 && begins > 0 && filled + begins <= BUFFER
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(len: usize) -> Piece {
        Piece {
            bytes: vec![0; len].into(),
            packet: false,
        }
    }

    #[test]
    fn pieces_are_joined_up_to_a_page() {
        let joins = |a, b| would_join(&piece(a), &piece(b));
        assert!(joins(1, 4095));
        assert!(!joins(2, 4095));
        assert!(!joins(4096, 1));
        assert!(!joins(1, 4096));
        assert!(joins(1, 4097));
        assert!(joins(8193, 1));
    }

    #[test]
    fn a_page_each() {
        let pieces = [piece(1), piece(4096), piece(4097)];
        assert_eq!(buffers(&pieces), 4);
        assert!(fit(&pieces, 4 * 4096));
        assert!(!fit(&pieces, 3 * 4096));
    }
}
