//! Determines the state of each socket, given all others.

use ckpt_sys::sockets;
use ckpt_tracer::sock_diag::unix as unix_diag;
use nix::errno::Errno;
use serde_bytes::ByteBuf;

use super::super::peers::Ucred;
use super::super::queue::Seen;
use super::super::unix::{GHOST, Message, Name, NameFile, Role, Style, UnixSocket, show};
use super::super::{filter, names, options};
use super::{Ghosts, Live, Table, Verdict, hidden};
use crate::error::Obstacle;
use crate::index::DescriptionId;

const CLOSE: &str = "close it before the checkpoint";

/// Determines the state of one socket.
pub(super) fn judge(socket: &Live, table: &Table<'_>, ghosts: &mut Ghosts) -> Verdict {
    // If the job runs, it may be closed by now.
    let closed = unix_diag::UnixSocket::default();
    let listed = table.diag.get(&socket.inode);
    let Some(diag) = listed.or((!table.held).then_some(&closed)) else {
        return socket.refuse("is a unix socket that the kernel does not list", CLOSE);
    };
    if let Some(reason) = &socket.fault {
        return socket.refuse(
            format!("is a unix socket that {reason}"),
            "let the program read it before the checkpoint",
        );
    }
    let filter = match filter::capture(&socket.copy) {
        Ok(filter) => filter,
        Err(Errno::EACCES) => {
            return socket.refuse(
                "is a unix socket with an eBPF filter (SO_ATTACH_BPF), which the kernel does not show",
                "let the program take it off (SO_DETACH_FILTER), or close the socket, before the checkpoint",
            );
        }
        Err(errno) => {
            let reason = format!(
                "is a unix socket whose filter cannot be read: {}",
                errno.desc()
            );
            return socket.refuse(reason, CLOSE);
        }
    };
    let bytes = sockets::own_name(&socket.copy).unwrap_or_default();
    let role = match role(socket, diag, table, ghosts) {
        Ok(role) => role,
        Err(verdict) => return verdict,
    };
    let reset = ckpt_sys::events::poll_now(&socket.copy, 0) & libc::POLLERR != 0;
    let gone = matches!(role, Role::Connected { peer } if peer >= GHOST);
    if reset && (socket.style == Style::Datagram || !gone) {
        return socket.refuse(
            "is a unix socket with a pending error that the program has not read",
            "let the program read from it before the checkpoint",
        );
    }
    if hidden::may_hide(socket, &role, table) {
        return socket.refuse_for_now(
            "is a unix socket with empty messages among the unread ones, which the kernel shows \
             once only and did so before",
            "let the program read them before the checkpoint",
        );
    }
    let file = names::file(
        &socket.copy,
        &bytes,
        diag.file.map(|(_, inode)| inode),
        &socket.directory,
    );
    let bound = is_bound(socket, diag, &bytes, file.as_ref(), table);
    let queue = messages(socket, &role, table, ghosts);
    Verdict::Inside(Box::new(UnixSocket {
        inode: socket.inode,
        style: socket.style,
        name: (!bytes.is_empty()).then(|| Name {
            file,
            bytes: ByteBuf::from(bytes),
            bound,
        }),
        role,
        shutdown: diag.shutdown & 3,
        reset,
        queue,
        options: options::capture(&socket.copy, libc::AF_UNIX, socket.style.number()),
        filter,
        peer_credentials: Ucred::of_peer(&socket.copy),
    }))
}

/// The record of its queue.
fn messages(socket: &Live, role: &Role, table: &Table<'_>, ghosts: &mut Ghosts) -> Vec<Message> {
    socket
        .seen
        .iter()
        .map(|(seen, rights)| Message {
            data: ByteBuf::from(seen.data.clone()),
            from: sender(socket, role, seen, table, ghosts),
            rights: rights.iter().copied().map(DescriptionId).collect(),
            credentials: seen.sender,
            urgent: seen.urgent,
        })
        .collect()
}

/// Whether a socket was bound itself: its name does not come from the listening socket.
fn is_bound(
    socket: &Live,
    diag: &unix_diag::UnixSocket,
    name: &[u8],
    file: Option<&NameFile>,
    table: &Table<'_>,
) -> bool {
    if socket.style == Style::Datagram || diag.listening || diag.peer.is_none() {
        return true;
    }
    if table.listening.contains(&(socket.style, name.to_vec())) {
        return false;
    }
    let in_use = match file {
        Some(file) => file.now.as_deref().and_then(names::is_live),
        None => names::in_use(name),
    };
    in_use == Some(true)
}

