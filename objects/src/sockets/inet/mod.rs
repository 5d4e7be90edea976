//! Internet sockets whose other ends are in the job: TCP, UDP, UDP-Lite and ICMP, over IPv4 and IPv6.
//!
//! They are captured together ([`survey`]), since what one end has sent may still be on its way to the other, and
//! created together by the process that restores ([`make`]): each end has its old address, connected ones are
//! connected to each other anew, and what was unread is sent again by the other end. None of this needs a capability.
//!
//! Options and filters follow when all descriptions are open, by the plan.

mod address;
mod closed;
mod describe;
mod drain;
mod judge;
pub mod make;
mod multicast;
mod obstacles;
pub mod options;
mod survey;
mod unread;

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::options::SocketOption;
use super::{filter, not_replaceable};
use crate::bounds;
use crate::error::Obstacle;
use crate::files::Staging;
use crate::files::kind::{Captured, OpenFile, Opened, Place, Sight};
use crate::index::DescriptionId;
use crate::need::Need;
use crate::plan::{Builder, Inherited};
use crate::references::Faults;
use crate::source::Collector;
use crate::{Snapshot, SpaceId};

pub use address::Address;
pub use describe::describe;
pub use multicast::Membership;
pub use obstacles::in_the_way;
pub use survey::{Survey, survey};

/// An internet socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InetSocket {
    /// Inode number.
    pub inode: u64,
    /// The protocol.
    pub protocol: Protocol,
    /// getsockname(2). Without a port it is not bound.
    pub local: Address,
    /// Its connection.
    pub state: State,
    /// shutdown(2) by the program: 1 for receiving, 2 for sending.
    #[serde(deserialize_with = "bounds::choice")]
    pub shutdown: u8,
    /// What it has not read: one piece of a stream, or one for each datagram.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unread: Vec<Unread>,
    /// The multicast groups that it has joined.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<Membership>,
    /// Options that differ from a new socket's.
    #[serde(deserialize_with = "bounds::few::<_, _, 128>")]
    pub options: Vec<SocketOption>,
    /// Its filter, instructions of classic BPF.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "serde_bytes")]
    pub filter: Vec<u8>,
}

/// Protocols of internet sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Protocol {
    /// tcp(7).
    Tcp,
    /// udp(7).
    Udp,
    /// udplite(7).
    UdpLite,
    /// ICMP echo sockets, icmp(7).
    Icmp,
}

/// The state of a socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// It is not connected and does not listen; it may be bound.
    Unconnected,
    /// It listens.
    Listening {
        /// listen(2).
        #[serde(deserialize_with = "bounds::backlog")]
        backlog: u32,
        /// The other ends of connections that were not accepted yet, the oldest first.
        pending: Vec<Pending>,
    },
    /// connect(2) is in progress.
    Connecting {
        /// The address that it connects to.
        peer: Address,
    },
    /// Connected. A datagram socket just has an address that it sends to.
    Connected {
        /// getpeername(2).
        peer: Address,
        /// Inode of the other end of a TCP connection; `None` if that is closed, or for datagrams.
        other: Option<u64>,
        /// It called connect(2); otherwise it was accepted.
        active: bool,
    },
    /// A TCP socket that has connected, and waits to be accepted.
    Waiting {
        /// getpeername(2).
        peer: Address,
    },
    /// A TCP socket that was disconnected (connect(2) with `AF_UNSPEC`) and has not told its error yet, ECONNRESET.
    Dissolved,
    /// A TCP connection that has ended at both ends.
    Ended {
        /// The error that the next call returns, an errno; 0 for none.
        #[serde(deserialize_with = "bounds::errno")]
        error: i32,
        /// There was a connection; otherwise it was refused.
        answered: bool,
    },
}

/// A connection that waits to be accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// The address of the client.
    pub client: Address,
    /// The address that it connected to.
    pub server: Address,
    /// Inode of the client; `None` if that is closed.
    pub inode: Option<u64>,
}

/// Unread bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unread {
    /// The space that has them.
    pub space: SpaceId,
    /// Their offset there, bytes.
    #[serde(deserialize_with = "bounds::bytes")]
    pub at: u64,
    /// Their number.
    #[serde(deserialize_with = "bounds::bytes")]
    pub len: u64,
    /// The sender of a datagram.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Address>,
}

impl Protocol {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Tcp, Self::Udp, Self::UdpLite, Self::Icmp];

    /// From `SO_PROTOCOL`.
    fn of(number: i32) -> Option<Self> {
        match number {
            libc::IPPROTO_TCP => Some(Self::Tcp),
            libc::IPPROTO_UDP => Some(Self::Udp),
            libc::IPPROTO_UDPLITE => Some(Self::UdpLite),
            libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6 => Some(Self::Icmp),
            _ => None,
        }
    }

    /// The protocol for socket(2).
    pub fn number(self, family: i32) -> i32 {
        match self {
            Self::Tcp => libc::IPPROTO_TCP,
            Self::Udp => libc::IPPROTO_UDP,
            Self::UdpLite => libc::IPPROTO_UDPLITE,
            Self::Icmp if family == libc::AF_INET6 => libc::IPPROTO_ICMPV6,
            Self::Icmp => libc::IPPROTO_ICMP,
        }
    }

    /// The type for socket(2).
    pub fn kind(self) -> i32 {
        match self {
            Self::Tcp => libc::SOCK_STREAM,
            _ => libc::SOCK_DGRAM,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::UdpLite => "UDP-Lite",
            Self::Icmp => "ICMP",
        }
    }
}

