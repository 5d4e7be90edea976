//! The user with whose rights files are opened.
//!
//! What a path refers to is decided by the users who may write to its directories. So when root restores another
//! user's job, everything is opened, created and written with that user's rights: the file system ids and the
//! supplementary groups (setfsuid(2)), with which the kernel also drops the capabilities that would override
//! permissions (`cap_task_fix_setuid`, security/commoncap.c). Root's other privileges, to choose pids and raise
//! limits, stay.
//!
//! A job may have opened files before it dropped privileges, or execute a program that its user may not read. Root
//! opens such a file for it, if it is the one that the job had (inode and time of creation).

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use ckpt_sys::credentials as own;
use ckpt_tracer::capabilities::{Held, Use};
use nix::errno::Errno;
use nix::unistd::{AccessFlags, geteuid};

use super::access::may;
use crate::Snapshot;
use crate::credentials::{self, Credentials};
use crate::error::Obstacle;
use crate::files::regular::Regular;
use crate::index::{DescriptionId, FileId};
use crate::memory::{Backing, FileIdentity};
use crate::open::Handle;
use crate::plan::Builder;
use crate::text::Shown;

/// The job's user, if that is not us.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rights {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    /// Whether the user may not map each of the snapshot's mapped files.
    mapped: Vec<bool>,
    /// Whether the user may not open each of its descriptions.
    descriptions: Vec<bool>,
}

impl Rights {
    /// The rights of the job's user, when we are root and no process of the job is.
    pub fn of(snapshot: &Snapshot, now: &Credentials, held: Held) -> Option<Self> {
        let threads = || snapshot.processes.iter().flat_map(|p| &p.threads);
        let first = &snapshot.processes.first()?.threads.first()?.credentials;
        let able = held.allows(Use::SetUser) && held.allows(Use::SetGroups);
        let ours = now.uid[1] != 0 || !able || threads().any(|t| t.credentials.uid[3] == 0);
        if ours || snapshot.namespaces.user.is_some() {
            return None;
        }
        let mut rights = Self {
            uid: first.uid[3],
            gid: first.gid[3],
            groups: first.groups.clone(),
            ..Self::default()
        };
        (rights.mapped, rights.descriptions) = rights.during(|| denied(snapshot));
        Some(rights)
    }

    /// The file system ids.
    pub fn ids(&self) -> (u32, u32) {
        (self.uid, self.gid)
    }

    /// The supplementary groups.
    pub fn groups(&self) -> &[u32] {
        &self.groups
    }

    /// Whether we open that mapped file, since its user may not.
    pub fn maps_for_it(&self, file: FileId) -> bool {
        self.mapped.get(file.0).copied().unwrap_or(false)
    }

    /// Whether we open the file of that description, since its user may not.
    pub fn opens_for_it(&self, description: DescriptionId) -> bool {
        self.descriptions
            .get(description.0)
            .copied()
            .unwrap_or(false)
    }

    /// Runs `work` with these rights, in this thread and the threads that it creates.
    pub fn during<T>(&self, work: impl FnOnce() -> T) -> T {
        let _guard = Guard::enter(self);
        work()
    }

    /// Gives these rights to the new process, until it gets its own credentials.
    pub fn begin(&self, plan: &mut Builder) {
        let object = || "the rights by which files are opened".to_owned();
        credentials::set_groups(&self.groups, plan, object);
        plan.syscall(libc::SYS_setfsgid, &[self.gid.into()], object);
        plan.syscall(libc::SYS_setfsuid, &[self.uid.into()], object);
    }

    /// Makes the new process execute `what`, as root if its user may not (`may`).
    pub fn as_ourselves(&self, may: bool, plan: &mut Builder, what: impl FnOnce(&mut Builder)) {
        let object = || "the rights by which files are opened".to_owned();
        if !may {
            plan.syscall(libc::SYS_setfsuid, &[0], object);
        }
        what(plan);
        if !may {
            plan.syscall(libc::SYS_setfsuid, &[self.uid.into()], object);
        }
    }
}

/// Whether the file may be opened in this way, with these rights or ours.
///
/// # Errors
/// That of open(2).
pub fn may_open(rights: Option<&Rights>, path: &Path, flags: i32) -> nix::Result<()> {
    with(rights, || may(path, access(flags)))
}

