//! Options of internet sockets: socket(7), tcp(7), ip(7), ipv6(7), udp(7).

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use ckpt_sys::sockets;
use serde_bytes::ByteBuf;

use super::super::options::SocketOption;
use super::judge::tcp;
use super::{Protocol, closed};

/// When an option is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// Before bind(2), or on an accepted socket at once: it decides about addresses, or concerns what arrives.
    Early,
    /// When the socket is complete.
    Late,
    /// The same; it may need a capability, or something that this machine lacks.
    MayFail,
    /// When the socket is complete, if it is not connected: the kernel changes the value of a connected one.
    Unconnected,
}
use When::{Early, Late, MayFail, Unconnected};

const IP: i32 = libc::IPPROTO_IP;
const IPV6: i32 = libc::IPPROTO_IPV6;
const TCP: i32 = libc::IPPROTO_TCP;
const UDP: i32 = libc::IPPROTO_UDP;

/// Options of `SOL_SOCKET` that unix sockets do not have, with the length of their value.
pub(in super::super) const OF_ALL: &[(i32, &str, usize)] = &[
    (libc::SO_REUSEPORT, "SO_REUSEPORT", 4),
    (libc::SO_ZEROCOPY, "SO_ZEROCOPY", 4),
    (74, "SO_TXREHASH", 4),
];

/// `SO_BUF_LOCK`: 1 for `SO_SNDBUF`, 2 for `SO_RCVBUF`.
const SO_BUF_LOCK: i32 = 72;

/// Options of `SOL_SOCKET`, in the order in which they are set.
#[rustfmt::skip]
const SOCKET: &[(i32, When)] = &[
    (libc::SO_REUSEADDR, Late), (libc::SO_REUSEPORT, Early), (libc::SO_INCOMING_CPU, Unconnected),
    (libc::SO_DEBUG, Late), (libc::SO_DONTROUTE, Late), (libc::SO_BROADCAST, Late), (libc::SO_SNDBUF, Late),
    (libc::SO_RCVBUF, Late), (SO_BUF_LOCK, Late), (libc::SO_KEEPALIVE, Late), (libc::SO_OOBINLINE, Late),
    (libc::SO_LINGER, Late), (libc::SO_RCVLOWAT, Late), (libc::SO_RCVTIMEO, Late), (libc::SO_SNDTIMEO, Late),
    (libc::SO_TIMESTAMP, Early), (libc::SO_TIMESTAMPNS, Early), (63, Early), (64, Early), (libc::SO_TIMESTAMPING, Late),
    (65, Late), (libc::SO_MARK, Late), (libc::SO_RXQ_OVFL, Late), (libc::SO_PEEK_OFF, Late), (libc::SO_NO_CHECK, Late),
    (libc::SO_WIFI_STATUS, Late), (libc::SO_NOFCS, Late), (libc::SO_SELECT_ERR_QUEUE, Late), (libc::SO_BUSY_POLL, Late),
    (libc::SO_PREFER_BUSY_POLL, Late), (libc::SO_MAX_PACING_RATE, Late), (libc::SO_ZEROCOPY, Late),
    (libc::SO_TXTIME, Late), (75, Late), (82, Late), (74, Late), (libc::SO_LOCK_FILTER, Late),
];

/// Options of `SOL_SOCKET` that follow those of the protocols: the type of service sets the priority, and what concerns an
/// interface cannot be set when the socket is bound to another one.
const LAST: &[(i32, When)] = &[(libc::SO_PRIORITY, Late), (libc::SO_BINDTOIFINDEX, Early)];

