//! Connections in `TIME_WAIT`, which a killed job leaves for a minute.
//!
//! They keep a port from being bound again, even with `SO_REUSEADDR` unless the socket had it when it was closed. They end
//! when the other end's port answers with a RST (RFC 1337): a socket at that port connects to the one in `TIME_WAIT`, gets
//! an acknowledgement that does not fit, and the kernel resets the connection.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use ckpt_sys::{events, sockets};
use ckpt_tracer::sock_diag::inet::InetSocket as Listed;
use nix::errno::Errno;

use super::super::judge::tcp;
use super::super::{InetSocket, Protocol, closed, survey};
use super::step;
use crate::index::DescriptionId;

/// How long an answer may take, in ms.
const ANSWER: i32 = 1000;
/// How long all of this may take.
const PATIENCE: Duration = Duration::from_secs(3);

/// Ends what is in `TIME_WAIT` between this machine's own addresses at ports that these sockets will have.
pub(super) fn clear(of: &[(DescriptionId, &InetSocket)]) {
    let streams = of
        .iter()
        .filter(|(_, s)| s.protocol == Protocol::Tcp && s.local.port != 0);
    let mut wanted: HashSet<u16> = HashSet::new();
    for (_, socket) in streams {
        wanted.insert(socket.local.port);
        wanted.extend(socket.peer().map(|peer| peer.port));
    }
    if wanted.is_empty() {
        return;
    }
    let start = Instant::now();
    // Both ends may be in this state; then the kernel gives the port of one only when a second is over.
    while start.elapsed() < PATIENCE {
        let found = survey::listed(Protocol::Tcp).unwrap_or_default();
        let waits = |s: &&Listed| s.state == tcp::TIME_WAIT && wanted.contains(&s.local.1);
        let ended: Vec<Attempt> = found.iter().filter(waits).map(|s| end(s, &found)).collect();
        if ended
            .iter()
            .all(|attempt| matches!(attempt, Attempt::Impossible))
        {
            return;
        }
        let mut begun = false;
        for attempt in &ended {
            if let Attempt::Begun(socket) = attempt {
                begun = true;
                events::poll_for(socket, libc::POLLOUT, ANSWER);
            }
        }
        if !begun {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// What came of connecting to a connection in `TIME_WAIT`.
enum Attempt {
    /// It answers.
    Begun(OwnedFd),
    /// The other end has no port yet.
    Later,
    /// Another socket listens there, or the other end is not of this machine.
    Impossible,
}

/// Connects to one end from the place of the other.
fn end(waiting: &Listed, all: &[Listed]) -> Attempt {
    let (here, there) = (survey::own(waiting), survey::far(waiting));
    if all.iter().any(|s| survey::listens(s, here)) || !closed::is_local(there) {
        return Attempt::Impossible;
    }
    let Ok(socket) = sockets::socket_of(there.family(), libc::SOCK_STREAM, libc::IPPROTO_TCP)
    else {
        return Attempt::Impossible;
    };
    step::reuse(&socket);
    if sockets::bind(&socket, &there.sockaddr()).is_ok() {
        let _ = sockets::connect(&socket, &here.sockaddr());
        return Attempt::Begun(socket);
    }
    match step::at_port(&socket, there.port, || {
        sockets::connect(&socket, &here.sockaddr())
    }) {
        Some(Ok(()) | Err(Errno::EINPROGRESS | Errno::ECONNREFUSED)) => Attempt::Begun(socket),
        Some(Err(Errno::EADDRNOTAVAIL)) => Attempt::Later,
        _ => Attempt::Impossible,
    }
}
