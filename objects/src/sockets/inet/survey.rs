//! All internet sockets of a job.

use std::collections::HashMap;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use ckpt_sys::sockets;
use ckpt_tracer::proc::fdlink::FdLink;
use ckpt_tracer::sock_diag::inet::{self as diag, InetSocket as Listed};
use nix::errno::Errno;

use super::super::{domain, family};
use super::judge::tcp;
use super::options::New;
use super::unread::Store;
use super::{Address, InetSocket, Protocol, State, closed, drain, judge};
use crate::error::{Obstacle, Result};
use crate::files::kind::Captured;
use crate::files::left::droppable;
use crate::files::{Kind, Look};
use crate::source::{Collector, Source};

/// What was found out about each socket.
#[derive(Debug, Default)]
pub struct Survey {
    verdicts: HashMap<u64, Verdict>,
}

/// Result for a socket.
#[derive(Debug)]
pub(super) enum Verdict {
    /// It can be captured.
    Inside(Box<InetSocket>),
    /// Its other end is outside the job.
    Outside(Box<Obstacle>),
    /// It cannot be captured.
    Refused(Box<Obstacle>),
}

impl Survey {
    /// The record of the socket with that inode, or the obstacle; `None` if it is no internet socket.
    pub fn verdict(&mut self, inode: u64) -> Captured {
        Some(match self.verdicts.remove(&inode)? {
            Verdict::Inside(socket) => Ok(Kind::from(*socket)),
            Verdict::Outside(obstacle) | Verdict::Refused(obstacle) => Err(obstacle),
        })
    }

    /// Whether the other end of a socket is outside the job, or it can never be captured.
    pub fn is_outside(&self, inode: u64) -> bool {
        match self.verdicts.get(&inode) {
            Some(Verdict::Outside(_)) => true,
            Some(Verdict::Refused(obstacle)) => !obstacle.passing,
            _ => false,
        }
    }

    /// Whether all that a socket refers to can be captured, too.
    fn is_whole(&self, socket: &InetSocket) -> bool {
        let inside = |inode: &u64| matches!(self.verdicts.get(inode), Some(Verdict::Inside(_)));
        match &socket.state {
            State::Connected { other, .. } => other.iter().all(inside),
            State::Listening { pending, .. } => {
                pending.iter().filter_map(|p| p.inode.as_ref()).all(inside)
            }
            State::Waiting { .. } => self.verdicts.values().any(|verdict| match verdict {
                Verdict::Inside(other) => other.awaits(socket.inode),
                _ => false,
            }),
            _ => true,
        }
    }

    /// A connection of which one end is refused is refused at the other one as well: the first may be dropped.
    fn refuse_halves(&mut self, live: &[Live<'_>]) {
        loop {
            let halves = live
                .iter()
                .filter(|socket| match self.verdicts.get(&socket.inode) {
                    Some(Verdict::Inside(record)) => !self.is_whole(record),
                    _ => false,
                });
            let halves: Vec<&Live<'_>> = halves.collect();
            if halves.is_empty() {
                return;
            }
            for socket in halves {
                let what = format!("{} whose other end cannot be captured", family(socket.copy));
                // Whether to try again depends on the other end.
                let obstacle = droppable(socket.look, socket.source, &what).passing();
                let verdict = Verdict::Refused(Box::new(obstacle));
                self.verdicts.insert(socket.inode, verdict);
            }
        }
    }
}

/// One socket of the job.
pub(super) struct Live<'a> {
    /// Our duplicate.
    pub(super) copy: &'a OwnedFd,
    /// Its inode.
    pub(super) inode: u64,
    /// Its protocol.
    pub(super) protocol: Protocol,
    look: &'a Look,
    source: &'a Source,
}

impl Live<'_> {
    /// `fd 3 of process 12 (name)`, for messages.
    pub(super) fn object(&self) -> String {
        self.look.object(self.source)
    }

    pub(super) fn refuse(&self, reason: impl Into<String>, remedy: &str) -> Verdict {
        Verdict::Refused(Box::new(Obstacle::new(self.object(), reason, remedy)))
    }

    /// A transient refusal.
    pub(super) fn refuse_for_now(&self, reason: impl Into<String>, remedy: &str) -> Verdict {
        let obstacle = Obstacle::new(self.object(), reason, remedy);
        Verdict::Refused(Box::new(obstacle.passing()))
    }

    /// The refusal of a socket with its other end outside the job.
    pub(super) fn outside(&self) -> Verdict {
        let what = format!("{} with its other end outside the job", family(self.copy));
        Verdict::Outside(Box::new(droppable(self.look, self.source, &what)))
    }

    pub(super) fn unsupported(&self, what: &str) -> Verdict {
        Verdict::Refused(Box::new(droppable(self.look, self.source, what)))
    }
}

/// Internet sockets of the network namespace.
pub(super) struct Table {
    /// All of them.
    pub(super) all: Vec<Listed>,
    /// Positions in `all`, by inode.
    by_inode: HashMap<u64, usize>,
    /// Positions of TCP sockets with a peer in `all`, by both addresses.
    by_pair: HashMap<Pair, usize>,
}

/// Own address and the peer's, [`Address::plain`].
pub(super) type Pair = ((IpAddr, u16), (IpAddr, u16));

