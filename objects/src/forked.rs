//! What a process of ours must not do itself, done by a child.
#![allow(unsafe_code)]

use nix::errno::Errno;

/// Does work in a child, and answers what it answers; it makes system calls and nothing else.
///
/// # Errors
/// Those of the work, or that there is no child.
pub(crate) fn in_a_child(work: impl FnOnce() -> Result<(), Errno>) -> Result<(), Errno> {
    // SAFETY: the child makes system calls and ends.
    let child = Errno::result(unsafe { libc::fork() })?;
    if child == 0 {
        let errno = work().err().map_or(0, |errno| errno as i32);
        // SAFETY: as above.
        unsafe { libc::_exit(errno) }
    }
    let mut status = 0;
    // SAFETY: a child of ours; the kernel writes one int.
    Errno::result(unsafe { libc::waitpid(child, &raw mut status, 0) })?;
    match libc::WEXITSTATUS(status) {
        0 if libc::WIFEXITED(status) => Ok(()),
        errno => Err(Errno::from_raw(errno)),
    }
}
