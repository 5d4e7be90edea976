//! Determines the state of each internet socket, given all others.

use std::collections::HashMap;

use ckpt_sys::{events, sockets};
use ckpt_tracer::sock_diag::inet::InetSocket as Listed;
use nix::errno::Errno;

use super::super::filter;
use super::survey::{Live, Table, Verdict, far, listens, own};
use super::unread::Store;
use super::{Address, InetSocket, Pending, Protocol, State, closed, multicast, options};
use crate::source::Collector;

/// States of a TCP socket, include/net/tcp_states.h.
pub(super) mod tcp {
    pub(in super::super) const ESTABLISHED: u8 = 1;
    pub(in super::super) const SYN_SENT: u8 = 2;
    pub(in super::super) const FIN_WAIT1: u8 = 4;
    pub(in super::super) const FIN_WAIT2: u8 = 5;
    pub(in super::super) const TIME_WAIT: u8 = 6;
    pub(in super::super) const CLOSE: u8 = 7;
    pub(in super::super) const CLOSE_WAIT: u8 = 8;
    pub(in super::super) const LAST_ACK: u8 = 9;
    pub(in super::super) const LISTEN: u8 = 10;
    pub(in super::super) const CLOSING: u8 = 11;
}

const RECEIVING: u8 = 1;
const SENDING: u8 = 2;
const READ_IT: &str = "let the program read from it before the checkpoint";
const AGAIN: &str = "try again in a moment";

/// Determines the state of one socket. `inodes` are those of the job's sockets.
pub(super) fn judge(
    socket: &Live<'_>,
    table: &Table,
    inodes: &HashMap<u64, usize>,
    (store, new): (&mut Store, &mut options::New),
    collector: &mut Collector,
) -> Verdict {
    match of(socket, table, inodes, (store, new), collector) {
        Ok(socket) => Verdict::Inside(Box::new(socket)),
        Err(verdict) => verdict,
    }
}

fn of(
    socket: &Live<'_>,
    table: &Table,
    inodes: &HashMap<u64, usize>,
    (store, new): (&mut Store, &mut options::New),
    collector: &mut Collector,
) -> Result<InetSocket, Verdict> {
    let unreadable = |errno: Errno| {
        let reason = format!(
            "is an internet socket that cannot be examined: {}",
            errno.desc()
        );
        socket.refuse_for_now(reason, AGAIN)
    };
    let local = sockets::own_address(socket.copy).map_err(unreadable)?;
    let Some(local) = Address::parse(&local) else {
        return Err(socket.unsupported("an internet socket without an address"));
    };
    let filter = match filter::capture(socket.copy) {
        Ok(filter) => filter,
        Err(Errno::EACCES) => {
            return Err(socket.refuse(
                "is an internet socket with an eBPF filter (SO_ATTACH_BPF), which the kernel does not show",
                "let the program take it off (SO_DETACH_FILTER), or close the socket, before the checkpoint",
            ));
        }
        Err(errno) => return Err(unreadable(errno)),
    };
    let mut found = InetSocket {
        inode: socket.inode,
        protocol: socket.protocol,
        local,
        state: State::Unconnected,
        shutdown: 0,
        unread: Vec::new(),
        groups: multicast::capture(socket.copy, socket.protocol, local.family()),
        options: options::capture(socket.copy, socket.protocol, local.family(), new),
        filter,
    };
    match socket.protocol {
        Protocol::Tcp => stream(socket, table, inodes, &mut found)?,
        _ => datagrams(socket, table, &mut found, collector)?,
    }
    if let State::Ended {
        error: 1..,
        answered: true,
    } = found.state
    {
        let object = socket.object();
        collector.findings.notes.push(format!(
            "{object} is a TCP socket with an error that the program has not been told, which cannot be read; the \
             restored one has ECONNRESET"
        ));
    }
    if collector.frozen() {
        let queue = match (&found.state, socket.protocol) {
            (State::Listening { .. } | State::Connecting { .. }, _) => Ok(Vec::new()),
            (_, Protocol::Tcp) => {
                let len = ckpt_sys::files::unread(socket.copy);
                store.stream(socket.copy, len, collector)
            }
            // A peek would take the error.
            _ if events::poll_now(socket.copy, 0) & libc::POLLERR != 0 => Ok(Vec::new()),
            _ => store.datagrams(socket.copy, collector),
        };
        found.unread = queue.map_err(|errno| {
            let reason = format!("has unread data that cannot be examined: {}", errno.desc());
            socket.refuse_for_now(reason, READ_IT)
        })?;
    }
    Ok(found)
}

