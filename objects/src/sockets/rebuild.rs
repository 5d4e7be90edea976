//! Creates the sockets of a snapshot, up to their connections. What needs all descriptions comes later ([`finish`]).
//!
//! Named sockets are bound one after the other. The file of each is opened at once by `O_PATH`, and clients connect
//! through that descriptor: so a name may be unlinked or reused by the next socket at once, and need not fit into an
//! address.

use std::collections::{HashMap, HashSet};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use super::names;
use super::peers::Ucred;
use super::plan::{Creation, Door, Job};
pub use super::transfer::finish;
use super::unix::{Name, NameFile, Role, UnixSocket, show, sockaddr};
use crate::Snapshot;
use crate::error::Obstacle;
use crate::files::kind::OpenFile;
use crate::files::{self, Staging};
use crate::index::DescriptionId;
use crate::plan::Builder;
use crate::text::Shown;

/// Creates all sockets, at the first of them.
pub fn open(
    index: DescriptionId,
    snapshot: &Snapshot,
    staging: Staging,
    plan: &mut Builder,
) -> Result<(), Vec<Obstacle>> {
    let is_unix = |d: &files::Description| d.kind.get::<UnixSocket>().is_some();
    if snapshot.descriptions.iter().position(is_unix) != Some(index.0) {
        return Ok(());
    }
    let job = Job::of(snapshot, staging);
    let mut obstacles = Vec::new();
    let leaving = match plan.host().leaving {
        true => job.all.iter().map(|(_, socket)| socket.inode).collect(),
        false => Vec::new(),
    };
    let stale = stale_files(&job, &leaving, plan, &mut obstacles);
    for (at, (_, socket)) in job.all.iter().enumerate() {
        if let Role::Beyond { address } = &socket.role
            && names::in_use(address) != Some(true)
        {
            obstacles.push(Obstacle::new(
                format!("the {}", socket.label()),
                format!(
                    "was connected to {}, to which no socket is bound now",
                    show(address)
                ),
                "start the program that listens there",
            ));
        }
        create(&job, at, plan);
    }
    let mut binding = Binding {
        stale,
        leaving,
        plan,
        obstacles: &mut obstacles,
    };
    binding.all(&job);
    for at in 0..job.all.len() {
        connect(&job, at, plan);
    }
    if obstacles.is_empty() {
        Ok(())
    } else {
        Err(obstacles)
    }
}

/// Files of the job's sockets that still exist, without a live socket: they are removed.
fn stale_files(
    job: &Job<'_>,
    leaving: &[u64],
    plan: &mut Builder,
    obstacles: &mut Vec<Obstacle>,
) -> HashSet<PathBuf> {
    let mut stale = HashSet::new();
    for (at, path) in job.present() {
        let label = job.socket(at).label();
        let Ok(meta) = std::fs::symlink_metadata(path) else {
            continue;
        };
        if !meta.file_type().is_socket() {
            obstacles.push(Obstacle::new(
                format!("the {label}"),
                format!("cannot have its name: another file is at {}", path.shown()),
                "move that file away",
            ));
        } else if names::is_live(path) != Some(false)
            && !leaves(path.as_os_str().as_bytes(), Some(path), leaving)
        {
            let bytes = path.as_os_str().as_bytes();
            obstacles.push(Obstacle::new(
                format!("the {label}"),
                format!(
                    "cannot have its name: a live socket is bound to {}",
                    names::holder_of_name(bytes)
                ),
                "end that process first",
            ));
        } else if stale.insert(path.clone()) {
            let at = plan.path(path);
            plan.syscall(libc::SYS_unlink, &[at], || {
                format!("the file that the {label} left behind")
            });
        }
    }
    stale
}

/// Whether a name is held by sockets of the job itself, which will be closed.
fn leaves(bytes: &[u8], path: Option<&Path>, leaving: &[u64]) -> bool {
    !leaving.is_empty() && names::are_these(bytes, path, leaving)
}

