//! Files and descriptors.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, OsString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::process::{Resource, Rlimit};

use crate::{Errno, Result, errno};

/// Converts a path to a C string.
///
/// # Errors
/// `EINVAL` for a path with a zero byte.
pub fn c_path(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)
}

/// Takes ownership of a descriptor that a system call returned.
///
/// # Safety
/// `answer` is the result of a call that makes a descriptor, and has no other owner.
pub(crate) unsafe fn given(answer: libc::c_long) -> Result<OwnedFd> {
    let fd = Errno::result(answer)?;
    // SAFETY: as our caller promises.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// fstat(2).
///
/// # Errors
/// `ENOENT` and others of the file system.
pub fn fstat(fd: impl AsFd) -> Result<libc::stat> {
    nix::sys::stat::fstat(fd.as_fd())
}

/// A substitute for the fstat(2) of a directory that cannot be queried: zeros, except for the file type.
pub fn unknown_directory() -> libc::stat {
    // SAFETY: plain integers, for which zero is valid.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    stat.st_mode = libc::S_IFDIR;
    stat
}

/// fstatfs(2): type (statfs(2) lists them) and block size of the file system.
pub fn fstatfs(fd: impl AsFd) -> Option<(i64, u64)> {
    let s = rustix::fs::fstatfs(fd).ok()?;
    Some((s.f_type as i64, s.f_bsize as u64))
}

/// Opens a path with `O_PATH`.
///
/// # Errors
/// Those of open(2).
pub fn handle(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(errno)
}

/// open(2) with `O_CLOEXEC`.
///
/// # Errors
/// Those of open(2).
pub fn open(path: &Path, flags: i32) -> Result<OwnedFd> {
    let flags = OFlags::from_bits_retain(flags as u32) | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(errno)
}

/// open(2) with exactly these flags: the descriptor becomes close-on-exec, but its description does not show
/// `O_CLOEXEC` in its flags, as it would forever.
///
/// # Errors
/// Those of open(2).
pub fn open_plainly(path: &CStr, flags: i32) -> Result<OwnedFd> {
    // SAFETY: a C string, and a new descriptor.
    let fd = unsafe { given(libc::open(path.as_ptr(), flags).into()) }?;
    set_close_on_exec(&fd, true)?;
    Ok(fd)
}

/// open_by_handle_at(2): an `O_PATH` descriptor for a file handle, given any descriptor on its
/// mount.
///
/// # Errors
/// `ESTALE` when there is no such file, `EPERM` without CAP_DAC_READ_SEARCH.
pub fn open_by_handle(mount: impl AsFd, kind: i32, handle: &[u8]) -> Result<OwnedFd> {
    let mut buffer = Vec::with_capacity(8 + handle.len());
    buffer.extend_from_slice(&(handle.len() as u32).to_ne_bytes());
    buffer.extend_from_slice(&kind.to_ne_bytes());
    buffer.extend_from_slice(handle);
    // SAFETY: `buffer` is a `struct file_handle` with its bytes behind it; the call makes a descriptor.
    unsafe {
        given(libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_fd().as_raw_fd(),
            buffer.as_ptr(),
            libc::O_PATH | libc::O_CLOEXEC,
        ))
    }
}

/// name_to_handle_at(2) with `AT_HANDLE_FID` (Linux 6.6): the type and bytes of a handle that identifies a file; it
/// need not be usable for open_by_handle_at(2). Follows symbolic links.
///
/// # Errors
/// `EOPNOTSUPP` where the file system has none, `EINVAL` on older kernels.
pub fn handle_of(path: &Path) -> Result<(i32, Vec<u8>)> {
    const AT_HANDLE_FID: i32 = libc::AT_REMOVEDIR;
    /// `MAX_HANDLE_SZ`.
    const MOST: usize = 128;
    let path = c_path(path)?;
    let mut buffer = [0u8; 8 + MOST];
    buffer[..4].copy_from_slice(&(MOST as u32).to_ne_bytes());
    let mut mount = 0i32;
    // SAFETY: the path ends in a zero byte; `buffer` is a `struct file_handle` that says how much room is behind it.
    let r = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            libc::AT_FDCWD,
            path.as_ptr(),
            buffer.as_mut_ptr(),
            &raw mut mount,
            AT_HANDLE_FID | libc::AT_SYMLINK_FOLLOW,
        )
    };
    Errno::result(r)?;
    let word = |at: usize| i32::from_ne_bytes(buffer[at..at + 4].try_into().unwrap_or_default());
    let bytes = (word(0).max(0) as usize).min(MOST);
    Ok((word(4), buffer[8..8 + bytes].to_vec()))
}

