//! A descriptor of `/dev/tty`, a different terminal for each session (tty(4)).
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::Errno;
use crate::process::{self, Status};

/// Opens `/dev/tty` in a session with that controlling terminal. A helper process that shares our descriptor table
/// leads that session meanwhile.
///
/// # Errors
/// Those of open(2) and `TIOCSCTTY`, and of creating the process.
pub fn controlling(slave: &OwnedFd, flags: i32) -> std::io::Result<OwnedFd> {
    // The helper replaces this one with what it opens.
    let place = slave.try_clone()?;
    let (slave, to) = (slave.as_raw_fd(), place.as_raw_fd());
    // SAFETY: without CLONE_VM this is a fork; the child makes only system calls, drops nothing, and ends.
    let child = unsafe { process::clone(libc::CLONE_FILES | libc::SIGCHLD) };
    let child = Errno::result(child)? as i32;
    if child == 0 {
        // SAFETY: this is the child.
        unsafe { open_controlling(slave, to, flags) }
    }
    match process::end_of(child)? {
        Status::Exited(0) => Ok(place),
        Status::Exited(errno) => Err(Errno::from_raw(errno).into()),
        _ => Err(Errno::EINTR.into()),
    }
}

/// The helper's part; its exit code is an errno.
///
/// SAFETY: called only in a child with a copy of our memory; makes only system calls.
unsafe fn open_controlling(slave: RawFd, to: RawFd, flags: i32) -> ! {
    // SAFETY: system calls on values and constants.
    unsafe {
        // Giving up the terminal sends SIGHUP and SIGCONT to the foreground process group, which is this process.
        libc::signal(libc::SIGHUP, libc::SIG_IGN);
        libc::signal(libc::SIGCONT, libc::SIG_IGN);
        let mut failed = libc::setsid() < 0 || libc::ioctl(slave, libc::TIOCSCTTY, 0) < 0;
        if !failed {
            let fd = libc::open(c"/dev/tty".as_ptr(), flags | libc::O_CLOEXEC);
            failed = fd < 0 || libc::dup3(fd, to, libc::O_CLOEXEC) < 0;
            if fd >= 0 {
                libc::close(fd);
            }
            let errno = *libc::__errno_location();
            libc::ioctl(slave, libc::TIOCNOTTY);
            *libc::__errno_location() = errno;
        }
        libc::_exit(if failed { *libc::__errno_location() } else { 0 })
    }
}