/// socket(2) or socketpair(2), placed at the staging numbers.
fn create(job: &Job<'_>, at: usize, plan: &mut Builder) {
    let socket = job.socket(at);
    let object = || format!("the {}", socket.label());
    let (family, kind) = (libc::AF_UNIX as u64, socket.style.number() as u64);
    match job.creations[at] {
        Creation::Alone => {
            plan.expect(libc::SYS_socket, &[family, kind, 0], 0, object);
            files::place(0, job.at(at), plan, object);
        }
        Creation::PairWith(other) => {
            let who = socket.peer_credentials;
            job.names.act(who, &told(socket), plan, |_, plan| {
                let out = plan.reserve(8);
                plan.expect(libc::SYS_socketpair, &[family, kind, 0, out], 0, object);
                files::place(0, job.at(at), plan, object);
                files::place(1, job.at(other), plan, object);
            });
        }
        Creation::Severed => {
            let who = socket.peer_credentials;
            job.names.act(who, &told(socket), plan, |_, plan| {
                let out = plan.reserve(8);
                plan.expect(libc::SYS_socketpair, &[family, kind, 0, out], 0, object);
                disconnect(0, plan, object);
                files::place(0, job.at(at), plan, object);
                plan.syscall(libc::SYS_close, &[1], object);
            });
        }
        Creation::Along | Creation::AlongAndOff | Creation::Accepted(..) => {}
    }
}

struct Binding<'a> {
    /// Files that the plan has already removed.
    stale: HashSet<PathBuf>,
    /// Inodes of live sockets of the job that will be closed.
    leaving: Vec<u64>,
    plan: &'a mut Builder,
    obstacles: &'a mut Vec<Obstacle>,
}

