//! The few system calls on sockets that tell about them without taking anything from them.
#![allow(unsafe_code)]

use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::bounds;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

/// Bytes of control messages that one message can carry: 253 descriptors and some words.
const CONTROL: usize = 2048;

/// getsockopt(2) of `SOL_SOCKET`.
pub fn option(fd: &impl AsRawFd, number: i32) -> Result<Vec<u8>, Errno> {
    option_of(libc::SOL_SOCKET, fd, number)
}

/// getsockopt(2).
pub fn option_of(level: i32, fd: &impl AsRawFd, number: i32) -> Result<Vec<u8>, Errno> {
    let mut value = [0u8; 64];
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: `value` is live and `len` says how long.
    let r = unsafe {
        let value = value.as_mut_ptr().cast();
        libc::getsockopt(fd.as_raw_fd(), level, number, value, &mut len)
    };
    Errno::result(r)?;
    Ok(value[..(len as usize).min(value.len())].to_vec())
}

/// An option that is an `int`.
pub fn int_option(fd: &impl AsRawFd, number: i32) -> Result<i32, Errno> {
    let value = option(fd, number)?;
    let bytes = value.get(..4).ok_or(Errno::EINVAL)?;
    Ok(i32::from_ne_bytes(bytes.try_into().unwrap_or_default()))
}

/// Sets an option that is an `int`.
pub fn set_int_option(fd: &impl AsRawFd, number: i32, value: i32) -> Result<(), Errno> {
    // SAFETY: the kernel reads one int.
    let r = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            number,
            (&raw const value).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    Errno::result(r).map(drop)
}

/// How many instructions the socket's filter has; 0 without one.
pub fn filter_len(fd: &impl AsRawFd) -> Result<usize, Errno> {
    read_filter(fd, &mut [], 0)
}

/// The first so many instructions of the socket's filter; how many it has.
pub fn read_filter(fd: &impl AsRawFd, program: &mut [u8], count: usize) -> Result<usize, Errno> {
    const SO_GET_FILTER: i32 = libc::SO_ATTACH_FILTER;
    assert!(
        program.len() >= count * 8,
        "no room for {count} instructions"
    );
    let mut len = count as libc::socklen_t;
    // SAFETY: `len` is a number of instructions of 8 bytes, for which there is room. With 0 nothing is written but
    // that number.
    let r = unsafe {
        let program = program.as_mut_ptr().cast();
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_GET_FILTER,
            program,
            &mut len,
        )
    };
    Errno::result(r).map(|_| len as usize)
}

/// The bytes of `sun_path` of getsockname(2) or getpeername(2); empty for an unnamed socket.
fn address(
    call: unsafe extern "C" fn(i32, *mut libc::sockaddr, *mut libc::socklen_t) -> i32,
    fd: &impl AsRawFd,
) -> Result<Vec<u8>, Errno> {
    let mut buffer = [0u8; 128];
    let mut len = buffer.len() as libc::socklen_t;
    // SAFETY: `buffer` is live and `len` says how long.
    let r = unsafe { call(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), &mut len) };
    Errno::result(r)?;
    Ok(sun_path(&buffer, len as usize))
}

/// The name in an address that the kernel wrote. It ends one with a path in a zero byte, which
/// is no part of the name, and may count it.
fn sun_path(buffer: &[u8], len: usize) -> Vec<u8> {
    let name = buffer.get(2..len.min(buffer.len())).unwrap_or(&[]);
    match name.first() {
        None | Some(0) => name.to_vec(),
        Some(_) => name.split(|b| *b == 0).next().unwrap_or(&[]).to_vec(),
    }
}

/// getsockname(2).
pub fn own_name(fd: &impl AsRawFd) -> Result<Vec<u8>, Errno> {
    address(libc::getsockname, fd)
}

/// getpeername(2).
pub fn peer_name(fd: &impl AsRawFd) -> Result<Vec<u8>, Errno> {
    address(libc::getpeername, fd)
}

/// Port and groups of getsockname(2) and getpeername(2) of a netlink socket (`struct sockaddr_nl`).
pub fn netlink_addresses(fd: &impl AsRawFd) -> Result<[[u32; 2]; 2], Errno> {
    let of = |call| {
        // The family and what follows it are two bytes each.
        let name = address(call, fd)?;
        let word = |at: usize| {
            let bytes = name.get(at..at + 4).and_then(|b| b.try_into().ok());
            bytes.map(u32::from_ne_bytes).ok_or(Errno::EINVAL)
        };
        Ok([word(2)?, word(6)?])
    };
    Ok([of(libc::getsockname)?, of(libc::getpeername)?])
}

