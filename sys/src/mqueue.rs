//! POSIX message queues: mq_overview(7). Names are without the slash in front.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use crate::files::given;
use crate::{Errno, Result, errno_of};

/// `struct mq_attr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueAttributes {
    /// `O_NONBLOCK` or 0.
    pub flags: i64,
    /// `mq_maxmsg`.
    pub most: i64,
    /// `mq_msgsize`, bytes.
    pub size: i64,
    /// `mq_curmsgs`.
    pub held: i64,
    reserved: [i64; 4],
}

/// `mq_getattr(3)`.
///
/// # Errors
/// `EBADF` for what is not a queue.
pub fn queue_attributes(queue: impl AsFd) -> Result<QueueAttributes> {
    let mut attributes = QueueAttributes::default();
    // SAFETY: the kernel writes one structure.
    let r = unsafe {
        let none = std::ptr::null::<QueueAttributes>();
        libc::syscall(
            libc::SYS_mq_getsetattr,
            queue.as_fd().as_raw_fd(),
            none,
            &mut attributes,
        )
    };
    Errno::result(r).map(|_| attributes)
}

/// `mq_open(3)` of a queue that exists; the name is without its slash.
///
/// # Errors
/// `ENOENT` and `EACCES` of mq_open(3).
pub fn open_queue(name: &[u8], access: i32) -> Result<OwnedFd> {
    let name = CString::new(name).map_err(|_| Errno::EINVAL)?;
    let flags = access | libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: a C string; the last operands are not used without O_CREAT. The call makes a descriptor.
    unsafe { given(libc::syscall(libc::SYS_mq_open, name.as_ptr(), flags, 0, 0)) }
}

/// The names of all queues of our IPC namespace, without their slashes: its file system is opened
/// without being mounted anywhere (fsopen(2), fsmount(2)).
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN in the user namespace of the IPC namespace.
pub fn queue_names() -> Result<Vec<Vec<u8>>> {
    let mounted = crate::mounts::detached(c"mqueue")?;
    let path = format!("/proc/self/fd/{}", mounted.as_raw_fd());
    let entries = std::fs::read_dir(path);
    let entries = entries.map_err(|e| errno_of(&e))?;
    let names = entries
        .flatten()
        .map(|entry| entry.file_name().into_encoded_bytes());
    Ok(names.collect())
}

/// `mq_open(3)` that creates a queue for that many messages of that size.
///
/// # Errors
/// `EEXIST`, `EINVAL` and `EMFILE` of mq_open(3).
pub fn create_queue(name: &[u8], most: i64, size: i64) -> Result<OwnedFd> {
    let name = CString::new(name).map_err(|_| Errno::EINVAL)?;
    let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_CLOEXEC;
    let attributes = QueueAttributes {
        most,
        size,
        ..QueueAttributes::default()
    };
    // SAFETY: a C string and one structure. The call makes a descriptor.
    unsafe {
        given(libc::syscall(
            libc::SYS_mq_open,
            name.as_ptr(),
            flags,
            0o600,
            &attributes,
        ))
    }
}

/// mq_send(3), without waiting for room.
///
/// # Errors
/// `EAGAIN` when there is no room, `EMSGSIZE` for a message above `mq_msgsize`.
pub fn send(queue: impl AsFd, message: &[u8]) -> Result<()> {
    let now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let (at, len) = (message.as_ptr(), message.len());
    // SAFETY: live bytes of that length and one live structure.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_mq_timedsend,
            queue.as_fd().as_raw_fd(),
            at,
            len,
            0,
            &now,
        )
    };
    Errno::result(sent).map(drop)
}

/// mq_notify(3) with a `struct sigevent` whose addresses are ours.
///
/// # Errors
/// `EBUSY` when another process is registered.
pub fn notify(queue: impl AsFd, event: &[u8; 64]) -> Result<()> {
    // SAFETY: the kernel reads one structure, and 32 bytes of what it points to, if those are mapped.
    let r = unsafe {
        libc::syscall(
            libc::SYS_mq_notify,
            queue.as_fd().as_raw_fd(),
            event.as_ptr(),
        )
    };
    Errno::result(r).map(drop)
}

/// `mq_unlink(3)`.
pub fn unlink_queue(name: &[u8]) {
    if let Ok(name) = CString::new(name) {
        // SAFETY: a C string.
        unsafe { libc::syscall(libc::SYS_mq_unlink, name.as_ptr()) };
    }
}