/// The state of a TCP socket.
fn stream(
    socket: &Live<'_>,
    table: &Table,
    inodes: &HashMap<u64, usize>,
    found: &mut InetSocket,
) -> Result<(), Verdict> {
    let state = sockets::tcp_state(socket.copy).unwrap_or(tcp::CLOSE);
    let ulp = sockets::option_of(libc::IPPROTO_TCP, socket.copy, libc::TCP_ULP);
    if ulp.is_ok_and(|name| !name.is_empty()) {
        return Err(socket.unsupported("a TCP socket that the kernel encrypts (TCP_ULP)"));
    }
    let urgent = events::poll_now(socket.copy, libc::POLLPRI) & libc::POLLPRI != 0;
    if urgent
        || sockets::at_mark(socket.copy) == Ok(true) && ckpt_sys::files::unread(socket.copy) > 0
    {
        return Err(socket.refuse_for_now("is a TCP socket with an urgent byte (MSG_OOB)", READ_IT));
    }
    let listed = table.of(socket.inode);
    found.state = match state {
        tcp::LISTEN => listening(socket, listed, table, inodes)?,
        tcp::SYN_SENT => match listed.map(far) {
            Some(peer) => State::Connecting { peer },
            None => return Err(socket.refuse_for_now("is a TCP socket that is connecting", AGAIN)),
        },
        tcp::CLOSE => {
            if let Some((error, answered)) = closed::ended(socket.copy) {
                State::Ended { error, answered }
            } else {
                if listed.is_none() {
                    // The port of a connection that was ended is shown, but no longer had.
                    found.local = Address::unspecified(found.local.family());
                }
                match closed::dissolved(socket.copy) {
                    true => State::Dissolved,
                    false => State::Unconnected,
                }
            }
        }
        _ => {
            let peer = sockets::peer_address(socket.copy).ok();
            let Some(peer) = peer.as_deref().and_then(Address::parse) else {
                return Err(
                    socket.refuse_for_now("is a TCP socket that is just being closed", AGAIN)
                );
            };
            connected(socket, state, (found.local, peer), table, inodes)?
        }
    };
    let shutdown = listed.map_or(0, |l| l.shutdown);
    found.shutdown = match state {
        tcp::FIN_WAIT1 | tcp::FIN_WAIT2 => shutdown & RECEIVING | SENDING,
        // Nothing more comes from the other end.
        tcp::CLOSE_WAIT => 0,
        tcp::LAST_ACK | tcp::CLOSING => SENDING,
        _ => shutdown & RECEIVING,
    };
    Ok(())
}

fn connected(
    socket: &Live<'_>,
    state: u8,
    (local, peer): (Address, Address),
    table: &Table,
    inodes: &HashMap<u64, usize>,
) -> Result<State, Verdict> {
    let active = closed::has_connected(socket.copy);
    let ended = [tcp::CLOSE_WAIT, tcp::LAST_ACK, tcp::CLOSING].contains(&state);
    let other = table.other_end(local, peer);
    match other.map(|other| (other.inode, other.state)) {
        Some((0, tcp::ESTABLISHED | tcp::CLOSE_WAIT)) => {
            // It has no descriptor yet.
            let listener = listeners(table, peer).find(|l| inodes.contains_key(&l.inode.into()));
            match listener {
                Some(_) => Ok(State::Waiting { peer }),
                None => Err(socket.outside()),
            }
        }
        Some((inode, _)) if inode != 0 => match inodes.contains_key(&u64::from(inode)) {
            true => Ok(State::Connected {
                peer,
                other: Some(inode.into()),
                active,
            }),
            false => Err(socket.outside()),
        },
        // Closed: what is left of it is in the kernel's list, or has gone by now.
        _ if ended && (other.is_some() || closed::is_local(peer)) => Ok(State::Connected {
            peer,
            other: None,
            active,
        }),
        Some(_) => Err(socket.refuse_for_now(
            "is a TCP socket whose other end is just being closed",
            AGAIN,
        )),
        None => Err(socket.outside()),
    }
}