/// `SIOCOUTQ`: memory that messages take which this socket has sent and nobody has read.
pub fn unsent(fd: &impl AsRawFd) -> usize {
    let mut n = 0i32;
    // SAFETY: the kernel writes one int.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &mut n) };
    if r == 0 { n.max(0) as usize } else { 0 }
}

/// `SIOCUNIXFILE`: an `O_PATH` descriptor for the file that a socket is bound to. Wants
/// CAP_NET_ADMIN.
pub fn bound_file(fd: &impl AsRawFd) -> Result<OwnedFd, Errno> {
    const SIOCUNIXFILE: libc::c_ulong = 0x89e0;
    // SAFETY: a call without pointers.
    let file = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCUNIXFILE, 0) };
    let file = Errno::result(file)?;
    // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(file) })
}

/// `struct ucred`: who a process is to those that it speaks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ucred {
    /// Process id.
    #[serde(deserialize_with = "bounds::pid")]
    pub pid: i32,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// `SO_PEERCRED`.
pub fn peer_credentials(fd: &impl AsRawFd) -> Result<Ucred, Errno> {
    let value = option(fd, libc::SO_PEERCRED)?;
    let word = |at: usize| {
        let bytes = value.get(at..at + 4).ok_or(Errno::EINVAL)?;
        Ok(u32::from_ne_bytes(bytes.try_into().unwrap_or_default()))
    };
    Ok(Ucred {
        pid: word(0)? as i32,
        uid: word(4)?,
        gid: word(8)?,
    })
}

/// A message that was looked at.
#[derive(Debug, Default)]
pub struct Peeked {
    /// Bytes that it holds, though the buffer may have been shorter.
    pub len: usize,
    /// `MSG_TRUNC`, `MSG_CTRUNC` …
    pub flags: i32,
    /// The sender's name.
    pub name: Vec<u8>,
    /// Copies of the descriptors that it carries.
    pub rights: Vec<OwnedFd>,
    /// Who sent it.
    pub sender: Option<Ucred>,
}

/// Looks at the next message, which stays where it is.
pub fn peek(fd: &impl AsRawFd, buffer: &mut [u8]) -> Result<Peeked, Errno> {
    let mut name = [0u8; 128];
    let mut control = [0u64; CONTROL / 8];
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: plain integers and pointers, for which zero is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_name = name.as_mut_ptr().cast();
    header.msg_namelen = name.len() as u32;
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = CONTROL;
    let how = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_TRUNC | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: everything that `header` points to is live and as long as said.
    let n = unsafe { libc::recvmsg(fd.as_raw_fd(), &mut header, how) };
    let len = Errno::result(n)? as usize;
    let mut peeked = Peeked {
        len,
        flags: header.msg_flags,
        name: sun_path(&name, header.msg_namelen as usize),
        ..Peeked::default()
    };
    // SAFETY: the kernel filled the control buffer, and the macros stay inside what it says.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(&header);
        while !at.is_null() {
            let len = (*at).cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
            let data = libc::CMSG_DATA(at);
            collect((*at).cmsg_level, (*at).cmsg_type, data, len, &mut peeked);
            at = libc::CMSG_NXTHDR(&header, at);
        }
    }
    Ok(peeked)
}

/// SAFETY: `data` is `len` bytes of a control message that the kernel wrote for us; called once
/// for each, since it takes the descriptors.
unsafe fn collect(level: i32, kind: i32, data: *const u8, len: usize, peeked: &mut Peeked) {
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
            // SAFETY: the kernel just gave us these descriptors; nobody else owns them.
            let owned = fds.map(|fd| unsafe { OwnedFd::from_raw_fd(*fd as RawFd) });
            // A pidfd tells who sent it, and is made for each reader: it is no part of the
            // message.
            if kind == libc::SCM_RIGHTS {
                peeked.rights.extend(owned);
            } else {
                owned.for_each(drop);
            }
        }
        (libc::SCM_CREDENTIALS, [pid, uid, gid, ..]) => {
            peeked.sender = Some(Ucred {
                pid: *pid,
                uid: *uid as u32,
                gid: *gid as u32,
            });
        }
        _ => {}
    }
}

