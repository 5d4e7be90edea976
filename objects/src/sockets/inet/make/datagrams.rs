//! Datagram sockets. What is unread is sent again, from the address that it came from.

use std::net::IpAddr;
use std::os::fd::OwnedFd;

use ckpt_sys::sockets;
use nix::errno::Errno;

use super::super::{Address, InetSocket, Protocol, State, closed};
use super::step::{NOWHERE, bind, reuse, set_reuse};
use super::{Maker, failed};
use crate::error::Result;
use crate::files::kind::OpenFile;

impl Maker<'_> {
    pub(super) fn datagrams(&mut self) -> Result<()> {
        let of_messages = |s: &InetSocket| s.protocol != Protocol::Tcp;
        let sockets_of_job: Vec<_> = self
            .sockets
            .iter()
            .filter(|(_, s)| of_messages(s))
            .copied()
            .collect();
        for (at, socket) in &sockets_of_job {
            let made = self.new_socket(socket)?;
            reuse(&made);
            bind(&made, socket)?;
            self.fill(&made, socket)?;
            self.made.all.insert(*at, made);
        }
        for (at, socket) in &sockets_of_job {
            let Some(made) = self.made.all.get(at) else {
                continue;
            };
            if let State::Connected { peer, .. } = socket.state {
                sockets::connect(made, &peer.sockaddr()).map_err(|e| failed(socket, e))?;
            }
            for group in &socket.groups {
                if let Err(errno) = group.join(made) {
                    self.made.warnings.push(format!(
                        "the {} is not a member of the group {group} any more: {}",
                        socket.label(),
                        errno.desc()
                    ));
                }
            }
            for (bit, how) in [(2, libc::SHUT_WR), (1, libc::SHUT_RD)] {
                if socket.shutdown & bit != 0 {
                    let _ = sockets::shutdown(made, how);
                }
            }
            set_reuse(made, socket)?;
        }
        Ok(())
    }

    /// Sends a socket what it had not read.
    fn fill(&mut self, made: &OwnedFd, socket: &InetSocket) -> Result<()> {
        let (mut lost, mut connected) = (0, false);
        let mut sender: Option<(Address, OwnedFd)> = None;
        for piece in &socket.unread {
            let Some(from) = piece
                .from
                .filter(|from| closed::is_local(*from) && socket.protocol != Protocol::Icmp)
            else {
                lost += 1;
                continue;
            };
            let own = from.plain() == socket.local.plain();
            if !own && sender.as_ref().map(|(at, _)| *at) != Some(from) {
                drop(sender.take());
                sender = sender_at(from, socket).map(|made| (from, made));
            }
            let mut bytes = vec![0; piece.len as usize];
            self.bytes(piece, 0, &mut bytes)?;
            let to = match socket.local.is_any() {
                true => socket.local.at(from.ip),
                false => socket.local,
            };
            // A connected socket gets it, whatever others have its port.
            let by = match &sender {
                _ if own => Some(made),
                Some((_, sender)) => Some(sender),
                None => None,
            };
            let done = by.ok_or(Errno::EADDRINUSE).and_then(|by| {
                sockets::connect(made, &from.sockaddr())?;
                connected = true;
                sockets::send_to(by, &bytes, &to.sockaddr())
            });
            if done.is_err() {
                lost += 1;
            }
        }
        if connected {
            let _ = sockets::connect(made, &NOWHERE);
        }
        if lost > 0 {
            self.made.warnings.push(format!(
                "{lost} of {} unread datagrams of the {} could not be sent again, as if they had been lost on the network",
                socket.unread.len(),
                socket.label()
            ));
        }
        Ok(())
    }
}

/// A socket at a sender's address.
fn sender_at(from: Address, socket: &InetSocket) -> Option<OwnedFd> {
    let protocol = socket.protocol;
    let made = sockets::socket_of(
        from.family(),
        protocol.kind(),
        protocol.number(from.family()),
    )
    .ok()?;
    reuse(&made);
    let _ = sockets::set_int_option(&made, libc::SO_REUSEPORT, 1);
    let mapped = matches!(from.ip, IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some());
    if from.family() == libc::AF_INET6 && !mapped {
        let _ = sockets::set_option(libc::IPPROTO_IPV6, &made, 26, &1i32.to_ne_bytes());
    }
    sockets::bind(&made, &from.sockaddr()).ok()?;
    Some(made)
}
