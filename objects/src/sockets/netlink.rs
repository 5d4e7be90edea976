//! Netlink sockets, netlink(7).
//!
//! A socket is created again with its port, its groups and its options. Protocols for which the kernel keeps no state of a
//! request are supported; a socket with unread messages is refused for the time being, since only the kernel can send them.
//!
//! glibc creates an unbound one for notifications of POSIX message queues (`SIGEV_THREAD`, mq_notify(3)).

use std::os::fd::{AsFd, OwnedFd};

use crate::bounds;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use ckpt_sys::sockets;
use ckpt_tracer::proc::fdlink::FdLink;

use super::filter;
use super::options::{self, SocketOption};
use crate::error::Obstacle;
use crate::files::kind::{Captured, OpenFile, Place, Sight};
use crate::files::{self, Look};
use crate::plan::Builder;
use crate::source::{Collector, Source};

/// Socket options beside those of `SOL_SOCKET`, linux/netlink.h.
const SOL_NETLINK: i32 = 270;
const NETLINK_ADD_MEMBERSHIP: i32 = 1;
const NETLINK_LIST_MEMBERSHIPS: i32 = 9;
/// `NETLINK_PKTINFO`, `NETLINK_BROADCAST_ERROR`, `NETLINK_NO_ENOBUFS`, `NETLINK_LISTEN_ALL_NSID`,
/// `NETLINK_CAP_ACK`, `NETLINK_EXT_ACK`, `NETLINK_GET_STRICT_CHK`.
const SWITCHES: [i32; 7] = [3, 4, 5, 8, 10, 11, 12];
/// `NETLINK_ROUTE`, `NETLINK_SOCK_DIAG`, `NETLINK_AUDIT`, `NETLINK_KOBJECT_UEVENT`, `NETLINK_GENERIC`.
const PROTOCOLS: [i32; 5] = [0, 4, 9, 15, 16];

/// A netlink socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetlinkSocket {
    /// Inode number.
    pub inode: u64,
    /// `SOCK_RAW` or `SOCK_DGRAM`.
    pub style: i32,
    /// Its protocol.
    pub protocol: i32,
    /// Its port (`nl_pid`); 0 if it is not bound.
    #[serde(default)]
    pub port: u32,
    /// The groups that it has joined, from 1 on.
    #[serde(default, deserialize_with = "bounds::few::<_, _, 512>")]
    pub groups: Vec<u32>,
    /// Options of `SOL_NETLINK` that are on.
    #[serde(default, deserialize_with = "bounds::few::<_, _, 16>")]
    pub switches: Vec<i32>,
    /// Its filter, instructions of classic BPF.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "serde_bytes")]
    pub filter: Vec<u8>,
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
    let protocol = sockets::int_option(socket, libc::SO_PROTOCOL).ok()?;
    if sockets::int_option(socket, libc::SO_DOMAIN) != Ok(libc::AF_NETLINK)
        || !PROTOCOLS.contains(&protocol)
    {
        return None;
    }
    let [[port, _], [peer, peer_groups]] = addresses(socket).ok()?;
    let style = sockets::int_option(socket, libc::SO_TYPE).ok()?;
    let (charged, room) = memory(socket).ok()?;
    let filter = filter::capture(socket).ok()?;
    if peer != 0 || peer_groups != 0 {
        return None;
    }
    let groups = sockets::option_of(SOL_NETLINK, socket, NETLINK_LIST_MEMBERSHIPS);
    let groups: Vec<u32> = groups.map_or(Vec::new(), |bytes| {
        let has = |group: &u32| {
            let (byte, bit) = ((group - 1) / 8, (group - 1) % 8);
            bytes
                .get(byte as usize)
                .is_some_and(|b| b & (1 << bit) != 0)
        };
        (1..=8 * bytes.len() as u32).filter(has).collect()
    });
    let is_on = |number: &i32| {
        let value = sockets::option_of(SOL_NETLINK, socket, *number);
        value.is_ok_and(|value| value.iter().any(|b| *b != 0))
    };
    let refuse =
        |reason: &str, remedy: &str| Box::new(Obstacle::new(look.object(source), reason, remedy));
    let state = ckpt_sys::events::poll_now(socket, libc::POLLIN);
    if state & (libc::POLLIN | libc::POLLERR) != 0 {
        let reason = match (port, protocol) {
            (0, 0) => {
                "is a netlink socket with an unread notification of a POSIX message queue, which is not supported"
            }
            _ => "is a netlink socket with unread messages, which only the kernel can send",
        };
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
        protocol,
        port,
        groups,
        switches: SWITCHES.into_iter().filter(is_on).collect(),
        filter,
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
        if self.port != 0 {
            let mut address = (libc::AF_NETLINK as u16).to_ne_bytes().to_vec();
            address.extend_from_slice(&[0; 2]);
            address.extend_from_slice(&self.port.to_ne_bytes());
            address.extend_from_slice(&[0; 4]);
            let data = plan.data(&address);
            plan.syscall(libc::SYS_bind, &[at as u64, data, 12], object);
        }
        let set = |plan: &mut Builder, number: i32, value: u32, what: String| {
            let data = plan.data(&value.to_ne_bytes());
            let args = [at as u64, SOL_NETLINK as u64, number as u64, data, 4];
            let warning = format!("{what} cannot be had again by the {}", self.label());
            plan.try_syscall(libc::SYS_setsockopt, &args, &warning);
        };
        for group in &self.groups {
            set(
                plan,
                NETLINK_ADD_MEMBERSHIP,
                *group,
                format!("group {group}"),
            );
        }
        for switch in &self.switches {
            set(plan, *switch, 1, format!("option {switch} of SOL_NETLINK"));
        }
        filter::rebuild(&self.filter, at, &self.label(), plan);
        for option in &self.options {
            option.rebuild(at, &self.label(), plan);
        }
        Ok(())
    }
}
