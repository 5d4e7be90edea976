//! Unread messages, copied without being consumed.

use std::os::fd::{AsFd, OwnedFd};

use ckpt_sys::control::{self, Received};
use ckpt_sys::sockets;
use nix::errno::Errno;

use super::offset::PeekOffset;
use super::peers::Ucred;
use super::unix::Style;
use super::urgent::{Mark, Urgent};

/// A message of a live socket.
#[derive(Debug)]
pub struct Seen {
    /// Its bytes.
    pub data: Vec<u8>,
    /// The name of the socket that sent it (datagrams only).
    pub name: Vec<u8>,
    /// Duplicates of the descriptors in it.
    pub rights: Vec<OwnedFd>,
    /// Its sender's credentials, if the reader would receive them.
    pub sender: Option<Ucred>,
    /// An urgent byte, or the mark of one.
    pub urgent: Option<Urgent>,
}

impl Seen {
    /// Bytes only.
    pub(super) fn bytes(data: Vec<u8>, sender: Option<Ucred>) -> Self {
        Self {
            data,
            name: Vec::new(),
            rights: Vec::new(),
            sender,
            urgent: None,
        }
    }
}

/// Why a queue cannot be copied.
#[derive(Debug, PartialEq, Eq)]
pub enum Fault {
    /// The kernel's error.
    Kernel(Errno),
    /// An error that the reader would get before the first message.
    PendingError,
    /// A byte sent with `MSG_OOB`, of which this kernel shows too little.
    Urgent,
    /// A byte sent with `MSG_OOB` whose position is unknown.
    UrgentPlace,
    /// A message has more descriptors than we may open.
    TooManyDescriptors,
}

impl From<Errno> for Fault {
    fn from(errno: Errno) -> Self {
        Fault::Kernel(errno)
    }
}

impl Fault {
    /// The reason, as the rest of a sentence that begins with the socket.
    pub fn reason(&self) -> String {
        match self {
            Fault::Kernel(e) => format!("has unread data that cannot be examined: {}", e.desc()),
            Fault::PendingError => {
                "has a pending error (ECONNRESET) before its unread messages, which cannot be examined \
                 without clearing it"
                    .into()
            }
            Fault::Urgent => {
                "holds an urgent byte (MSG_OOB), which kernels before Linux 6.11 do not fully show"
                    .into()
            }
            Fault::UrgentPlace => {
                "holds an urgent byte (MSG_OOB) that came with descriptors, or right behind those or \
                 another writer's bytes, so that its position cannot be determined"
                    .into()
            }
            Fault::TooManyDescriptors => {
                "carries more descriptors than ckpt may have open; raise its limit with ulimit -n"
                    .into()
            }
        }
    }
}

/// Everything that can be read from a socket. `held` says that the job is frozen; if not, messages after the first
/// one are left out, since reading them needs an option of the socket.
pub fn contents(socket: &OwnedFd, style: Style, held: bool) -> Result<Vec<Seen>, Fault> {
    let state = ckpt_sys::events::poll_now(socket, libc::POLLIN | libc::POLLPRI | libc::POLLRDHUP);
    let total = ckpt_sys::files::unread(socket);
    if state & libc::POLLERR != 0 && style != Style::Stream {
        // The next call would return the error and clear it.
        let empty = total == 0 && (state & libc::POLLIN == 0 || state & libc::POLLRDHUP != 0);
        return if empty {
            Ok(Vec::new())
        } else {
            Err(Fault::PendingError)
        };
    }
    let mut offset = PeekOffset::of(socket)?;
    if !held && offset.before() >= 0 {
        // A peek would move the peek offset.
        return Ok(Vec::new());
    }
    if style == Style::Stream {
        let mark = Mark::of(socket, state & libc::POLLPRI != 0)?;
        stream(socket, total, held, mark, &mut offset)
    } else if state & libc::POLLIN != 0 {
        messages(socket, style, held, &mut offset)
    } else {
        Ok(Vec::new())
    }
}

