//! What a socket itself tells about its past.

use std::os::fd::OwnedFd;

use ckpt_sys::{events, sockets};
use nix::errno::Errno;

use super::Address;
use super::judge::tcp;

/// `SO_NETNS_COOKIE` (Linux 5.14).
const SO_NETNS_COOKIE: i32 = 71;

/// What identifies our network namespace among its sockets, if the kernel tells.
pub(super) fn network() -> Option<Vec<u8>> {
    let socket = sockets::socket(libc::AF_INET, libc::SOCK_DGRAM).ok()?;
    sockets::option(&socket, SO_NETNS_COOKIE).ok()
}

/// Whether a socket belongs to that network namespace, as far as the kernel tells.
pub(super) fn is_of(network: Option<&[u8]>, socket: &OwnedFd) -> bool {
    match (network, sockets::option(socket, SO_NETNS_COOKIE)) {
        (Some(network), Ok(its)) => network == its,
        _ => true,
    }
}

/// Whether an address belongs to this machine.
pub(super) fn is_local(address: Address) -> bool {
    let Ok(socket) = sockets::socket(address.family(), libc::SOCK_DGRAM) else {
        return false;
    };
    let address = Address { port: 0, ..address };
    sockets::bind(&socket, &address.sockaddr()).is_ok()
}

/// A number in `struct tcp_info`, linux/tcp.h.
fn number(info: &[u8], at: usize, len: usize) -> u64 {
    let bytes = info.get(at..at + len).unwrap_or(&[]);
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

/// Whether the socket called connect(2): the first byte that was acknowledged to it is its SYN, which it has not sent as a
/// byte of the stream.
pub(super) fn has_connected(socket: &OwnedFd) -> bool {
    let Ok(info) = sockets::tcp_info(socket) else {
        return false;
    };
    let acknowledged = number(&info, 120, 8);
    let (sent, again) = (number(&info, 200, 8), number(&info, 208, 8));
    let waiting = sockets::unsent(socket).saturating_sub(sockets::never_sent(socket)) as u64;
    // The end of its own stream counts as well.
    let end = [tcp::FIN_WAIT1, tcp::FIN_WAIT2].contains(info.first().unwrap_or(&0));
    acknowledged + waiting > sent.saturating_sub(again) + u64::from(end)
}

/// Whether a TCP socket was disconnected and has not told it yet (`tcp_disconnect`, net/ipv4/tcp.c).
pub(super) fn dissolved(socket: &OwnedFd) -> bool {
    let state = events::poll_now(socket, libc::POLLRDHUP);
    state & libc::POLLERR != 0 && state & libc::POLLRDHUP == 0
}

/// The error that a TCP socket returns next whose connection has ended at both ends, 0 for none, and whether it was ever
/// answered; `None` if it has never called connect(2).
pub(super) fn ended(socket: &OwnedFd) -> Option<(i32, bool)> {
    let state = events::poll_now(socket, libc::POLLRDHUP);
    if state & libc::POLLRDHUP == 0 {
        return None;
    }
    let answered = sockets::tcp_info(socket).is_ok_and(|info| number(&info, 68, 4) != 0);
    let error = match (state & libc::POLLERR != 0, answered) {
        (false, _) => 0,
        (true, false) => Errno::ECONNREFUSED as i32,
        (true, true) => Errno::ECONNRESET as i32,
    };
    Some((error, answered))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn the_end_that_connected_is_known() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("there is a loopback");
        let at = listener.local_addr().expect("it is bound");
        let mut client = TcpStream::connect(at).expect("it listens");
        let (mut server, _) = listener.accept().expect("it waits");
        let known = |client: &TcpStream, server: &TcpStream| {
            let of = |stream: &TcpStream| has_connected(&stream.try_clone().unwrap().into());
            assert!(of(client) && !of(server));
        };
        known(&client, &server);
        for _ in 0..3 {
            client.write_all(&[7; 1000]).expect("there is room");
            server.write_all(&[8; 10]).expect("there is room");
            known(&client, &server);
        }
        client
            .shutdown(std::net::Shutdown::Write)
            .expect("it is connected");
        known(&client, &server);
        assert_eq!(ended(&client.try_clone().unwrap().into()), None);
        // Unread data at the end that closes resets the connection.
        drop(server);
        let client = OwnedFd::from(client);
        while ended(&client).is_none() {}
        assert_eq!(ended(&client), Some((libc::ECONNRESET, true)));
        let new = sockets::socket(libc::AF_INET, libc::SOCK_STREAM).expect("a socket");
        assert_eq!(ended(&new), None);
    }

    #[test]
    fn own_addresses_are_known() {
        let of = |text: &str| Address::new(text.parse::<std::net::IpAddr>().unwrap(), 80);
        assert!(is_local(of("127.0.0.1")) && is_local(of("127.1.2.3")));
        assert!(!is_local(of("192.0.2.1")));
    }
}