impl Binding<'_> {
    /// Names that are only temporary come first, permanent ones last.
    fn all(&mut self, job: &Job<'_>) {
        let stays = |at: &usize| {
            let file = job.socket(*at).name.as_ref().and_then(|n| n.file.as_ref());
            file.is_none_or(|f| f.now.as_ref() == Some(&f.named))
        };
        let bound: Vec<usize> = (0..job.all.len()).filter(|at| job.binds(*at)).collect();
        for at in bound.iter().copied().filter(|at| !stays(at)) {
            self.socket(job, at);
        }
        for (number, stand_in) in job.stand_ins.iter().enumerate() {
            let object = || format!("the listening socket {}", show(&stand_in.name.bytes));
            let (at, file_at) = job.stand_in_at(number);
            let args = [libc::AF_UNIX as u64, stand_in.style.number() as u64, 0];
            self.plan.expect(libc::SYS_socket, &args, 0, object);
            files::place(0, at, self.plan, object);
            let free = self.bind(at, file_at, stand_in.name, false, &object());
            if free {
                self.plan.syscall(libc::SYS_listen, &[at as u64, 1], object);
            }
        }
        self.accept_at_stand_ins(job);
        for at in bound.iter().copied().filter(stays) {
            self.socket(job, at);
        }
    }

    fn socket(&mut self, job: &Job<'_>, at: usize) {
        let socket = job.socket(at);
        let Some(name) = &socket.name else { return };
        let label = format!("the {}", socket.label());
        if socket.is_ghost() && self.is_taken(name) {
            self.plan.warn(format!(
                "{}, the name of a closed socket, belongs to another socket now: its messages and \
                 connections come from a socket without a name",
                show(&name.bytes)
            ));
            return;
        }
        let stays = !socket.is_ghost();
        self.bind(job.at(at), job.file_at(at), name, stays, &label);
    }

    /// Connections accepted from a listening socket that has gone; its substitute is closed at once, which frees an
    /// abstract name.
    fn accept_at_stand_ins(&mut self, job: &Job<'_>) {
        let mut listening = HashMap::new();
        for at in 0..job.all.len() {
            if let Creation::Accepted(client, door @ Door::StandIn(_)) = job.creations[at] {
                let number = job.door_at(door).0;
                let peer = job.socket(client).peer_credentials;
                if peer.is_some() && listening.insert(number, peer) != Some(peer) {
                    listen(job, at, number, 1, peer, self.plan);
                }
                accept(job, at, client, door, self.plan);
            }
        }
        for number in 0..job.stand_ins.len() {
            let (at, _) = job.stand_in_at(number);
            self.plan.syscall(libc::SYS_close, &[at as u64], || {
                "a listening socket that is gone".into()
            });
        }
    }

    fn is_taken(&self, name: &Name) -> bool {
        match &name.file {
            None => {
                names::in_use(&name.bytes) == Some(true)
                    && !leaves(&name.bytes, None, &self.leaving)
            }
            Some(file) => {
                let there = std::fs::symlink_metadata(&file.named).is_ok();
                there && !self.stale.contains(&file.named)
            }
        }
    }

    /// Binds a socket and opens its file. False when the name is in use.
    fn bind(&mut self, at: i32, file_at: i32, name: &Name, stays: bool, label: &str) -> bool {
        let object = || label.to_owned();
        let taken = self.is_taken(name);
        let address = sockaddr(&name.bytes);
        let Some(file) = &name.file else {
            if taken {
                self.obstacles.push(Obstacle::new(
                    label,
                    format!(
                        "cannot have its name: a live socket has {}",
                        names::holder_of_name(&name.bytes)
                    ),
                    "end that process first",
                ));
                return false;
            }
            let data = self.plan.data(&address);
            let args = [at as u64, data, address.len() as u64];
            self.plan.syscall(libc::SYS_bind, &args, object);
            return true;
        };
        let now = file.now.as_ref().filter(|_| stays);
        let missing = names::missing_directories(&file.named);
        let Some(missing) = missing.filter(|missing| missing.is_empty() || now.is_none()) else {
            self.obstacles.push(Obstacle::new(
                label,
                format!(
                    "cannot have its name: there is no directory for {}",
                    file.named.shown()
                ),
                "make that directory",
            ));
            return false;
        };
        // It fitted before; a longer one results from --map-path.
        if address.len() > size_of::<libc::sockaddr_un>() {
            self.obstacles.push(Obstacle::new(
                label,
                "cannot have its name: it is too long for the address of a socket",
                "map its directory to a shorter path (--map-path)",
            ));
            return false;
        }
        // Another file has the name now: it is renamed temporarily.
        let aside = taken.then(|| aside(&file.named, at));
        if let Some(aside) = &aside {
            rename(&file.named, aside, label, self.plan);
        }
        // The directories have gone like the file, and are created temporarily.
        for directory in missing.iter().rev() {
            let path = self.plan.path(directory);
            self.plan.syscall(libc::SYS_mkdir, &[path, 0o700], object);
        }
        self.bind_file(at, file_at, &address, file, label);
        match now {
            Some(now) if *now != file.named => rename(&file.named, now, label, self.plan),
            Some(_) => {}
            None => {
                let path = self.plan.path(&file.named);
                self.plan.syscall(libc::SYS_unlink, &[path], object);
            }
        }
        for directory in &missing {
            let path = self.plan.path(directory);
            self.plan.syscall(libc::SYS_rmdir, &[path], object);
        }
        if let Some(aside) = &aside {
            rename(aside, &file.named, label, self.plan);
        }
        true
    }

    fn bind_file(&mut self, at: i32, file_at: i32, address: &[u8], file: &NameFile, label: &str) {
        let object = || label.to_owned();
        if let Some(directory) = &file.directory {
            let path = self.plan.path(directory);
            self.plan.syscall(libc::SYS_chdir, &[path], object);
        }
        let data = self.plan.data(address);
        let args = [at as u64, data, address.len() as u64];
        self.plan.syscall(libc::SYS_bind, &args, object);
        // The kernel reveals the file of a socket only with CAP_NET_ADMIN (`SIOCUNIXFILE`).
        let path = self.plan.path(&file.named);
        let flags = (libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC) as u64;
        let args = [libc::AT_FDCWD as u64, path, flags, 0];
        self.plan.expect(libc::SYS_openat, &args, 0, object);
        files::place(0, file_at, self.plan, object);
    }
}

/// The temporary name of a file that has the name of a socket, by the socket's staging number.
pub(super) fn aside(named: &Path, at: i32) -> PathBuf {
    let mut aside = named.as_os_str().to_owned();
    aside.push(format!(".ckpt-aside-{at}"));
    aside.into()
}

