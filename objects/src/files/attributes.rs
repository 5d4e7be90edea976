//! What a file without a name has besides its contents: owner, mode, times, extended attributes and inode
//! flags. A file with a name keeps its own.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::fs::{File, FileTimes, Metadata, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use serde::{Deserialize, Serialize};

/// The attributes of a file whose mode is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// Its owner, and its owner's group.
    pub owner: (u32, u32),
    /// Time of the last access, nanoseconds since 1970.
    pub accessed_ns: i64,
    /// Time of the last change of contents, nanoseconds since 1970.
    pub modified_ns: i64,
    /// Extended attributes (xattr(7)): names and values.
    pub extended: Vec<Extended>,
    /// Inode flags that a user can change (ioctl_iflags(2)).
    pub flags: u32,
    /// How long what is written will live, `F_GET_RW_HINT` (fcntl(2)).
    #[serde(default)]
    pub lifetime: u64,
}

/// An extended attribute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extended {
    /// Its name with its namespace, such as `user.comment`.
    pub name: String,
    /// Its value.
    #[serde(with = "serde_bytes")]
    pub value: Vec<u8>,
}

/// `FS_FL_USER_MODIFIABLE` (linux/fs.h).
const MODIFIABLE: u32 = 0x0003_80ff;
/// `FS_IMMUTABLE_FL` and `FS_APPEND_FL`: with them nothing else can be changed.
const FINAL: u32 = 0x10 | 0x20;
/// `FS_IOC_GETFLAGS` and `FS_IOC_SETFLAGS`.
const GET_FLAGS: u64 = 0x8008_6601;
const SET_FLAGS: u64 = 0x4008_6602;
/// `F_GET_RW_HINT` and `F_SET_RW_HINT`.
const GET_LIFETIME: i32 = 1035;
const SET_LIFETIME: i32 = 1036;

impl Attributes {
    /// Those of an open file.
    pub fn of(file: &File, meta: &Metadata) -> Self {
        Self {
            owner: (meta.uid(), meta.gid()),
            accessed_ns: meta.atime() * 1_000_000_000 + meta.atime_nsec(),
            modified_ns: meta.mtime() * 1_000_000_000 + meta.mtime_nsec(),
            extended: extended(file),
            flags: flags(file) & MODIFIABLE,
            lifetime: lifetime(file),
        }
    }

    /// Without the inode flags that forbid every other change: a name with them could not be removed.
    pub fn changeable(mut self) -> Self {
        self.flags &= !FINAL;
        self
    }

