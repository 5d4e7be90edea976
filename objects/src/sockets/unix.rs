//! Unix domain sockets: the record, and the state that one socket reveals.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::not_replaceable;
use super::options::SocketOption;
use super::peers::Ucred;
use super::rebuild;
use super::urgent::Urgent;
use crate::Snapshot;
use crate::bounds;
use crate::error::{Error, Obstacle};
use crate::files::kind::{Captured, OpenFile, Place, Sight, Substitutes};
use crate::index::DescriptionId;
use crate::need::Need;
use crate::plan::Builder;
use crate::source::Collector;
use crate::text::Shown;

/// A unix domain socket. Everything that refers to another socket does so by inode number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixSocket {
    /// Inode number. From [`GHOST`] on, above all numbers of the kernel, it is a closed socket, which exists only
    /// temporarily during a restore.
    pub inode: u64,
    /// The type.
    pub style: Style,
    /// getsockname(2).
    pub name: Option<Name>,
    /// What it is connected to or waits for.
    pub role: Role,
    /// shutdown(2): 1 for receiving, 2 for sending.
    #[serde(deserialize_with = "bounds::choice")]
    pub shutdown: u8,
    /// The next call on it returns `ECONNRESET`.
    pub reset: bool,
    /// Its unread messages.
    pub queue: Vec<Message>,
    /// Options that differ from a new socket's.
    #[serde(deserialize_with = "bounds::few::<_, _, 64>")]
    pub options: Vec<SocketOption>,
    /// Its filter, instructions of classic BPF.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "serde_bytes")]
    pub filter: Vec<u8>,
    /// Credentials of the peer (`SO_PEERCRED`); for a listening socket, those that its clients see.
    #[serde(default)]
    pub peer_credentials: Option<Ucred>,
}

/// Inode numbers from here on are not the kernel's.
pub const GHOST: u64 = 1 << 63;

/// Types of unix domain sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Style {
    /// `SOCK_STREAM`.
    Stream,
    /// `SOCK_DGRAM`.
    Datagram,
    /// `SOCK_SEQPACKET`.
    SeqPacket,
}

impl Style {
    /// From the type of socket(2).
    pub fn of(number: i32) -> Option<Self> {
        match number {
            libc::SOCK_STREAM => Some(Style::Stream),
            libc::SOCK_DGRAM => Some(Style::Datagram),
            libc::SOCK_SEQPACKET => Some(Style::SeqPacket),
            _ => None,
        }
    }

    /// The type for socket(2).
    pub fn number(self) -> i32 {
        match self {
            Style::Stream => libc::SOCK_STREAM,
            Style::Datagram => libc::SOCK_DGRAM,
            Style::SeqPacket => libc::SOCK_SEQPACKET,
        }
    }
}

/// The state of a socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Not connected, not listening.
    Unconnected,
    /// It listens.
    Listening {
        /// listen(2).
        backlog: u32,
        /// Connections to be accepted, by the inode of the client, oldest first.
        pending: Vec<u64>,
    },
    /// It has connected to a listening socket, which has not accepted it yet.
    Pending,
    /// Connected to the socket of that inode. For datagram sockets this need not be mutual.
    Connected {
        /// Inode.
        peer: u64,
    },
    /// A datagram socket, connected to a name outside the job.
    Beyond {
        /// The name, as [`Name::bytes`].
        address: ByteBuf,
    },
}

/// A name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Name {
    /// The bytes of `sun_path`: a path as given to bind(2), or a zero byte and an abstract name.
    pub bytes: ByteBuf,
    /// The socket itself was bound to it; otherwise it was accepted from a bound one.
    pub bound: bool,
    /// The file of a name that is a path.
    pub file: Option<NameFile>,
}

/// The file that a socket was bound to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NameFile {
    /// The path that the name resolves to.
    #[serde(with = "crate::raw_path")]
    pub named: PathBuf,
    /// The directory from which a relative name resolves to it.
    #[serde(default, with = "crate::raw_path")]
    pub directory: Option<PathBuf>,
    /// The file's present path: as bound, renamed, or deleted.
    #[serde(default, with = "crate::raw_path")]
    pub now: Option<PathBuf>,
    /// Permission bits.
    #[serde(deserialize_with = "bounds::mode")]
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Bytes of a path as the address of a socket (`sun_path`, unix(7)).
const LONGEST_NAME: usize = 108;

impl OpenFile for UnixSocket {
    /// What one is can only be said with the others in view: [`super::survey`].
    fn capture(_: &Sight, _: &mut Collector) -> Captured {
        None
    }