impl Table {
    fn read(protocols: &[Protocol]) -> Result<Self> {
        let mut all = Vec::new();
        let mut tcp = 0;
        for protocol in protocols {
            all.extend(listed(*protocol)?);
            if *protocol == Protocol::Tcp {
                tcp = all.len();
            }
        }
        let mut table = Self {
            by_inode: HashMap::new(),
            by_pair: HashMap::new(),
            all,
        };
        for (at, socket) in table.all.iter().enumerate() {
            if socket.inode != 0 {
                table.by_inode.insert(socket.inode.into(), at);
            }
            if at < tcp && socket.remote.1 != 0 {
                let pair = (own(socket).plain(), far(socket).plain());
                // What is in TIME_WAIT gives way to a live socket.
                let before = table.by_pair.insert(pair, at);
                if let Some(before) = before.filter(|b| table.all[*b].inode != 0) {
                    table.by_pair.insert(pair, before);
                }
            }
        }
        Ok(table)
    }

    /// The entry of a socket.
    pub(super) fn of(&self, inode: u64) -> Option<&Listed> {
        self.by_inode.get(&inode).map(|at| &self.all[*at])
    }

    /// The other end of a connection.
    pub(super) fn other_end(&self, local: Address, peer: Address) -> Option<&Listed> {
        let at = self.by_pair.get(&(peer.plain(), local.plain()))?;
        Some(&self.all[*at])
    }
}

/// The sockets of a protocol, of both families; a family that the kernel lacks has none. Echo sockets are not listed.
pub(super) fn listed(protocol: Protocol) -> Result<Vec<Listed>> {
    let mut all = Vec::new();
    if protocol == Protocol::Icmp {
        return Ok(all);
    }
    for family in [libc::AF_INET, libc::AF_INET6] {
        match diag::dump(family, protocol.number(family)) {
            Err(ckpt_tracer::Error::Kernel {
                errno: Errno::ENOENT,
                ..
            }) if family == libc::AF_INET6 => {}
            found => all.extend(found?),
        }
    }
    Ok(all)
}

/// The own address of an entry.
pub(super) fn own(listed: &Listed) -> Address {
    Address::new(listed.local.0, listed.local.1)
}

/// The address of its other end.
pub(super) fn far(listed: &Listed) -> Address {
    Address::new(listed.remote.0, listed.remote.1)
}

/// Whether connections to an address arrive at that socket.
pub(super) fn listens(listed: &Listed, at: Address) -> bool {
    let ((ip, port), (to, of)) = (own(listed).plain(), at.plain());
    listed.state == tcp::LISTEN && port == of && (ip == to || ip.is_unspecified())
}

/// Captures the internet sockets of the job, which stay as they are.
///
/// # Errors
/// [`crate::Error::Tracer`] where the kernel does not list sockets.
pub fn survey(looks: &[Look], sources: &[&Source], collector: &mut Collector) -> Result<Survey> {
    let mut survey = Survey::default();
    let mut live = Vec::new();
    let network = closed::network();
    for look in looks {
        if !matches!(look.link, FdLink::Socket(_)) || look.is_path() {
            continue;
        }
        let internet = [libc::AF_INET, libc::AF_INET6].map(Some);
        if !internet.contains(&domain(&look.copy)) {
            continue;
        }
        let kind = sockets::int_option(&look.copy, libc::SO_TYPE).unwrap_or(0);
        let protocol = sockets::int_option(&look.copy, libc::SO_PROTOCOL).ok();
        let protocol = protocol.and_then(Protocol::of).filter(|p| p.kind() == kind);
        let source = sources[look.process];
        let ours = closed::is_of(network.as_deref(), &look.copy);
        let Some(protocol) = protocol.filter(|_| ours) else {
            let what = match ours {
                true => family(&look.copy),
                false => "a socket of another network namespace".into(),
            };
            let refused = Verdict::Refused(Box::new(droppable(look, source, &what)));
            survey.verdicts.insert(look.stat.st_ino, refused);
            continue;
        };
        live.push(Live {
            copy: &look.copy,
            inode: look.stat.st_ino,
            protocol,
            look,
            source,
        });
    }
    if live.is_empty() {
        return Ok(survey);
    }
    let protocols = Protocol::ALL.into_iter();
    let protocols = protocols.filter(|p| live.iter().any(|l| l.protocol == *p));
    let protocols: Vec<Protocol> = protocols.collect();
    let mut table = Table::read(&protocols)?;
    let mut stuck = HashMap::new();
    if collector.frozen() {
        let drained = drain::drain(&live, &table);
        if drained.any {
            table = Table::read(&protocols)?;
        }
        stuck = drained.stuck;
    }
    let inodes: HashMap<u64, usize> = live
        .iter()
        .enumerate()
        .map(|(at, l)| (l.inode, at))
        .collect();
    let (mut store, mut new) = (Store::default(), New::default());
    for socket in &live {
        let verdict = match stuck.remove(&socket.inode) {
            Some(bytes) => socket.refuse_for_now(
                format!(
                    "is {} to which {bytes} bytes are on their way that do not arrive",
                    family(socket.copy)
                ),
                "let the program read from it before the checkpoint",
            ),
            None => judge::judge(socket, &table, &inodes, (&mut store, &mut new), collector),
        };
        survey.verdicts.insert(socket.inode, verdict);
    }
    survey.refuse_halves(&live);
    store.finish(collector);
    Ok(survey)
}
