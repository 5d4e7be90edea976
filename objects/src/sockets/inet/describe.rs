//! Internet sockets in messages, by their addresses.

use std::os::fd::AsFd;

use ckpt_sys::sockets;

use super::address::Address;

/// `127.0.0.1:4000, connected to 127.0.0.1:5000, ESTABLISHED`; `None` for other families.
pub fn describe(fd: &impl AsFd) -> Option<String> {
    let mut text = Address::parse(&sockets::own_address(fd).ok()?)?.to_string();
    let peer = sockets::peer_address(fd).ok();
    if let Some(peer) = peer.and_then(|peer| Address::parse(&peer)) {
        text.push_str(&format!(", connected to {peer}"));
    }
    if let Some(state) = tcp_state(fd) {
        text.push_str(&format!(", {state}"));
    }
    Some(text)
}

/// The state by its name in ss(8) and netstat(8).
fn tcp_state(fd: &impl AsFd) -> Option<&'static str> {
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
    let state = usize::from(sockets::tcp_state(fd).ok()?);
    STATES.get(state.checked_sub(1)?).copied()
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
