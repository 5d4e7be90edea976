//! What a record must be like, and what a restore needs: addresses that the machine has, and ports that are free.

use std::collections::{HashMap, HashSet};

use ckpt_tracer::capabilities::{Held, Use};
use ckpt_tracer::sock_diag::inet::InetSocket as Listed;

use super::judge::tcp;
use super::{Address, InetSocket, Pending, Protocol, State, all, closed, options, survey};
use crate::Snapshot;
use crate::error::Obstacle;
use crate::files::kind::OpenFile;
use crate::index::DescriptionId;
use crate::outsiders::process_name;
use crate::references::{Faults, require};

/// Checks a record.
pub(super) fn check(
    socket: &InetSocket,
    number: DescriptionId,
    snapshot: &Snapshot,
    faults: &mut Faults,
) {
    let inode = socket.inode;
    if all(snapshot).next().map(|(first, _)| first) == Some(number) {
        references(snapshot, faults);
    }
    let family = socket.family();
    let peer = socket.peer();
    require!(
        faults,
        peer.is_none_or(|peer| peer.family() == family && peer.port != 0 && !peer.is_any()),
        "socket:[{inode}] cannot have its peer"
    );
    let streams = socket.protocol == Protocol::Tcp;
    let bound = socket.local.port != 0;
    let possible = match &socket.state {
        State::Unconnected => true,
        State::Listening { pending, .. } => {
            let of_family = |p: &Pending| [p.client, p.server].iter().all(|a| a.family() == family);
            streams && bound && pending.iter().all(of_family)
        }
        State::Connecting { .. } | State::Waiting { .. } => streams && bound,
        State::Connected { other, .. } => bound && (streams || other.is_none()),
        State::Ended { .. } | State::Dissolved => streams,
    };
    require!(
        faults,
        possible && socket.shutdown <= 3,
        "socket:[{inode}] cannot be in its state"
    );
    let pieces = match (&socket.state, streams) {
        (State::Connected { .. } | State::Ended { .. }, true) => 1,
        (_, true) => 0,
        (_, false) => usize::MAX,
    };
    // Sizes of buffers are ints; a datagram has at most 64 KiB.
    let most = match streams {
        true => i32::MAX as u64,
        false => 1 << 16,
    };
    let sizes = socket.unread.iter().all(|piece| piece.len <= most);
    let space = socket.unread.first().map(|piece| piece.space);
    let apart = socket.unread.windows(2).all(|two| {
        two[0]
            .at
            .checked_add(two[0].len)
            .is_some_and(|end| end <= two[1].at)
    });
    require!(
        faults,
        socket.unread.len() <= pieces
            && sizes
            && apart
            && socket.unread.iter().all(|p| Some(p.space) == space),
        "the unread bytes of socket:[{inode}] cannot be its own"
    );
    for option in &socket.options {
        require!(
            faults,
            options::is_known(option),
            "socket:[{inode}] has an option {} that is not kept",
            option.number
        );
    }
}

/// Checks what sockets say of each other.
fn references(snapshot: &Snapshot, faults: &mut Faults) {
    let mut by_inode: HashMap<u64, &InetSocket> = HashMap::new();
    for (_, socket) in all(snapshot) {
        require!(
            faults,
            by_inode.insert(socket.inode, socket).is_none(),
            "socket:[{}] exists twice",
            socket.inode
        );
    }
    let mut waiting = HashSet::new();
    for (_, socket) in all(snapshot) {
        let inode = socket.inode;
        match &socket.state {
            State::Connected {
                peer,
                other: Some(other),
                ..
            } => {
                let fits = by_inode.get(other).is_some_and(|end| {
                    let back = matches!(&end.state, State::Connected { other: Some(back), .. } if *back == inode);
                    back && end.local.plain() == peer.plain()
                        && end.peer().map(Address::plain) == Some(socket.local.plain())
                });
                require!(
                    faults,
                    fits,
                    "socket:[{inode}] is connected to socket:[{other}], which is not connected to it"
                );
            }
            State::Listening { pending, .. } => {
                for client in pending.iter().filter_map(|p| p.inode) {
                    let fits = by_inode.get(&client);
                    let fits = fits.is_some_and(|c| matches!(c.state, State::Waiting { .. }));
                    require!(
                        faults,
                        fits && waiting.insert(client),
                        "socket:[{client}] cannot wait in the backlog of socket:[{inode}]"
                    );
                }
            }
            _ => {}
        }
    }
    for (_, socket) in all(snapshot) {
        require!(
            faults,
            !matches!(socket.state, State::Waiting { .. }) || waiting.contains(&socket.inode),
            "socket:[{}] waits in no backlog",
            socket.inode
        );
    }
}

