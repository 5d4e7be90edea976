//! Access to our own files as their owner had it: git writes its objects with mode 0444.
//!
//! The owner could change the mode and change it back, but a restore that is killed in between would leave it
//! changed.
//! In a user namespace of its own a process has CAP_DAC_OVERRIDE for files whose owner and group are mapped there
//! (`capable_wrt_inode_uidgid`, kernel/capability.c). So a child of ours opens the file there, and no mode changes.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::unistd::{getegid, geteuid};

use crate::process::{self, Status};
use crate::{Errno, Result};

/// faccessat(2) in such a namespace, with `R_OK`, `W_OK` and `X_OK`.
///
/// # Errors
/// Those of faccessat(2), and of creating the namespace.
pub fn may(link: &CStr, how: i32) -> Result<()> {
    in_namespace(|| {
        // SAFETY: a C string.
        unsafe { libc::faccessat(libc::AT_FDCWD, link.as_ptr(), how, libc::AT_EACCESS) }
    })
}

/// open(2) in such a namespace; the new description replaces that of `place`.
///
/// # Errors
/// Those of open(2), and of creating the namespace.
pub fn open(link: &CStr, flags: i32, place: OwnedFd) -> Result<OwnedFd> {
    let to = place.as_raw_fd();
    in_namespace(|| {
        // SAFETY: a C string, and descriptors of a table that the child shares with us.
        unsafe {
            let fd = libc::open(link.as_ptr(), flags);
            let placed = if fd < 0 {
                fd
            } else {
                libc::dup3(fd, to, libc::O_CLOEXEC)
            };
            let errno = *libc::__errno_location();
            if fd >= 0 {
                libc::close(fd);
            }
            *libc::__errno_location() = errno;
            placed
        }
    })?;
    Ok(place)
}

/// Runs `call` in a child that shares our descriptor table and makes system calls only.
fn in_namespace(call: impl FnOnce() -> i32) -> Result<()> {
    let line = |id: u32| CString::new(format!("{id} {id} 1")).unwrap_or_default();
    let maps = [
        (c"/proc/self/setgroups", c"deny".to_owned()),
        (c"/proc/self/uid_map", line(geteuid().as_raw())),
        (c"/proc/self/gid_map", line(getegid().as_raw())),
    ];
    // SAFETY: without CLONE_VM this is a fork; the child drops nothing. It has no exit signal.
    let child = unsafe { process::clone(libc::CLONE_FILES) };
    let child = Errno::result(child)? as i32;
    if child == 0 {
        // SAFETY: this is the child; all strings were made before.
        unsafe {
            let made = libc::unshare(libc::CLONE_NEWUSER) == 0
                && maps.iter().all(|(path, text)| write(path, text));
            let done = made && call() >= 0;
            libc::_exit(if done {
                0
            } else {
                (*libc::__errno_location()).max(1)
            })
        }
    }
    match process::end_of(child)? {
        Status::Exited(0) => Ok(()),
        Status::Exited(errno) => Err(Errno::from_raw(errno)),
        _ => Err(Errno::EINTR),
    }
}

/// SAFETY: makes only system calls.
unsafe fn write(path: &CStr, text: &CStr) -> bool {
    // SAFETY: C strings.
    unsafe {
        let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        let written = fd >= 0 && libc::write(fd, text.as_ptr().cast(), text.count_bytes()) >= 0;
        let errno = *libc::__errno_location();
        if fd >= 0 {
            libc::close(fd);
        }
        *libc::__errno_location() = errno;
        written
    }
}