/// Renames without overwriting.
fn rename(from: &Path, to: &Path, label: &str, plan: &mut Builder) {
    const RENAME_NOREPLACE: u64 = 1;
    let here = libc::AT_FDCWD as u64;
    let (from, to) = (plan.path(from), plan.path(to));
    let args = [here, from, here, to, RENAME_NOREPLACE];
    plan.syscall(libc::SYS_renameat2, &args, || label.to_owned());
}

/// Connects a client to a listening socket and accepts it there.
fn accept(job: &Job<'_>, server: usize, client: usize, door: Door, plan: &mut Builder) {
    let object = || format!("the {}", job.socket(server).label());
    let (listener, address) = job.door_at(door);
    let who = job.socket(server).peer_credentials;
    dial_as(job, who, client, &address, job.socket(server), plan);
    let flags = libc::SOCK_CLOEXEC as u64;
    let args = [listener as u64, 0, 0, flags];
    plan.expect(libc::SYS_accept4, &args, 0, object);
    files::place(0, job.at(server), plan, object);
}

/// listen(2): later clients see the credentials of `who`. `at` is the socket.
fn listen(
    job: &Job<'_>,
    at: usize,
    number: i32,
    backlog: u32,
    who: Option<Ucred>,
    plan: &mut Builder,
) {
    let socket = job.socket(at);
    job.names.act(who, &told(socket), plan, |_, plan| {
        let args = [number as u64, backlog.into()];
        plan.syscall(libc::SYS_listen, &args, || {
            format!("the {}", socket.label())
        });
    });
}

/// The object of a warning about credentials.
fn told(socket: &UnixSocket) -> String {
    format!("SO_PEERCRED of the {}", socket.label())
}

/// connect(2) under the credentials that the peer is to see.
fn dial_as(
    job: &Job<'_>,
    who: Option<Ucred>,
    client: usize,
    address: &[u8],
    server: &UnixSocket,
    plan: &mut Builder,
) {
    job.names.act(who, &told(server), plan, |_, plan| {
        dial(job.at(client), address, &server.label(), plan);
    });
}

/// Disconnects a datagram socket. Its unread messages are lost (`unix_dgram_disconnected` in net/unix/af_unix.c).
pub(super) fn disconnect(at: i32, plan: &mut Builder, object: impl Fn() -> String) {
    let unspecified = plan.data(&(libc::AF_UNSPEC as u16).to_ne_bytes());
    plan.syscall(libc::SYS_connect, &[at as u64, unspecified, 2], object);
}

/// connect(2).
pub(super) fn dial(at: i32, address: &[u8], label: &str, plan: &mut Builder) {
    let data = plan.data(address);
    let args = [at as u64, data, address.len() as u64];
    plan.syscall(libc::SYS_connect, &args, || label.to_owned());
}

/// For a listening socket: all its connections, accepted ones first, then the backlog.
fn connect(job: &Job<'_>, at: usize, plan: &mut Builder) {
    let socket = job.socket(at);
    let Role::Listening { backlog, pending } = &socket.role else {
        return;
    };
    let room = (*backlog).max(pending.len() as u32);
    let number = job.at(at);
    let who = socket.peer_credentials;
    let mut is = who;
    listen(job, at, number, room, who, plan);
    for server in 0..job.all.len() {
        if let Creation::Accepted(client, door) = job.creations[server]
            && door == Door::Listener(at)
        {
            let peer = job.socket(client).peer_credentials;
            if peer.is_some() && peer != is {
                listen(job, at, number, room, peer, plan);
                is = peer;
            }
            accept(job, server, client, door, plan);
        }
    }
    let (_, address) = job.door_at(Door::Listener(at));
    for client in pending.iter().filter_map(|inode| job.position(*inode)) {
        let peer = job.socket(client).peer_credentials;
        if peer.is_some() && peer != is {
            listen(job, at, number, room, peer, plan);
            is = peer;
        }
        // The process that accepts it will see the client's credentials, which the kernel does not show before.
        let who = job.holder(client);
        dial_as(job, who, client, &address, socket, plan);
    }
    if room != *backlog || is != who {
        listen(job, at, number, *backlog, who, plan);
    }
}
