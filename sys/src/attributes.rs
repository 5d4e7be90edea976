//! Attributes of a file besides its contents and mode: extended attributes (xattr(7)), inode flags (ioctl_iflags(2))
//! and the write lifetime hint (fcntl(2)).
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use rustix::fs::{IFlags, XattrFlags};

use crate::{Errno, Result, errno};

/// `F_GET_RW_HINT` and `F_SET_RW_HINT`.
const GET_LIFETIME: i32 = 1035;
const SET_LIFETIME: i32 = 1036;
/// `XATTR_LIST_MAX`, `XATTR_SIZE_MAX`
const LARGEST: usize = 65536;

/// Names and values of the extended attributes that can be read (flistxattr(2), fgetxattr(2)).
pub fn extended(file: impl AsFd) -> Vec<(CString, Vec<u8>)> {
    let file = file.as_fd();
    let (mut names, mut value) = (vec![0u8; LARGEST], vec![0u8; LARGEST]);
    let len = rustix::fs::flistxattr(file, &mut names[..]).unwrap_or(0);
    names.truncate(len);
    let names = names.split_inclusive(|byte| *byte == 0);
    let names = names.filter_map(|name| CStr::from_bytes_with_nul(name).ok());
    let mut read = |name: &CStr| {
        let len = rustix::fs::fgetxattr(file, name, &mut value[..]).ok()?;
        Some((name.to_owned(), value[..len].to_vec()))
    };
    names.filter_map(&mut read).collect()
}

/// fsetxattr(2): creates or replaces an extended attribute.
///
/// # Errors
/// `EOPNOTSUPP` where the file system has none, `EPERM` for those that need a privilege.
pub fn set_extended(file: impl AsFd, name: &CStr, value: &[u8]) -> Result<()> {
    rustix::fs::fsetxattr(file, name, value, XattrFlags::empty()).map_err(errno)
}

/// Whether a path leads to a file with this extended attribute, of at least one byte (getxattr(2)).
pub fn has_extended(path: &Path, name: &CStr) -> bool {
    let none: &mut [u8] = &mut [];
    // With an empty buffer the kernel returns the size only.
    rustix::fs::getxattr(path, name, none).is_ok_and(|size| size > 0)
}

/// Inode flags (`FS_*_FL`); none where the file system has none.
pub fn inode_flags(file: impl AsFd) -> u32 {
    rustix::fs::ioctl_getflags(file).map_or(0, |flags| flags.bits())
}

/// Sets the inode flags.
///
/// # Errors
/// `EPERM` for those that need a privilege, `EOPNOTSUPP` where there are none.
pub fn set_inode_flags(file: impl AsFd, flags: u32) -> Result<()> {
    rustix::fs::ioctl_setflags(file, IFlags::from_bits_retain(flags)).map_err(errno)
}

/// `F_GET_RW_HINT`: expected lifetime of written data, `RWH_WRITE_LIFE_*`; 0 without a hint.
pub fn lifetime(file: impl AsFd) -> u64 {
    let mut hint = 0u64;
    // SAFETY: the kernel writes one word.
    unsafe { libc::fcntl(file.as_fd().as_raw_fd(), GET_LIFETIME, &raw mut hint) };
    hint
}

/// `F_SET_RW_HINT`: sets that hint.
///
/// # Errors
/// `EINVAL` for a value that the kernel does not know.
pub fn set_lifetime(file: impl AsFd, hint: u64) -> Result<()> {
    // SAFETY: the kernel reads one word.
    let set = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), SET_LIFETIME, &raw const hint) };
    Errno::result(set).map(drop)
}
