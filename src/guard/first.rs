//! Passes the program's pid to the guard before its exec: it writes a byte, to which the kernel adds its pid as the
//! guard sees it, also from another pid namespace (unix(7), `SO_PASSCRED`). This is between fork and exec, where only
//! system calls may be made: so it is not a channel (`ckpt_sys::channel`).

use std::io;
use std::os::unix::net::UnixStream;

use ckpt_sys::{control, sockets};
use ckpt_tracer::Pid;

/// Makes the kernel add the sender's credentials.
pub(super) fn wants_credentials(socket: &UnixStream) -> io::Result<()> {
    Ok(sockets::set_int_option(socket, libc::SO_PASSCRED, 1)?)
}

/// The sender of the next byte; `None` at end of file.
pub(super) fn sender(socket: &UnixStream) -> Option<Pid> {
    let came = control::receive(socket, &mut [0], 0).ok()?;
    let who = came.sender.filter(|who| came.len == 1 && who.pid > 0)?;
    Some(Pid(who.pid))
}

/// Pid and user of the process that connected or listens at the other end.
pub(super) fn peer(socket: &UnixStream) -> Option<(i32, u32)> {
    let who = sockets::peer_credentials(socket).ok()?;
    Some((who.pid, who.uid))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn sender_of_bytes_is_known() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        wants_credentials(&ours).unwrap();
        theirs.write_all(b"?").unwrap();
        let me = std::process::id() as i32;
        assert_eq!(sender(&ours), Some(Pid(me)));
        assert_eq!(peer(&ours).map(|(pid, _)| pid), Some(me));
        drop(theirs);
        assert_eq!(sender(&ours), None);
    }
}
