//! Locks and leases of open files.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;

use ckpt_tracer::capabilities::Use;
use ckpt_tracer::proc::fdinfo::{FdDetail, LockLine};
use ckpt_tracer::proc::fdlink::FdLink;
use serde::{Deserialize, Serialize};

use super::outside::Outside;
use super::regular::{Regular, open_quietly};
use super::{Description, Kind, Look};
use crate::Snapshot;
use crate::bounds;
use crate::error::Obstacle;
use crate::index::DescriptionId;
use crate::plan::Builder;
use crate::process::Process;
use crate::source::{Contents, Source};

/// A file lock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lock {
    /// flock(2), POSIX or OFD lock (fcntl(2)), or a lease.
    pub kind: LockKind,
    /// Exclusive (for writing).
    pub exclusive: bool,
    /// First byte.
    #[serde(deserialize_with = "bounds::bytes")]
    pub start: u64,
    /// Length in bytes; 0 up to the end of the file.
    #[serde(deserialize_with = "bounds::bytes")]
    pub len: u64,
    /// The process that took it; an OFD lock has none.
    #[serde(default, deserialize_with = "bounds::pid")]
    pub taker: Option<i32>,
}

/// Kinds of file locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockKind {
    /// flock(2).
    Flock,
    /// `F_SETLK`.
    Posix,
    /// `F_OFD_SETLK`.
    Ofd,
    /// `F_SETLEASE`.
    Lease,
}

/// The locks held through a description.
pub(super) fn capture(
    source: &Source,
    look: &Look,
    kind: &Kind,
) -> Result<Vec<Lock>, Box<Obstacle>> {
    let refuse = |reason: &str, remedy: &str| {
        let reason = format!("({}) holds {reason}", kind.label());
        Box::new(Obstacle::new(look.object(source), reason, remedy))
    };
    let lock = |lock: &LockLine| {
        let of = match lock.kind.as_str() {
            "FLOCK" => LockKind::Flock,
            "OFDLCK" => LockKind::Ofd,
            "LEASE" if lock.mode == "ACTIVE" => LockKind::Lease,
            "LEASE" => {
                let refusal = refuse(
                    "a lease that another process breaks",
                    "try again in a moment",
                );
                return Err(Box::new(refusal.passing()));
            }
            other => {
                let what = format!("a {other}, which is not supported");
                return Err(refuse(&what, "release it before the checkpoint"));
            }
        };
        Ok(Lock::of(of, lock))
    };
    let locks = look
        .info
        .locks
        .iter()
        .map(lock)
        .collect::<Result<Vec<_>, _>>()?;
    // All anonymous inodes have the same inode, which other programs may lock too.
    let anonymous = matches!(look.link, FdLink::AnonInode(_) | FdLink::PidFd);
    let foreign = kind.get::<Outside>().is_some();
    if !locks.is_empty() && (anonymous || foreign) {
        let what = "a lock on an object shared with other programs, which is not supported";
        return Err(refuse(what, "release it before the checkpoint"));
    }
    Ok(locks)
}

/// Files that are read through the job's description instead of another open, by device and inode:
///
/// - those with a write lease, which any other open would break (fcntl(2)). Such a file has one description, apart from
///   `O_PATH` handles, whose fdinfo does not show the lease; `None` if it is open for writing only;
/// - those without a name that an inotify(7) descriptor of the job watches, which would report the open.
#[derive(Debug, Default)]
pub struct Held(HashMap<(u64, u64), Option<OwnedFd>>);

impl Held {
    /// Finds them.
    ///
    /// # Errors
    /// When a descriptor cannot be duplicated.
    pub(super) fn of(looks: &[Look]) -> std::io::Result<Self> {
        let mut found = HashMap::new();
        for look in looks {
            let mut locks = look.info.locks.iter();
            if locks.any(|lock| lock.kind == "LEASE" && lock.access == "WRITE") {
                let writes_only = look.info.flags as i32 & libc::O_ACCMODE == libc::O_WRONLY;
                let readable = (!writes_only).then(|| look.copy.try_clone());
                found.insert(look.inode(), readable.transpose()?);
            }
        }
        let watches = looks.iter().flat_map(|look| match &look.info.detail {
            FdDetail::Inotify { watches } => watches.as_slice(),
            _ => &[],
        });
        let watched: HashSet<_> = watches.map(|watch| (watch.ino, watch.sdev)).collect();
        for look in looks.iter().filter(|look| is_watched(look, &watched)) {
            if let Entry::Vacant(entry) = found.entry(look.inode()) {
                entry.insert(Some(look.copy.try_clone()?));
            }
        }
        Ok(Self(found))
    }
}

