//! Whether a file has changed since the checkpoint, and what `restore --files` does about it.

use std::collections::HashSet;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ckpt_tracer::capabilities::Use;
use nix::sys::statfs::{self, FsType};
use nix::unistd::AccessFlags;

use super::Description;
use super::regular::Regular;
use crate::Snapshot;
use crate::access::MISSING;
use crate::error::{Error, Obstacle, Result};
use crate::index::DescriptionId;
use crate::memory::{Backing, FileIdentity};
use crate::open::{Handle, Last};
use crate::options::{FilesPolicy, Options};
use crate::rights::may_spare_access_time;
use crate::text::Shown;

/// How a file has changed since the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// Its name refers to another file.
    Replaced,
    /// It is shorter.
    Shrunk,
    /// It is longer.
    Grown,
    /// Same size, but written since.
    Rewritten,
}

impl Change {
    /// The change from `was` to `now`. A file with another inode but the same size and time is a faithful copy.
    fn between(was: &FileIdentity, now: &Metadata) -> Option<Self> {
        let now = FileIdentity::of(now);
        if (now.size, now.modified_ns) == (was.size, was.modified_ns) {
            return None;
        }
        if !now.is_same_file(was) {
            return Some(Change::Replaced);
        }
        match now.size.cmp(&was.size) {
            std::cmp::Ordering::Less => Some(Change::Shrunk),
            std::cmp::Ordering::Greater => Some(Change::Grown),
            // An empty file has nothing to rewrite.
            std::cmp::Ordering::Equal if was.size == 0 => None,
            std::cmp::Ordering::Equal => Some(Change::Rewritten),
        }
    }

    /// Whether the job may have caused it after the checkpoint, by writing.
    fn by_writing(self) -> bool {
        matches!(self, Change::Grown | Change::Rewritten)
    }

    fn reason(self, was: u64, now: u64) -> String {
        match self {
            Change::Replaced => "was replaced by another file since the checkpoint".into(),
            Change::Shrunk => format!("has shrunk from {was} to {now} bytes since the checkpoint"),
            Change::Grown => format!(
                "which the job only reads, has grown from {was} to {now} bytes since the checkpoint"
            ),
            Change::Rewritten => {
                "which the job only reads, was rewritten in place since the checkpoint".into()
            }
        }
    }
}

/// Opens the present file, if it is unchanged as far as the policy requires. `flags` are those of the description.
pub fn check(
    file: &Regular,
    flags: u32,
    written: &Written,
    policy: FilesPolicy,
) -> Result<Handle, Box<Obstacle>> {
    let refuse =
        |reason: String, remedy: &str| Err(Box::new(Obstacle::new(file.object(), reason, remedy)));
    // A file that was put back is unchanged.
    let policy = file.saved.map_or(policy, |_| FilesPolicy::Adopt);
    let now = match look(&file.path, &file.identity, policy) {
        Ok(now) => now,
        Err(e) => return refuse(format!("cannot be opened: {e}"), MISSING),
    };
    if let Some(reason) = is_another_kind(&now, &file.path, &file.identity) {
        return refuse(reason, MISSING);
    }
    let access = access(flags);
    if let Some(Err(e)) = access.map(|access| now.may(access)) {
        let remedy = "change its mode, or restore as a user who may open it";
        return refuse(format!("cannot be opened: {}", e.desc()), remedy);
    }
    if !may_spare_access_time(flags as i32, now.meta()) {
        let reason = format!(
            "was opened with O_NOATIME and belongs to another user, which needs {}",
            Use::NoAccessTime
        );
        return refuse(reason, "restore as the owner of the file, or as root");
    }
    if policy == FilesPolicy::Adopt || !file.is(libc::S_IFREG) || is_of_the_kernel(&now.link()) {
        return Ok(now);
    }
    match Change::between(&file.identity, now.meta()) {
        None => Ok(now),
        Some(change) if change.by_writing() && written.has(&file.identity) => Ok(now),
        // An `O_PATH` handle reads nothing.
        Some(change) if change != Change::Replaced && flags as i32 & libc::O_PATH != 0 => Ok(now),
        Some(change) => {
            let reason = change.reason(file.identity.size, now.meta().len());
            let adopt = "put the old one back, or take what is there with --files adopt";
            let obstacle = Obstacle::new(file.object(), reason, adopt);
            // The same file, changed by other processes.
            let its_own = change != Change::Replaced;
            Err(Box::new(match its_own {
                true => obstacle.by_option(),
                false => obstacle,
            }))
        }
    }
}

