//! Socket options.

use ckpt_tracer::capabilities::Use;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::sys;
use super::unix::Style;
use crate::restore::plan::Builder;

/// An option of `SOL_SOCKET` that is not as a new socket has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketOption {
    /// `SO_*`.
    pub number: i32,
    /// What getsockopt(2) tells.
    pub value: ByteBuf,
}

const SO_PASSPIDFD: i32 = 76;
const SO_PASSRIGHTS: i32 = 83;
const SO_INQ: i32 = 84;

/// Options that are kept, with the length of their value.
pub const KEPT: &[(i32, &str, usize)] = &[
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
];

/// What differs from a new socket of the same kind.
pub fn capture(socket: &OwnedFd, style: Style) -> Vec<SocketOption> {
    let Ok(fresh) = sys::socket(style.number()) else {
        return Vec::new();
    };
    let kept = KEPT.iter().filter_map(|(number, _, len)| {
        let value = sys::option(socket, *number).ok()?;
        let differs = value.len() == *len && sys::option(&fresh, *number).ok()? != value;
        differs.then(|| SocketOption {
            number: *number,
            value: ByteBuf::from(value),
        })
    });
    kept.collect()
}

impl SocketOption {
    /// `SO_SNDBUF` of a new socket.
    pub fn send_room_of_new() -> Option<Self> {
        let fresh = sys::socket(Style::Stream.number()).ok()?;
        Some(Self {
            number: libc::SO_SNDBUF,
            value: ByteBuf::from(sys::option(&fresh, libc::SO_SNDBUF).ok()?),
        })
    }

    /// Sets it on the socket at a number.
    pub fn rebuild(&self, at: i32, label: &str, plan: &mut Builder) {
        let Some((_, name, _)) = KEPT.iter().find(|(number, ..)| *number == self.number) else {
            return;
        };
        let object = || format!("{name} of the {label}");
        let (mut number, mut value) = (self.number, self.value.to_vec());
        if [libc::SO_SNDBUF, libc::SO_RCVBUF].contains(&number) {
            // The kernel doubles what it is given, and tells the doubled value.
            let doubled = value.get(..4).and_then(|v| v.try_into().ok());
            let half = i32::from_ne_bytes(doubled.unwrap_or_default()) / 2;
            value = half.to_ne_bytes().to_vec();
            if half > largest(number) {
                number = match number {
                    libc::SO_SNDBUF => libc::SO_SNDBUFFORCE,
                    _ => libc::SO_RCVBUFFORCE,
                };
                let data = plan.data(&value);
                let args = operands(at, number, data, value.len());
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
        let args = operands(at, number, data, value.len());
        if [libc::SO_MARK, libc::SO_PRIORITY].contains(&number) {
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

fn operands(at: i32, number: i32, data: u64, len: usize) -> [u64; 5] {
    [
        at as u64,
        libc::SOL_SOCKET as u64,
        number as u64,
        data,
        len as u64,
    ]
}

/// What an unprivileged process may ask for.
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

/// Room for everything that is going to be sent, until the options are set. Where we may not
/// have it, what the socket has from the start is mostly enough: the messages fit once.
pub fn make_room(at: i32, bytes: usize, plan: &mut Builder) {
    let wanted = i32::try_from(bytes.saturating_mul(2) + (1 << 20)).unwrap_or(i32::MAX / 2);
    let data = plan.data(&wanted.to_ne_bytes());
    for number in [libc::SO_SNDBUF, libc::SO_SNDBUFFORCE] {
        let args = operands(at, number, data, 4);
        plan.attempt(libc::SYS_setsockopt, &args, || {
            "room for unread data".into()
        });
    }
}
