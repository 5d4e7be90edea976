//! Empty messages that the kernel does not show any more.
//!
//! An empty message behind others is shown at the first peek, and marked; later peeks skip it
//! (`__skb_try_recv_from_queue`, net/core/datagram.c). It is still visible in the memory charged to its sender until
//! it is read.

use std::collections::{HashMap, HashSet};

use ckpt_sys::sockets;
use ckpt_tracer::sock_diag::unix as unix_diag;
use nix::errno::Errno;

use super::super::unix::{Role, Style};
use super::{Live, Table};

/// Memory charged to the sender for messages of these lengths, as far as they were seen.
fn taken_by(style: Style, lengths: impl Iterator<Item = usize>) -> Result<usize, Errno> {
    let mut known: HashMap<usize, usize> = HashMap::new();
    let mut sum = 0;
    for length in lengths {
        sum += match known.get(&length) {
            Some(taken) => *taken,
            None => {
                let taken = unsent_of(style.number(), &[length])?;
                known.insert(length, taken);
                taken
            }
        };
    }
    Ok(sum)
}

/// `SIOCOUTQ` of a socket of ours that has sent messages of these lengths, all unread.
pub(in crate::sockets) fn unsent_of(kind: i32, lengths: &[usize]) -> Result<usize, Errno> {
    let [from, _to] = sockets::pair(kind)?;
    let buffer = vec![0u8; lengths.iter().copied().max().unwrap_or(0)];
    let room = i32::try_from(lengths.iter().sum::<usize>()).map_err(|_| Errno::EOVERFLOW)?;
    sockets::set_int_option(&from, libc::SO_SNDBUF, room.saturating_add(1 << 20))?;
    for len in lengths {
        sockets::send(&from, &buffer[..*len], 0)?;
    }
    Ok(sockets::unsent(&from))
}

/// Whether more was sent than was seen; true if unknown.
fn is_more(unsent: usize, style: Style, seen: impl Iterator<Item = usize>) -> bool {
    unsent > 0 && !taken_by(style, seen).is_ok_and(|seen| seen >= unsent)
}

fn peer(inode: u64, diag: &HashMap<u64, unix_diag::UnixSocket>) -> Option<u64> {
    diag.get(&inode)?.peer.map(u64::from)
}

/// Datagram sockets of the job that have sent more than was found in the job. Sockets with the same name, and those
/// without a name, are counted together; the two of a nameless pair are checked separately, as long as both are
/// connected to each other.
pub(super) fn owing(live: &[Live], diag: &HashMap<u64, unix_diag::UnixSocket>) -> HashSet<u64> {
    let datagram = || live.iter().filter(|l| l.style == Style::Datagram);
    if datagram().all(|l| l.seen.is_empty()) {
        return HashSet::new();
    }
    let name = |l: &Live| sockets::own_name(&l.copy).unwrap_or_default();
    let nameless: HashSet<u64> = datagram()
        .filter(|l| name(l).is_empty())
        .map(|l| l.inode)
        .collect();
    let of_a_pair = |l: &Live| {
        let peer = peer(l.inode, diag).filter(|peer| nameless.contains(peer));
        nameless.contains(&l.inode) && peer.is_some_and(|to| self::peer(to, diag) == Some(l.inode))
    };
    let mut senders: HashMap<Vec<u8>, (usize, Vec<u64>)> = HashMap::new();
    for socket in datagram().filter(|l| !of_a_pair(l)) {
        let (unsent, inodes) = senders.entry(name(socket)).or_default();
        *unsent += sockets::unsent(&socket.copy);
        inodes.push(socket.inode);
    }
    let owing = senders.into_iter().filter(|(name, (unsent, _))| {
        let queues = datagram().filter(|l| !of_a_pair(l));
        let theirs = queues
            .flat_map(|l| &l.seen)
            .filter(|(m, _)| m.name == *name);
        is_more(*unsent, Style::Datagram, theirs.map(|(m, _)| m.data.len()))
    });
    owing.flat_map(|(_, (_, inodes))| inodes).collect()
}

/// Whether a socket may hold messages that were not seen.
pub(super) fn may_hide(socket: &Live, role: &Role, table: &Table<'_>) -> bool {
    if !table.held || socket.style == Style::Stream {
        return false;
    }
    socket.unseen || in_pair(socket, role, table) || by_others(socket, table)
}

/// For a socket whose peer sends to it only.
fn in_pair(socket: &Live, role: &Role, table: &Table<'_>) -> bool {
    let Role::Connected { peer } = role else {
        return false;
    };
    let Some(peer) = table.live.get(peer) else {
        return false;
    };
    let nameless = |l: &Live| sockets::own_name(&l.copy).is_ok_and(|n| n.is_empty());
    let mutual = self::peer(peer.inode, &table.diag) == Some(socket.inode);
    let alone = socket.style == Style::SeqPacket || mutual && nameless(socket) && nameless(peer);
    let seen = socket.seen.iter().map(|(m, _)| m.data.len());
    alone && is_more(sockets::unsent(&peer.copy), socket.style, seen)
}

/// For a datagram socket to which an unseen message may have been sent. The first message is always shown, so an
/// empty queue hides none.
fn by_others(socket: &Live, table: &Table<'_>) -> bool {
    if socket.style != Style::Datagram || socket.seen.is_empty() {
        return false;
    }
    let named = sockets::own_name(&socket.copy).is_ok_and(|n| !n.is_empty());
    // A socket that was once paired with it may have sent to it.
    let connected = |from: &u64| {
        peer(*from, &table.diag) == Some(socket.inode)
            || peer(socket.inode, &table.diag) == Some(*from)
    };
    table.owing.iter().any(|from| named || connected(from))
}
