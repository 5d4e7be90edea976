//! Sockets.
//!
//! Unix domain sockets are captured together ([`survey`]), since the state of one depends on its peer, and rebuilt
//! together ([`rebuild`]). The record of one is in [`unix`]. Other families are refused.

use std::os::fd::AsFd;
use std::path::Path;

use ckpt_sys::sockets;
use nix::errno::Errno;

pub mod filter;
pub mod inet;
mod made;
pub mod names;
pub mod netlink;
mod offset;
pub mod options;
pub mod peers;
mod plan;
pub mod queue;
pub mod rebuild;
pub mod survey;
mod transfer;
pub mod unix;
pub mod urgent;

pub use made::Made;

use crate::error::Obstacle;
use crate::files::outside::Outside;
use crate::files::{Description, Kind};
use crate::text::Shown;
use survey::{Survey, Verdict};

/// Whether a descriptor of ours is for a unix domain socket.
pub fn is_unix(fd: &impl AsFd) -> bool {
    domain(fd) == Some(libc::AF_UNIX)
}

/// The family of a socket, `AF_*`.
pub fn domain(fd: &impl AsFd) -> Option<i32> {
    sockets::int_option(fd, libc::SO_DOMAIN).ok()
}

/// The family of a socket, for messages: `an IPv4 TCP socket`.
pub fn family(fd: &impl AsFd) -> String {
    let domain = match sockets::int_option(fd, libc::SO_DOMAIN) {
        Ok(domain) => domain,
        Err(Errno::EBADF) => return "a socket opened with O_PATH".into(),
        Err(_) => return "a socket".into(),
    };
    let kind = sockets::int_option(fd, libc::SO_TYPE).unwrap_or(0);
    let internet = match kind {
        libc::SOCK_STREAM => "TCP",
        libc::SOCK_DGRAM => "UDP",
        _ => "raw",
    };
    match domain {
        libc::AF_INET => format!("an IPv4 {internet} socket"),
        libc::AF_INET6 => format!("an IPv6 {internet} socket"),
        libc::AF_NETLINK => "a netlink socket".into(),
        libc::AF_PACKET => "a packet socket".into(),
        libc::AF_VSOCK => "a vsock socket".into(),
        libc::AF_ALG => "a socket of the kernel's cryptography (AF_ALG)".into(),
        libc::AF_UNIX => "a unix socket".into(),
        other => format!("a socket of family {other}"),
    }
}

/// Why `--fd` cannot replace a socket.
fn not_replaceable(label: &str, by: &Path) -> Obstacle {
    Obstacle::new(
        format!("the {label}"),
        format!(
            "is rebuilt with everything connected to it and cannot be replaced by {}",
            by.shown()
        ),
        "leave that --fd out",
    )
}

/// Whether the process of a `/proc/PID` directory is stopped because we trace it.
pub fn is_held(status: &ckpt_tracer::proc::status::Status) -> bool {
    let ours = format!("/proc/self/task/{}", status.tracer_pid);
    status.tracer_pid != 0 && Path::new(&ours).exists()
}

/// Whether a file may be held by an unread message only: not if it becomes a descriptor of `restore` by its number,
/// nor if opening it waits for processes.
pub fn may_be_in_flight(
    kind: Result<Kind, Box<Obstacle>>,
    first: Option<i32>,
) -> Result<Kind, Box<Obstacle>> {
    let what = match kind {
        Ok(kind) if kind.get::<Outside>().is_some() => kind.label(),
        Ok(kind) if kind.file().is_late(first) => {
            format!(
                "{}, which can be opened only when all processes are there",
                kind.label()
            )
        }
        Ok(other) => return Ok(other),
        Err(obstacle) => {
            return Err(Box::new(Obstacle {
                object: "a file that is in flight between sockets".into(),
                ..*obstacle
            }));
        }
    };
    Err(Box::new(Obstacle::new(
        "a file that is in flight between sockets",
        format!("is {what}, which is not supported"),
        "let the program receive it before the checkpoint",
    )))
}

impl Survey {
    /// The kind of the description with that number. `first` is the index in the snapshot of number 0; `None` if it
    /// is not a unix domain socket. `outside` decides for a socket whose peer is outside the job.
    pub fn kind(
        &mut self,
        number: usize,
        first: usize,
        outside: impl FnOnce(Obstacle) -> Result<Kind, Box<Obstacle>>,
    ) -> Option<Result<Kind, Box<Obstacle>>> {
        Some(match self.verdicts.remove(&number)? {
            Verdict::Inside(mut socket) => {
                for message in &mut socket.queue {
                    message.rights.iter_mut().for_each(|n| n.0 += first);
                }
                Ok(Kind::from(*socket))
            }
            Verdict::Outside(obstacle) => outside(*obstacle),
            Verdict::Refused(obstacle) => Err(obstacle),
        })
    }

    /// Descriptions of sockets that are closed, which follow all others.
    pub fn ghosts(&mut self) -> impl Iterator<Item = Description> {
        std::mem::take(&mut self.ghosts)
            .into_iter()
            .map(|ghost| Description {
                kind: ghost.into(),
                flags: libc::O_RDWR as u32,
                owner: None,
                made_by: None,
                locks: Vec::new(),
            })
    }
}
