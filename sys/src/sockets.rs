//! Sockets: socket(7), unix(7), netlink(7).
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::control::Credentials;
use crate::files::given;
use crate::{Errno, Result, errno};

/// getsockopt(2) of `SOL_SOCKET`, up to 64 bytes.
///
/// # Errors
/// `ENOPROTOOPT` where there is no such option.
pub fn option(fd: impl AsFd, number: i32) -> Result<Vec<u8>> {
    option_of(libc::SOL_SOCKET, fd, number)
}

/// getsockopt(2), up to 64 bytes.
///
/// # Errors
/// `ENOPROTOOPT` where there is no such option, `EOPNOTSUPP` where there is no such level.
pub fn option_of(level: i32, fd: impl AsFd, number: i32) -> Result<Vec<u8>> {
    let mut value = [0u8; 64];
    let len = get(level, fd, number, &mut value, 64)?;
    Ok(value[..len.min(value.len())].to_vec())
}

/// getsockopt(2). Returns the length that the kernel sets. `len` is passed to the kernel, in the option's unit.
fn get(level: i32, fd: impl AsFd, number: i32, room: &mut [u8], len: usize) -> Result<usize> {
    let mut len = len as libc::socklen_t;
    // SAFETY: `room` is live, and `len` is its length; callers with another unit ensure that it fits.
    let r = unsafe {
        let room = room.as_mut_ptr().cast();
        libc::getsockopt(fd.as_fd().as_raw_fd(), level, number, room, &raw mut len)
    };
    Errno::result(r).map(|_| len as usize)
}

/// An option that is an `int`.
///
/// # Errors
/// As for [`option`].
pub fn int_option(fd: impl AsFd, number: i32) -> Result<i32> {
    let value = option(fd, number)?;
    let bytes = value.get(..4).ok_or(Errno::EINVAL)?;
    Ok(i32::from_ne_bytes(bytes.try_into().unwrap_or_default()))
}

