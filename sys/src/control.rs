//! Messages with ancillary data: descriptors (`SCM_RIGHTS`) and credentials (`SCM_CREDENTIALS`), see unix(7) and
//! cmsg(3). The only users of recvmsg(2) and sendmsg(2).
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::{Errno, Result};

/// Most descriptors that one message can carry (`SCM_MAX_FD`, include/net/scm.h).
pub const MOST_RIGHTS: usize = 253;

/// Bytes of ancillary data that one message can carry: the most descriptors and some words.
const CONTROL: usize = 2048;
/// In words, for the alignment of `struct cmsghdr`.
type Control = [u64; CONTROL / 8];

/// `struct ucred`: the credentials of a sending process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Process id, as the receiver sees it; 0 where it has none there.
    pub pid: i32,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// A message received, or peeked at with `MSG_PEEK`.
#[derive(Debug, Default)]
pub struct Received {
    /// Bytes put into the buffer; with `MSG_TRUNC` the length of the whole message.
    pub len: usize,
    /// `MSG_TRUNC`, `MSG_CTRUNC` …
    pub flags: i32,
    /// The sender's address (`struct sockaddr`), empty where there is none.
    pub address: Vec<u8>,
    /// Its descriptors, close-on-exec; with `MSG_PEEK` duplicates of them.
    pub rights: Vec<OwnedFd>,
    /// Its sender, if the socket has `SO_PASSCRED`.
    pub sender: Option<Credentials>,
}

/// recvmsg(2). A length of 0 without flags is the end of a stream.
///
/// # Errors
/// `EAGAIN` when there is no message and the call must not wait; `EINTR`.
pub fn receive(fd: impl AsFd, buffer: &mut [u8], flags: i32) -> Result<Received> {
    let mut address = [0u8; 128];
    let mut control: Control = [0; CONTROL / 8];
    let mut part = part(buffer.as_mut_ptr(), buffer.len());
    let mut header = header(std::slice::from_mut(&mut part));
    header.msg_name = address.as_mut_ptr().cast();
    header.msg_namelen = address.len() as u32;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = CONTROL;
    // SAFETY: everything that `header` points to is live and as long as said.
    let len = unsafe { recvmsg(fd.as_fd(), &mut header, flags) }?;
    let address_len = (header.msg_namelen as usize).min(address.len());
    let mut received = Received {
        len,
        flags: header.msg_flags,
        address: address[..address_len].to_vec(),
        ..Received::default()
    };
    // SAFETY: the kernel filled the control buffer, and the macros stay inside what it says.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(&raw const header);
        while !at.is_null() {
            let len = (*at).cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
            let data = libc::CMSG_DATA(at);
            collect((*at).cmsg_level, (*at).cmsg_type, data, len, &mut received);
            at = libc::CMSG_NXTHDR(&raw const header, at);
        }
    }
    Ok(received)
}

/// SAFETY: `data` is `len` bytes of a control message that the kernel wrote for us; called once
/// for each, since it takes the descriptors.
unsafe fn collect(level: i32, kind: i32, data: *const u8, len: usize, received: &mut Received) {
    const SCM_PIDFD: i32 = 4;
    if level != libc::SOL_SOCKET {
        return;
    }
    // SAFETY: as the function's.
    let words: Vec<i32> = unsafe {
        (0..len / 4)
            .map(|i| data.cast::<i32>().add(i).read_unaligned())
            .collect()
    };
    match (kind, words.as_slice()) {
        (libc::SCM_RIGHTS | SCM_PIDFD, fds) => {
            let fds = fds.iter().filter(|fd| **fd >= 0);
            // SAFETY: the kernel just gave us these descriptors; nothing else owns them.
            let owned = fds.map(|fd| unsafe { OwnedFd::from_raw_fd(*fd as RawFd) });
            // SCM_PIDFD: a pidfd of the sender, made for each reader. It is no part of the message.
            if kind == libc::SCM_RIGHTS {
                received.rights.extend(owned);
            } else {
                owned.for_each(drop);
            }
        }
        (libc::SCM_CREDENTIALS, [pid, uid, gid, ..]) => {
            received.sender = Some(Credentials {
                pid: *pid,
                uid: *uid as u32,
                gid: *gid as u32,
            });
        }
        _ => {}
    }
}