/// Whether O_NOATIME, if in these flags, is permitted: to the owner, and with CAP_FOWNER (open(2)).
pub fn may_spare_access_time(flags: i32, meta: &Metadata) -> bool {
    let asked = flags & libc::O_NOATIME != 0 && flags & libc::O_PATH == 0;
    !asked || meta.uid() == geteuid().as_raw() || Held::now().allows(Use::NoAccessTime)
}

/// The access that open(2) with these flags needs.
fn access(flags: i32) -> AccessFlags {
    match flags & libc::O_ACCMODE {
        _ if flags & libc::O_PATH != 0 => AccessFlags::F_OK,
        libc::O_RDONLY => AccessFlags::R_OK,
        libc::O_WRONLY => AccessFlags::W_OK,
        _ => AccessFlags::R_OK | AccessFlags::W_OK,
    }
}

/// Makes the new process resolve a path without any capability: those that setfsuid(2) keeps permit opening files of
/// `/proc`, `/dev/kmsg` and more.
pub fn led(plan: &mut Builder, what: impl FnOnce(&mut Builder)) {
    /// `CAP_FS_SET` (include/linux/capability.h): dropped by setfsuid(2), and not restored afterwards.
    const OF_FILES: u64 = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 9 | 1 << 27 | 1 << 32;
    let host = plan.host();
    if host.rights.is_none() {
        return what(plan);
    }
    let object = || "the rights by which files are opened".to_owned();
    let mut with = host.credentials.clone();
    with.effective = with.permitted & !OF_FILES;
    let without = Credentials {
        effective: 0,
        ..with.clone()
    };
    without.set_capabilities(plan, object);
    what(plan);
    with.set_capabilities(plan, object);
}

/// Runs `work` with the rights of the job's user, or with ours.
pub fn with<T>(rights: Option<&Rights>, work: impl FnOnce() -> T) -> T {
    match rights {
        Some(rights) => rights.during(work),
        None => work(),
    }
}

/// For each mapped file and each description, whether the user may not open it as the job has it. This only decides
/// who opens it; it is opened and checked later.
fn denied(snapshot: &Snapshot) -> (Vec<bool>, Vec<bool>) {
    let writable = |file: FileId| {
        let mut mappings = snapshot.processes.iter().flat_map(|p| &p.memory.mappings);
        mappings.any(
            |m| matches!(m.backing, Backing::SharedFile { file: f, writable: true, .. } if f == file),
        )
    };
    let mapped = FileId::each(&snapshot.mapped_files);
    let mapped = mapped.map(|(index, file)| {
        let write = match writable(index) {
            true => AccessFlags::W_OK,
            false => AccessFlags::empty(),
        };
        let named = file.contents.is_none() && file.saved.is_none();
        named && may(&file.path, AccessFlags::R_OK | write) == Err(Errno::EACCES)
    });
    let descriptions = snapshot.descriptions.iter().map(|description| {
        let Some(file) = description.kind.get::<Regular>() else {
            return false;
        };
        let flags = description.flags as i32;
        let named = file.contents.is_none() && file.saved.is_none() && file.removed.is_none();
        let spares =
            || std::fs::metadata(&file.path).is_ok_and(|meta| !may_spare_access_time(flags, &meta));
        named && (may(&file.path, access(flags)) == Err(Errno::EACCES) || spares())
    });
    (mapped.collect(), descriptions.collect())
}

/// Root opens a file for the user only if it is the one that the job had.
///
/// # Errors
/// When it is another file by now.
pub fn is_the_same(found: &Handle, path: &Path, was: &FileIdentity) -> Result<(), Box<Obstacle>> {
    match FileIdentity::of(found.meta()).is_same_file(was) {
        true => Ok(()),
        false => Err(Box::new(Obstacle::new(
            format!("the file {}", path.shown()),
            "may not be opened by the job's user, and is not the one that the job had, so that root \
             does not open it either",
            "put the old one back, or give that user access to it",
        ))),
    }
}

/// The effective ids and the groups of this thread, restored when dropped. With root's effective id all effective
/// capabilities are dropped and regained (capabilities(7)); other threads keep theirs, since the calls bypass the C
/// library.
struct Guard {
    groups: Vec<u32>,
}

impl Guard {
    fn enter(rights: &Rights) -> Self {
        let groups = own::groups();
        let _ = own::set_thread_groups(&rights.groups);
        own::set_effective(rights.uid, rights.gid);
        Self { groups }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        own::set_effective(0, nix::unistd::getgid().as_raw());
        let _ = own::set_thread_groups(&self.groups);
    }
}
