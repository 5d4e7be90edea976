//! Socket options.

use ckpt_sys::sockets;
use ckpt_tracer::capabilities::Use;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::unix::Style;
use crate::plan::Builder;

/// An option that differs from a new socket's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketOption {
    /// `SOL_SOCKET`, or a protocol (`IPPROTO_TCP` …).
    #[serde(default = "of_all", skip_serializing_if = "is_of_all")]
    pub level: i32,
    /// `SO_*`, or `TCP_*`, `IP_*` …
    pub number: i32,
    /// The value from getsockopt(2).
    pub value: ByteBuf,
}

fn of_all() -> i32 {
    libc::SOL_SOCKET
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_of_all(level: &i32) -> bool {
    *level == libc::SOL_SOCKET
}

const SO_TIMESTAMP_NEW: i32 = 63;
const SO_TIMESTAMPNS_NEW: i32 = 64;
const SO_TIMESTAMPING_NEW: i32 = 65;
const SO_BUF_LOCK: i32 = 72;
const SO_RCVMARK: i32 = 75;
const SO_PASSPIDFD: i32 = 76;
const SO_RCVPRIORITY: i32 = 82;
const SO_PASSRIGHTS: i32 = 83;
const SO_INQ: i32 = 84;

const BUFFERS: [i32; 2] = [libc::SO_SNDBUF, libc::SO_RCVBUF];

/// Options that may need a capability. Others never do.
const PRIVILEGED: &[i32] = &[
    libc::SO_DEBUG,
    libc::SO_PRIORITY,
    libc::SO_MARK,
    SO_RCVMARK,
    libc::SO_BUSY_POLL,
    libc::SO_PREFER_BUSY_POLL,
    libc::SO_TXTIME,
];

/// Stored options, with the length of their value: all that a unix socket supports (`sk_setsockopt`, net/core/sock.c;
/// `unix_setsockopt`, net/unix/af_unix.c) and reports, except filters. Set in this order.
pub const KEPT: &[(i32, &str, usize)] = &[
    (libc::SO_DEBUG, "SO_DEBUG", 4),
    (libc::SO_REUSEADDR, "SO_REUSEADDR", 4),
    (libc::SO_DONTROUTE, "SO_DONTROUTE", 4),
    (libc::SO_BROADCAST, "SO_BROADCAST", 4),
    (libc::SO_SNDBUF, "SO_SNDBUF", 4),
    (libc::SO_RCVBUF, "SO_RCVBUF", 4),
    (libc::SO_KEEPALIVE, "SO_KEEPALIVE", 4),
    (libc::SO_OOBINLINE, "SO_OOBINLINE", 4),
    (libc::SO_PRIORITY, "SO_PRIORITY", 4),
    (libc::SO_LINGER, "SO_LINGER", 8),
    (libc::SO_PASSCRED, "SO_PASSCRED", 4),
    (libc::SO_RCVLOWAT, "SO_RCVLOWAT", 4),
    (libc::SO_RCVTIMEO, "SO_RCVTIMEO", 16),
    (libc::SO_SNDTIMEO, "SO_SNDTIMEO", 16),
    (libc::SO_TIMESTAMP, "SO_TIMESTAMP", 4),
    (libc::SO_PASSSEC, "SO_PASSSEC", 4),
    (libc::SO_TIMESTAMPNS, "SO_TIMESTAMPNS", 4),
    (libc::SO_MARK, "SO_MARK", 4),
    (libc::SO_RXQ_OVFL, "SO_RXQ_OVFL", 4),
    (libc::SO_PEEK_OFF, "SO_PEEK_OFF", 4),
    (SO_PASSPIDFD, "SO_PASSPIDFD", 4),
    (SO_PASSRIGHTS, "SO_PASSRIGHTS", 4),
    (SO_INQ, "SO_INQ", 4),
    (libc::SO_NO_CHECK, "SO_NO_CHECK", 4),
    (SO_TIMESTAMP_NEW, "SO_TIMESTAMP_NEW", 4),
    (SO_TIMESTAMPNS_NEW, "SO_TIMESTAMPNS_NEW", 4),
    (libc::SO_TIMESTAMPING, "SO_TIMESTAMPING", 8),
    (SO_TIMESTAMPING_NEW, "SO_TIMESTAMPING_NEW", 8),
    (libc::SO_WIFI_STATUS, "SO_WIFI_STATUS", 4),
    (libc::SO_NOFCS, "SO_NOFCS", 4),
    (libc::SO_LOCK_FILTER, "SO_LOCK_FILTER", 4),
    (libc::SO_SELECT_ERR_QUEUE, "SO_SELECT_ERR_QUEUE", 4),
    (libc::SO_BUSY_POLL, "SO_BUSY_POLL", 4),
    (libc::SO_PREFER_BUSY_POLL, "SO_PREFER_BUSY_POLL", 4),
    (libc::SO_MAX_PACING_RATE, "SO_MAX_PACING_RATE", 8),
    (libc::SO_INCOMING_CPU, "SO_INCOMING_CPU", 4),
    (libc::SO_TXTIME, "SO_TXTIME", 8),
    (libc::SO_BINDTOIFINDEX, "SO_BINDTOIFINDEX", 4),
    (SO_RCVMARK, "SO_RCVMARK", 4),
    (SO_RCVPRIORITY, "SO_RCVPRIORITY", 4),
    // Which buffers the program has set: setting one locks it.
    (SO_BUF_LOCK, "SO_BUF_LOCK", 4),
];

/// The options that differ from a new socket of the same family and type.
pub fn capture(socket: &OwnedFd, family: i32, kind: i32) -> Vec<SocketOption> {
    let Ok(fresh) = sockets::socket(family, kind) else {
        return Vec::new();
    };
    let mut kept: Vec<SocketOption> = Vec::new();
    for (number, _, len) in KEPT {
        let Ok(value) = sockets::option(socket, *number) else {
            continue;
        };
        // Setting a buffer locks it.
        let follows = *number == SO_BUF_LOCK && kept.iter().any(|o| BUFFERS.contains(&o.number));
        let differs = || sockets::option(&fresh, *number).is_ok_and(|new| new != value);
        if value.len() == *len && (follows || differs()) {
            kept.push(SocketOption {
                level: libc::SOL_SOCKET,
                number: *number,
                value: ByteBuf::from(value),
            });
        }
    }
    kept
}

impl SocketOption {
    /// The send buffer of a new socket, to be set after [`make_room`].
    pub fn send_room_of_new() -> Vec<Self> {
        let Ok(fresh) = sockets::socket(libc::AF_UNIX, Style::Stream.number()) else {
            return Vec::new();
        };
        let numbers = [libc::SO_SNDBUF, SO_BUF_LOCK].into_iter();
        let options = numbers.filter_map(|number| {
            let value = ByteBuf::from(sockets::option(&fresh, number).ok()?);
            Some(Self {
                level: libc::SOL_SOCKET,
                number,
                value,
            })
        });
        options.collect()
    }

    /// Its name; `None` if it is not stored.
    pub(super) fn name(&self) -> Option<&'static str> {
        if self.level != libc::SOL_SOCKET {
            return super::inet::options::name(self.level, self.number);
        }
        let all = KEPT.iter().chain(super::inet::options::OF_ALL);
        let mut all = all.filter(|(number, ..)| *number == self.number);
        all.next().map(|(_, name, _)| *name)
    }

    /// Sets it on the socket with that descriptor number.
    pub fn rebuild(&self, at: i32, label: &str, plan: &mut Builder) {
        let Some(name) = self.name() else {
            return;
        };
        let object = || format!("{name} of the {label}");
        let (mut number, mut value) = (self.number, self.value.to_vec());
        let of_all = self.level == libc::SOL_SOCKET;
        if of_all && BUFFERS.contains(&number) {
            // The kernel doubles the value that it is given, and reports the doubled one.
            let doubled = value.get(..4).and_then(|v| v.try_into().ok());
            let half = i32::from_ne_bytes(doubled.unwrap_or_default()) / 2;
            value = half.to_ne_bytes().to_vec();
            if half > largest(number) {
                number = match number {
                    libc::SO_SNDBUF => libc::SO_SNDBUFFORCE,
                    _ => libc::SO_RCVBUFFORCE,
                };
                let data = plan.data(&value);
                let args = operands(at, self.level, number, data, value.len());
                let warning = format!(
                    "{} is smaller than it was: it is above this system's limit, and setting it \
                     needs {}",
                    object(),
                    Use::SocketBuffers
                );
                return plan.try_syscall(libc::SYS_setsockopt, &args, &warning);
            }
        }
        let data = plan.data(&value);
        let args = operands(at, self.level, number, data, value.len());
        if !of_all && super::inet::options::may_be_refused(self.level, number) {
            let warning = format!("{} cannot be set here and is not set again", object());
            plan.try_syscall(libc::SYS_setsockopt, &args, &warning);
        } else if of_all && PRIVILEGED.contains(&number) {
            let warning = format!(
                "{} needs {} and is not set again",
                object(),
                Use::SocketMark
            );
            plan.try_syscall(libc::SYS_setsockopt, &args, &warning);
        } else {
            plan.syscall(libc::SYS_setsockopt, &args, object);
        }
    }
}

fn operands(at: i32, level: i32, number: i32, data: u64, len: usize) -> [u64; 5] {
    [at as u64, level as u64, number as u64, data, len as u64]
}

/// The largest value without privilege.
fn largest(number: i32) -> i32 {
    let which = match number {
        libc::SO_SNDBUF => "wmem_max",
        _ => "rmem_max",
    };
    let text = std::fs::read_to_string(format!("/proc/sys/net/core/{which}"));
    text.ok()
        .and_then(|t| t.trim().parse().ok())
        .unwrap_or(212_992)
}

/// Enlarges the send buffer for everything that will be sent, until the options are set. If not permitted, the
/// default usually suffices: the messages fitted once.
pub fn make_room(at: i32, bytes: usize, plan: &mut Builder) {
    let wanted = i32::try_from(bytes.saturating_mul(2) + (1 << 20)).unwrap_or(i32::MAX / 2);
    let data = plan.data(&wanted.to_ne_bytes());
    for number in [libc::SO_SNDBUF, libc::SO_SNDBUFFORCE] {
        let args = operands(at, libc::SOL_SOCKET, number, data, 4);
        plan.attempt(libc::SYS_setsockopt, &args, || {
            "room for unread data".into()
        });
    }
}