/// Why the present file is of another type, regardless of its contents: a FIFO, a device, or a link to a kernel file.
pub fn is_another_kind(now: &Handle, path: &Path, was: &FileIdentity) -> Option<String> {
    let kind = now.meta().mode() & libc::S_IFMT;
    if kind != was.mode & libc::S_IFMT {
        let what = match kind {
            libc::S_IFLNK => "a symbolic link",
            _ => "something else",
        };
        return Some(format!("is {what} by now"));
    }
    let leads_to = is_of_the_kernel(&now.link()).then(|| now.place())??;
    (leads_to != path).then(|| format!("leads to {} by now", leads_to.shown()))
}

/// The access that opening with these flags needs; `None` for `O_PATH`.
fn access(flags: u32) -> Option<AccessFlags> {
    let flags = flags as i32;
    match flags & libc::O_ACCMODE {
        _ if flags & libc::O_PATH != 0 => None,
        libc::O_WRONLY => Some(AccessFlags::W_OK),
        libc::O_RDONLY => Some(AccessFlags::R_OK),
        _ => Some(AccessFlags::R_OK | AccessFlags::W_OK),
    }
}

/// Looks up the path of a record. A directory may have been moved, with a link in its place; with `--files adopt` a
/// file too.
pub fn look(path: &Path, was: &FileIdentity, policy: FilesPolicy) -> io::Result<Handle> {
    let last = match was.mode & libc::S_IFMT {
        libc::S_IFDIR => Last::LeadsOn,
        libc::S_IFREG if policy == FilesPolicy::Adopt => Last::LeadsOn,
        _ => Last::IsIt,
    };
    Handle::of(path, last)
}

/// Files whose contents the kernel generates when they are read; their inodes and times are meaningless.
pub fn is_of_the_kernel(path: &Path) -> bool {
    // As in linux/magic.h.
    const SYSFS: i64 = 0x6265_6572;
    const DEBUGFS: i64 = 0x6462_6720;
    const TRACEFS: i64 = 0x7472_6163;
    const SECURITYFS: i64 = 0x7363_6673;
    let known = [
        statfs::PROC_SUPER_MAGIC,
        statfs::CGROUP_SUPER_MAGIC,
        statfs::CGROUP2_SUPER_MAGIC,
        FsType(SYSFS),
        FsType(DEBUGFS),
        FsType(TRACEFS),
        FsType(SECURITYFS),
    ];
    statfs::statfs(path).is_ok_and(|s| known.contains(&s.filesystem_type()))
}

/// Files that the job may have written since, since it has them open or mapped for writing.
#[derive(Debug)]
pub struct Written(HashSet<Inode>);

/// Device and inode.
type Inode = ((u32, u32), u64);

fn inode(identity: &FileIdentity) -> Inode {
    (identity.device, identity.inode)
}

impl Written {
    /// By any process of the job.
    pub fn by(snapshot: &Snapshot) -> Self {
        let open = snapshot.descriptions.iter().filter(|d| writes(d));
        let open = open.filter_map(|d| d.kind.get::<Regular>());
        let open = open.map(|file| inode(&file.identity));
        let mappings = snapshot.processes.iter().flat_map(|p| &p.memory.mappings);
        let mapped = mappings.filter_map(|m| match m.backing {
            Backing::SharedFile {
                file,
                writable: true,
                ..
            } => Some(inode(&snapshot.mapped_files[file].identity)),
            _ => None,
        });
        Self(open.chain(mapped).collect())
    }

    /// Whether that file is one of them.
    pub fn has(&self, file: &FileIdentity) -> bool {
        self.0.contains(&inode(file))
    }
}