/// The listening sockets at which a connection to that address may arrive.
fn listeners(table: &Table, at: Address) -> impl Iterator<Item = &Listed> {
    table.all.iter().filter(move |l| listens(l, at))
}

/// The state of a listening socket.
fn listening(
    socket: &Live<'_>,
    listed: Option<&Listed>,
    table: &Table,
    inodes: &HashMap<u64, usize>,
) -> Result<State, Verdict> {
    let Some(listed) = listed else {
        return Err(
            socket.refuse_for_now("is a listening socket that the kernel does not list", AGAIN)
        );
    };
    let backlog = listed.unsent;
    if listed.unread == 0 {
        return Ok(State::Listening {
            backlog,
            pending: Vec::new(),
        });
    }
    let arrives = |waiting: &&Listed| {
        let connected = [tcp::ESTABLISHED, tcp::CLOSE_WAIT].contains(&waiting.state);
        waiting.inode == 0 && connected && listens(listed, own(waiting))
    };
    let waiting: Vec<&Listed> = table.all.iter().filter(arrives).collect();
    let mut pending = Vec::new();
    for waiting in &waiting {
        let (server, client) = (own(waiting), far(waiting));
        let end = u32::from(waiting.state == tcp::CLOSE_WAIT);
        if waiting.unread > end {
            return Err(socket.refuse_for_now(
                format!(
                    "is a listening socket with a connection from {client} that waits to be accepted, and has {} \
                     unread bytes, which only a process that accepts it can read",
                    waiting.unread - end
                ),
                "let the program accept it before the checkpoint",
            ));
        }
        let inode = match table.other_end(server, client) {
            Some(other) if inodes.contains_key(&u64::from(other.inode)) => Some(other.inode.into()),
            Some(other) if other.inode == 0 && end == 1 => None,
            None if end == 1 && closed::is_local(client) => None,
            _ => {
                return Err(socket.refuse_for_now(
                    format!(
                        "is a listening socket with a connection from {client}, outside the job, that waits to be accepted"
                    ),
                    "let the program accept it before the checkpoint",
                ));
            }
        };
        pending.push(Pending {
            client,
            server,
            inode,
        });
    }
    let ambiguous = waiting.iter().any(|w| listeners(table, own(w)).count() > 1);
    if ambiguous || waiting.len() != listed.unread as usize {
        let reason = match ambiguous {
            // Which of them has a connection the kernel does not tell.
            true => {
                "is one of several sockets that listen on one port, with connections that wait to be accepted"
            }
            false => {
                "is a listening socket with connections that wait to be accepted, some of which have been reset"
            }
        };
        return Err(
            socket.refuse_for_now(reason, "let the program accept them before the checkpoint")
        );
    }
    // The order is not told; clients were made in the order of their inodes.
    pending.sort_by_key(|p| p.inode.unwrap_or(0));
    Ok(State::Listening { backlog, pending })
}

/// The state of a datagram socket.
fn datagrams(
    socket: &Live<'_>,
    table: &Table,
    found: &mut InetSocket,
    collector: &mut Collector,
) -> Result<(), Verdict> {
    if let Some(peer) = sockets::peer_address(socket.copy)
        .ok()
        .as_deref()
        .and_then(Address::parse)
    {
        found.state = State::Connected {
            peer,
            other: None,
            active: true,
        };
    }
    if socket.protocol != Protocol::Icmp && collector.frozen() && sockets::unsent(socket.copy) > 0 {
        return Err(socket.refuse_for_now(
            "is a socket with a datagram that is not complete (UDP_CORK, MSG_MORE), which the kernel does not show",
            "let the program send it before the checkpoint",
        ));
    }
    if let Some(listed) = table.of(socket.inode) {
        found.shutdown = listed.shutdown & (RECEIVING | SENDING);
    }
    let state = events::poll_now(socket.copy, libc::POLLIN);
    if state & libc::POLLERR != 0 && state & libc::POLLIN != 0 {
        let reason = "has a pending error before its unread datagrams, which cannot be examined without clearing it";
        return Err(socket.refuse_for_now(reason, READ_IT));
    }
    if state & libc::POLLERR != 0 {
        let what = "has an error or a message in its error queue that the program has not read";
        let then = "the restored socket does not have it";
        let object = socket.object();
        let told = collector.not_read_yet(object, what, then);
        told.map_err(Verdict::Refused)?;
    }
    Ok(())
}