fn role(
    socket: &Live,
    diag: &unix_diag::UnixSocket,
    table: &Table<'_>,
    ghosts: &mut Ghosts,
) -> std::result::Result<Role, Verdict> {
    if diag.listening {
        return backlog(socket, diag, table);
    }
    let peer_name = || sockets::peer_name(&socket.copy).unwrap_or_default();
    match diag.peer {
        None => Ok(Role::Unconnected),
        Some(0) if table.waiting.contains(&socket.inode) => {
            if sockets::unsent(&socket.copy) == 0 {
                return Ok(Role::Pending);
            }
            Err(socket.refuse_for_now(
                "is a unix socket that has sent data into a connection that is not accepted yet, where it \
                 cannot be examined",
                "try again when the connection has been accepted",
            ))
        }
        Some(0) if socket.style == Style::Datagram || diag.shutdown == 3 => {
            let name = peer_name();
            // A pair has the credentials of its peer, a datagram socket after connect(2) does not (`init_peercred` in
            // net/unix/af_unix.c).
            let called = socket.style == Style::Datagram && Ucred::of_peer(&socket.copy).is_none();
            let role = match called && !name.is_empty() {
                true => Role::Unconnected,
                false => Role::Connected { peer: socket.inode },
            };
            let peer = ghosts.add(socket.style, &name, &socket.directory, role);
            Ok(Role::Connected { peer })
        }
        // Possibly of a listening socket in flight; known when the job is frozen.
        Some(0) if table.unseen => Ok(Role::Pending),
        Some(0) => Err(outside(
            socket,
            "waiting to be accepted by",
            &peer_name(),
            None,
        )),
        Some(peer) => connected(socket, u64::from(peer), &peer_name(), table),
    }
}

fn connected(
    socket: &Live,
    peer: u64,
    peer_name: &[u8],
    table: &Table<'_>,
) -> std::result::Result<Role, Verdict> {
    if table.is_of_the_job(peer) {
        return Ok(Role::Connected { peer });
    }
    let datagram = socket.style == Style::Datagram;
    if datagram && peer_name.first().is_some_and(|b| *b == b'/') {
        return Ok(Role::Beyond {
            address: ByteBuf::from(peer_name),
        });
    }
    Err(outside(socket, "connected to", peer_name, Some(peer)))
}

/// Refuses a socket whose peer is outside the job.
fn outside(socket: &Live, how: &str, name: &[u8], inode: Option<u64>) -> Verdict {
    let what = match (name.is_empty(), inode) {
        (false, _) => show(name),
        (true, Some(inode)) => format!("socket:[{inode}]"),
        (true, None) => "a socket".into(),
    };
    let who = match inode.and_then(names::holder) {
        Some(holder) => format!("{what} of {holder}"),
        None if inode.is_none() => names::holder_of_name(name),
        None => what,
    };
    Verdict::Outside(Box::new(Obstacle::new(
        &socket.object,
        format!("is a unix socket {how} {who}, outside the job"),
        "close it before the checkpoint, or leave it out of the restored job with --drop-fd unix",
    )))
}

fn backlog(
    socket: &Live,
    diag: &unix_diag::UnixSocket,
    table: &Table<'_>,
) -> std::result::Result<Role, Verdict> {
    let wait = "try again when the connection has been accepted";
    for client in &diag.pending {
        let inode = u64::from(*client);
        if inode == 0 {
            let reason = "is a listening unix socket with a connection waiting to be accepted whose client \
                          has closed it already; what it sent cannot be examined";
            return Err(socket.refuse_for_now(reason, wait));
        }
        if !table.is_of_the_job(inode) {
            let who = names::holder(inode).unwrap_or_else(|| "a process".into());
            let reason = format!(
                "is a listening unix socket with a connection of {who} waiting to be accepted, \
                 which is outside the job"
            );
            return Err(socket.refuse_for_now(reason, wait));
        }
    }
    Ok(Role::Listening {
        backlog: diag.unsent,
        pending: diag.pending.iter().map(|i| u64::from(*i)).collect(),
    })
}

/// Inode of the sender of a message.
fn sender(socket: &Live, role: &Role, seen: &Seen, table: &Table<'_>, ghosts: &mut Ghosts) -> u64 {
    let cwd = &socket.directory;
    let peer = match role {
        Role::Connected { peer } => Some(*peer),
        _ => None,
    };
    if socket.style != Style::Datagram {
        return peer.unwrap_or_else(|| ghosts.sender(&[], cwd));
    }
    if !seen.name.is_empty() {
        let peer_is_it = sockets::peer_name(&socket.copy).ok().as_ref() == Some(&seen.name);
        return match table.datagram.get(&seen.name) {
            Some(inode) => *inode,
            None if peer_is_it && peer.is_some() => peer.unwrap_or_default(),
            None => ghosts.sender(&seen.name, cwd),
        };
    }
    let unnamed = |inode: &u64| {
        table.live.get(inode).map_or(*inode >= GHOST, |l| {
            sockets::own_name(&l.copy).is_ok_and(|n| n.is_empty())
        })
    };
    let to_us = |live: &&&Live| {
        let diag = table.diag.get(&live.inode);
        diag.and_then(|d| d.peer).map(u64::from) == Some(socket.inode) && unnamed(&live.inode)
    };
    peer.filter(unnamed)
        .or_else(|| table.live.values().find(to_us).map(|l| l.inode))
        .unwrap_or_else(|| ghosts.sender(&[], cwd))
}