/// Sets an option that is an `int`.
///
/// # Errors
/// `EINVAL` for an invalid value, `EPERM` where it needs a capability.
pub fn set_int_option(fd: impl AsFd, number: i32, value: i32) -> Result<()> {
    // SAFETY: the kernel reads one int.
    let r = unsafe {
        libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            number,
            (&raw const value).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    Errno::result(r).map(drop)
}

/// Number of instructions of the socket's filter; 0 without one.
///
/// # Errors
/// `EACCES` for an eBPF filter, whose instructions cannot be read.
pub fn filter_len(fd: impl AsFd) -> Result<usize> {
    read_filter(fd, &mut [], 0)
}

/// Reads `count` instructions of the socket's filter, 8 bytes each. Returns how many it has.
///
/// # Errors
/// As for [`filter_len`]; `EINVAL` when it has more.
///
/// # Panics
/// When `program` is too small.
pub fn read_filter(fd: impl AsFd, program: &mut [u8], count: usize) -> Result<usize> {
    const SO_GET_FILTER: i32 = libc::SO_ATTACH_FILTER;
    let room = program.len() / 8;
    assert!(room >= count, "no room for {count} instructions");
    // The length is a number of instructions; with 0 the kernel writes only that number.
    get(libc::SOL_SOCKET, fd, SO_GET_FILTER, program, count)
}

/// `tcpi_state`, the first byte of `struct tcp_info`: the state of a TCP socket by the kernel's numbers, from 1 on.
///
/// # Errors
/// `EOPNOTSUPP` for other sockets.
pub fn tcp_state(fd: impl AsFd) -> Result<u8> {
    let mut state = [0];
    get(libc::IPPROTO_TCP, fd, libc::TCP_INFO, &mut state, 1).map(|_| state[0])
}

/// getsockname(2), getpeername(2).
type NameCall = unsafe extern "C" fn(i32, *mut libc::sockaddr, *mut libc::socklen_t) -> i32;

fn address(call: NameCall, fd: impl AsFd) -> Result<Vec<u8>> {
    let mut buffer = [0u8; 128];
    let mut len = buffer.len() as libc::socklen_t;
    // SAFETY: `buffer` is live and `len` says how long.
    let r = unsafe {
        let fd = fd.as_fd().as_raw_fd();
        call(fd, buffer.as_mut_ptr().cast(), &raw mut len)
    };
    Errno::result(r)?;
    Ok(buffer[..(len as usize).min(buffer.len())].to_vec())
}

/// getsockname(2): the `struct sockaddr` of the socket.
///
/// # Errors
/// None for a socket.
pub fn own_address(fd: impl AsFd) -> Result<Vec<u8>> {
    address(libc::getsockname, fd)
}

/// getpeername(2): the `struct sockaddr` of the other end.
///
/// # Errors
/// `ENOTCONN` where there is none.
pub fn peer_address(fd: impl AsFd) -> Result<Vec<u8>> {
    address(libc::getpeername, fd)
}

/// The name in the address of a unix socket (`sun_path`): empty if unnamed, with a leading zero byte if abstract. The
/// kernel ends a path with a zero byte, which is not part of the name, and may count it.
pub fn sun_path(address: &[u8]) -> Vec<u8> {
    let name = address.get(2..).unwrap_or(&[]);
    match name.first() {
        None | Some(0) => name.to_vec(),
        Some(_) => name.split(|b| *b == 0).next().unwrap_or(&[]).to_vec(),
    }
}

/// The name of a unix socket, as [`sun_path`] has it.
///
/// # Errors
/// As for [`own_address`].
pub fn own_name(fd: impl AsFd) -> Result<Vec<u8>> {
    own_address(fd).map(|address| sun_path(&address))
}

/// The name of the other end, as [`sun_path`] has it.
///
/// # Errors
/// As for [`peer_address`].
pub fn peer_name(fd: impl AsFd) -> Result<Vec<u8>> {
    peer_address(fd).map(|address| sun_path(&address))
}

/// `SIOCOUTQ`: memory of sent messages that have not been read, bytes.
pub fn unsent(fd: impl AsFd) -> usize {
    int_ioctl(fd, libc::TIOCOUTQ).map_or(0, |n| n.max(0) as usize)
}

/// `SIOCATMARK`: whether the next byte to be read is at the urgent mark.
///
/// # Errors
/// `ENOTTY` for sockets without urgent data.
pub fn at_mark(fd: impl AsFd) -> Result<bool> {
    const SIOCATMARK: libc::Ioctl = 0x8905;
    int_ioctl(fd, SIOCATMARK).map(|answer| answer != 0)
}

fn int_ioctl(fd: impl AsFd, request: libc::Ioctl) -> Result<i32> {
    let mut n = 0i32;
    // SAFETY: called with requests for which the kernel writes one int.
    let r = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, &raw mut n) };
    Errno::result(r).map(|_| n)
}

/// `SIOCUNIXFILE`: an `O_PATH` descriptor for the file that a socket is bound to.
///
/// # Errors
/// `EPERM` without CAP_NET_ADMIN, `ENOENT` for a socket without a file.
pub fn bound_file(fd: impl AsFd) -> Result<OwnedFd> {
    const SIOCUNIXFILE: libc::c_ulong = 0x89e0;
    // SAFETY: a call without pointers, which makes a descriptor.
    unsafe { given(libc::ioctl(fd.as_fd().as_raw_fd(), SIOCUNIXFILE, 0).into()) }
}

/// `SO_PEERCRED`: credentials of the process that connected or listens at the other end.
///
/// # Errors
/// As for [`option`].
pub fn peer_credentials(fd: impl AsFd) -> Result<Credentials> {
    let value = option(fd, libc::SO_PEERCRED)?;
    let word = |at: usize| {
        let bytes = value.get(at..at + 4).ok_or(Errno::EINVAL)?;
        Ok(u32::from_ne_bytes(bytes.try_into().unwrap_or_default()))
    };
    Ok(Credentials {
        pid: word(0)? as i32,
        uid: word(4)?,
        gid: word(8)?,
    })
}

