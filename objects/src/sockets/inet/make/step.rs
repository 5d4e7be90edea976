//! Single steps: binding, connecting, accepting at a temporary listening socket.

use std::os::fd::OwnedFd;
use std::time::Instant;

use ckpt_sys::{events, sockets};
use nix::errno::Errno;

use super::super::super::options::SocketOption;
use super::super::{Address, InetSocket};
use super::{PATIENCE, failed};
use crate::error::Result;

/// Waits until a socket has one of these states of poll(2).
pub(super) fn becomes(socket: &OwnedFd, states: i16) {
    events::poll_for(socket, states, PATIENCE.as_millis() as i32);
}

/// Lets connect(2) choose a certain port of the ephemeral ones; `None` where that is not possible.
pub(super) fn at_port(
    client: &OwnedFd,
    port: u16,
    connect: impl FnOnce() -> nix::Result<()>,
) -> Option<nix::Result<()>> {
    /// `IP_LOCAL_PORT_RANGE` (Linux 6.3).
    const LOCAL_PORT_RANGE: i32 = 51;
    let set = |value: u32| {
        let value = value.to_ne_bytes();
        sockets::set_option(libc::IPPROTO_IP, client, LOCAL_PORT_RANGE, &value)
    };
    if !ephemeral_ports().contains(&port) {
        return None;
    }
    set(u32::from(port) | u32::from(port) << 16).ok()?;
    let done = connect();
    let _ = set(0);
    Some(done)
}

/// `ip_local_port_range`.
pub(super) fn ephemeral_ports() -> std::ops::RangeInclusive<u16> {
    let text =
        std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut ends = text.split_whitespace().map(|end| end.parse().unwrap_or(0));
    ends.next().unwrap_or(1)..=ends.next().unwrap_or(0)
}

/// Binds a socket as it was. One that has only an address has lost its port when it was disconnected.
pub(super) fn bind(made: &OwnedFd, socket: &InetSocket) -> Result<()> {
    let Address { ip, port, .. } = socket.local;
    if port == 0 && ip.is_unspecified() {
        return Ok(());
    }
    let bound = sockets::bind(made, &socket.local.sockaddr());
    bound.map_err(|e| failed(socket, e))?;
    if port == 0 {
        sockets::connect(made, &NOWHERE).map_err(|e| failed(socket, e))?;
    }
    Ok(())
}

/// `struct sockaddr` of `AF_UNSPEC`, which disconnects a socket.
pub(super) const NOWHERE: [u8; 16] = [0; 16];

/// Waits until all that `from` has sent is acknowledged, which `to` does at once (`TCP_QUICKACK`). No descriptor becomes
/// ready then.
pub(super) fn acknowledged(from: &OwnedFd, to: &OwnedFd) {
    let (now, start) = (1i32.to_ne_bytes(), Instant::now());
    while sockets::unsent(from) > 0 && start.elapsed() < PATIENCE {
        let _ = sockets::set_option(libc::IPPROTO_TCP, to, libc::TCP_QUICKACK, &now);
        std::thread::yield_now();
    }
}

/// Sets `SO_REUSEADDR`.
pub(super) fn reuse(socket: &OwnedFd) {
    let _ = sockets::set_int_option(socket, libc::SO_REUSEADDR, 1);
}

/// Sets it as the program has it.
pub(super) fn set_reuse(made: &OwnedFd, socket: &InetSocket) -> Result<()> {
    let is_it = |o: &&SocketOption| (o.level, o.number) == (libc::SOL_SOCKET, libc::SO_REUSEADDR);
    match socket.options.iter().find(is_it) {
        Some(option) => option.set(made).map_err(|e| failed(socket, e)),
        None => Ok(()),
    }
}

/// connect(2) of a nonblocking socket to one that listens.
pub(super) fn dial(socket: &OwnedFd, to: Address) -> nix::Result<()> {
    match sockets::connect(socket, &to.sockaddr()) {
        Err(Errno::EINPROGRESS) => {
            events::poll_for(socket, libc::POLLOUT, PATIENCE.as_millis() as i32);
            match sockets::int_option(socket, libc::SO_ERROR)? {
                0 if sockets::peer_address(socket).is_ok() => Ok(()),
                0 => Err(Errno::ETIMEDOUT),
                errno => Err(Errno::from_raw(errno)),
            }
        }
        other => other,
    }
}

/// A temporary listening socket.
pub(super) struct Door {
    pub(super) socket: OwnedFd,
    pub(super) at: Address,
}

impl Door {
    /// Listens at an address; without a port, at a free one.
    pub(super) fn open(at: Address, connections: usize) -> nix::Result<Self> {
        let socket = sockets::socket_of(at.family(), libc::SOCK_STREAM, libc::IPPROTO_TCP)?;
        reuse(&socket);
        sockets::bind(&socket, &at.sockaddr())?;
        sockets::listen(&socket, i32::try_from(connections).unwrap_or(i32::MAX))?;
        let at = Address::parse(&sockets::own_address(&socket)?).ok_or(Errno::EAFNOSUPPORT)?;
        Ok(Self { socket, at })
    }

    /// The next connection, and the address of its client.
    pub(super) fn accept(&self) -> nix::Result<(OwnedFd, Address)> {
        events::poll_for(&self.socket, libc::POLLIN, PATIENCE.as_millis() as i32);
        let accepted = sockets::accept(&self.socket)?;
        let from = Address::parse(&sockets::peer_address(&accepted)?);
        Ok((accepted, from.ok_or(Errno::EAFNOSUPPORT)?))
    }
}
