//! Memberships in multicast groups, ip(7) and ipv6(7).
//!
//! No call lists the groups of a socket. `/proc/net/igmp` and `igmp6` list those of all interfaces, and for each of them
//! the socket tells its filter, or that it is not a member (`MCAST_MSFILTER`).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;

use ckpt_sys::sockets;
use serde::{Deserialize, Serialize};

use super::{Address, Protocol};

/// A membership.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// The group.
    pub group: IpAddr,
    /// Index of the interface.
    pub interface: u32,
    /// Whether the sources are those from which nothing is wanted; otherwise only theirs is.
    pub exclude: bool,
    /// Sources.
    pub sources: Vec<IpAddr>,
}

const MCAST_JOIN_GROUP: i32 = 42;
const MCAST_MSFILTER: i32 = 48;
/// `MCAST_EXCLUDE`, `MCAST_INCLUDE`.
const EXCLUDE: u32 = 0;
const INCLUDE: u32 = 1;
/// Bytes of `struct sockaddr_storage`.
const STORAGE: usize = 128;
/// Sources that are asked for (`net.ipv4.igmp_max_msf` is 10).
const SOURCES: usize = 64;

fn level(group: IpAddr) -> i32 {
    match group {
        IpAddr::V4(_) => libc::IPPROTO_IP,
        IpAddr::V6(_) => libc::IPPROTO_IPV6,
    }
}

fn storage(ip: IpAddr) -> Vec<u8> {
    let mut bytes = Address::new(ip, 0).sockaddr();
    bytes.resize(STORAGE, 0);
    bytes
}

/// `struct group_req`, or the beginning of `struct group_filter`.
fn request(group: IpAddr, interface: u32) -> Vec<u8> {
    let mut bytes = u64::from(interface).to_ne_bytes().to_vec();
    bytes.extend(storage(group));
    bytes
}

/// The memberships of a datagram socket.
pub(super) fn capture(socket: &OwnedFd, protocol: Protocol, family: i32) -> Vec<Membership> {
    if protocol == Protocol::Tcp {
        return Vec::new();
    }
    let mut candidates = of_interfaces_v4();
    if family == libc::AF_INET6 {
        candidates.extend(of_interfaces_v6());
    }
    let asked = candidates.into_iter();
    asked
        .filter_map(|(interface, group)| ask(socket, group, interface))
        .collect()
}

fn ask(socket: &OwnedFd, group: IpAddr, interface: u32) -> Option<Membership> {
    let mut filter = request(group, interface);
    let counts = filter.len();
    filter.extend_from_slice(&INCLUDE.to_ne_bytes());
    filter.extend_from_slice(&(SOURCES as u32).to_ne_bytes());
    filter.resize(counts + 8 + SOURCES * STORAGE, 0);
    sockets::exchange_option(level(group), socket, MCAST_MSFILTER, &mut filter).ok()?;
    let word = |at: usize| Some(u32::from_ne_bytes(filter.get(at..at + 4)?.try_into().ok()?));
    let count = (word(counts + 4)? as usize).min(SOURCES);
    let sources = filter[counts + 8..].chunks_exact(STORAGE).take(count);
    Some(Membership {
        group,
        interface,
        exclude: word(counts)? == EXCLUDE,
        sources: sources
            .filter_map(|s| Some(Address::parse(s)?.ip))
            .collect(),
    })
}

/// Interface and group of each line of `/proc/net/igmp`: lines of groups follow that of their interface.
fn of_interfaces_v4() -> Vec<(u32, IpAddr)> {
    let text = std::fs::read_to_string("/proc/net/igmp").unwrap_or_default();
    let (mut interface, mut found) = (0, Vec::new());
    for line in text.lines().skip(1) {
        let first = line.split_whitespace().next().unwrap_or("");
        if !line.starts_with('\t') {
            interface = first.parse().unwrap_or(0);
        } else if let Ok(group) = u32::from_str_radix(first, 16) {
            found.push((interface, Ipv4Addr::from(group.to_ne_bytes()).into()));
        }
    }
    found
}

/// The same of `/proc/net/igmp6`, which has both in each line.
fn of_interfaces_v6() -> Vec<(u32, IpAddr)> {
    let text = std::fs::read_to_string("/proc/net/igmp6").unwrap_or_default();
    let of = |line: &str| {
        let mut words = line.split_whitespace();
        let interface = words.next()?.parse().ok()?;
        let group = u128::from_str_radix(words.nth(1)?, 16).ok()?;
        Some((interface, Ipv6Addr::from(group.to_be_bytes()).into()))
    };
    text.lines().filter_map(of).collect()
}

impl Membership {
    /// Joins the group.
    ///
    /// # Errors
    /// `ENODEV` where the interface is missing, and others of setsockopt(2).
    pub(super) fn join(&self, socket: &OwnedFd) -> nix::Result<()> {
        let level = level(self.group);
        let mut filter = request(self.group, self.interface);
        sockets::set_option(level, socket, MCAST_JOIN_GROUP, &filter)?;
        if self.exclude && self.sources.is_empty() {
            return Ok(());
        }
        let mode = if self.exclude { EXCLUDE } else { INCLUDE };
        filter.extend_from_slice(&mode.to_ne_bytes());
        filter.extend_from_slice(&(self.sources.len() as u32).to_ne_bytes());
        filter.extend(self.sources.iter().flat_map(|ip| storage(*ip)));
        sockets::set_option(level, socket, MCAST_MSFILTER, &filter)
    }
}

impl fmt::Display for Membership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of interface {}", self.group, self.interface)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    #[test]
    fn memberships_are_found_and_joined() {
        let group: Ipv4Addr = "239.1.2.3".parse().unwrap();
        let made = || UdpSocket::bind("127.0.0.1:0").expect("there is a loopback");
        let (member, other) = (made(), made());
        member
            .join_multicast_v4(&group, &Ipv4Addr::LOCALHOST)
            .expect("loopback has groups");
        let of = |socket: &UdpSocket| {
            let socket: OwnedFd = socket.try_clone().unwrap().into();
            capture(&socket, Protocol::Udp, libc::AF_INET)
        };
        let found = of(&member);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].group == IpAddr::V4(group) && found[0].exclude);
        assert!(of(&other).is_empty());
        let with = Membership {
            sources: vec![Ipv4Addr::new(10, 0, 0, 7).into()],
            exclude: false,
            ..found[0].clone()
        };
        with.join(&other.try_clone().unwrap().into())
            .expect("the interface is there");
        assert_eq!(of(&other), [with]);
    }
}
