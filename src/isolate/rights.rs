//! Descriptors that go from one process of ours to another: unix(7), SCM_RIGHTS.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;

/// The kernel takes no more than 253 at once (`SCM_MAX_FD`).
pub(super) const MOST: usize = 128;

/// Room for a control message of [`MOST`] descriptors.
type Control = [u64; 2 + MOST / 2 + 1];

/// A message of one byte, whose descriptors are in `control`.
fn message(byte: &mut libc::iovec, control: &mut Control, len: usize) -> libc::msghdr {
    // SAFETY: plain integers and pointers, for which zero is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = byte;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = len;
    header
}

/// Sends copies of at most [`MOST`].
pub(crate) fn send(socket: &UnixStream, fds: &[RawFd]) -> io::Result<()> {
    assert!(!fds.is_empty() && fds.len() <= MOST);
    let mut byte = [0u8];
    let mut part = libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: 1,
    };
    let mut control: Control = [0; _];
    let bytes = size_of_val(fds) as u32;
    // SAFETY: arithmetic.
    let (len, space) = unsafe { (libc::CMSG_LEN(bytes), libc::CMSG_SPACE(bytes)) };
    let header = message(&mut part, &mut control, space as usize);
    // SAFETY: `control` has room for one message of that length, and everything that `header` points
    // to is live.
    let sent = unsafe {
        let at = libc::CMSG_FIRSTHDR(&header);
        (*at).cmsg_level = libc::SOL_SOCKET;
        (*at).cmsg_type = libc::SCM_RIGHTS;
        (*at).cmsg_len = len as usize;
        libc::CMSG_DATA(at)
            .cast::<RawFd>()
            .copy_from_nonoverlapping(fds.as_ptr(), fds.len());
        libc::sendmsg(socket.as_raw_fd(), &header, libc::MSG_NOSIGNAL)
    };
    Ok(Errno::result(sent).map(drop)?)
}

/// The next that were sent.
pub(crate) fn receive(socket: &UnixStream) -> io::Result<Vec<OwnedFd>> {
    let mut byte = [0u8];
    let mut part = libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: 1,
    };
    let mut control: Control = [0; _];
    let mut header = message(&mut part, &mut control, size_of::<Control>());
    // SAFETY: everything that `header` points to is live and as long as said. The kernel fills the
    // control buffer with descriptors that are ours alone.
    unsafe {
        let flags = libc::MSG_CMSG_CLOEXEC;
        Errno::result(libc::recvmsg(socket.as_raw_fd(), &mut header, flags))?;
        let at = libc::CMSG_FIRSTHDR(&header);
        if at.is_null() || (*at).cmsg_type != libc::SCM_RIGHTS {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let count = ((*at).cmsg_len - libc::CMSG_LEN(0) as usize) / size_of::<RawFd>();
        let fds = libc::CMSG_DATA(at).cast::<RawFd>();
        let one = |i| OwnedFd::from_raw_fd(fds.add(i).read_unaligned());
        Ok((0..count).map(one).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn copies_arrive_in_order() {
        let (one, other) = UnixStream::pair().unwrap();
        let pairs: Vec<_> = (0..MOST).map(|_| UnixStream::pair().unwrap()).collect();
        let fds: Vec<RawFd> = pairs.iter().map(|(a, _)| a.as_raw_fd()).collect();
        send(&one, &fds).unwrap();
        let copies = receive(&other).unwrap();
        assert_eq!(copies.len(), MOST);
        for (copy, (_, mut far)) in copies.into_iter().zip(pairs) {
            UnixStream::from(copy).write_all(b"x").unwrap();
            let mut got = [0];
            far.read_exact(&mut got).unwrap();
        }
        drop(one);
        assert!(receive(&other).is_err());
    }
}
