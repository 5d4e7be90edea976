//! Unix domain sockets: sock_diag(7) over netlink, in our own network namespace.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use crate::{Error, Result};

/// One unix domain socket of the network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnixSocket {
    /// Inode number; 0 for one without a descriptor yet (it waits to be accepted).
    pub inode: u32,
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    pub kind: u8,
    /// It listens.
    pub listening: bool,
    /// Inode of the connected peer; 0 when that is closed or not accepted yet.
    pub peer: Option<u32>,
    /// The bytes of `sun_path`; an abstract name begins with 0.
    pub name: Option<Vec<u8>>,
    /// Device (as the kernel keeps it) and inode of the file that it is bound to.
    pub file: Option<(u32, u32)>,
    /// Inodes of the sockets in its backlog, the oldest first.
    pub pending: Vec<u32>,
    /// Connections in the backlog, or bytes to be read.
    pub unread: u32,
    /// The backlog limit, or memory of sent messages that are unread, bytes.
    pub unsent: u32,
    /// `RCV_SHUTDOWN` (1) and `SEND_SHUTDOWN` (2).
    pub shutdown: u8,
}

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const TCP_LISTEN: u8 = 10;
/// `UDIAG_SHOW_NAME` to `UDIAG_SHOW_RQLEN`.
const SHOW: u32 = 0x1f;
/// Attempts to read the table while it changes.
const ROUNDS: u32 = 20;

/// Lists all visible unix domain sockets.
///
/// # Errors
/// [`Error::Kernel`] with `ENOENT` when the kernel was built without `CONFIG_UNIX_DIAG`.
pub fn dump() -> Result<Vec<UnixSocket>> {
    let failed = |errno| Error::Kernel {
        call: "sock_diag",
        object: "unix domain sockets".into(),
        errno,
    };
    for _ in 0..ROUNDS {
        if let Some(sockets) = dump_once().map_err(failed)? {
            return Ok(sockets);
        }
    }
    Err(failed(Errno::EAGAIN))
}

/// `None` when the table changed while it was read.
fn dump_once() -> std::result::Result<Option<Vec<UnixSocket>>, Errno> {
    let socket = open()?;
    let mut request = Vec::with_capacity(40);
    request.extend_from_slice(&40u32.to_ne_bytes());
    request.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    request.extend_from_slice(&[0; 8]); // sequence number, port
    request.extend_from_slice(&[libc::AF_UNIX as u8, 0, 0, 0]);
    for word in [u32::MAX, 0, SHOW, u32::MAX, u32::MAX] {
        request.extend_from_slice(&word.to_ne_bytes());
    }
    // SAFETY: the bytes of a live vector.
    let sent = unsafe {
        libc::send(
            socket.as_raw_fd(),
            request.as_ptr().cast(),
            request.len(),
            0,
        )
    };
    Errno::result(sent)?;
    let mut sockets = Vec::new();
    let mut changed = false;
    // A dump message has at most 32 KiB.
    let mut buffer = vec![0u8; 1 << 16];
    loop {
        // SAFETY: `buffer` is live and as long as said.
        let n = unsafe {
            libc::recv(
                socket.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                libc::MSG_TRUNC,
            )
        };
        let n = match Errno::result(n) {
            Err(Errno::EINTR) => continue,
            other => other? as usize,
        };
        let Some(answer) = buffer.get(..n) else {
            return Err(Errno::EMSGSIZE);
        };
        let progress = parse(answer, &mut sockets)?;
        changed |= progress.changed;
        if progress.done {
            return Ok((!changed).then_some(sockets));
        }
    }
}

fn open() -> std::result::Result<OwnedFd, Errno> {
    const NETLINK_SOCK_DIAG: i32 = 4;
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: a call without pointers.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, NETLINK_SOCK_DIAG) };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel just gave us this descriptor; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Progress {
    /// This was the last message.
    done: bool,
    /// The table changed, so the dump may be inconsistent.
    changed: bool,
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at + 2)?;
    Some(u16::from_ne_bytes(bytes.try_into().ok()?))
}