impl InetSocket {
    /// `AF_INET` or `AF_INET6`.
    pub fn family(&self) -> i32 {
        self.local.family()
    }

    /// The address that it is connected to, or connects to.
    pub fn peer(&self) -> Option<Address> {
        match self.state {
            State::Connecting { peer }
            | State::Connected { peer, .. }
            | State::Waiting { peer } => Some(peer),
            _ => None,
        }
    }

    /// Whether the client with that inode waits to be accepted.
    fn awaits(&self, client: u64) -> bool {
        match &self.state {
            State::Listening { pending, .. } => pending.iter().any(|p| p.inode == Some(client)),
            _ => false,
        }
    }

    /// Unread bytes.
    pub fn unread_bytes(&self) -> u64 {
        self.unread.iter().map(|piece| piece.len).sum()
    }

    fn state_shown(&self) -> String {
        match &self.state {
            State::Unconnected | State::Dissolved => String::new(),
            State::Listening { pending, .. } if pending.is_empty() => ", listening".into(),
            State::Listening { pending, .. } => {
                format!(", listening, {} to be accepted", pending.len())
            }
            State::Connecting { peer } => format!(", connecting to {peer}"),
            State::Connected { peer, .. } | State::Waiting { peer } => {
                format!(", connected to {peer}")
            }
            State::Ended { .. } => ", ended".into(),
        }
    }
}

impl OpenFile for InetSocket {
    fn capture(sight: &Sight, collector: &mut Collector) -> Captured {
        let inode = sight.look.stat.st_ino;
        // One of the first three becomes that of `restore`.
        let outside = sight.look.fd <= 2 && collector.inet.is_outside(inode);
        if sight.look.is_path() || outside {
            return None;
        }
        collector.inet.verdict(inode)
    }

    fn class(&self) -> &'static str {
        match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp | Protocol::UdpLite => "udp",
            Protocol::Icmp => "icmp",
        }
    }

    fn label(&self) -> String {
        format!("{} socket {}", self.protocol.name(), self.local)
    }

    fn shown(&self) -> String {
        let unread = match self.unread_bytes() {
            0 => String::new(),
            bytes => format!(", {bytes} bytes unread"),
        };
        format!("{}{}{unread}", self.label(), self.state_shown())
    }

    fn contents(&self) -> Option<(SpaceId, u64)> {
        let last = self.unread.last()?;
        Some((last.space, last.at.saturating_add(last.len)))
    }

    fn needs(&self, _: u32, _: &Snapshot) -> Vec<Need> {
        match self.local.port {
            0 => Vec::new(),
            _ => vec![Need::new(
                "address",
                format!("{} {}", self.class(), self.local),
                "an address of the machine, whose port is free",
            )],
        }
    }

    fn check(&self, number: DescriptionId, snapshot: &Snapshot, faults: &mut Faults) {
        obstacles::check(self, number, snapshot, faults);
    }

    fn each_inode(&mut self, f: &mut dyn FnMut(&mut u64)) {
        f(&mut self.inode);
        match &mut self.state {
            State::Connected {
                other: Some(other), ..
            } => f(other),
            State::Listening { pending, .. } => {
                pending
                    .iter_mut()
                    .filter_map(|p| p.inode.as_mut())
                    .for_each(f);
            }
            _ => {}
        }
    }

    fn shows_maker(&self) -> bool {
        true
    }

    /// This process makes them nonblocking.
    fn opened(&self) -> Opened {
        Opened::Unknown
    }

    fn not_replaceable(&self, by: &Path) -> Option<Obstacle> {
        Some(not_replaceable(&self.label(), by))
    }

    fn open(&self, place: &Place, plan: &mut Builder) -> Result<(), Vec<Obstacle>> {
        plan.inherit(place.at, Inherited::InetSocket(place.index));
        Ok(())
    }

    fn complete(&self, at: i32, _: Staging, _: &Snapshot, plan: &mut Builder) {
        filter::rebuild(&self.filter, at, &self.label(), plan);
        for option in self.options.iter().filter(|o| !options::is_early(o)) {
            option.rebuild(at, &self.label(), plan);
        }
    }
}

/// The snapshot's internet sockets, with their references.
pub fn all(snapshot: &Snapshot) -> impl Iterator<Item = (DescriptionId, &InetSocket)> {
    DescriptionId::each(&snapshot.descriptions).filter_map(|(at, d)| Some((at, d.kind.get()?)))
}
