//! Namespaces: namespaces(7), unshare(2), setns(2), ioctl_nsfs(2). `CLONE_NEW*` selects the kind.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use crate::files::given;
use crate::{Errno, Result, errno};

/// unshare(2) of namespaces. Of a new pid or time namespace only children become members.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN, `ENOSPC` above the limit of namespaces, `EINVAL` for flags that name no namespace,
/// and in a multithreaded process.
pub fn unshare(kinds: i32) -> Result<()> {
    const NAMESPACES: i32 = libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWTIME
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWUTS;
    if kinds & !NAMESPACES != 0 {
        return Err(Errno::EINVAL);
    }
    // SAFETY: a call without pointers. What our threads share (`CLONE_FILES`, `CLONE_FS`) stays shared, except for
    // the working directory, on which the C library does not rely.
    Errno::result(unsafe { libc::unshare(kinds) }).map(drop)
}

/// setns(2): enters the namespace of a descriptor, or those of a pidfd.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN there, `EINVAL` for another kind of namespace, `EUSERS` and others of setns(2).
pub fn enter(namespace: impl AsFd, kinds: i32) -> Result<()> {
    // SAFETY: a call without pointers.
    let entered = unsafe { libc::setns(namespace.as_fd().as_raw_fd(), kinds) };
    Errno::result(entered).map(drop)
}

/// `NS_GET_OWNER_UID`: the owner of a user namespace, as our user namespace maps it.
pub fn owner(namespace: impl AsFd) -> Option<u32> {
    const NS_GET_OWNER_UID: u64 = 0xb704;
    let mut uid = 0u32;
    let fd = namespace.as_fd().as_raw_fd();
    // SAFETY: the kernel writes one uid_t.
    let r = unsafe { libc::ioctl(fd, NS_GET_OWNER_UID, &raw mut uid) };
    (r == 0).then_some(uid)
}

/// `NS_GET_USERNS`: the user namespace that owns a namespace.
///
/// # Errors
/// `EPERM` when it is neither ours nor a descendant of ours.
pub fn user_namespace(namespace: impl AsFd) -> Result<OwnedFd> {
    const NS_GET_USERNS: libc::Ioctl = 0xb701;
    // SAFETY: a call without pointers, which makes a descriptor.
    unsafe { given(libc::ioctl(namespace.as_fd().as_raw_fd(), NS_GET_USERNS).into()) }
}

/// sethostname(2) and setdomainname(2).
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN, `EINVAL` for more than 64 bytes.
pub fn set_names(host: &[u8], domain: &[u8]) -> Result<()> {
    rustix::system::sethostname(host).map_err(errno)?;
    rustix::system::setdomainname(domain).map_err(errno)
}