/// A socket of our own.
pub fn socket(family: i32, kind: i32) -> Result<OwnedFd, Errno> {
    let kind = kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: a call without pointers.
    let fd = Errno::result(unsafe { libc::socket(family, kind, 0) })?;
    // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `SIOCATMARK`: whether what is read next stands behind the mark of an urgent byte, or is one.
pub fn at_mark(fd: &impl AsRawFd) -> Result<bool, Errno> {
    const SIOCATMARK: libc::Ioctl = 0x8905;
    let mut answer = 0i32;
    // SAFETY: the kernel writes one int.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCATMARK, &mut answer) };
    Errno::result(r).map(|_| answer != 0)
}

/// Looks at the urgent byte, which stays where it is.
pub fn peek_urgent(fd: &impl AsRawFd) -> Result<u8, Errno> {
    receive_byte(fd, libc::MSG_OOB | libc::MSG_PEEK)
}

/// Takes the urgent byte of a socket of ours.
pub fn receive_urgent(fd: &impl AsRawFd) -> Result<u8, Errno> {
    receive_byte(fd, libc::MSG_OOB)
}

fn receive_byte(fd: &impl AsRawFd, flags: i32) -> Result<u8, Errno> {
    let mut byte = 0u8;
    let flags = flags | libc::MSG_DONTWAIT;
    // SAFETY: the kernel writes one byte.
    let n = unsafe { libc::recv(fd.as_raw_fd(), (&raw mut byte).cast(), 1, flags) };
    match Errno::result(n)? {
        1 => Ok(byte),
        _ => Err(Errno::EIO),
    }
}

/// send(2) through a socket of ours.
pub fn send(fd: &impl AsRawFd, bytes: &[u8], flags: i32) -> Result<(), Errno> {
    let flags = flags | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `bytes` is live and as long as said.
    let n = unsafe { libc::send(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
    Errno::result(n).map(drop)
}

/// Streams of ours, connected with each other.
pub fn pair() -> Result<[OwnedFd; 2], Errno> {
    socketpair(libc::SOCK_STREAM)
}

fn socketpair(kind: i32) -> Result<[OwnedFd; 2], Errno> {
    let kind = kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    let mut fds = [0; 2];
    // SAFETY: the kernel writes two ints.
    Errno::result(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) })?;
    // SAFETY: the kernel just gave us these descriptors; nobody else owns them.
    Ok(fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// `SIOCOUTQ` of a socket of ours that has sent messages of these lengths, which nobody has read.
pub fn unsent_of(kind: i32, lengths: &[usize]) -> Result<usize, Errno> {
    let [from, _to] = socketpair(kind)?;
    let buffer = vec![0u8; lengths.iter().copied().max().unwrap_or(0)];
    let room = i32::try_from(lengths.iter().sum::<usize>()).map_err(|_| Errno::EOVERFLOW)?;
    set_int_option(&from, libc::SO_SNDBUF, room.saturating_add(1 << 20))?;
    for len in lengths {
        send(&from, &buffer[..*len], 0)?;
    }
    Ok(unsent(&from))
}

/// connect(2).
pub fn connect(fd: &impl AsRawFd, address: &[u8]) -> Result<(), Errno> {
    let len = address.len() as libc::socklen_t;
    // SAFETY: `address` is live and as long as said.
    let r = unsafe { libc::connect(fd.as_raw_fd(), address.as_ptr().cast(), len) };
    Errno::result(r).map(drop)
}

/// How many of the `len` unread bytes of a stream stand in messages that end before the last of
/// these bytes; `len` is not 0.
///
/// A look copies message by message, and one that cannot be copied whole does not count. So the
/// last byte is to be copied to where no memory is.
pub fn before_last_message(fd: &impl AsRawFd, len: usize) -> Result<usize, Errno> {
    let mut buffer = vec![0u8; len - 1];
    let part = |base: *mut u8, len: usize| libc::iovec {
        iov_base: base.cast(),
        iov_len: len,
    };
    let mut parts = [
        part(buffer.as_mut_ptr(), buffer.len()),
        part(std::ptr::without_provenance_mut(8), 1),
    ];
    // SAFETY: plain integers and pointers, for which zero is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = parts.as_mut_ptr();
    header.msg_iovlen = parts.len();
    let how = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: everything that `header` points to is live but for the last part, which the kernel
    // finds to be nobody's memory.
    let n = unsafe { libc::recvmsg(fd.as_raw_fd(), &mut header, how) };
    match Errno::result(n) {
        Err(Errno::EFAULT) => Ok(0),
        other => Ok(other? as usize),
    }
}
