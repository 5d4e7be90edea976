//! Creates the internet sockets of a snapshot in this process, which the restored job inherits.
//!
//! The order follows from what bind(2) permits: two sockets may have one port if both have `SO_REUSEADDR` and neither
//! listens. So connections are made first, at temporary listening sockets, one port after the other; then the job's own
//! listening sockets take their ports. `SO_REUSEADDR` gets the program's value last.

use std::collections::HashMap;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use ckpt_image::Reader;
use ckpt_sys::sockets;
use nix::errno::Errno;

use super::{Address, InetSocket, Protocol, State, Unread, all, options};
use crate::error::{Error, Result};
use crate::files::kind::OpenFile;
use crate::index::DescriptionId;
use crate::memory::space::fill;
use crate::{Snapshot, SpaceId};

mod datagrams;
mod step;
mod stream;
mod time_wait;

use step::{Door, NOWHERE, acknowledged, at_port, becomes, bind, dial, reuse, set_reuse};

/// How long a step may take that the kernel does at once on an idle machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// The sockets that were made.
#[derive(Debug, Default)]
pub struct Made {
    all: HashMap<DescriptionId, OwnedFd>,
    /// What could not be restored exactly, one sentence each.
    pub warnings: Vec<String>,
}

impl Made {
    /// Takes the socket of a description.
    pub fn take(&mut self, index: DescriptionId) -> Option<OwnedFd> {
        self.all.remove(&index)
    }
}

/// Creates all of them. If one cannot be made, all are closed again.
///
/// # Errors
/// [`Error::Object`](crate::error::Error) with the socket and the reason.
pub fn make(snapshot: &Snapshot, image: &Reader) -> Result<Made> {
    let mut maker = Maker {
        sockets: all(snapshot).collect(),
        by_description: all(snapshot).collect(),
        by_inode: all(snapshot)
            .map(|(at, socket)| (socket.inode, at))
            .collect(),
        made: Made::default(),
        unread: HashMap::new(),
        ends: HashMap::new(),
    };
    if maker.sockets.is_empty() {
        return Ok(maker.made);
    }
    maker.load(snapshot, image)?;
    time_wait::clear(&maker.sockets);
    maker.ended()?;
    maker.connections()?;
    maker.bound()?;
    maker.waiting()?;
    maker.send_all()?;
    maker.finish()?;
    maker.datagrams()?;
    Ok(maker.made)
}

struct Maker<'a> {
    sockets: Vec<(DescriptionId, &'a InetSocket)>,
    by_description: HashMap<DescriptionId, &'a InetSocket>,
    by_inode: HashMap<u64, DescriptionId>,
    made: Made,
    /// Files with the contents of spaces.
    unread: HashMap<SpaceId, File>,
    /// Other ends of connections that are not the job's: they send what is unread, and are closed.
    ends: HashMap<DescriptionId, OwnedFd>,
}

/// A connection: the end that is accepted, and the one that connects.
struct Connection<'a> {
    server: (Option<DescriptionId>, Address),
    client: (Option<DescriptionId>, Address),
    /// A socket of it that the job has, for messages.
    one: &'a InetSocket,
}

fn failed(socket: &InetSocket, errno: Errno) -> Error {
    let reason = match errno {
        Errno::EADDRINUSE => "another socket has its port".into(),
        Errno::EADDRNOTAVAIL => "its address, or the connection, is not available".into(),
        Errno::EACCES => "its port needs a capability".into(),
        other => other.desc().to_owned(),
    };
    Error::object(format!("the {}", socket.label()), "made", reason)
}

impl<'a> Maker<'a> {
    /// Reads unread bytes out of the image.
    fn load(&mut self, snapshot: &Snapshot, image: &Reader) -> Result<()> {
        for (_, socket) in all(snapshot) {
            for piece in &socket.unread {
                let end = piece.at + piece.len;
                let file = match self.unread.entry(piece.space) {
                    std::collections::hash_map::Entry::Occupied(file) => file.into_mut(),
                    std::collections::hash_map::Entry::Vacant(place) => {
                        let made = ckpt_sys::files::memfd(c"ckpt-unread", libc::MFD_CLOEXEC);
                        place.insert(made.map_err(|e| failed(socket, e))?.into())
                    }
                };
                let len = file.metadata().map_or(0, |meta| meta.len());
                if end > len {
                    file.set_len(end)
                        .map_err(|e| Error::object("unread bytes", "read", e))?;
                }
            }
        }
        for (space, file) in &self.unread {
            let len = file.metadata().map_or(0, |meta| meta.len());
            fill(file, "unread bytes of sockets".as_ref(), *space, len, image)?;
        }
        Ok(())
    }