/// Whether it is a description, fit for reading, of a file without a name that is one of these, by inode and device.
fn is_watched(look: &Look, watched: &HashSet<(u64, (u32, u32))>) -> bool {
    let (stat, flags) = (&look.stat, look.info.flags as i32);
    let unfit = libc::O_PATH | libc::O_DIRECT;
    let readable = flags & libc::O_ACCMODE != libc::O_WRONLY && flags & unfit == 0;
    let device = (libc::major(stat.st_dev), libc::minor(stat.st_dev));
    readable
        && look.file_type() == libc::S_IFREG
        && stat.st_nlink == 0
        && watched.contains(&(stat.st_ino, device))
}

impl Look {
    fn inode(&self) -> (u64, u64) {
        (self.stat.st_dev, self.stat.st_ino)
    }

    /// The contents of a regular file or memfd, opened anew: the job's descriptor may be write-only, and searching
    /// holes moves the offset. Those that are [`Held`] are read through the job's description.
    pub(super) fn contents(
        &self,
        source: &Source,
        size: u64,
        held: &Held,
    ) -> std::io::Result<Contents> {
        match held.0.get(&self.inode()) {
            None => {
                let file = open_quietly(&source.dir.join(format!("fd/{}", self.fd)))?;
                Ok(Contents::File(file, size))
            }
            Some(Some(held)) => Ok(Contents::Held(held.try_clone()?.into(), size)),
            Some(None) => Err(std::io::Error::other(
                "it is open for writing only, and has a lease that opening it would break",
            )),
        }
    }
}

impl Description {
    /// Its locks.
    pub fn locks(&self) -> &[Lock] {
        match self.kind.get::<Regular>() {
            Some(file) if self.locks.is_empty() => &file.locks,
            _ => &self.locks,
        }
    }

    /// Whether its file has a lease.
    pub fn is_leased(&self) -> bool {
        let mut locks = self.locks().iter();
        locks.any(|lock| lock.kind == LockKind::Lease)
    }

    /// Takes the OFD locks, which belong to no process.
    pub(super) fn rebuild_ofd_locks(&self, at: i32, plan: &mut Builder) {
        let locks = self.locks().iter();
        for lock in locks.filter(|lock| lock.kind == LockKind::Ofd) {
            let data = plan.data(&lock.flock());
            let args = [at as u64, libc::F_OFD_SETLK as u64, data];
            plan.syscall(libc::SYS_fcntl, &args, || {
                format!("a lock on {}", self.kind.label())
            });
        }
    }

    /// Takes those of flock(2) that belong to the process with this pid.
    fn rebuild_flocks(
        &self,
        index: DescriptionId,
        by: i32,
        at: i32,
        snapshot: &Snapshot,
        plan: &mut Builder,
    ) {
        let locks = self.locks().iter();
        for lock in locks.filter(|lock| flocker(lock, index, snapshot) == Some(by)) {
            let how = if lock.exclusive {
                libc::LOCK_EX
            } else {
                libc::LOCK_SH
            };
            let args = [at as u64, (how | libc::LOCK_NB) as u64];
            plan.syscall(libc::SYS_flock, &args, || {
                format!("a lock on {}", self.kind.label())
            });
        }
    }
}

fn has(process: &Process, description: DescriptionId) -> bool {
    process.fds.iter().any(|e| e.description == description)
}

/// The process that takes a lock of flock(2): the original one, even if it has closed the file since, since each
/// process temporarily has every file, except those that share another's descriptors; otherwise the first process
/// that has the file, or the root.
fn flocker(lock: &Lock, description: DescriptionId, snapshot: &Snapshot) -> Option<i32> {
    if lock.kind != LockKind::Flock {
        return None;
    }
    let took = |p: &&Process| lock.taker == Some(p.pid);
    let taker = snapshot.processes.iter().find(took);
    let taker = taker.filter(|p| !p.shares.files || has(p, description));
    let first = || snapshot.processes.iter().find(|p| has(p, description));
    let any = taker.or_else(first).or(snapshot.processes.first());
    any.map(|p| p.pid)
}

/// Takes the locks of flock(2) in a process that has every description, under the numbers that `at` returns.
pub(super) fn rebuild_flocks(
    process: &Process,
    snapshot: &Snapshot,
    at: impl Fn(DescriptionId) -> i32,
    plan: &mut Builder,
) {
    for (index, description) in DescriptionId::each(&snapshot.descriptions) {
        description.rebuild_flocks(index, process.pid, at(index), snapshot, plan);
    }
}

/// The process that sets a description's lease and owner: the one that took the lease, otherwise the first that has
/// the description.
pub(super) fn keeper(description: DescriptionId, snapshot: &Snapshot) -> Option<i32> {
    let have = snapshot.processes.iter().filter(|p| has(p, description));
    let mut have = have.map(|p| p.pid);
    let locks = snapshot.descriptions[description].locks().iter();
    let leases = locks.filter(|lock| lock.kind == LockKind::Lease);
    let takers: Vec<i32> = leases.filter_map(|lock| lock.taker).collect();
    let first = have.clone().next();
    have.find(|pid| takers.contains(pid)).or(first)
}