/// setsockopt(2).
///
/// # Errors
/// `EPERM` where it needs a capability, `ENOPROTOOPT` where there is no such option, `EINVAL` for an invalid value.
pub fn set_option(level: i32, fd: impl AsFd, number: i32, value: &[u8]) -> Result<()> {
    // SAFETY: the kernel reads as many bytes as `value` has.
    let r = unsafe {
        libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            level,
            number,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    Errno::result(r).map(drop)
}

/// getsockopt(2) of `TCP_INFO`: as much of `struct tcp_info` as the kernel has, up to 256 bytes.
///
/// # Errors
/// `EOPNOTSUPP` for other sockets.
pub fn tcp_info(fd: impl AsFd) -> Result<Vec<u8>> {
    let mut info = vec![0; 256];
    let len = get(libc::IPPROTO_TCP, fd, libc::TCP_INFO, &mut info, 256)?;
    info.truncate(len);
    Ok(info)
}

/// `SIOCOUTQNSD`: bytes of a TCP socket's send queue that were never sent.
pub fn never_sent(fd: impl AsFd) -> usize {
    const SIOCOUTQNSD: libc::Ioctl = 0x894b;
    int_ioctl(fd, SIOCOUTQNSD).map_or(0, |n| n.max(0) as usize)
}

/// getsockopt(2) of an option that reads its buffer as well.
///
/// # Errors
/// Those of the option.
pub fn exchange_option(level: i32, fd: impl AsFd, number: i32, value: &mut [u8]) -> Result<()> {
    let len = value.len();
    get(level, fd, number, value, len).map(drop)
}

/// A nonblocking socket of a protocol (`IPPROTO_*`).
///
/// # Errors
/// Those of socket(2).
pub fn socket_of(family: i32, kind: i32, protocol: i32) -> Result<OwnedFd> {
    let kind = kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: a call without pointers, which makes a descriptor.
    unsafe { given(libc::socket(family, kind, protocol).into()) }
}

/// Brings up the loopback device of our network namespace: netdevice(7).
///
/// # Errors
/// `EPERM` without CAP_NET_ADMIN in the namespace.
pub fn bring_up_loopback() -> Result<()> {
    let socket = socket(libc::AF_INET, libc::SOCK_DGRAM)?;
    // SAFETY: a structure of numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: `request` is live, and names the device with a zero byte at the end.
    let r = unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS as libc::Ioctl,
            &raw mut request,
        )
    };
    Errno::result(r).map(drop)
}

/// listen(2).
///
/// # Errors
/// `EADDRINUSE` when another socket listens on the port.
pub fn listen(fd: impl AsFd, backlog: i32) -> Result<()> {
    rustix::net::listen(fd, backlog).map_err(errno)
}

/// accept4(2), nonblocking: the next connection of a listening socket, a nonblocking socket too.
///
/// # Errors
/// `EAGAIN` where none waits.
pub fn accept(fd: impl AsFd) -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::accept_with(fd, flags).map_err(errno)
}

/// shutdown(2): `SHUT_RD`, `SHUT_WR`, `SHUT_RDWR`.
///
/// # Errors
/// `ENOTCONN` where it is not connected.
pub fn shutdown(fd: impl AsFd, how: i32) -> Result<()> {
    // SAFETY: a call without pointers.
    Errno::result(unsafe { libc::shutdown(fd.as_fd().as_raw_fd(), how) }).map(drop)
}

/// send(2) without waiting and without SIGPIPE. Returns how many bytes were taken.
///
/// # Errors
/// `EAGAIN` when there is no room, and others of send(2).
pub fn send_some(fd: impl AsFd, bytes: &[u8]) -> Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: `bytes` is live and as long as said.
    let n = unsafe { libc::send(fd, bytes.as_ptr().cast(), bytes.len(), flags) };
    Errno::result(n).map(|n| n as usize)
}