/// Options of the protocols, in the order in which they are set. Not stored is what a socket only tells, what changes by
/// itself (`TCP_QUICKACK`), and memberships (`multicast.rs`).
#[rustfmt::skip]
const OF_PROTOCOLS: &[(i32, i32, &str, When)] = &[
    (IPV6, 26, "IPV6_V6ONLY", Early), (IP, 15, "IP_FREEBIND", Early), (IPV6, 78, "IPV6_FREEBIND", Early),
    (IP, 19, "IP_TRANSPARENT", Early), (IPV6, 75, "IPV6_TRANSPARENT", Early),
    (IP, 32, "IP_MULTICAST_IF", Early), (IP, 50, "IP_UNICAST_IF", Early), (IPV6, 17, "IPV6_MULTICAST_IF", Early),
    (IPV6, 76, "IPV6_UNICAST_IF", Early), (IP, 24, "IP_BIND_ADDRESS_NO_PORT", Late),
    (TCP, 1, "TCP_NODELAY", Late), (TCP, 2, "TCP_MAXSEG", Unconnected), (TCP, 4, "TCP_KEEPIDLE", Late),
    (TCP, 5, "TCP_KEEPINTVL", Late), (TCP, 6, "TCP_KEEPCNT", Late), (TCP, 7, "TCP_SYNCNT", Late),
    (TCP, 8, "TCP_LINGER2", Late), (TCP, 9, "TCP_DEFER_ACCEPT", Late), (TCP, 10, "TCP_WINDOW_CLAMP", Unconnected),
    (TCP, 13, "TCP_CONGESTION", MayFail), (TCP, 16, "TCP_THIN_LINEAR_TIMEOUTS", Late),
    (TCP, 18, "TCP_USER_TIMEOUT", Late), (TCP, 23, "TCP_FASTOPEN", Unconnected), (TCP, 25, "TCP_NOTSENT_LOWAT", Late),
    (TCP, 27, "TCP_SAVE_SYN", Late), (TCP, 30, "TCP_FASTOPEN_CONNECT", Unconnected),
    (TCP, 33, "TCP_FASTOPEN_KEY", Unconnected), (TCP, 34, "TCP_FASTOPEN_NO_COOKIE", Unconnected),
    (TCP, 36, "TCP_INQ", Late), (TCP, 37, "TCP_TX_DELAY", Late),
    (TCP, 44, "TCP_RTO_MAX_MS", MayFail), (TCP, 45, "TCP_RTO_MIN_US", MayFail),
    (TCP, 46, "TCP_DELACK_MAX_US", MayFail), (TCP, 3, "TCP_CORK", Late),
    (IP, 1, "IP_TOS", Late), (IP, 2, "IP_TTL", Late), (IP, 4, "IP_OPTIONS", MayFail), (IP, 6, "IP_RECVOPTS", Late),
    (IP, 7, "IP_RETOPTS", Late), (IP, 8, "IP_PKTINFO", Early), (IP, 10, "IP_MTU_DISCOVER", Late),
    (IP, 11, "IP_RECVERR", Late), (IP, 12, "IP_RECVTTL", Late), (IP, 13, "IP_RECVTOS", Late),
    (IP, 18, "IP_PASSSEC", Late), (IP, 20, "IP_RECVORIGDSTADDR", Late), (IP, 21, "IP_MINTTL", Late),
    (IP, 23, "IP_CHECKSUM", Late), (IP, 25, "IP_RECVFRAGSIZE", MayFail), (IP, 26, "IP_RECVERR_RFC4884", Late),
    (IP, 33, "IP_MULTICAST_TTL", MayFail), (IP, 34, "IP_MULTICAST_LOOP", Late),
    (IP, 49, "IP_MULTICAST_ALL", Late), (IP, 51, "IP_LOCAL_PORT_RANGE", Late),
    (IPV6, 2, "IPV6_2292PKTINFO", Early), (IPV6, 3, "IPV6_2292HOPOPTS", Late), (IPV6, 4, "IPV6_2292DSTOPTS", Late),
    (IPV6, 5, "IPV6_2292RTHDR", Late), (IPV6, 8, "IPV6_2292HOPLIMIT", Late), (IPV6, 11, "IPV6_FLOWINFO", Late),
    (IPV6, 16, "IPV6_UNICAST_HOPS", Late), 
    (IPV6, 18, "IPV6_MULTICAST_HOPS", MayFail), (IPV6, 19, "IPV6_MULTICAST_LOOP", Late),
    (IPV6, 23, "IPV6_MTU_DISCOVER", Late), (IPV6, 25, "IPV6_RECVERR", Late), (IPV6, 29, "IPV6_MULTICAST_ALL", Late),
    (IPV6, 30, "IPV6_ROUTER_ALERT_ISOLATE", Late), (IPV6, 31, "IPV6_RECVERR_RFC4884", Late),
    (IPV6, 33, "IPV6_FLOWINFO_SEND", Late), (IPV6, 49, "IPV6_RECVPKTINFO", Early), (IPV6, 51, "IPV6_RECVHOPLIMIT", Late),
    (IPV6, 53, "IPV6_RECVHOPOPTS", Late), (IPV6, 56, "IPV6_RECVRTHDR", Late), (IPV6, 58, "IPV6_RECVDSTOPTS", Late),
    (IPV6, 60, "IPV6_RECVPATHMTU", Late), (IPV6, 62, "IPV6_DONTFRAG", Late), (IPV6, 66, "IPV6_RECVTCLASS", Late),
    (IPV6, 67, "IPV6_TCLASS", Late), (IPV6, 70, "IPV6_AUTOFLOWLABEL", Late),
    (IPV6, 72, "IPV6_ADDR_PREFERENCES", MayFail), (IPV6, 73, "IPV6_MINHOPCOUNT", Late),
    (IPV6, 74, "IPV6_RECVORIGDSTADDR", Late), 
    (IPV6, 77, "IPV6_RECVFRAGSIZE", Late),
    (UDP, 10, "UDPLITE_SEND_CSCOV", Late), (UDP, 11, "UDPLITE_RECV_CSCOV", Late), (UDP, 100, "UDP_ENCAP", MayFail),
    (UDP, 101, "UDP_NO_CHECK6_TX", Late), (UDP, 102, "UDP_NO_CHECK6_RX", Late),
    (UDP, 103, "UDP_SEGMENT", Late), (UDP, 104, "UDP_GRO", Early), (UDP, 1, "UDP_CORK", Late),
];

