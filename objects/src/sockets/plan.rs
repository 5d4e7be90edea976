//! All sockets of a snapshot, with the numbers and addresses for rebuilding them.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use super::peers::Names;
use super::peers::Ucred;
use super::unix::{Name, Role, Style, UnixSocket, sockaddr};
use crate::Snapshot;
use crate::files::Staging;
use crate::index::DescriptionId;

/// The sockets of a snapshot.
pub(super) struct Job<'a> {
    /// In the order of their descriptions, with the index of each.
    pub(super) all: Vec<(DescriptionId, &'a UnixSocket)>,
    /// Position in `all` by inode.
    by_inode: HashMap<u64, usize>,
    /// How each is created.
    pub(super) creations: Vec<Creation>,
    /// Temporary listening sockets, for connections whose listening socket has gone.
    pub(super) stand_ins: Vec<StandIn<'a>>,
    /// `O_PATH` descriptors for the files of names, by inode of the socket.
    files: HashMap<u64, usize>,
    staging: Staging,
    spare: usize,
    snapshot: &'a Snapshot,
    /// The credentials under which they are created.
    pub(super) names: Names,
}

/// How a socket is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Creation {
    /// socket(2).
    Alone,
    /// The first of a socketpair(2), with the position of the second.
    PairWith(usize),
    /// The second of that pair.
    Along,
    /// The same; then it disconnects from the first, a datagram socket, which stays connected to it.
    AlongAndOff,
    /// By a socketpair(2) whose other end is closed at once: a datagram socket that is not connected any more, but
    /// still reports the pair's creator.
    Severed,
    /// accept(2), with the position of the client and that of the listening socket.
    Accepted(usize, Door),
}

/// Where a connection is accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Door {
    /// At a socket of the job, by position.
    Listener(usize),
    /// At a temporary listening socket.
    StandIn(usize),
}

/// See [`Job::stand_ins`].
pub(super) struct StandIn<'a> {
    pub(super) style: Style,
    pub(super) name: &'a Name,
    number: usize,
}

impl<'a> Job<'a> {
    pub(super) fn of(snapshot: &'a Snapshot, staging: Staging) -> Self {
        let descriptions = DescriptionId::each(&snapshot.descriptions);
        let all: Vec<(DescriptionId, &UnixSocket)> = descriptions
            .filter_map(|(i, d)| Some((i, d.kind.get()?)))
            .collect();
        let by_inode = all.iter().enumerate().map(|(at, (_, s))| (s.inode, at));
        let mut job = Self {
            by_inode: by_inode.collect(),
            creations: vec![Creation::Alone; all.len()],
            all,
            stand_ins: Vec::new(),
            files: HashMap::new(),
            staging,
            spare: 0,
            snapshot,
            names: Names {
                root: snapshot.processes.first().map_or(0, |p| p.pid),
            },
        };
        job.decide_births();
        for (_, socket) in job.all.clone() {
            let file = socket.name.as_ref().and_then(|n| n.file.as_ref());
            if file.is_some() && !job.files.contains_key(&socket.inode) {
                job.files.insert(socket.inode, job.spare);
                job.spare += 1;
            }
        }
        job
    }

    /// The references of the snapshot have been checked (`inspect::references`).
    pub(super) fn position(&self, inode: u64) -> Option<usize> {
        self.by_inode.get(&inode).copied()
    }