/// readlinkat(2) of a symbolic link that a descriptor stands for (`O_PATH | O_NOFOLLOW`).
///
/// # Errors
/// `ENOENT` for anything else.
pub fn link_target(link: impl AsFd) -> Result<PathBuf> {
    let target = rustix::fs::readlinkat(link, c"", Vec::new()).map_err(errno)?;
    Ok(OsString::from_vec(target.into_bytes()).into())
}

/// mknod(2) of a FIFO, a socket or a regular file: `S_IFIFO`, `S_IFSOCK`, `S_IFREG`.
///
/// # Errors
/// `EEXIST` and others of mknod(2).
pub fn make_node(path: &Path, kind: u32, mode: u32) -> Result<()> {
    let kind = FileType::from_raw_mode(kind);
    rustix::fs::mknodat(CWD, path, kind, Mode::from_raw_mode(mode), 0).map_err(errno)
}

/// lseek(2) to the next data or hole (`SEEK_DATA`, `SEEK_HOLE`). Returns the new offset of the description.
///
/// # Errors
/// `ENXIO` when there is none behind `offset`, `EINVAL` where the file system does not support it.
pub fn seek(fd: impl AsFd, offset: u64, whence: i32) -> Result<u64> {
    // SAFETY: a call without pointers.
    let at = unsafe { libc::lseek(fd.as_fd().as_raw_fd(), offset as i64, whence) };
    Errno::result(at).map(|at| at as u64)
}

/// `F_GETFL`: access mode and status flags.
///
/// # Errors
/// None for a descriptor that is open.
pub fn flags(fd: impl AsFd) -> Result<i32> {
    number(fd.as_fd(), libc::F_GETFL, 0)
}

/// `F_SETFL`: sets `O_APPEND`, `O_ASYNC`, `O_DIRECT`, `O_NOATIME` and `O_NONBLOCK`, and leaves the others as they are.
///
/// # Errors
/// `EINVAL` and `EPERM` for flags that the file does not support.
pub fn set_flags(fd: impl AsFd, flags: i32) -> Result<()> {
    number(fd.as_fd(), libc::F_SETFL, flags).map(drop)
}

/// `F_SETFD`: whether an exec closes the descriptor.
///
/// # Errors
/// None for a descriptor that is open.
pub fn set_close_on_exec(fd: impl AsFd, yes: bool) -> Result<()> {
    let flags = if yes { libc::FD_CLOEXEC } else { 0 };
    number(fd.as_fd(), libc::F_SETFD, flags).map(drop)
}

/// `F_GETOWN_EX`: kind (`F_OWNER_*`) and id of the receiver of SIGIO.
pub fn owner(fd: impl AsFd) -> Option<(i32, i32)> {
    const F_GETOWN_EX: i32 = 16;
    let mut owner = [0i32; 2];
    // SAFETY: the kernel writes two ints (`struct f_owner_ex`).
    let r = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_GETOWN_EX, owner.as_mut_ptr()) };
    (r == 0).then_some((owner[0], owner[1]))
}

/// `F_GETSIG`: the signal sent instead of SIGIO, 0 for SIGIO itself.
pub fn owner_signal(fd: impl AsFd) -> i32 {
    const F_GETSIG: i32 = 11;
    number(fd.as_fd(), F_GETSIG, 0).unwrap_or(0)
}

/// `F_DUPFD_CLOEXEC`: a duplicate under the first free number from `lowest` on.
///
/// # Errors
/// `EMFILE` when there is none, `EINVAL` above the limit.
pub fn duplicate_from(fd: impl AsFd, lowest: RawFd) -> Result<OwnedFd> {
    rustix::io::fcntl_dupfd_cloexec(fd, lowest).map_err(errno)
}

/// The same for an inherited descriptor, by number: standard input, or one that the shell opened.
///
/// # Errors
/// `EBADF` when it is not open.
pub fn duplicate_number(fd: RawFd, lowest: RawFd) -> Result<OwnedFd> {
    // SAFETY: a call without pointers, which makes a descriptor.
    unsafe { given(libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, lowest).into()) }
}