    fn bytes(&self, piece: &Unread, at: u64, room: &mut [u8]) -> Result<()> {
        let file = self.unread.get(&piece.space);
        let file = file.ok_or_else(|| Error::Bug("unread bytes were not loaded".into()))?;
        let read = file.read_exact_at(room, piece.at + at);
        read.map_err(|e| Error::object("unread bytes of a socket", "read", e))
    }

    /// A socket, with the options that come before its address.
    fn new_socket(&mut self, socket: &InetSocket) -> Result<OwnedFd> {
        let family = socket.family();
        let protocol = socket.protocol;
        let made = sockets::socket_of(family, protocol.kind(), protocol.number(family));
        let made = made.map_err(|e| failed(socket, e))?;
        self.set_early(&made, socket);
        Ok(made)
    }

    fn set_early(&mut self, made: &OwnedFd, socket: &InetSocket) {
        for option in socket.options.iter().filter(|o| options::is_early(o)) {
            if let Err(errno) = option.set(made) {
                self.made.warnings.push(format!(
                    "{} of the {} is not set again: {}",
                    option.name().unwrap_or("an option"),
                    socket.label(),
                    errno.desc()
                ));
            }
        }
    }

    /// Connections that have ended at both ends: only what is unread, and an error, is left of them. Their ports are
    /// mostly those of other sockets, which come later.
    fn ended(&mut self) -> Result<()> {
        for (at, socket) in self.sockets.clone() {
            let answered = match socket.state {
                State::Ended { answered, .. } => answered,
                State::Dissolved => true,
                _ => continue,
            };
            let made = self.new_socket(socket)?;
            reuse(&made);
            if socket.local.port != 0 && sockets::bind(&made, &socket.local.sockaddr()).is_err() {
                self.made.warnings.push(format!(
                    "the {}, whose connection has ended, has another address now",
                    socket.label()
                ));
            }
            let loopback = match socket.family() {
                libc::AF_INET6 if socket.local.ip.to_canonical().is_ipv4() => {
                    IpAddr::V6(Ipv4Addr::LOCALHOST.to_ipv6_mapped())
                }
                libc::AF_INET6 => IpAddr::V6(std::net::Ipv6Addr::LOCALHOST),
                _ => IpAddr::V4(Ipv4Addr::LOCALHOST),
            };
            let to = match socket.local.is_any() || socket.local.port == 0 {
                true => loopback,
                false => socket.local.ip,
            };
            let door = Door::open(Address::new(to, 0), 1).map_err(|e| failed(socket, e))?;
            if !answered {
                // A connection fills the backlog, so that the next SYN is dropped; when it comes again, none listens.
                let filler =
                    sockets::socket_of(socket.family(), libc::SOCK_STREAM, libc::IPPROTO_TCP);
                let filler = filler.map_err(|e| failed(socket, e))?;
                sockets::listen(&door.socket, 0).map_err(|e| failed(socket, e))?;
                dial(&filler, door.at).map_err(|e| failed(socket, e))?;
                let _ = sockets::connect(&made, &door.at.sockaddr());
                self.made.all.insert(at, made);
                continue;
            }
            dial(&made, door.at).map_err(|e| failed(socket, e))?;
            let (end, _) = door.accept().map_err(|e| failed(socket, e))?;
            if socket.state == State::Dissolved {
                sockets::connect(&made, &NOWHERE).map_err(|e| failed(socket, e))?;
                self.made.all.insert(at, made);
                continue;
            }
            self.made.all.insert(at, made);
            self.ends.insert(at, end);
        }
        Ok(())
    }