/// Whether the description permits writing.
fn writes(description: &Description) -> bool {
    let flags = description.flags as i32;
    flags & libc::O_PATH == 0 && flags & libc::O_ACCMODE != libc::O_RDONLY
}

/// A file that will be truncated to its size at the checkpoint.
#[derive(Debug)]
pub struct Cut {
    path: PathBuf,
    file: File,
    now: u64,
    then: u64,
}

impl Cut {
    /// All files that `--files truncate` truncates: those that the job has open for writing and that have grown. They
    /// are opened here, so that a missing permission is detected in time.
    pub fn all(snapshot: &Snapshot, options: &Options) -> Result<Vec<Self>, Vec<Obstacle>> {
        let mut cuts: Vec<Self> = Vec::new();
        let mut obstacles = Vec::new();
        if options.files != FilesPolicy::Truncate {
            return Ok(cuts);
        }
        for (index, description) in DescriptionId::each(&snapshot.descriptions) {
            let Some(file) = description.kind.get::<Regular>() else {
                continue;
            };
            let stays = file.contents.is_some() || file.saved.is_some();
            if stays || !writes(description) || super::named(index, snapshot, options).is_some() {
                continue;
            }
            let known = cuts.iter().any(|cut| cut.path == file.path);
            match Self::of(file) {
                Ok(Some(cut)) if !known => cuts.push(cut),
                Ok(_) => {}
                Err(o) => obstacles.push(*o),
            }
        }
        match obstacles.is_empty() {
            true => Ok(cuts),
            false => Err(obstacles),
        }
    }

    fn of(file: &Regular) -> Result<Option<Self>, Box<Obstacle>> {
        // `check` reports other changes.
        let Ok(now) = look(&file.path, &file.identity, FilesPolicy::Truncate) else {
            return Ok(None);
        };
        let change = Change::between(&file.identity, now.meta());
        if !now.meta().is_file() || change != Some(Change::Grown) {
            return Ok(None);
        }
        match now.open(libc::O_WRONLY) {
            Ok(opened) => Ok(Some(Self {
                path: file.path.clone(),
                file: opened,
                now: now.meta().len(),
                then: file.identity.size,
            })),
            Err(e) => Err(Box::new(Obstacle::new(
                file.object(),
                format!("has grown and cannot be truncated: {e}"),
                "make it writable, or let it be with --files strict",
            ))),
        }
    }

    /// Describes the truncation on one line.
    pub fn describe(&self) -> String {
        let path = self.path.shown();
        format!("cut {path} from {} to {} bytes", self.now, self.then)
    }

    /// Truncates it.
    ///
    /// # Errors
    /// [`Error::File`] of ftruncate(2).
    pub fn make(&self) -> Result<()> {
        self.file
            .set_len(self.then)
            .map_err(Error::file("cut back", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed_is_told_from_size_time_and_inode() {
        let now = std::fs::metadata("/proc/self/exe").unwrap();
        let same = FileIdentity::of(&now);
        let change = |edit: &dyn Fn(&mut FileIdentity)| {
            let mut was = same.clone();
            edit(&mut was);
            Change::between(&was, &now)
        };
        assert_eq!(change(&|_| {}), None);
        assert_eq!(change(&|was| was.inode += 1), None);
        assert_eq!(change(&|was| was.modified_ns -= 1), Some(Change::Rewritten));
        assert_eq!(change(&|was| was.size += 1), Some(Change::Shrunk));
        assert_eq!(change(&|was| was.size -= 1), Some(Change::Grown));
        let other = |was: &mut FileIdentity| (was.inode, was.size) = (was.inode + 1, was.size - 1);
        assert_eq!(change(&other), Some(Change::Replaced));
        // A reused inode number.
        let anew = |was: &mut FileIdentity| {
            (was.created_ns, was.size) = (was.created_ns.map(|t| t - 1), was.size - 1);
        };
        let known = same.created_ns.is_some();
        let told = if known {
            Change::Replaced
        } else {
            Change::Grown
        };
        assert_eq!(change(&anew), Some(told));
    }
}