/// Takes the leases, each through the lowest number of its holder, which a lease break reports. Any open of the file
/// would break the lease, so this follows all opens and mappings.
pub fn rebuild_leases(process: &Process, snapshot: &Snapshot, plan: &mut Builder) {
    let mut done = HashSet::new();
    for entry in &process.fds {
        let description = &snapshot.descriptions[entry.description];
        if !description.is_leased() {
            continue;
        }
        let kept = keeper(entry.description, snapshot) == Some(process.pid);
        if !kept || !done.insert(entry.description) {
            continue;
        }
        let leases = description.locks().iter();
        for lease in leases.filter(|lock| lock.kind == LockKind::Lease) {
            let how = if lease.exclusive {
                libc::F_WRLCK
            } else {
                libc::F_RDLCK
            };
            let args = [entry.fd as u64, libc::F_SETLEASE as u64, how as u64];
            let object = || {
                let (of, takes) = (description.kind.label(), Use::Lease);
                format!("the lease on {of}, which needs {takes} if that is not yours")
            };
            plan.syscall(libc::SYS_fcntl, &args, object);
        }
    }
}

/// Takes the POSIX locks of a process that has its own descriptors, except those of another process that shares them.
pub(super) fn rebuild_record_locks(process: &Process, snapshot: &Snapshot, plan: &mut Builder) {
    for (fd, lock) in &process.record_locks {
        let mut others = snapshot.processes.iter().filter(|p| p.shares.files);
        if !others.any(|p| p.took(lock)) {
            lock.rebuild_posix(*fd, plan);
        }
    }
}

/// Takes the locks, flock(2) included, of a process that shares the descriptors of another one.
pub fn rebuild_shared(process: &Process, snapshot: &Snapshot, plan: &mut Builder) {
    if !process.shares.files {
        return;
    }
    let locks = process.record_locks.iter();
    for (fd, lock) in locks.filter(|(_, lock)| process.took(lock)) {
        lock.rebuild_posix(*fd, plan);
    }
    let mut done = HashSet::new();
    for entry in process.fds.iter().filter(|e| done.insert(e.description)) {
        let description = &snapshot.descriptions[entry.description];
        description.rebuild_flocks(entry.description, process.pid, entry.fd, snapshot, plan);
    }
}

/// Sets the owner of each lock to the process that takes it at a restore.
pub fn name_takers(snapshot: &mut Snapshot) {
    let takers = |index: DescriptionId| {
        let locks = snapshot.descriptions[index].locks().iter();
        let taker = |lock: &Lock| match lock.kind {
            LockKind::Lease => keeper(index, snapshot),
            _ => flocker(lock, index, snapshot),
        };
        locks.map(taker).collect::<Vec<_>>()
    };
    let all: Vec<_> = DescriptionId::each(&snapshot.descriptions)
        .map(|(index, _)| takers(index))
        .collect();
    for (description, takers) in snapshot.descriptions.iter_mut().zip(all) {
        for (lock, taker) in description.locks.iter_mut().zip(takers) {
            lock.taker = taker;
        }
    }
    let sharing = snapshot.processes.iter().filter(|p| p.shares.files);
    let sharing: HashSet<i32> = sharing.map(|p| p.pid).collect();
    for process in &mut snapshot.processes {
        for (_, lock) in &mut process.record_locks {
            let taker = lock.taker.filter(|pid| sharing.contains(pid));
            lock.taker = taker.or(Some(process.pid));
        }
    }
}

impl Process {
    fn took(&self, lock: &Lock) -> bool {
        let mut own = self.record_locks.iter();
        lock.taker == Some(self.pid) && own.any(|(_, one)| one == lock)
    }
}

impl Lock {
    /// From a line of fdinfo.
    pub fn of(kind: LockKind, lock: &LockLine) -> Self {
        Self {
            kind,
            exclusive: lock.access == "WRITE",
            start: lock.start,
            taker: (kind != LockKind::Ofd).then_some(lock.pid),
            len: lock.end.map_or(0, |end| end - lock.start + 1),
        }
    }

    /// Takes a POSIX lock in the executing process.
    pub fn rebuild_posix(&self, fd: i32, plan: &mut Builder) {
        let data = plan.data(&self.flock());
        let args = [fd as u64, libc::F_SETLK as u64, data];
        plan.syscall(libc::SYS_fcntl, &args, || format!("a lock on fd {fd}"));
    }

    /// `struct flock`.
    fn flock(&self) -> [u8; 32] {
        let mut bytes = [0; 32];
        let kind = if self.exclusive {
            libc::F_WRLCK
        } else {
            libc::F_RDLCK
        } as i16;
        bytes[0..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.start.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }
}