    /// Connections between two sockets of the job, and those of which one end is closed.
    fn connections(&mut self) -> Result<()> {
        let mut doors: Vec<(Address, Vec<Connection<'a>>)> = Vec::new();
        let mut found: HashMap<Address, usize> = HashMap::new();
        for (at, socket) in self.sockets.clone() {
            let State::Connected {
                peer,
                other,
                active,
            } = socket.state
            else {
                continue;
            };
            if socket.protocol != Protocol::Tcp {
                continue;
            }
            let other = other.and_then(|inode| self.by_inode.get(&inode).copied());
            if other == Some(at) {
                self.connect_to_itself(at, socket)?;
                continue;
            }
            let (own, end) = ((Some(at), socket.local), (other, peer));
            let (server, client) = match other {
                // Once for each pair: from the end that connected, or the first of two that both say so.
                Some(other) => {
                    let passive = |at: DescriptionId| {
                        let of = self.socket(at);
                        of.is_some_and(|s| {
                            matches!(s.state, State::Connected { active: false, .. })
                        })
                    };
                    let end = (end.0, self.socket(other).map_or(peer, |s| s.local));
                    match (active, passive(other)) {
                        (true, true) => (end, own),
                        (false, false) => continue,
                        _ if at < other => (end, own),
                        _ => continue,
                    }
                }
                None if active => (end, own),
                None => (own, end),
            };
            let door = *found.entry(server.1).or_insert_with(|| {
                doors.push((server.1, Vec::new()));
                doors.len() - 1
            });
            doors[door].1.push(Connection {
                server,
                client,
                one: socket,
            });
        }
        for (address, connections) in doors {
            let one = connections[0].one;
            let door = Door::open(address, connections.len()).map_err(|e| failed(one, e))?;
            for connection in connections {
                self.connect(&door, connection)?;
            }
        }
        Ok(())
    }

    fn socket(&self, at: DescriptionId) -> Option<&'a InetSocket> {
        self.by_description.get(&at).copied()
    }

    fn connect(&mut self, door: &Door, connection: Connection<'a>) -> Result<()> {
        let Connection {
            server,
            client,
            one,
        } = connection;
        let record = client.0.and_then(|at| self.socket(at));
        let made = match record {
            Some(socket) => self.new_socket(socket)?,
            None => {
                let made =
                    sockets::socket_of(client.1.family(), libc::SOCK_STREAM, libc::IPPROTO_TCP);
                made.map_err(|e| failed(one, e))?
            }
        };
        let to = Self::seen_from(client.1.family(), door.at);
        let accepted = Self::bind_and_dial(&made, client.1, to)
            .and_then(|()| door.accept())
            .map_err(|e| failed(one, e))?;
        let (accepted, from) = accepted;
        if from.plain() != client.1.plain() {
            return Err(failed(one, Errno::EADDRNOTAVAIL));
        }
        if let Some(socket) = server.0.and_then(|at| self.socket(at)) {
            self.set_early(&accepted, socket);
        }
        for (index, end, other) in [(client.0, made, server.0), (server.0, accepted, client.0)] {
            match (index, other) {
                (Some(index), _) => self.made.all.insert(index, end),
                (None, Some(other)) => self.ends.insert(other, end),
                (None, None) => None,
            };
        }
        Ok(())
    }

    /// An address for a socket of that family.
    fn seen_from(family: i32, at: Address) -> Address {
        match (family, at.ip) {
            (libc::AF_INET, IpAddr::V6(_)) => at.at(at.ip.to_canonical()),
            (libc::AF_INET6, IpAddr::V4(ip)) => at.at(IpAddr::V6(ip.to_ipv6_mapped())),
            _ => at,
        }
    }

    /// Binds a client and connects it. An ephemeral port is taken as connect(2) takes it, so that the socket holds it as
    /// it did.
    fn bind_and_dial(client: &OwnedFd, from: Address, to: Address) -> nix::Result<()> {
        reuse(client);
        if from.ip == to.ip && at_port(client, from.port, || dial(client, to)) == Some(Ok(())) {
            return Ok(());
        }
        sockets::bind(client, &from.sockaddr())?;
        dial(client, to)
    }

    fn connect_to_itself(&mut self, at: DescriptionId, socket: &InetSocket) -> Result<()> {
        let made = self.new_socket(socket)?;
        reuse(&made);
        let done =
            sockets::bind(&made, &socket.local.sockaddr()).and_then(|()| dial(&made, socket.local));
        done.map_err(|e| failed(socket, e))?;
        self.made.all.insert(at, made);
        Ok(())
    }

    /// Sockets that are bound and not connected, listening ones too.
    fn bound(&mut self) -> Result<()> {
        for (at, socket) in self.sockets.clone() {
            if socket.protocol != Protocol::Tcp
                || !matches!(socket.state, State::Unconnected | State::Listening { .. })
            {
                continue;
            }
            let made = self.new_socket(socket)?;
            reuse(&made);
            bind(&made, socket)?;
            self.made.all.insert(at, made);
        }
        // Where one listens, no other can be bound.
        for (at, socket) in &self.sockets {
            if let (State::Listening { backlog, pending }, Some(made)) =
                (&socket.state, self.made.all.get(at))
            {
                let room = (*backlog).max(pending.len() as u32);
                let listens = sockets::listen(made, i32::try_from(room).unwrap_or(i32::MAX));
                listens.map_err(|e| failed(socket, e))?;
            }
        }
        Ok(())
    }