/// The obstacles to the restore of all internet sockets. `leaving`: the job is alive and will end, and its ports with it.
pub fn in_the_way(snapshot: &Snapshot, held: Held, leaving: bool) -> Vec<Obstacle> {
    let own: HashSet<u64> = match leaving {
        true => all(snapshot).map(|(_, socket)| socket.inode).collect(),
        false => HashSet::new(),
    };
    // By protocol and port.
    let mut listed: HashMap<(Protocol, u16), Vec<Listed>> = HashMap::new();
    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::UdpLite] {
        if all(snapshot).any(|(_, socket)| socket.protocol == protocol) {
            for socket in survey::listed(protocol).unwrap_or_default() {
                let place = listed.entry((protocol, socket.local.1)).or_default();
                place.push(socket);
            }
        }
    }
    let privileged = held.allows(Use::LowPorts);
    let mut obstacles = Vec::new();
    let (mut missing, mut told) = (HashSet::new(), HashSet::new());
    for (_, socket) in all(snapshot) {
        let local = socket.local;
        if local.port == 0 || matches!(socket.state, State::Ended { .. }) {
            continue;
        }
        if !local.is_any() && missing.insert(local.ip) && !closed::is_local(local) {
            obstacles.push(Obstacle::new(
                format!("the {}", socket.label()),
                format!(
                    "cannot have its address: this machine does not have {}",
                    local.ip
                ),
                "give the address to an interface of this machine (ip addr add)",
            ));
        }
        if !privileged && socket.protocol != Protocol::Icmp && local.port < lowest_free_port() {
            obstacles.push(Obstacle::new(
                format!("the {}", socket.label()),
                format!(
                    "cannot have its port: a port below {} needs {}",
                    lowest_free_port(),
                    Use::LowPorts
                ),
                "restore it as root, or lower net.ipv4.ip_unprivileged_port_start",
            ));
        }
        let taken = listed.get(&(socket.protocol, local.port));
        let taken = taken
            .into_iter()
            .flatten()
            .find(|other| !own.contains(&other.inode.into()) && conflict(socket, other));
        if let Some(other) = taken
            && told.insert((local.port, other.inode))
        {
            obstacles.push(Obstacle::new(
                format!("the {}", socket.label()),
                format!("cannot have its port: {} has it", holder(other)),
                "end that process first",
            ));
        }
    }
    obstacles
}

/// Whether a live socket prevents one from having its address and port again.
fn conflict(socket: &InetSocket, other: &Listed) -> bool {
    let (ours, theirs) = (socket.local.plain(), survey::own(other).plain());
    let overlap = ours.0 == theirs.0 || ours.0.is_unspecified() || theirs.0.is_unspecified();
    if ours.1 != theirs.1 || !overlap || other.inode == 0 {
        return false;
    }
    let peer = socket.peer().map(Address::plain);
    match socket.protocol {
        Protocol::Tcp if other.state == tcp::LISTEN => true,
        // The ports of two connections may be equal if the other ends are not.
        Protocol::Tcp => match peer {
            Some(peer) => peer == survey::far(other).plain(),
            None => !matches!(socket.state, State::Ended { .. }) && other.state == tcp::CLOSE,
        },
        _ => peer.is_none() || other.remote.1 == 0 || peer == Some(survey::far(other).plain()),
    }
}

/// `process 12 (name)`, or what else is known of a socket's holder.
fn holder(socket: &Listed) -> String {
    match super::super::names::holder_pid(socket.inode.into()) {
        Some(pid) => process_name(pid),
        None => format!("a process of uid {}", socket.uid),
    }
}

/// `ip_unprivileged_port_start`.
fn lowest_free_port() -> u16 {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    text.ok()
        .and_then(|t| t.trim().parse().ok())
        .unwrap_or(1024)
}
