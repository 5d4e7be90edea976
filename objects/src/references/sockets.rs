//! Unix domain sockets, which refer to each other by inode.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::Snapshot;
use crate::sockets::options::KEPT;
use crate::sockets::unix::{Name, Role, Style, UnixSocket};

use super::{Faults, require};

/// The longest `sun_path`.
const LONGEST_NAME: usize = 108;
/// `SCM_MAX_FD`.
const MOST_RIGHTS: usize = 253;

/// Checks of sockets and their references.
pub(super) fn sockets(snapshot: &Snapshot, faults: &mut Faults) {
    let sockets = || {
        let all = snapshot.descriptions.iter();
        all.filter_map(|d| d.kind.get::<UnixSocket>())
    };
    let mut by_inode: HashMap<u64, &UnixSocket> = HashMap::new();
    for socket in sockets() {
        require!(
            faults,
            by_inode.insert(socket.inode, socket).is_none(),
            "socket:[{}] exists twice",
            socket.inode
        );
    }
    for socket in sockets() {
        role(socket, &by_inode, faults);
        queue(socket, &by_inode, snapshot.descriptions.len(), faults);
        if let Some(name) = &socket.name {
            self::name(socket.inode, name, faults);
        }
        for option in &socket.options {
            let known = |(number, _, len): &(i32, &str, usize)| {
                *number == option.number && *len == option.value.len()
            };
            require!(
                faults,
                KEPT.iter().any(known),
                "socket:[{}] has an option {} that is not kept",
                socket.inode,
                option.number
            );
        }
    }
}

fn role(socket: &UnixSocket, by_inode: &HashMap<u64, &UnixSocket>, faults: &mut Faults) {
    let inode = socket.inode;
    require!(
        faults,
        socket.shutdown <= 3,
        "socket:[{inode}] is shut down in an impossible way"
    );
    let alike = |other: &u64| {
        let other = by_inode.get(other)?;
        (other.style == socket.style).then_some(*other)
    };
    match &socket.role {
        Role::Unconnected | Role::Pending => {}
        Role::Connected { peer } => match alike(peer) {
            None => faults.add(format_args!(
                "socket:[{inode}] is connected to socket:[{peer}], which is none of its kind"
            )),
            Some(other) => require!(
                faults,
                socket.style == Style::Datagram || other.peer() == Some(inode),
                "socket:[{inode}] is connected to socket:[{peer}], which is not connected to it"
            ),
        },
        Role::Listening { pending, .. } => {
            require!(
                faults,
                socket.style != Style::Datagram && socket.name.as_ref().is_some_and(|n| n.bound),
                "socket:[{inode}] cannot listen"
            );
            for client in pending {
                require!(
                    faults,
                    alike(client).is_some_and(|c| c.role == Role::Pending),
                    "socket:[{client}] cannot wait in the backlog of socket:[{inode}]"
                );
            }
        }
        Role::Beyond { address } => require!(
            faults,
            socket.style == Style::Datagram && (1..=LONGEST_NAME).contains(&address.len()),
            "socket:[{inode}] cannot be connected to something outside"
        ),
    }
    let peer = socket.peer().and_then(|p| by_inode.get(&p));
    require!(
        faults,
        !socket.reset || socket.style != Style::Datagram && peer.is_some_and(|p| p.is_ghost()),
        "socket:[{inode}] cannot have been reset"
    );
}

fn queue(
    socket: &UnixSocket,
    by_inode: &HashMap<u64, &UnixSocket>,
    descriptions: usize,
    faults: &mut Faults,
) {
    let inode = socket.inode;
    for message in &socket.queue {
        let from = by_inode.get(&message.from);
        let possible = match socket.style {
            Style::Datagram => from.is_some_and(|f| f.style == Style::Datagram),
            _ => from.is_some() && socket.peer() == Some(message.from),
        };
        require!(
            faults,
            possible,
            "a message in socket:[{inode}] comes from socket:[{}], which cannot have sent it",
            message.from
        );
        require!(
            faults,
            message.rights.len() <= MOST_RIGHTS
                && message.rights.iter().all(|d| d.0 < descriptions),
            "a message in socket:[{inode}] carries descriptions that do not exist"
        );
    }
}

fn name(inode: u64, name: &Name, faults: &mut Faults) {
    let absolute = |path: &Path| path.is_absolute() && !path.as_os_str().as_bytes().contains(&0);
    let (len, first) = (name.bytes.len(), name.bytes.first());
    let is_path = first.is_some_and(|b| *b != 0);
    let file = name.file.as_ref();
    let files = file.is_none_or(|f| {
        let others = f.directory.iter().chain(&f.now);
        let bound = Path::new(std::ffi::OsStr::from_bytes(&name.bytes));
        // The file that bind(2) makes is removed when a restore fails.
        let same = bound.file_name() == f.named.file_name();
        same && absolute(&f.named) && others.into_iter().all(|p| absolute(p))
    });
    require!(
        faults,
        (1..=LONGEST_NAME).contains(&len)
            && is_path == file.is_some()
            && !(is_path && name.bytes.contains(&0))
            && files,
        "socket:[{inode}] has an impossible name"
    );
}
