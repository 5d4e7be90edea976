//! Internet sockets by their addresses, for messages.
#![allow(unsafe_code)]

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;

type Call = unsafe extern "C" fn(i32, *mut libc::sockaddr, *mut libc::socklen_t) -> i32;

/// `127.0.0.1:4000, connected to 127.0.0.1:5000, ESTABLISHED`; `None` for other families.
pub fn describe(fd: &impl AsRawFd) -> Option<String> {
    let mut text = address(libc::getsockname, fd)?.to_string();
    if let Some(peer) = address(libc::getpeername, fd) {
        text.push_str(&format!(", connected to {peer}"));
    }
    if let Some(state) = tcp_state(fd) {
        text.push_str(&format!(", {state}"));
    }
    Some(text)
}

fn address(call: Call, fd: &impl AsRawFd) -> Option<SocketAddr> {
    let mut buffer = [0u8; 128];
    let mut len = buffer.len() as libc::socklen_t;
    // SAFETY: `buffer` is live and `len` says how long.
    let r = unsafe { call(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), &raw mut len) };
    let bytes = buffer.get(..len as usize).filter(|_| r == 0)?;
    parse(bytes)
}

/// `struct sockaddr_in` and `struct sockaddr_in6`.
fn parse(bytes: &[u8]) -> Option<SocketAddr> {
    let family = u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?);
    let port = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
    match i32::from(family) {
        libc::AF_INET => {
            let address: [u8; 4] = bytes.get(4..8)?.try_into().ok()?;
            Some((Ipv4Addr::from(address), port).into())
        }
        libc::AF_INET6 => {
            let address: [u8; 16] = bytes.get(8..24)?.try_into().ok()?;
            Some((Ipv6Addr::from(address), port).into())
        }
        _ => None,
    }
}

/// By the names of ss(8) and netstat(8).
fn tcp_state(fd: &impl AsRawFd) -> Option<&'static str> {
    const STATES: [&str; 12] = [
        "ESTABLISHED",
        "SYN_SENT",
        "SYN_RECV",
        "FIN_WAIT1",
        "FIN_WAIT2",
        "TIME_WAIT",
        "CLOSE",
        "CLOSE_WAIT",
        "LAST_ACK",
        "LISTEN",
        "CLOSING",
        "NEW_SYN_RECV",
    ];
    // `tcpi_state`, the first byte of `struct tcp_info`.
    let mut state = 0u8;
    let mut len: libc::socklen_t = 1;
    // SAFETY: the kernel writes at most `len` bytes.
    let r = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut state).cast(),
            &raw mut len,
        )
    };
    STATES
        .get(usize::from(state).checked_sub(1)?)
        .copied()
        .filter(|_| r == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn sockets_are_told_by_their_addresses() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("there is a loopback");
        let at = listener.local_addr().expect("it is bound");
        assert_eq!(describe(&listener), Some(format!("{at}, LISTEN")));
        let stream = TcpStream::connect(at).expect("it listens");
        let from = stream.local_addr().expect("it is connected");
        let wanted = format!("{from}, connected to {at}, ESTABLISHED");
        assert_eq!(describe(&stream), Some(wanted));
        let (unix, _) = std::os::unix::net::UnixStream::pair().expect("a pair");
        assert_eq!(describe(&unix), None);
    }
}