/// The name of an option of a protocol.
pub(in super::super) fn name(level: i32, number: i32) -> Option<&'static str> {
    let mut all = OF_PROTOCOLS.iter();
    let found = all.find(|(l, n, ..)| (*l, *n) == (level, number));
    found.map(|(.., name, _)| *name)
}

/// Whether setting an option of a protocol may fail although it was set before.
pub(in super::super) fn may_be_refused(level: i32, number: i32) -> bool {
    when(level, number) == Some(MayFail)
}

/// Whether it is set before bind(2).
pub(super) fn is_early(option: &SocketOption) -> bool {
    when(option.level, option.number) == Some(Early)
}

/// Whether a record may have an option.
pub(super) fn is_known(option: &SocketOption) -> bool {
    when(option.level, option.number).is_some() && option.value.len() <= 64
}

fn when(level: i32, number: i32) -> Option<When> {
    if level == libc::SOL_SOCKET {
        let mut all = SOCKET.iter().chain(LAST);
        return all.find(|(n, _)| *n == number).map(|(_, when)| *when);
    }
    let mut all = OF_PROTOCOLS.iter();
    let found = all.find(|(l, n, ..)| (*l, *n) == (level, number));
    found.map(|(.., when)| *when)
}

/// The options of new sockets, by protocol and family.
#[derive(Default)]
pub(super) struct New(HashMap<(Protocol, i32), Values>);

/// Values by level and number.
type Values = HashMap<(i32, i32), Vec<u8>>;