/// Takes ownership of an inherited descriptor. An inherited one is not close-on-exec, and every one that we open is.
/// So this marks it close-on-exec: a second call returns `None`.
pub fn inherited(fd: RawFd) -> Option<OwnedFd> {
    // SAFETY: it is open, and nothing of ours owns a descriptor without that flag.
    unsafe {
        let flags = if fd > 2 {
            libc::fcntl(fd, libc::F_GETFD)
        } else {
            -1
        };
        if flags < 0 || flags & libc::FD_CLOEXEC != 0 {
            return None;
        }
        libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC);
        Some(OwnedFd::from_raw_fd(fd))
    }
}

/// close_range(2) with `CLOSE_RANGE_CLOEXEC` (Linux 5.11): makes every descriptor from this number on close-on-exec.
///
/// # Errors
/// `EINVAL` and `ENOSYS` on older kernels.
pub fn close_on_exec_from(first: RawFd) -> Result<()> {
    // SAFETY: a call without pointers, which closes nothing.
    let r = unsafe { libc::close_range(first as u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) };
    Errno::result(r).map(drop)
}

/// Sets `RLIMIT_NOFILE`: the soft and hard limit of descriptors.
///
/// # Errors
/// `EPERM` above `fs.nr_open`, and for raising the hard limit without CAP_SYS_RESOURCE.
pub fn set_descriptor_limit(soft: u64, hard: u64) -> Result<()> {
    let limit = Rlimit {
        current: Some(soft),
        maximum: Some(hard),
    };
    rustix::process::setrlimit(Resource::Nofile, limit).map_err(errno)
}

/// memfd_create(2).
///
/// # Errors
/// `EINVAL` for a name of more than 249 bytes, or flags that the kernel does not know.
pub fn memfd(name: &CStr, flags: u32) -> Result<OwnedFd> {
    let flags = MemfdFlags::from_bits_retain(flags) | MemfdFlags::CLOEXEC;
    rustix::fs::memfd_create(name, flags).map_err(errno)
}

/// `F_GET_SEALS`; `None` for a file without support for seals.
pub fn seals(fd: impl AsFd) -> Option<u32> {
    rustix::fs::fcntl_get_seals(fd).ok().map(|s| s.bits())
}

/// `F_ADD_SEALS`.
///
/// # Errors
/// `EPERM` when the seals are sealed, `EBUSY` while it is mapped writable.
pub fn add_seals(fd: impl AsFd, seals: u32) -> Result<()> {
    rustix::fs::fcntl_add_seals(fd, SealFlags::from_bits_retain(seals)).map_err(errno)
}

/// `FIONREAD`: bytes that can be read at once; 0 where the file does not support it.
pub fn unread(fd: impl AsFd) -> usize {
    rustix::io::ioctl_fionread(fd).map_or(0, |n| n as usize)
}

/// faccessat(2) of an open file by the effective ids.
///
/// # Errors
/// `EACCES` when the access is denied.
pub fn may(fd: impl AsFd, how: i32) -> Result<()> {
    let how = rustix::fs::Access::from_bits_retain(how as u32);
    let itself = AtFlags::EACCESS | AtFlags::EMPTY_PATH;
    rustix::fs::accessat(fd, c"", how, itself).map_err(errno)
}

/// fcntl(2) with a number.
fn number(fd: BorrowedFd<'_>, command: i32, value: i32) -> Result<i32> {
    // SAFETY: called with commands that take a number or nothing.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), command, value) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lookup::open_without_magic_links;

    #[test]
    fn what_is_inherited_is_taken_over_once() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(inherited(file.as_raw_fd()).is_none(), "an exec closes it");
        let copy = OwnedFd::from(file.try_clone().unwrap());
        set_close_on_exec(&copy, false).unwrap();
        let number = std::os::fd::IntoRawFd::into_raw_fd(copy);
        let taken = inherited(number).expect("it is not closed on exec");
        assert!(inherited(number).is_none());
        drop(taken);
        assert!(inherited(number).is_none());
    }

    #[test]
    fn a_description_does_not_show_o_cloexec() {
        for open in [open_plainly, open_without_magic_links] {
            let fd = open(c"/dev/null", libc::O_RDONLY | libc::O_NOFOLLOW).unwrap();
            assert_eq!(number(fd.as_fd(), libc::F_GETFD, 0), Ok(libc::FD_CLOEXEC));
            let info = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
            let info = std::fs::read_to_string(info).unwrap();
            // The kernel adds the descriptor's flag to those of the description.
            assert_eq!(flags(&fd).unwrap() & libc::O_CLOEXEC, 0, "{info}");
        }
    }
}