    /// Gives owner, mode and times to what has a name and cannot be opened; a symbolic link has no mode. What
    /// could not be given, in words.
    pub fn give_to_name(&self, path: &Path, mode: Option<u32>) -> Vec<String> {
        let mut lost = Vec::new();
        let (uid, gid) = self.owner;
        let is = std::fs::symlink_metadata(path).map(|m| (m.uid(), m.gid()));
        if is.is_ok_and(|is| is != self.owner)
            && let Err(e) = std::os::unix::fs::lchown(path, Some(uid), Some(gid))
        {
            lost.push(format!("the owner {uid}:{gid}: {e}"));
        }
        if let Some(mode) = mode
            && let Err(e) = std::fs::set_permissions(path, Permissions::from_mode(mode & 0o777))
        {
            lost.push(format!("the mode {mode:o}: {e}"));
        }
        let spec =
            |ns: i64| TimeSpec::new(ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000));
        let (accessed, modified) = (spec(self.accessed_ns), spec(self.modified_ns));
        let not_followed = UtimensatFlags::NoFollowSymlink;
        if let Err(e) = utimensat(AT_FDCWD, path, &accessed, &modified, not_followed) {
            lost.push(format!("the times: {}", e.desc()));
        }
        lost
    }

    /// Gives them, and the mode, to a file that has its contents. What could not be given, in words.
    pub fn give(&self, file: &File, mut mode: u32) -> Vec<String> {
        let mut lost = Vec::new();
        let mut note = |what: &str, error: std::io::Error| lost.push(format!("{what}: {error}"));
        let (uid, gid) = self.owner;
        let is = file.metadata().map(|m| (m.uid(), m.gid()));
        if is.is_ok_and(|is| is != self.owner)
            && let Err(e) = std::os::unix::fs::fchown(file, Some(uid), Some(gid))
        {
            note(&format!("the owner {uid}:{gid}"), e);
            mode &= 0o777;
        }
        // While the mode is still ours, which may forbid it.
        for attribute in &self.extended {
            if let Err(e) = attribute.give(file) {
                note(&format!("the extended attribute {}", attribute.name), e);
            }
        }
        if let Err(e) = file.set_permissions(Permissions::from_mode(mode)) {
            note(&format!("the mode {mode:o}"), e);
        }
        if self.lifetime != lifetime(file) {
            // SAFETY: the kernel reads one word.
            let set =
                unsafe { libc::fcntl(file.as_raw_fd(), SET_LIFETIME, &raw const self.lifetime) };
            if set != 0 {
                note("the hint of its lifetime", std::io::Error::last_os_error());
            }
        }
        if let Err(e) = self.give_flags(file, !FINAL) {
            note("the inode flags", e);
        }
        let times = FileTimes::new()
            .set_accessed(time(self.accessed_ns))
            .set_modified(time(self.modified_ns));
        if let Err(e) = file.set_times(times) {
            note("the times", e);
        }
        if self.flags & FINAL != 0
            && let Err(e) = self.give_flags(file, u32::MAX)
        {
            note("the inode flags", e);
        }
        lost
    }

    fn give_flags(&self, file: &File, mask: u32) -> std::io::Result<()> {
        let now = flags(file);
        let wanted = now & !MODIFIABLE | self.flags & mask & MODIFIABLE;
        if wanted == now {
            return Ok(());
        }
        // SAFETY: the kernel reads one int.
        match unsafe { libc::ioctl(file.as_raw_fd(), SET_FLAGS, &raw const wanted) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }
}

fn time(ns: i64) -> SystemTime {
    let distance = Duration::from_nanos(ns.unsigned_abs());
    match ns < 0 {
        true => UNIX_EPOCH - distance,
        false => UNIX_EPOCH + distance,
    }
}

/// Inode flags; none where the file system has none.
fn flags(file: &File) -> u32 {
    let mut flags = 0u32;
    // SAFETY: the kernel writes one int.
    unsafe { libc::ioctl(file.as_raw_fd(), GET_FLAGS, &raw mut flags) };
    flags
}

/// The hint; 0 where there is none.
fn lifetime(file: &File) -> u64 {
    let mut hint = 0u64;
    // SAFETY: the kernel writes one word.
    unsafe { libc::fcntl(file.as_raw_fd(), GET_LIFETIME, &raw mut hint) };
    hint
}

/// Those that can be read.
fn extended(file: &File) -> Vec<Extended> {
    let fd = file.as_raw_fd();
    // `XATTR_LIST_MAX`, `XATTR_SIZE_MAX`
    let (mut names, mut value) = (vec![0u8; 65536], vec![0u8; 65536]);
    // SAFETY: room for as many bytes as are told.
    let len = unsafe { libc::flistxattr(fd, names.as_mut_ptr().cast(), names.len()) };
    names.truncate(len.max(0) as usize);
    let names = names.split_inclusive(|byte| *byte == 0);
    let names = names.filter_map(|name| CStr::from_bytes_with_nul(name).ok());
    let mut read = |name: &CStr| {
        // SAFETY: a C string, and room for as many bytes as are told.
        let len =
            unsafe { libc::fgetxattr(fd, name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
        Some(Extended {
            name: name.to_str().ok()?.to_owned(),
            value: value[..usize::try_from(len).ok()?].to_vec(),
        })
    };
    // What a security module says of a file is its own to say of another one.
    let given = |e: &Extended| !e.name.starts_with("security.") || e.name == "security.capability";
    names.filter_map(&mut read).filter(given).collect()
}

impl Extended {
    fn give(&self, file: &File) -> std::io::Result<()> {
        let name = CString::new(self.name.as_str())?;
        let (value, len) = (self.value.as_ptr().cast(), self.value.len());
        // SAFETY: a C string, and as many bytes as are told.
        match unsafe { libc::fsetxattr(file.as_raw_fd(), name.as_ptr(), value, len, 0) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }
}
