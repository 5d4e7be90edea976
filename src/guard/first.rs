//! Who the program is, before it is one: it writes a byte, and the kernel adds its pid as the guard sees it,
//! also out of another pid namespace (unix(7), `SO_PASSCRED`). It does so between fork and exec, where only system calls
//! may be made: so this is no channel (`ckpt_sys::channel`).

use std::io;
use std::os::unix::net::UnixStream;

use ckpt_sys::{control, sockets};
use ckpt_tracer::Pid;

/// The kernel adds to what comes who sent it.
pub(super) fn wants_credentials(socket: &UnixStream) -> io::Result<()> {
    Ok(sockets::set_int_option(socket, libc::SO_PASSCRED, 1)?)
}

/// The sender of the next byte; nobody if there will be none.
pub(super) fn sender(socket: &UnixStream) -> Option<Pid> {
    let came = control::receive(socket, &mut [0], 0).ok()?;
    let who = came.sender.filter(|who| came.len == 1 && who.pid > 0)?;
    Some(Pid(who.pid))
}

/// Who made the other end of a connection, or listens there: pid and user.
pub(super) fn peer(socket: &UnixStream) -> Option<(i32, u32)> {
    let who = sockets::peer_credentials(socket).ok()?;
    Some((who.pid, who.uid))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn whoever_writes_is_known() {
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
