//! Netlink sockets, netlink(7).
//!
//! Supported is an unbound socket that has never sent anything, belongs to no group and has no dump in progress. It
//! receives only notifications of POSIX message queues (`SIGEV_THREAD`, mq_notify(3)), for which glibc creates one.
//! Others are refused.

use std::os::fd::{AsFd, OwnedFd};

use crate::bounds;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use ckpt_sys::sockets;
use ckpt_tracer::proc::fdlink::FdLink;

use super::options::{self, SocketOption};
use crate::error::Obstacle;
use crate::files::kind::{Captured, OpenFile, Place, Sight};
use crate::files::{self, Look};
use crate::plan::Builder;
use crate::source::{Collector, Source};

/// Socket options beside those of `SOL_SOCKET`, linux/netlink.h.
const SOL_NETLINK: i32 = 270;
/// `NETLINK_PKTINFO`, `NETLINK_BROADCAST_ERROR`, `NETLINK_NO_ENOBUFS`, `NETLINK_LISTEN_ALL_NSID`,
/// `NETLINK_LIST_MEMBERSHIPS`, `NETLINK_CAP_ACK`, `NETLINK_EXT_ACK`, `NETLINK_GET_STRICT_CHK`.
const OPTIONS: [i32; 8] = [3, 4, 5, 8, 9, 10, 11, 12];

/// An unbound netlink socket of protocol 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetlinkSocket {
    /// Inode number.
    pub inode: u64,
    /// `SOCK_RAW` or `SOCK_DGRAM`.
    pub style: i32,
    /// Its protocol.
    pub protocol: i32,
    /// Options that differ from a new socket's.
    #[serde(deserialize_with = "bounds::few::<_, _, 64>")]
    pub options: Vec<SocketOption>,
    /// Bytes of its receive buffer used by cookies of registered notifications.
    #[serde(skip)]
    pub charged: u32,
}

/// Creates a socket as glibc does for notifications.
pub fn new() -> Result<OwnedFd, Errno> {
    sockets::socket(libc::AF_NETLINK, libc::SOCK_RAW)
}

/// Used bytes of the receive buffer, including cookies of registered notifications.
pub fn charged(fd: &impl AsFd) -> Result<u32, Errno> {
    Ok(memory(fd)?.0)
}

/// Port and groups of getsockname(2) and getpeername(2) (`struct sockaddr_nl`).
fn addresses(fd: &impl AsFd) -> Result<[[u32; 2]; 2], Errno> {
    let of = |address: Vec<u8>| {
        let word = |at: usize| {
            let bytes = address.get(at..at + 4).and_then(|b| b.try_into().ok());
            bytes.map(u32::from_ne_bytes).ok_or(Errno::EINVAL)
        };
        Ok([word(4)?, word(8)?])
    };
    Ok([
        of(sockets::own_address(fd)?)?,
        of(sockets::peer_address(fd)?)?,
    ])
}

/// `SK_MEMINFO_RMEM_ALLOC` and `SK_MEMINFO_RCVBUF`, linux/sock_diag.h.
fn memory(fd: &impl AsFd) -> Result<(u32, u32), Errno> {
    let words = sockets::option(fd, libc::SO_MEMINFO)?;
    match words.as_chunks::<4>().0 {
        [used, room, ..] => Ok((u32::from_ne_bytes(*used), u32::from_ne_bytes(*room))),
        _ => Err(Errno::EINVAL),
    }
}

/// Captures a socket; `None` if it is not a netlink socket, or may have more state than is stored.
fn capture(source: &Source, look: &Look) -> Option<Result<NetlinkSocket, Box<Obstacle>>> {
    let socket = &look.copy;
    let is_plain = sockets::int_option(socket, libc::SO_DOMAIN) == Ok(libc::AF_NETLINK)
        && sockets::int_option(socket, libc::SO_PROTOCOL) == Ok(0)
        && addresses(socket) == Ok([[0; 2]; 2])
        && OPTIONS.iter().all(|number| {
            // Empty if the protocol has no groups, an error if the kernel lacks the option.
            match sockets::option_of(SOL_NETLINK, socket, *number) {
                Ok(value) => value.iter().all(|b| *b == 0),
                Err(errno) => errno == Errno::ENOPROTOOPT,
            }
        })
        && sockets::filter_len(socket) == Ok(0);
    let style = sockets::int_option(socket, libc::SO_TYPE).ok()?;
    let (charged, room) = memory(socket).ok()?;
    if !is_plain {
        return None;
    }
    let refuse =
        |reason: &str, remedy: &str| Box::new(Obstacle::new(look.object(source), reason, remedy));
    let state = ckpt_sys::events::poll_now(socket, libc::POLLIN);
    if state & (libc::POLLIN | libc::POLLERR) != 0 {
        let reason = "is a netlink socket with an unread notification of a POSIX message queue, which is \
                      not supported";
        let unread = refuse(reason, "try again when the program has read it");
        return Some(Err(Box::new(unread.passing())));
    }
    // Another registration would wait for room.
    if charged > room {
        let reason = "is a netlink socket for notifications of POSIX message queues, with a receive buffer \
                      that is too small for them";
        return Some(Err(refuse(
            reason,
            "let the program set a larger one (SO_RCVBUF)",
        )));
    }
    Some(Ok(NetlinkSocket {
        inode: look.stat.st_ino,
        style,
        protocol: 0,
        options: options::capture(socket, libc::AF_NETLINK, style),
        charged,
    }))
}

impl OpenFile for NetlinkSocket {
    fn capture(sight: &Sight, _: &mut Collector) -> Captured {
        match sight.look.link {
            FdLink::Socket(_) => Some(capture(sight.source, sight.look)?.map(Into::into)),
            _ => None,
        }
    }

    fn class(&self) -> &'static str {
        "netlink"
    }

    fn label(&self) -> String {
        format!("netlink socket:[{}]", self.inode)
    }

    fn each_inode(&mut self, f: &mut dyn FnMut(&mut u64)) {
        f(&mut self.inode);
    }

    fn shows_maker(&self) -> bool {
        true
    }

    fn open(&self, place: &Place, plan: &mut Builder) -> Result<(), Vec<Obstacle>> {
        let at = place.at;
        let object = || format!("the {}", self.label());
        let args = [
            libc::AF_NETLINK as u64,
            self.style as u64,
            self.protocol as u64,
        ];
        plan.expect(libc::SYS_socket, &args, 0, object);
        files::place(0, at, plan, object);
        for option in &self.options {
            option.rebuild(at, &self.label(), plan);
        }
        Ok(())
    }
}