/// Parses one datagram: several netlink messages.
fn parse(mut answer: &[u8], sockets: &mut Vec<UnixSocket>) -> std::result::Result<Progress, Errno> {
    let mut progress = Progress::default();
    while !answer.is_empty() {
        let header = (word(answer, 0), half(answer, 4), half(answer, 6));
        let (Some(len), Some(kind), Some(flags)) = header else {
            return Err(Errno::EBADMSG);
        };
        let body = answer.get(16..len as usize).ok_or(Errno::EBADMSG)?;
        progress.changed |= flags & NLM_F_DUMP_INTR != 0;
        match kind {
            NLMSG_DONE | NLMSG_ERROR => {
                let status = word(body, 0).map_or(0, |status| status as i32);
                if status < 0 || kind == NLMSG_ERROR {
                    return Err(Errno::from_raw(status.checked_neg().unwrap_or(0)));
                }
                progress.done = true;
                return Ok(progress);
            }
            SOCK_DIAG_BY_FAMILY => sockets.push(socket(body).ok_or(Errno::EBADMSG)?),
            _ => {}
        }
        let next = (len as usize).next_multiple_of(4).min(answer.len());
        answer = &answer[next..];
    }
    Ok(progress)
}

/// `struct unix_diag_msg` and its attributes.
fn socket(body: &[u8]) -> Option<UnixSocket> {
    let mut socket = UnixSocket {
        kind: *body.get(1)?,
        listening: *body.get(2)? == TCP_LISTEN,
        inode: word(body, 4)?,
        ..UnixSocket::default()
    };
    let mut rest = body.get(16..)?;
    while rest.len() >= 4 {
        let len = half(rest, 0)? as usize;
        let value = rest.get(4..len)?;
        match half(rest, 2)? & 0x3fff {
            0 => socket.name = Some(value.to_vec()),
            1 => socket.file = Some((word(value, 4)?, word(value, 0)?)),
            2 => socket.peer = Some(word(value, 0)?),
            3 => {
                let words = value.chunks_exact(4);
                socket.pending = words.filter_map(|w| word(w, 0)).collect();
            }
            4 => (socket.unread, socket.unsent) = (word(value, 0)?, word(value, 4)?),
            6 => socket.shutdown = *value.first()?,
            _ => {}
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Some(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

    fn inode(fd: &impl AsRawFd) -> u32 {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        std::fs::metadata(path).expect("it is open").ino() as u32
    }

    #[test]
    fn peers_and_backlogs_are_told() {
        let name = format!("ckpt-diag-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("short");
        let listener = UnixListener::bind_addr(&address).expect("free");
        let client = UnixStream::connect_addr(&address).expect("it listens");
        let (a, b) = UnixStream::pair().expect("a pair");
        let all = dump().expect("unix_diag");
        let find = |i: u32| all.iter().find(|s| s.inode == i).expect("it is there");
        assert_eq!(find(inode(&a)).peer, Some(inode(&b)));
        assert_eq!(find(inode(&b)).peer, Some(inode(&a)));
        let listening = find(inode(&listener));
        assert!(listening.listening);
        assert_eq!(listening.pending, [inode(&client)]);
        assert_eq!(
            listening.name.as_deref(),
            Some(&*format!("\0{name}").into_bytes())
        );
        assert_eq!(find(inode(&client)).peer, Some(0));
    }

    #[test]
    fn what_is_cut_short_is_an_error() {
        let mut whole = Vec::new();
        whole.extend_from_slice(&48u32.to_ne_bytes());
        whole.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        whole.extend_from_slice(&[0; 10]);
        whole.extend_from_slice(&[1, 1, 1, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        whole.extend_from_slice(&[8, 0, 2, 0, 9, 0, 0, 0, 5, 0, 6, 0, 3, 0, 0, 0]);
        let mut sockets = Vec::new();
        assert_eq!(parse(&whole, &mut sockets), Ok(Progress::default()));
        assert_eq!((sockets[0].inode, sockets[0].peer), (7, Some(9)));
        assert_eq!(sockets[0].shutdown, 3);
        for len in 1..whole.len() {
            assert!(parse(&whole[..len], &mut Vec::new()).is_err(), "{len}");
        }
        // A length that is too small, an attribute that overruns.
        whole[0] = 3;
        assert!(parse(&whole, &mut Vec::new()).is_err());
        whole[0] = 48;
        whole[32] = 200;
        assert!(parse(&whole, &mut Vec::new()).is_err());
    }
}