/// sendmsg(2) with duplicates of descriptors, [`MOST_RIGHTS`] at most, attached to the first byte. Returns the bytes
/// sent. A closed stream is an error, without SIGPIPE.
///
/// # Errors
/// `EPIPE` when the other end is closed, `ETOOMANYREFS` when too many descriptors are in flight, `EINVAL` for more
/// than one message can carry.
pub fn send(fd: impl AsFd, bytes: &[u8], rights: &[BorrowedFd<'_>]) -> Result<usize> {
    if rights.len() > MOST_RIGHTS {
        return Err(Errno::EINVAL);
    }
    let mut control: Control = [0; CONTROL / 8];
    let mut part = part(bytes.as_ptr().cast_mut(), bytes.len());
    let mut header = header(std::slice::from_mut(&mut part));
    if !rights.is_empty() {
        let bytes = size_of_val(rights) as u32;
        header.msg_control = control.as_mut_ptr().cast();
        // SAFETY: `control` has room for one message of that length; a BorrowedFd is the number that it borrows.
        unsafe {
            header.msg_controllen = libc::CMSG_SPACE(bytes) as usize;
            let at = libc::CMSG_FIRSTHDR(&raw const header);
            (*at).cmsg_level = libc::SOL_SOCKET;
            (*at).cmsg_type = libc::SCM_RIGHTS;
            (*at).cmsg_len = libc::CMSG_LEN(bytes) as usize;
            let to = libc::CMSG_DATA(at).cast::<RawFd>();
            to.copy_from_nonoverlapping(rights.as_ptr().cast(), rights.len());
        }
    }
    // SAFETY: everything that `header` points to is live, and is only read.
    let sent = unsafe {
        let fd = fd.as_fd().as_raw_fd();
        libc::sendmsg(fd, &raw const header, libc::MSG_NOSIGNAL)
    };
    Errno::result(sent).map(|n| n as usize)
}

/// Of the `len` unread bytes of a stream (`len` > 0), how many belong to messages that end before the last of these
/// bytes.
///
/// A peek copies message by message, and a message that cannot be copied whole does not count. So the destination of
/// the last byte is unmapped memory.
///
/// # Errors
/// `EAGAIN` when there is nothing to read, and errors of the socket.
pub fn before_last_message(fd: impl AsFd, len: usize) -> Result<usize> {
    let mut buffer = vec![0u8; len - 1];
    let mut parts = [
        part(buffer.as_mut_ptr(), buffer.len()),
        part(std::ptr::without_provenance_mut(8), 1),
    ];
    let mut header = header(&mut parts);
    // SAFETY: everything that `header` points to is live, except for the last part, which is unmapped: the kernel
    // answers EFAULT for it.
    match unsafe { recvmsg(fd.as_fd(), &mut header, libc::MSG_PEEK | libc::MSG_DONTWAIT) } {
        Err(Errno::EFAULT) => Ok(0),
        other => other,
    }
}

fn part(base: *mut u8, len: usize) -> libc::iovec {
    libc::iovec {
        iov_base: base.cast(),
        iov_len: len,
    }
}

fn header(parts: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: plain integers and pointers, for which zero is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = parts.as_mut_ptr();
    header.msg_iovlen = parts.len();
    header
}

/// SAFETY: what `header` points to is live and as long as said, or unmapped.
unsafe fn recvmsg(fd: BorrowedFd<'_>, header: &mut libc::msghdr, flags: i32) -> Result<usize> {
    let flags = flags | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: as our caller promises.
    let n = unsafe { libc::recvmsg(fd.as_raw_fd(), header, flags) };
    Errno::result(n).map(|n| n as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sockets;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn copies_arrive_in_order() {
        let (one, other) = UnixStream::pair().unwrap();
        let pairs: Vec<_> = (0..MOST_RIGHTS)
            .map(|_| UnixStream::pair().unwrap())
            .collect();
        let fds: Vec<BorrowedFd<'_>> = pairs.iter().map(|(a, _)| a.as_fd()).collect();
        assert_eq!(send(&one, b"x", &fds), Ok(1));
        let mut byte = [0; 4];
        let came = receive(&other, &mut byte, 0).unwrap();
        assert_eq!((came.len, came.rights.len()), (1, MOST_RIGHTS));
        for (copy, (_, far)) in came.rights.into_iter().zip(&pairs) {
            UnixStream::from(copy).write_all(b"x").unwrap();
            (&*far).read_exact(&mut [0]).unwrap();
        }
        let over = vec![one.as_fd(); MOST_RIGHTS + 1];
        assert_eq!(send(&one, b"x", &over), Err(Errno::EINVAL));
        drop(one);
        assert_eq!(receive(&other, &mut byte, 0).unwrap().len, 0);
        assert_eq!(send(&other, b"x", &[]), Err(Errno::EPIPE));
    }

    #[test]
    fn sender_of_bytes_is_known() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"?").unwrap();
        assert!(receive(&ours, &mut [0], 0).unwrap().sender.is_none());
        sockets::set_int_option(&ours, libc::SO_PASSCRED, 1).unwrap();
        theirs.write_all(b"?").unwrap();
        let sender = receive(&ours, &mut [0], 0).unwrap().sender;
        let me = std::process::id() as i32;
        assert_eq!(sender.map(|who| who.pid), Some(me));
        assert_eq!(sockets::peer_credentials(&ours), Ok(sender.unwrap()));
    }
}
