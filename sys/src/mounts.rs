//! Mounts: mount(2), open_tree(2), move_mount(2), fsopen(2).

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};

use crate::{Result, errno};

/// mount(2) of a new file system of this type, without data (`MS_*`).
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN in the user namespace of the mount namespace.
pub fn mount(what: &CStr, at: &CStr, kind: &CStr, flags: u64) -> Result<()> {
    let flags = MountFlags::from_bits_retain(flags as u32);
    rustix::mount::mount(what, at, kind, flags, None::<&CStr>).map_err(errno)
}

/// Makes all mounts slaves (`MS_SLAVE`): later mounts outside propagate here, and not the other way round.
///
/// # Errors
/// As for [`mount`].
pub fn follow_the_outer() -> Result<()> {
    let flags = MountPropagationFlags::REC | MountPropagationFlags::DOWNSTREAM;
    rustix::mount::mount_change(c"/", flags).map_err(errno)
}

/// umount2(2) with `MNT_DETACH`: detached at once, and unmounted when it is no longer in use.
///
/// # Errors
/// `EINVAL` when nothing is mounted there.
pub fn detach(at: &CStr) -> Result<()> {
    rustix::mount::unmount(at, UnmountFlags::DETACH).map_err(errno)
}

/// A detached bind mount of one file or directory (open_tree(2), Linux 5.2).
///
/// # Errors
/// Those of open(2); `EPERM` as for [`mount`].
pub fn copy_of(path: &CStr) -> Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    rustix::mount::open_tree(CWD, path, flags).map_err(errno)
}

/// Attaches a mount over the file or directory of a descriptor (move_mount(2)).
///
/// # Errors
/// `ENOTDIR` when only one of the two is a directory; `EPERM` as for [`mount`].
pub fn put(mount: impl AsFd, over: impl AsFd) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(mount, c"", over, c"", flags).map_err(errno)
}

/// A detached mount of a new file system of this type (fsopen(2), fsmount(2), Linux 5.2).
///
/// # Errors
/// As for [`mount`].
pub fn detached(kind: &CStr) -> Result<OwnedFd> {
    let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(errno)?;
    rustix::mount::fsconfig_create(context.as_fd()).map_err(errno)?;
    let flags = FsMountFlags::FSMOUNT_CLOEXEC;
    rustix::mount::fsmount(context.as_fd(), flags, MountAttrFlags::empty()).map_err(errno)
}
