//! Unix domain sockets.

use super::{TCP_LISTEN, each_attribute, word};
use crate::Result;

/// One unix domain socket of the network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnixSocket {
    /// Inode number; 0 for one without a descriptor yet (it waits to be accepted).
    pub inode: u32,
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    pub kind: u8,
    /// It listens.
    pub listening: bool,
    /// Inode of the connected peer; 0 when that is closed or not accepted yet.
    pub peer: Option<u32>,
    /// The bytes of `sun_path`; an abstract name begins with 0.
    pub name: Option<Vec<u8>>,
    /// Device (as the kernel keeps it) and inode of the file that it is bound to.
    pub file: Option<(u32, u32)>,
    /// Inodes of the sockets in its backlog, the oldest first.
    pub pending: Vec<u32>,
    /// Connections in the backlog, or bytes to be read.
    pub unread: u32,
    /// The backlog limit, or memory of sent messages that are unread, bytes.
    pub unsent: u32,
    /// `RCV_SHUTDOWN` (1) and `SEND_SHUTDOWN` (2).
    pub shutdown: u8,
}

/// `UDIAG_SHOW_NAME` to `UDIAG_SHOW_RQLEN`.
const SHOW: u32 = 0x1f;

/// Lists all visible unix domain sockets.
///
/// # Errors
/// [`Error::Kernel`](crate::Error::Kernel) with `ENOENT` when the kernel was built without `CONFIG_UNIX_DIAG`.
pub fn dump() -> Result<Vec<UnixSocket>> {
    // struct unix_diag_req
    let mut request = vec![libc::AF_UNIX as u8, 0, 0, 0];
    for word in [u32::MAX, 0, SHOW, u32::MAX, u32::MAX] {
        request.extend_from_slice(&word.to_ne_bytes());
    }
    super::dump(&request, "unix domain sockets", socket)
}

/// `struct unix_diag_msg` and its attributes.
pub(super) fn socket(body: &[u8]) -> Option<UnixSocket> {
    let mut socket = UnixSocket {
        kind: *body.get(1)?,
        listening: *body.get(2)? == TCP_LISTEN,
        inode: word(body, 4)?,
        ..UnixSocket::default()
    };
    each_attribute(body.get(16..)?, |kind, value| {
        match kind {
            0 => socket.name = Some(value.to_vec()),
            1 => socket.file = Some((word(value, 4)?, word(value, 0)?)),
            2 => socket.peer = Some(word(value, 0)?),
            3 => {
                let words = value.chunks_exact(4);
                socket.pending = words.filter_map(|w| word(w, 0)).collect();
            }
            4 => (socket.unread, socket.unsent) = (word(value, 0)?, word(value, 4)?),
            6 => socket.shutdown = *value.first()?,
            _ => {}
        }
        Some(())
    })?;
    Some(socket)
}

#[cfg(test)]
mod tests {
    use super::super::inode;
    use super::*;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

    #[test]
    fn peers_and_backlogs_are_told() {
        let name = format!("ckpt-diag-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("short");
        let listener = UnixListener::bind_addr(&address).expect("free");
        let client = UnixStream::connect_addr(&address).expect("it listens");
        let (a, b) = UnixStream::pair().expect("a pair");
        let all = dump().expect("unix_diag");
        let find = |i: u32| all.iter().find(|s| s.inode == i).expect("it is there");
        assert_eq!(find(inode(&a)).peer, Some(inode(&b)));
        assert_eq!(find(inode(&b)).peer, Some(inode(&a)));
        let listening = find(inode(&listener));
        assert!(listening.listening);
        assert_eq!(listening.pending, [inode(&client)]);
        assert_eq!(
            listening.name.as_deref(),
            Some(&*format!("\0{name}").into_bytes())
        );
        assert_eq!(find(inode(&client)).peer, Some(0));
    }
}
