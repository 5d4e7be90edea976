//! Urgent bytes of unix streams, `MSG_OOB`.
//!
//! An urgent byte is a message of its own in the queue, and the socket refers to the last one until it is read
//! (`oob_skb`, net/unix/af_unix.c). Reads and peeks end before it. After `MSG_OOB` has read it, an empty message
//! stays at its position, where they also end, until the next urgent byte arrives. So a peek that ends for no other
//! reason reveals the position. At the front of the queue `SIOCATMARK` reveals it, and a peek skips the byte, unless
//! `SO_OOBINLINE` is set.
//!
//! Unknown: the position of a byte that was read when data is unread before it but not after it; and that of such a
//! byte right after descriptors or another sender's bytes.

use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use ckpt_sys::sockets;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::queue::peek;
use super::queue::{Fault, Seen};

/// State of an urgent byte in a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Urgent {
    /// Unread.
    Waits,
    /// Its mark: it was read.
    Read,
}

/// What a socket reveals of its last urgent byte.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mark {
    /// It is unread.
    waits: bool,
    /// It is before all unread data.
    front: bool,
    /// `SO_OOBINLINE`.
    inline: bool,
}

impl Mark {
    /// Queries the socket; `waits` is `POLLPRI` of poll(2).
    ///
    /// # Errors
    /// [`Fault::Urgent`] if there is one and this kernel reveals too little.
    pub(super) fn of(socket: &OwnedFd, waits: bool) -> Result<Self, Fault> {
        // The queue of a listening socket holds connections, as empty messages.
        let listens = sockets::int_option(socket, libc::SO_ACCEPTCONN)? != 0;
        let front = !listens && sockets::at_mark(socket).unwrap_or(false);
        if (waits || front) && !is_told() {
            return Err(Fault::Urgent);
        }
        let inline = sockets::int_option(socket, libc::SO_OOBINLINE)? != 0;
        Ok(Self {
            waits,
            front,
            inline,
        })
    }

    /// The byte that peeks skip.
    pub(super) fn passed_over(self, socket: &OwnedFd) -> Result<Option<Seen>, Fault> {
        match self.waits && self.front && !self.inline {
            true => Ok(Some(Seen {
                urgent: Some(Urgent::Waits),
                ..Seen::bytes(
                    vec![sockets::receive_byte(
                        socket,
                        libc::MSG_OOB | libc::MSG_PEEK,
                    )?],
                    None,
                )
            })),
            false => Ok(None),
        }
    }

    /// Marks the urgent pieces of a stream, after all have been read. `stops` are those at which a peek started
    /// although the previous one had no other reason to end.
    pub(super) fn place(self, pieces: &mut Vec<Seen>, stops: &[usize]) -> Result<(), Fault> {
        match (self.waits, self.front, stops) {
            (true, true, _) if self.inline => split(pieces, 0),
            // It is the first piece.
            (true, true, _) => Ok(()),
            (true, false, [at]) => split(pieces, *at),
            (true, false, _) => Err(Fault::UrgentPlace),
            (false, ..) => {
                let stops = if is_told() { stops } else { &[] };
                let front = self.front.then_some(0);
                for at in stops.iter().copied().rev().chain(front) {
                    let urgent = Some(Urgent::Read);
                    let place = Seen::bytes(Vec::new(), None);
                    pieces.insert(at, Seen { urgent, ..place });
                }
                Ok(())
            }
        }
    }
}

/// Splits off the first byte of a piece as the urgent one.
fn split(pieces: &mut Vec<Seen>, at: usize) -> Result<(), Fault> {
    let piece = pieces.get_mut(at).ok_or(Fault::UrgentPlace)?;
    if piece.data.len() > 1 {
        let rest = piece.data.split_off(1);
        let byte = std::mem::replace(&mut piece.data, rest);
        let byte = Seen::bytes(byte, piece.sender);
        pieces.insert(at, byte);
    } else if !piece.rights.is_empty() {
        return Err(Fault::UrgentPlace);
    }
    pieces[at].urgent = Some(Urgent::Waits);
    Ok(())
}

/// Whether this kernel behaves as described above (Linux 6.11): tried once, with sockets of ours. On older kernels a
/// peek at an urgent byte may never end.
fn is_told() -> bool {
    static TOLD: OnceLock<bool> = OnceLock::new();
    *TOLD.get_or_init(|| tried().unwrap_or(false))
}

fn tried() -> Result<bool, Errno> {
    let [from, to] = sockets::pair(libc::SOCK_STREAM)?;
    sockets::send(&from, b"!", libc::MSG_OOB)?;
    sockets::receive_byte(&to, libc::MSG_OOB)?;
    // The empty message counts as the mark: peeks were fixed before that.
    if !sockets::at_mark(&to)? {
        return Ok(false);
    }
    let looks = |offset: i32, text: &[u8]| -> Result<bool, Errno> {
        sockets::set_int_option(&to, libc::SO_PEEK_OFF, offset)?;
        let mut seen = [0; 16];
        let seen_len = peek(&to, &mut seen)?.len;
        Ok(&seen[..seen_len] == text)
    };
    sockets::send(&from, b"ab", 0)?;
    sockets::send(&from, b"c", libc::MSG_OOB)?;
    sockets::send(&from, b"de", 0)?;
    Ok(looks(0, b"ab")?
        && looks(2, b"cde")?
        && sockets::receive_byte(&to, libc::MSG_OOB | libc::MSG_PEEK)? == b'c')
}