/// sendto(2) without waiting: one datagram to a `struct sockaddr`.
///
/// # Errors
/// Those of sendto(2).
pub fn send_to(fd: impl AsFd, bytes: &[u8], to: &[u8]) -> Result<()> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    let (fd, len) = (fd.as_fd().as_raw_fd(), to.len() as libc::socklen_t);
    // SAFETY: both are live and as long as said.
    let n = unsafe {
        libc::sendto(
            fd,
            bytes.as_ptr().cast(),
            bytes.len(),
            flags,
            to.as_ptr().cast(),
            len,
        )
    };
    Errno::result(n).map(drop)
}

/// recv(2) without waiting or consuming. Returns how many bytes were copied.
///
/// # Errors
/// `EAGAIN` when there are none; those of recv(2).
pub fn peek(fd: impl AsFd, room: &mut [u8]) -> Result<usize> {
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: `room` is live and as long as said.
    let n = unsafe { libc::recv(fd, room.as_mut_ptr().cast(), room.len(), flags) };
    Errno::result(n).map(|n| n as usize)
}

/// A nonblocking socket (`AF_*`, `SOCK_*`).
///
/// # Errors
/// Those of socket(2).
pub fn socket(family: i32, kind: i32) -> Result<OwnedFd> {
    let family = AddressFamily::from_raw(family as u16);
    let kind = SocketType::from_raw(kind as u32);
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(family, kind, flags, None).map_err(errno)
}

/// A connected pair of nonblocking unix sockets (`SOCK_*`).
///
/// # Errors
/// `EMFILE` and `ENFILE` when there are no descriptors.
pub fn pair(kind: i32) -> Result<[OwnedFd; 2]> {
    let kind = SocketType::from_raw(kind as u32);
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (a, b) = rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None).map_err(errno)?;
    Ok([a, b])
}

/// bind(2) to a `struct sockaddr`. For a unix socket, an address of only the family lets the kernel choose an
/// abstract name.
///
/// # Errors
/// `EADDRINUSE` when the name is taken, and others of bind(2).
pub fn bind(fd: impl AsFd, address: &[u8]) -> Result<()> {
    let len = address.len() as libc::socklen_t;
    // SAFETY: `address` is live and as long as said.
    let r = unsafe { libc::bind(fd.as_fd().as_raw_fd(), address.as_ptr().cast(), len) };
    Errno::result(r).map(drop)
}

/// connect(2) to a `struct sockaddr`.
///
/// # Errors
/// `ECONNREFUSED` when no socket listens there, and others of connect(2).
pub fn connect(fd: impl AsFd, address: &[u8]) -> Result<()> {
    let len = address.len() as libc::socklen_t;
    // SAFETY: `address` is live and as long as said.
    let r = unsafe { libc::connect(fd.as_fd().as_raw_fd(), address.as_ptr().cast(), len) };
    Errno::result(r).map(drop)
}

/// send(2), nonblocking and without SIGPIPE.
///
/// # Errors
/// `EAGAIN` when there is no room, and others of send(2).
pub fn send(fd: impl AsFd, bytes: &[u8], flags: i32) -> Result<()> {
    let flags = flags | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: `bytes` is live and as long as said.
    let n = unsafe { libc::send(fd, bytes.as_ptr().cast(), bytes.len(), flags) };
    Errno::result(n).map(drop)
}

/// recv(2) of one byte, nonblocking; with `MSG_OOB` the urgent byte, which stays with `MSG_PEEK`.
///
/// # Errors
/// `EINVAL` when there is no urgent byte, `EAGAIN` when it has not arrived; `EIO` at end of file.
pub fn receive_byte(fd: impl AsFd, flags: i32) -> Result<u8> {
    let mut byte = 0u8;
    let flags = flags | libc::MSG_DONTWAIT;
    // SAFETY: the kernel writes one byte.
    let n = unsafe { libc::recv(fd.as_fd().as_raw_fd(), (&raw mut byte).cast(), 1, flags) };
    match Errno::result(n)? {
        1 => Ok(byte),
        _ => Err(Errno::EIO),
    }
}