    fn class(&self) -> &'static str {
        "unix"
    }

    /// Its name, else its inode.
    fn label(&self) -> String {
        match &self.name {
            Some(name) => format!("unix socket {}", show(&name.bytes)),
            None if self.is_ghost() => "unix socket that was closed".into(),
            None => format!("unix socket:[{}]", self.inode),
        }
    }

    fn needs(&self, _: u32, _: &Snapshot) -> Vec<Need> {
        let mut needs = Vec::new();
        self.clone().each_path(&mut |path| {
            let detail = "its name, or its peer's";
            needs.push(Need::new("unix socket", path.shown(), detail));
        });
        needs
    }

    fn each_path(&mut self, f: &mut dyn FnMut(&mut PathBuf)) {
        if let Some(name) = &mut self.name {
            each_path_of_address(&mut name.bytes, f);
            if let Some(file) = &mut name.file {
                f(&mut file.named);
                file.directory.iter_mut().for_each(&mut *f);
                file.now.iter_mut().for_each(&mut *f);
            }
        }
        if let Role::Beyond { address } = &mut self.role {
            each_path_of_address(address, f);
        }
    }

    fn each_reference(&self, f: &mut dyn FnMut(DescriptionId)) {
        let rights = self.queue.iter().flat_map(|message| &message.rights);
        rights.copied().for_each(f);
    }

    fn each_inode(&mut self, f: &mut dyn FnMut(&mut u64)) {
        f(&mut self.inode);
        match &mut self.role {
            Role::Connected { peer } => f(peer),
            Role::Listening { pending, .. } => pending.iter_mut().for_each(&mut *f),
            _ => {}
        }
        self.queue
            .iter_mut()
            .for_each(|message| f(&mut message.from));
    }

    fn substitute(&mut self, _: &mut u32, by: &mut dyn Substitutes) -> Result<(), Error> {
        let name = self.name.as_ref().map_or(0, |name| name.bytes.len());
        if name > LONGEST_NAME {
            return Err(by.refusal(
                format!("the {}", self.label()),
                "has a name that is too long for a rehearsal, whose names are longer by 8 bytes",
            ));
        }
        for file in self.name.iter().filter_map(|name| name.file.as_ref()) {
            if let Some(directory) = &file.directory {
                by.directory(directory)?;
            }
            if let Some(now) = &file.now {
                by.parent(&file.named)?;
                by.parent(now)?;
            }
        }
        match &self.role {
            Role::Beyond { address } => by.socket(address),
            _ => Ok(()),
        }
    }

    fn shows_maker(&self) -> bool {
        true
    }

    fn not_replaceable(&self, by: &Path) -> Option<Obstacle> {
        Some(not_replaceable(&self.label(), by))
    }

    /// All of them are made when the first comes.
    fn open(&self, place: &Place, plan: &mut Builder) -> Result<(), Vec<Obstacle>> {
        rebuild::open(place.index, place.snapshot, place.staging, plan)
    }
}

/// Applies to an address that is an absolute path; relative ones move with their directory.
fn each_path_of_address(address: &mut ByteBuf, f: &mut dyn FnMut(&mut PathBuf)) {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    if address.first() != Some(&b'/') {
        return;
    }
    let end = address.iter().position(|b| *b == 0);
    let (path, rest) = address.split_at(end.unwrap_or(address.len()));
    let mut path = PathBuf::from(std::ffi::OsStr::from_bytes(path));
    let rest = rest.to_vec();
    f(&mut path);
    let mut bytes = path.into_os_string().into_vec();
    bytes.extend(rest);
    *address = ByteBuf::from(bytes);
}

/// An unread message, or a piece of a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Its bytes.
    pub data: ByteBuf,
    /// Inode of the sender.
    pub from: u64,
    /// Descriptors in it: indices in the snapshot's descriptions.
    #[serde(deserialize_with = "bounds::few::<_, _, 253>")]
    pub rights: Vec<DescriptionId>,
    /// Credentials that the reader gets.
    pub credentials: Option<Ucred>,
    /// It is an urgent byte, or the mark of one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub urgent: Option<Urgent>,
}

impl UnixSocket {
    /// It is closed, and needed only for its effects on others.
    pub fn is_ghost(&self) -> bool {
        self.inode >= GHOST
    }

    /// Inode of its peer.
    pub fn peer(&self) -> Option<u64> {
        match self.role {
            Role::Connected { peer } => Some(peer),
            _ => None,
        }
    }
}

/// A name for display: `@` marks an abstract one.
pub fn show(bytes: &[u8]) -> String {
    match bytes.split_first() {
        Some((0, rest)) => format!("@{}", crate::text::of(rest)),
        _ => crate::text::of(bytes),
    }
}

/// `struct sockaddr_un` of a name.
pub fn sockaddr(bytes: &[u8]) -> Vec<u8> {
    let mut address = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    address.extend_from_slice(bytes);
    // A path of full length has no zero byte.
    if bytes.first().is_some_and(|b| *b != 0) && bytes.len() < 108 {
        address.push(0);
    }
    address
}