    pub(super) fn socket(&self, position: usize) -> &'a UnixSocket {
        self.all[position].1
    }

    /// A process that has a socket, the best guess for its creator.
    pub(super) fn holder(&self, position: usize) -> Option<Ucred> {
        Ucred::holder(self.all[position].0, self.snapshot)
    }

    /// Staging number of a socket.
    pub(super) fn at(&self, position: usize) -> i32 {
        self.staging.of(self.all[position].0)
    }

    fn decide_births(&mut self) {
        let mut decided = HashSet::new();
        for at in 0..self.all.len() {
            let socket = self.socket(at);
            // What remains of a pair of datagram sockets after connect(2) and send(2) (`init_peercred` in
            // net/unix/af_unix.c).
            let paired = socket.style == Style::Datagram && socket.peer_credentials.is_some();
            if paired && self.creations[at] == Creation::Alone {
                self.creations[at] = Creation::Severed;
            }
            let Some(other) = socket.peer().and_then(|peer| self.position(peer)) else {
                continue;
            };
            let mutual = self.socket(other).peer() == Some(socket.inode);
            // Only socketpair(2) connects to a socket without a name.
            let left = socket.style == Style::Datagram && self.socket(other).name.is_none();
            if !(mutual || left) || other == at || decided.contains(&at) || decided.contains(&other)
            {
                continue;
            }
            decided.extend([at, other]);
            if !mutual {
                self.creations[at] = Creation::PairWith(other);
                self.creations[other] = Creation::AlongAndOff;
                continue;
            }
            let named = |at: usize| self.socket(at).name.is_some();
            if socket.style == Style::Datagram {
                let told = |at: usize| self.socket(at).peer_credentials;
                if !named(at) || !named(other) || (paired && told(at) == told(other)) {
                    self.creations[at] = Creation::PairWith(other);
                    self.creations[other] = Creation::Along;
                }
                continue;
            }
            match self.server(at, other) {
                None => {
                    self.creations[at] = Creation::PairWith(other);
                    self.creations[other] = Creation::Along;
                }
                Some(server) => {
                    let client = if server == at { other } else { at };
                    self.creations[server] = Creation::Accepted(client, self.door(server));
                }
            }
        }
    }

    /// Which of two connected sockets was accepted from a listening one, if any.
    fn server(&self, a: usize, b: usize) -> Option<usize> {
        let accepted = |at: &usize| self.socket(*at).name.as_ref().is_some_and(|n| !n.bound);
        let mut candidates = [a, b].into_iter().filter(accepted);
        let known = |at: &usize| self.listener(*at).is_some();
        candidates.clone().find(known).or_else(|| candidates.next())
    }

    /// The listening socket of the job with the name of an accepted one.
    fn listener(&self, accepted: usize) -> Option<usize> {
        let socket = self.socket(accepted);
        let name = socket.name.as_ref()?;
        self.all.iter().position(|(_, other)| {
            matches!(other.role, Role::Listening { .. })
                && other.style == socket.style
                && other.name.as_ref().is_some_and(|n| n.bytes == name.bytes)
        })
    }

    fn door(&mut self, accepted: usize) -> Door {
        if let Some(listener) = self.listener(accepted) {
            return Door::Listener(listener);
        }
        let socket = self.socket(accepted);
        let same = |s: &StandIn<'_>| {
            s.style == socket.style && Some(&s.name.bytes) == socket.name.as_ref().map(|n| &n.bytes)
        };
        if let Some(at) = self.stand_ins.iter().position(same) {
            return Door::StandIn(at);
        }
        if let Some(name) = &socket.name {
            self.stand_ins.push(StandIn {
                style: socket.style,
                name,
                number: self.spare,
            });
            self.spare += 2;
        }
        Door::StandIn(self.stand_ins.len() - 1)
    }

    /// Whether the plan binds the socket to its name; an accepted one inherits it.
    pub(super) fn binds(&self, position: usize) -> bool {
        self.socket(position).name.is_some()
            && !matches!(self.creations[position], Creation::Accepted(..))
    }

    /// Number of the descriptor that refers to a bound socket's file.
    pub(super) fn file_at(&self, position: usize) -> i32 {
        let spare = self.files.get(&self.socket(position).inode);
        self.staging.spare(spare.copied().unwrap_or(0))
    }

    /// Numbers of a stand-in and of its file.
    pub(super) fn stand_in_at(&self, stand_in: usize) -> (i32, i32) {
        let number = self.stand_ins[stand_in].number;
        (self.staging.spare(number), self.staging.spare(number + 1))
    }

    /// Number and address of a listening socket.
    pub(super) fn door_at(&self, door: Door) -> (i32, Vec<u8>) {
        match door {
            Door::Listener(at) => (self.at(at), self.address(at)),
            Door::StandIn(at) => {
                let (number, file) = self.stand_in_at(at);
                (number, reach(self.stand_ins[at].name, file))
            }
        }
    }

    /// The address of a bound socket while the plan runs.
    pub(super) fn address(&self, position: usize) -> Vec<u8> {
        match &self.socket(position).name {
            Some(name) => reach(name, self.file_at(position)),
            None => sockaddr(&[]),
        }
    }

    /// The files of bound sockets, which a restore creates anew.
    pub(super) fn present(&self) -> impl Iterator<Item = (usize, &'a PathBuf)> {
        (0..self.all.len()).filter_map(|at| {
            let name = self.socket(at).name.as_ref().filter(|_| self.binds(at))?;
            Some((at, name.file.as_ref()?.now.as_ref()?))
        })
    }
}

/// A file may be unlinked by now, or its path too long: it is addressed through its descriptor.
fn reach(name: &Name, file_at: i32) -> Vec<u8> {
    match name.file {
        Some(_) => sockaddr(format!("/proc/self/fd/{file_at}").as_bytes()),
        None => sockaddr(&name.bytes),
    }
}
