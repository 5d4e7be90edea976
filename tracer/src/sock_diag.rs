//! Sockets of our own network namespace: sock_diag(7) over netlink.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use crate::{Error, Result};

pub mod inet;
pub mod unix;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const TCP_LISTEN: u8 = 10;
/// Attempts to read a table while it changes.
const ROUNDS: u32 = 20;

/// Lists sockets. `request` is the family's request structure, `what` its name for errors, `parse` reads the body of one
/// message.
fn dump<T>(request: &[u8], what: &str, parse: impl Fn(&[u8]) -> Option<T>) -> Result<Vec<T>> {
    let failed = |errno| Error::Kernel {
        call: "sock_diag",
        object: what.into(),
        errno,
    };
    for _ in 0..ROUNDS {
        if let Some(sockets) = dump_once(request, &parse).map_err(failed)? {
            return Ok(sockets);
        }
    }
    Err(failed(Errno::EAGAIN))
}

/// `None` when the table changed while it was read.
fn dump_once<T>(
    body: &[u8],
    parse_one: impl Fn(&[u8]) -> Option<T>,
) -> std::result::Result<Option<Vec<T>>, Errno> {
    let socket = open()?;
    let mut request = Vec::with_capacity(16 + body.len());
    request.extend_from_slice(&(16 + body.len() as u32).to_ne_bytes());
    request.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    request.extend_from_slice(&[0; 8]); // sequence number, port
    request.extend_from_slice(body);
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
        let progress = parse(answer, &parse_one, &mut sockets)?;
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
fn parse<T>(
    mut answer: &[u8],
    parse_one: impl Fn(&[u8]) -> Option<T>,
    sockets: &mut Vec<T>,
) -> std::result::Result<Progress, Errno> {
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
            SOCK_DIAG_BY_FAMILY => sockets.push(parse_one(body).ok_or(Errno::EBADMSG)?),
            _ => {}
        }
        let next = (len as usize).next_multiple_of(4).min(answer.len());
        answer = &answer[next..];
    }
    Ok(progress)
}

/// Calls `f` with the type and value of each attribute (`struct nlattr`). `None` when one is cut short.
fn each_attribute(mut rest: &[u8], mut f: impl FnMut(u16, &[u8]) -> Option<()>) -> Option<()> {
    while rest.len() >= 4 {
        let len = half(rest, 0)? as usize;
        f(half(rest, 2)? & 0x3fff, rest.get(4..len)?)?;
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Some(())
}

/// The inode number of a descriptor of ours.
#[cfg(test)]
fn inode(fd: &impl AsRawFd) -> u32 {
    use std::os::unix::fs::MetadataExt;

    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    std::fs::metadata(path).expect("it is open").ino() as u32
}

#[cfg(test)]
mod tests {
    use super::unix::{UnixSocket, socket};
    use super::*;

    #[test]
    fn what_is_cut_short_is_an_error() {
        let mut whole = Vec::new();
        whole.extend_from_slice(&48u32.to_ne_bytes());
        whole.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        whole.extend_from_slice(&[0; 10]);
        whole.extend_from_slice(&[1, 1, 1, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        whole.extend_from_slice(&[8, 0, 2, 0, 9, 0, 0, 0, 5, 0, 6, 0, 3, 0, 0, 0]);
        let mut sockets = Vec::new();
        assert_eq!(parse(&whole, socket, &mut sockets), Ok(Progress::default()));
        assert_eq!((sockets[0].inode, sockets[0].peer), (7, Some(9)));
        assert_eq!(sockets[0].shutdown, 3);
        for len in 1..whole.len() {
            assert!(
                parse(&whole[..len], socket, &mut Vec::<UnixSocket>::new()).is_err(),
                "{len}"
            );
        }
        // A length that is too small, an attribute that overruns.
        whole[0] = 3;
        assert!(parse(&whole, socket, &mut Vec::new()).is_err());
        whole[0] = 48;
        whole[32] = 200;
        assert!(parse(&whole, socket, &mut Vec::new()).is_err());
    }
}
