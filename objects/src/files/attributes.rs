//! Attributes of a nameless file besides its contents: owner, mode, times, extended attributes and inode flags. A
//! file with a name keeps its own.

use std::ffi::CString;
use std::fs::{File, FileTimes, Metadata, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ckpt_sys::attributes as sys;
use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use serde::{Deserialize, Serialize};

/// The attributes of a file with known mode.
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
    /// Write lifetime hint, `F_GET_RW_HINT` (fcntl(2)).
    #[serde(default)]
    pub lifetime: u64,
}

/// An extended attribute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extended {
    /// Its name with namespace, such as `user.comment`.
    pub name: String,
    /// Its value.
    #[serde(with = "serde_bytes")]
    pub value: Vec<u8>,
}

/// `FS_FL_USER_MODIFIABLE` (linux/fs.h).
const MODIFIABLE: u32 = 0x0003_80ff;
/// `FS_IMMUTABLE_FL` and `FS_APPEND_FL`, which forbid further changes.
const FINAL: u32 = 0x10 | 0x20;

impl Attributes {
    /// Reads them from an open file.
    pub fn of(file: &File, meta: &Metadata) -> Self {
        Self {
            owner: (meta.uid(), meta.gid()),
            accessed_ns: meta.atime() * 1_000_000_000 + meta.atime_nsec(),
            modified_ns: meta.mtime() * 1_000_000_000 + meta.mtime_nsec(),
            extended: extended(file),
            flags: sys::inode_flags(file) & MODIFIABLE,
            lifetime: sys::lifetime(file),
        }
    }

    /// Without the inode flags that forbid further changes: a name with them could not be removed.
    pub fn changeable(mut self) -> Self {
        self.flags &= !FINAL;
        self
    }

    /// Sets owner, mode and times of a named file that cannot be opened; a symbolic link has no mode. Returns what
    /// could not be set.
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

    /// Sets the attributes and the mode of a file, after its contents are written. Returns what could not be set.
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
        // Before the mode is set, which may forbid it.
        for attribute in &self.extended {
            if let Err(e) = attribute.give(file) {
                note(&format!("the extended attribute {}", attribute.name), e);
            }
        }
        if let Err(e) = file.set_permissions(Permissions::from_mode(mode)) {
            note(&format!("the mode {mode:o}"), e);
        }
        if self.lifetime != sys::lifetime(file)
            && let Err(e) = sys::set_lifetime(file, self.lifetime)
        {
            note("the hint of its lifetime", e.into());
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
        let now = sys::inode_flags(file);
        let wanted = now & !MODIFIABLE | self.flags & mask & MODIFIABLE;
        if wanted == now {
            return Ok(());
        }
        Ok(sys::set_inode_flags(file, wanted)?)
    }
}

fn time(ns: i64) -> SystemTime {
    let distance = Duration::from_nanos(ns.unsigned_abs());
    match ns < 0 {
        true => UNIX_EPOCH - distance,
        false => UNIX_EPOCH + distance,
    }
}

/// Those that are readable.
fn extended(file: &File) -> Vec<Extended> {
    let extended = |(name, value): (CString, Vec<u8>)| {
        let name = name.into_string().ok()?;
        Some(Extended { name, value })
    };
    // Labels of security modules are left to the policy, except file capabilities.
    let given = |e: &Extended| !e.name.starts_with("security.") || e.name == "security.capability";
    let all = sys::extended(file).into_iter();
    all.filter_map(extended).filter(given).collect()
}

impl Extended {
    fn give(&self, file: &File) -> std::io::Result<()> {
        let name = CString::new(self.name.as_str())?;
        Ok(sys::set_extended(file, &name, &self.value)?)
    }
}