    /// Connections that wait to be accepted, and those in progress.
    fn waiting(&mut self) -> Result<()> {
        for (_, socket) in self.sockets.clone() {
            let State::Listening { pending, .. } = &socket.state else {
                continue;
            };
            for client in pending {
                let index = client
                    .inode
                    .and_then(|inode| self.by_inode.get(&inode).copied());
                let record = index.and_then(|at| self.socket(at));
                let (made, from) = match record {
                    Some(record) => (self.new_socket(record)?, record.local),
                    None => {
                        let made = sockets::socket_of(
                            client.client.family(),
                            libc::SOCK_STREAM,
                            libc::IPPROTO_TCP,
                        );
                        (made.map_err(|e| failed(socket, e))?, client.client)
                    }
                };
                let to = Self::seen_from(from.family(), client.server);
                Self::bind_and_dial(&made, from, to).map_err(|e| failed(socket, e))?;
                // Without one, the client is closed at once.
                if let Some(index) = index {
                    self.made.all.insert(index, made);
                }
            }
        }
        // A full backlog must be full for what connects next.
        for (at, socket) in &self.sockets {
            if let (State::Listening { backlog, .. }, Some(made)) =
                (&socket.state, self.made.all.get(at))
            {
                let listens = sockets::listen(made, i32::try_from(*backlog).unwrap_or(i32::MAX));
                listens.map_err(|e| failed(socket, e))?;
            }
        }
        for (at, socket) in self.sockets.clone() {
            let State::Connecting { peer } = socket.state else {
                continue;
            };
            let made = self.new_socket(socket)?;
            reuse(&made);
            let bound = sockets::bind(&made, &socket.local.sockaddr());
            bound.map_err(|e| failed(socket, e))?;
            match sockets::connect(&made, &peer.sockaddr()) {
                Ok(()) | Err(Errno::EINPROGRESS) => {}
                Err(errno) => return Err(failed(socket, errno)),
            }
            self.made.all.insert(at, made);
        }
        Ok(())
    }

    /// Ends of streams, resets, and the program's `SO_REUSEADDR` and backlogs.
    fn finish(&mut self) -> Result<()> {
        let ends = std::mem::take(&mut self.ends);
        for (at, end) in ends {
            let socket = self.socket(at);
            if let Some(State::Ended { error, .. }) = socket.map(|s| &s.state) {
                if *error != 0 {
                    // struct linger: closing resets the connection.
                    let at_once = [1i32, 0].map(i32::to_ne_bytes).concat();
                    let _ = sockets::set_option(libc::SOL_SOCKET, &end, libc::SO_LINGER, &at_once);
                } else if let Some(own) = self.made.all.get(&at) {
                    let _ = sockets::shutdown(&end, libc::SHUT_WR);
                    becomes(own, libc::POLLRDHUP);
                    let _ = sockets::shutdown(own, libc::SHUT_WR);
                    becomes(&end, libc::POLLRDHUP);
                }
            }
            drop(end);
            if let Some(own) = self.made.all.get(&at) {
                becomes(own, libc::POLLRDHUP);
            }
        }
        for (at, socket) in &self.sockets {
            if let (
                State::Ended {
                    error,
                    answered: false,
                },
                Some(own),
            ) = (&socket.state, self.made.all.get(at))
            {
                becomes(own, libc::POLLERR);
                if *error == 0 {
                    // The program has taken it.
                    let _ = sockets::int_option(own, libc::SO_ERROR);
                }
            }
        }
        for (at, socket) in &self.sockets {
            let (Some(own), Protocol::Tcp) = (self.made.all.get(at), socket.protocol) else {
                continue;
            };
            let connected = matches!(
                socket.state,
                State::Connected { .. } | State::Waiting { .. }
            );
            for (bit, how) in [(2, libc::SHUT_WR), (1, libc::SHUT_RD)] {
                if connected && socket.shutdown & bit != 0 {
                    sockets::shutdown(own, how).map_err(|e| failed(socket, e))?;
                }
            }
            if let State::Connected {
                other: Some(other), ..
            } = socket.state
                && socket.shutdown & 2 != 0
                && let Some(other) = self
                    .by_inode
                    .get(&other)
                    .and_then(|at| self.made.all.get(at))
            {
                becomes(other, libc::POLLRDHUP);
                acknowledged(own, other);
            }
        }
        for (at, socket) in &self.sockets {
            if let (Some(own), Protocol::Tcp) = (self.made.all.get(at), socket.protocol) {
                set_reuse(own, socket)?;
            }
        }
        Ok(())
    }
}
