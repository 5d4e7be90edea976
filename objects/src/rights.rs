//! In whose name files are opened.
//!
//! What a path leads to is for those to say who may write to its directories. So when root restores the
//! job of another user, everything is opened, created and written with that user's rights: by the
//! file system ids and the supplementary groups (setfsuid(2)), with which the kernel also takes away what
//! root's capabilities would override (`cap_task_fix_setuid`, security/commoncap.c). The other rights
//! of root, to choose pids and to raise limits, stay.
//!
//! A job may have opened files before it gave up its privileges, or be a program that its user may execute
//! and not read. What its user may not open, root opens for it, if the file is the very one (inode and time of creation) that the job had.

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
use crate::memory::{Backing, FileIdentity};
use crate::open::Handle;
use crate::plan::Builder;
use crate::text::Shown;

/// The job's user, where that is not we.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rights {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    /// Which of the snapshot's mapped files its user may not map.
    mapped: Vec<bool>,
    /// Which of its descriptions its user may not open.
    descriptions: Vec<bool>,
}

impl Rights {
    /// Those of the job's user, when we are root and no process of the job is.
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
    pub fn maps_for_it(&self, file: usize) -> bool {
        self.mapped.get(file).copied().unwrap_or(false)
    }

    /// Whether we open what that description is of, since its user may not.
    pub fn opens_for_it(&self, description: usize) -> bool {
        self.descriptions.get(description).copied().unwrap_or(false)
    }

    /// Does work with these rights, in this thread and those that it starts.
    pub fn during<T>(&self, work: impl FnOnce() -> T) -> T {
        let _guard = Guard::enter(self);
        work()
    }

    /// The rights of the new process until it has its own credentials.
    pub fn begin(&self, plan: &mut Builder) {
        let object = || "the rights by which files are opened".to_owned();
        credentials::set_groups(&self.groups, plan, object);
        plan.syscall(libc::SYS_setfsgid, &[self.gid.into()], object);
        plan.syscall(libc::SYS_setfsuid, &[self.uid.into()], object);
    }

    /// Has the new process do something as root that its user may not.
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

/// Whether whoever opens files may open that one in this way.
///
/// # Errors
/// That of open(2).
pub fn may_open(rights: Option<&Rights>, path: &Path, flags: i32) -> nix::Result<()> {
    with(rights, || may(path, access(flags)))
}

/// Whether these flags are permitted as far as O_NOATIME goes: it is its owner's, or CAP_FOWNER's (open(2)).
pub fn may_spare_access_time(flags: i32, meta: &Metadata) -> bool {
    let asked = flags & libc::O_NOATIME != 0 && flags & libc::O_PATH == 0;
    !asked || meta.uid() == geteuid().as_raw() || Held::now().allows(Use::NoAccessTime)
}

/// What has to be allowed for an open(2) with these flags.
fn access(flags: i32) -> AccessFlags {
    match flags & libc::O_ACCMODE {
        _ if flags & libc::O_PATH != 0 => AccessFlags::F_OK,
        libc::O_RDONLY => AccessFlags::R_OK,
        libc::O_WRONLY => AccessFlags::W_OK,
        _ => AccessFlags::R_OK | AccessFlags::W_OK,
    }
}

/// Has the new process enter what a path leads to, without any capability: those that setfsuid(2) leaves in
/// force open files of `/proc`, `/dev/kmsg` and more.
pub fn led(plan: &mut Builder, what: impl FnOnce(&mut Builder)) {
    /// `CAP_FS_SET` (include/linux/capability.h): what setfsuid(2) has taken away, and would not come back.
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

/// Does work in the name of the job's user, or in ours.
pub fn with<T>(rights: Option<&Rights>, work: impl FnOnce() -> T) -> T {
    match rights {
        Some(rights) => rights.during(work),
        None => work(),
    }
}

/// For each mapped file and each description, whether we may not open it as the job has it. It is opened, and judged,
/// later: all that is decided here is who does it.
fn denied(snapshot: &Snapshot) -> (Vec<bool>, Vec<bool>) {
    let writable = |file: usize| {
        let mut mappings = snapshot.processes.iter().flat_map(|p| &p.memory.mappings);
        mappings.any(
            |m| matches!(m.backing, Backing::SharedFile { file: f, writable: true, .. } if f == file),
        )
    };
    let mapped = snapshot.mapped_files.iter().enumerate();
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

/// What root opens for a user who may not is the very file that the job had.
///
/// # Errors
/// When it is another one by now.
pub fn is_the_same(found: &Handle, path: &Path, was: &FileIdentity) -> Result<(), Box<Obstacle>> {
    match FileIdentity::of(found.meta()).is_same_file(was) {
        true => Ok(()),
        false => Err(Box::new(Obstacle::new(
            format!("the file {}", path.shown()),
            "may not be opened by the job's user, and is not the one that the job had, so that root \
             does not open it either",
            "put the old one back, or give its user the right to it",
        ))),
    }
}

/// The effective ids and the groups of this thread, until it is dropped. With root's effective id go all effective
/// capabilities, and come back with it (capabilities(7)); other threads keep theirs, since the calls are
/// made without the C library.
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