/// Peeks at the next message; its length is that of the whole message.
///
/// # Errors
/// Those of recvmsg(2).
pub(super) fn peek(socket: &impl AsFd, buffer: &mut [u8]) -> Result<Received, Errno> {
    let how = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_TRUNC;
    control::receive(socket, buffer, how)
}

fn look(socket: &OwnedFd, buffer: &mut [u8]) -> Result<Received, Fault> {
    let peeked = peek(socket, buffer)?;
    if peeked.flags & libc::MSG_CTRUNC != 0 {
        return Err(Fault::TooManyDescriptors);
    }
    Ok(peeked)
}

/// A stream in pieces: a new one starts where descriptors are attached to a byte, after them, and where the sender
/// changes. A peek that ends for no such reason ends at the mark of an urgent byte.
fn stream(
    socket: &OwnedFd,
    total: usize,
    held: bool,
    mark: Mark,
    offset: &mut PeekOffset<'_>,
) -> Result<Vec<Seen>, Fault> {
    let mut pieces: Vec<Seen> = mark.passed_over(socket)?.into_iter().collect();
    let total = total.saturating_sub(pieces.len());
    let mut at = 0;
    // Pieces at which such a peek started; whether descriptors ended the previous one; and its sender.
    let (mut stops, mut before) = (Vec::new(), None);
    // Without unread bytes a peek would consume a pending error.
    while at < total {
        if at > 0 || offset.before() >= 0 {
            if !held {
                break;
            }
            offset.set(at)?;
        }
        let mut data = vec![0; total - at];
        let piece = look(socket, &mut data)?;
        if piece.len == 0 {
            return Err(Fault::Kernel(Errno::EIO));
        }
        data.truncate(piece.len);
        let sender = piece.sender.map(Ucred::from);
        if before == Some((false, sender)) {
            stops.push(pieces.len());
        }
        before = Some((!piece.rights.is_empty(), sender));
        if !piece.rights.is_empty() && held {
            // Bytes before the one to which the descriptors are attached.
            offset.set(at)?;
            let plain = control::before_last_message(socket, piece.len)?;
            if plain > 0 {
                let rest = data.split_off(plain);
                let plain = std::mem::replace(&mut data, rest);
                pieces.push(Seen::bytes(plain, sender));
            }
        }
        at += piece.len;
        pieces.push(Seen {
            rights: piece.rights,
            ..Seen::bytes(data, sender)
        });
    }
    if held {
        mark.place(&mut pieces, &stops)?;
    }
    Ok(pieces)
}

/// Datagrams and packets, one after the other.
///
/// The kernel marks an empty message that was peeked at and skips it at later peeks with an offset; so the first
/// message is peeked at without one.
fn messages(
    socket: &OwnedFd,
    style: Style,
    held: bool,
    offset: &mut PeekOffset<'_>,
) -> Result<Vec<Seen>, Fault> {
    let mut seen = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    let mut at = 0;
    if offset.before() >= 0 {
        offset.set(0)?;
    }
    let ended = style == Style::SeqPacket
        && ckpt_sys::events::poll_now(socket, libc::POLLRDHUP) & libc::POLLRDHUP != 0;
    loop {
        let peeked = match look(socket, &mut buffer) {
            // Packets of a socket without a peer are not read: the queue of a listening one holds clients
            // (`unix_seqpacket_recvmsg`, net/unix/af_unix.c).
            Err(Fault::Kernel(Errno::EAGAIN | Errno::ENOTCONN)) => break,
            other => other?,
        };
        // The end of file of a peer looks like an empty packet.
        if peeked.len == 0 && ended {
            break;
        }
        let whole = peeked.len <= buffer.len();
        if whole {
            at += peeked.len;
            seen.push(Seen {
                name: sockets::sun_path(&peeked.address),
                rights: peeked.rights,
                ..Seen::bytes(
                    buffer[..peeked.len].to_vec(),
                    peeked.sender.map(Ucred::from),
                )
            });
        } else {
            buffer.resize(peeked.len, 0);
        }
        if whole && !held {
            break;
        }
        if !seen.is_empty() || offset.before() >= 0 {
            offset.set(at)?;
        }
    }
    Ok(seen)
}
