//! Who the program is, before it is one: it writes a byte, and the kernel adds its pid as the guard sees it,
//! also out of another pid namespace (unix(7), `SO_PASSCRED`).
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use ckpt_tracer::Pid;
use nix::errno::Errno;

/// Room for a control message with credentials.
type Control = [u64; 8];

/// The kernel adds to what comes who sent it.
pub(super) fn wants_credentials(socket: &UnixStream) -> io::Result<()> {
    let yes: libc::c_int = 1;
    // SAFETY: one live int with its size.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PASSCRED,
            (&raw const yes).cast(),
            size_of_val(&yes) as u32,
        )
    };
    Ok(Errno::result(set).map(drop)?)
}

/// The sender of the next byte; nobody if there will be none.
pub(super) fn sender(socket: &UnixStream) -> Option<Pid> {
    let mut byte = [0u8];
    let mut part = libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: 1,
    };
    let mut control: Control = [0; _];
    // SAFETY: plain integers and pointers, for which zero is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    // SAFETY: everything that `header` points to is live and has the sizes that it says; the kernel
    // writes whole control messages.
    unsafe {
        let flags = libc::MSG_CMSG_CLOEXEC;
        if libc::recvmsg(socket.as_raw_fd(), &mut header, flags) != 1 {
            return None;
        }
        let at = libc::CMSG_FIRSTHDR(&header);
        if at.is_null() || (*at).cmsg_type != libc::SCM_CREDENTIALS {
            return None;
        }
        let who = libc::CMSG_DATA(at).cast::<libc::ucred>().read_unaligned();
        (who.pid > 0).then_some(Pid(who.pid))
    }
}

/// Who made the other end of a connection, or listens there: pid and user.
pub(super) fn peer(socket: &UnixStream) -> Option<(i32, u32)> {
    let mut who = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut size = size_of_val(&who) as u32;
    // SAFETY: one live structure with its size.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut who).cast(),
            &mut size,
        )
    };
    (got == 0).then_some((who.pid, who.uid))
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
