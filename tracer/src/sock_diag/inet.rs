//! Internet sockets: TCP, UDP and their kin.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{each_attribute, word};
use crate::Result;

/// One internet socket of the network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InetSocket {
    /// `AF_INET` or `AF_INET6`.
    pub family: u8,
    /// The state by the kernel's numbers (`TCP_ESTABLISHED` is 1); of a datagram socket 1 when it is connected, else 7.
    pub state: u8,
    /// Its own address and port.
    pub local: (IpAddr, u16),
    /// Those of the other end; unspecified and 0 without one.
    pub remote: (IpAddr, u16),
    /// Inode number; 0 when it has no descriptor: it waits to be accepted, or has been closed.
    pub inode: u32,
    /// User that has it.
    pub uid: u32,
    /// Unread bytes; of a listening socket, connections in its backlog.
    pub unread: u32,
    /// Bytes sent that are not acknowledged; of a listening socket, the limit of its backlog.
    pub unsent: u32,
    /// `RCV_SHUTDOWN` (1) and `SEND_SHUTDOWN` (2).
    pub shutdown: u8,
}

/// `INET_DIAG_SHUTDOWN`.
const SHUTDOWN: u16 = 8;

/// Lists all visible sockets of a family (`AF_INET`, `AF_INET6`) and a protocol (`IPPROTO_TCP`, `IPPROTO_UDP` …), in all
/// states, `TIME_WAIT` and `SYN_RECV` too.
///
/// # Errors
/// [`Error::Kernel`](crate::Error::Kernel) with `ENOENT` where the kernel has no module for that protocol.
pub fn dump(family: i32, protocol: i32) -> Result<Vec<InetSocket>> {
    // struct inet_diag_req_v2, with an empty struct inet_diag_sockid
    let mut request = vec![family as u8, protocol as u8, 1 << (SHUTDOWN - 1), 0];
    request.extend_from_slice(&u32::MAX.to_ne_bytes());
    request.extend_from_slice(&[0; 40]);
    request.extend_from_slice(&[0xff; 8]);
    super::dump(&request, "internet sockets", socket)
}

/// `struct inet_diag_msg` and its attributes.
fn socket(body: &[u8]) -> Option<InetSocket> {
    let family = *body.first()?;
    let port = |at: usize| Some(u16::from_be_bytes(body.get(at..at + 2)?.try_into().ok()?));
    let address = |at: usize| match i32::from(family) {
        libc::AF_INET6 => {
            let bytes: [u8; 16] = body.get(at..at + 16)?.try_into().ok()?;
            Some(IpAddr::from(Ipv6Addr::from(bytes)))
        }
        _ => {
            let bytes: [u8; 4] = body.get(at..at + 4)?.try_into().ok()?;
            Some(IpAddr::from(Ipv4Addr::from(bytes)))
        }
    };
    let mut socket = InetSocket {
        family,
        state: *body.get(1)?,
        local: (address(8)?, port(4)?),
        remote: (address(24)?, port(6)?),
        inode: word(body, 68)?,
        uid: word(body, 64)?,
        unread: word(body, 56)?,
        unsent: word(body, 60)?,
        shutdown: 0,
    };
    each_attribute(body.get(72..)?, |kind, value| {
        if kind == SHUTDOWN {
            socket.shutdown = *value.first()?;
        }
        Some(())
    })?;
    Some(socket)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::fd::AsRawFd;

    use super::super::inode;
    use super::*;

    #[test]
    fn both_ends_and_the_backlog_are_told() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("there is a loopback");
        let at = listener.local_addr().expect("it is bound");
        let mut client = TcpStream::connect(at).expect("it listens");
        let (server, _) = listener.accept().expect("it is there");
        let waiting = TcpStream::connect(at).expect("it listens");
        client.write_all(b"abc").expect("there is room");
        client
            .shutdown(std::net::Shutdown::Write)
            .expect("it is connected");
        let arrived = || {
            let all = dump(libc::AF_INET, libc::IPPROTO_TCP).expect("inet_diag");
            let server = all
                .iter()
                .find(|s| s.inode == inode(&server))
                .expect("it is there");
            (server.unread >= 3 && server.shutdown & 1 != 0).then(|| all.clone())
        };
        let all = std::iter::repeat_with(arrived)
            .flatten()
            .next()
            .expect("endless");
        let find = |fd: &dyn AsRawFd| {
            let inode = inode(&fd.as_raw_fd());
            all.iter().find(|s| s.inode == inode).expect("it is there")
        };
        let (near, far) = (find(&client), find(&server));
        assert_eq!((near.local, near.remote), (far.remote, far.local));
        assert_eq!(near.shutdown, 2);
        // FIN_WAIT1 or FIN_WAIT2, CLOSE_WAIT
        assert!(
            [4, 5].contains(&near.state) && far.state == 8,
            "{near:?}, {far:?}"
        );
        assert_eq!((find(&listener).state, find(&listener).unread), (10, 1));
        let not_accepted = all.iter().find(|s| s.remote == find(&waiting).local);
        assert_eq!(not_accepted.expect("it is there").inode, 0);
    }

    #[test]
    fn datagram_sockets_are_told() {
        let socket = UdpSocket::bind("[::1]:0").expect("there is a loopback");
        let at = socket.local_addr().expect("it is bound");
        let all = dump(libc::AF_INET6, libc::IPPROTO_UDP).expect("inet_diag");
        let found = all
            .iter()
            .find(|s| s.inode == inode(&socket))
            .expect("it is there");
        assert_eq!((found.local, found.state), ((at.ip(), at.port()), 7));
    }
}