impl New {
    fn of(&mut self, protocol: Protocol, family: i32) -> &Values {
        self.0.entry((protocol, family)).or_insert_with(|| {
            let number = protocol.number(family);
            let Ok(socket) = sockets::socket_of(family, protocol.kind(), number) else {
                return HashMap::new();
            };
            let of_all = SOCKET.iter().chain(LAST);
            let of_all = of_all.map(|(number, _)| (libc::SOL_SOCKET, *number));
            let others = OF_PROTOCOLS
                .iter()
                .map(|(level, number, ..)| (*level, *number));
            let value = |(level, number)| {
                Some((
                    (level, number),
                    sockets::option_of(level, &socket, number).ok()?,
                ))
            };
            of_all.chain(others).filter_map(value).collect()
        })
    }
}

/// The options that differ from a new socket's, in the order in which they are set. `SO_REUSEADDR` is always
/// among them.
pub(super) fn capture(
    socket: &OwnedFd,
    protocol: Protocol,
    family: i32,
    new: &mut New,
) -> Vec<SocketOption> {
    let fresh = new.of(protocol, family);
    let unconnected = match sockets::tcp_state(socket) {
        Ok(tcp::CLOSE) => closed::ended(socket).is_none(),
        Ok(state) => state == tcp::LISTEN,
        Err(_) => sockets::peer_address(socket).is_err(),
    };
    let of = |level: i32, number: i32| {
        let value = sockets::option_of(level, socket, number).ok()?;
        Some(SocketOption {
            level,
            number,
            value: ByteBuf::from(value),
        })
    };
    let differing = |level: i32, number: i32, when: When| {
        let option = of(level, number)?;
        // One that the program has not set may be shown as what the last connection had.
        let word = option.value.get(..4).and_then(|b| b.try_into().ok());
        let word = word.map_or(0, u32::from_ne_bytes);
        if (level, number) == (TCP, libc::TCP_MAXSEG) && !(88..=32767).contains(&word) {
            return None;
        }
        let new = fresh.get(&(level, number));
        let differs = new.is_some_and(|new| **new != *option.value);
        (differs && (when != Unconnected || unconnected)).then_some(option)
    };
    let mut kept: Vec<SocketOption> = of(libc::SOL_SOCKET, libc::SO_REUSEADDR)
        .into_iter()
        .collect();
    let locked = sockets::int_option(socket, SO_BUF_LOCK).unwrap_or(0);
    kept.extend(SOCKET.iter().filter_map(|(number, when)| match *number {
        // The kernel sizes the others itself.
        libc::SO_SNDBUF if locked & 1 == 0 => None,
        libc::SO_RCVBUF if locked & 2 == 0 => None,
        libc::SO_SNDBUF | libc::SO_RCVBUF => of(libc::SOL_SOCKET, *number),
        SO_BUF_LOCK if locked != 0 => of(libc::SOL_SOCKET, SO_BUF_LOCK),
        libc::SO_REUSEADDR => None,
        _ => differing(libc::SOL_SOCKET, *number, *when),
    }));
    for (level, number, _, when) in OF_PROTOCOLS {
        let of_groups = [(IP, 32), (IP, 33), (IPV6, 17), (IPV6, 18)].contains(&(*level, *number));
        let has = match *level {
            _ if of_groups && protocol == Protocol::Tcp => false,
            IP => true,
            IPV6 => family == libc::AF_INET6,
            TCP => protocol == Protocol::Tcp,
            _ => matches!(protocol, Protocol::Udp | Protocol::UdpLite),
        };
        if has {
            kept.extend(differing(*level, *number, *when));
        }
    }
    for (number, when) in LAST {
        kept.extend(differing(libc::SOL_SOCKET, *number, *when));
    }
    kept
}

impl SocketOption {
    /// Sets it on a socket of ours, unless it has that value.
    pub(super) fn set(&self, socket: &OwnedFd) -> nix::Result<()> {
        let now = sockets::option_of(self.level, socket, self.number);
        if now.is_ok_and(|now| *now == *self.value) {
            return Ok(());
        }
        sockets::set_option(self.level, socket, self.number, &self.value)
    }
}
