//! Pipes: pipe(7).

use std::os::fd::{AsFd, OwnedFd};

use rustix::pipe::{PipeFlags, SpliceFlags};

use crate::{Result, errno};

/// pipe2(2): read end and write end.
///
/// # Errors
/// `EMFILE` and `ENFILE` when there are no descriptors.
pub fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(errno)
}

/// A pipe of at least that capacity, with `O_NONBLOCK` on both ends.
///
/// # Errors
/// As for [`pipe`]; `EPERM` above `fs.pipe-max-size` without CAP_SYS_RESOURCE.
pub fn pipe_of(capacity: usize) -> Result<(OwnedFd, OwnedFd)> {
    let flags = PipeFlags::CLOEXEC | PipeFlags::NONBLOCK;
    let ends = rustix::pipe::pipe_with(flags).map_err(errno)?;
    rustix::pipe::fcntl_setpipe_size(&ends.1, capacity).map_err(errno)?;
    Ok(ends)
}

/// `F_GETPIPE_SZ`: capacity in bytes; `None` for what is not a pipe.
pub fn capacity(pipe: impl AsFd) -> Option<usize> {
    rustix::pipe::fcntl_getpipe_size(pipe).ok()
}

/// tee(2): copies up to `len` bytes between pipes without consuming them, and does not wait.
///
/// # Errors
/// `EAGAIN` when nothing is in the one, or there is no room in the other.
pub fn tee(from: impl AsFd, to: impl AsFd, len: usize) -> Result<usize> {
    rustix::pipe::tee(from, to, len, SpliceFlags::NONBLOCK).map_err(errno)
}

/// splice(2): moves up to `len` bytes between pipes, buffer by buffer, as far as there is room, and does not wait.
///
/// # Errors
/// As for [`tee`].
pub fn splice(from: impl AsFd, to: impl AsFd, len: usize) -> Result<usize> {
    rustix::pipe::splice(from, None, to, None, len, SpliceFlags::NONBLOCK).map_err(errno)
}
