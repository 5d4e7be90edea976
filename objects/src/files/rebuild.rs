//! Restores open file descriptions and descriptors: the root opens every description, each process makes its own
//! numbers from them.

use ckpt_tracer::capabilities::Use;

use super::epoll::Epoll;
use super::kind::{Opened, Place};
use super::left::names_nothing;
use super::{Description, Owner, changed, late, lock, terminal};
use crate::error::Obstacle;
use crate::index::{DescriptionId, FileId, RemovedId, TerminalId};
use crate::options::Options;
use crate::plan::{Builder, Inherited};
use crate::process::Process;
use crate::sockets::unix::UnixSocket;
use crate::{Snapshot, limits, sockets};

/// Staging numbers of descriptions: description `i` is open as `stage + i` until every descriptor of every process
/// has been made from it. The root opens them all; the other processes inherit them.
#[derive(Clone, Copy, Debug)]
pub struct Staging {
    base: i32,
    descriptions: i32,
    files: i32,
    terminals: i32,
    removed: i32,
    /// Number of staging numbers.
    len: i32,
}

/// System calls create descriptors at the lowest free numbers.
const LOWEST: i32 = 10;

impl Staging {
    /// In a range that no process of the job uses.
    pub fn beside(snapshot: &Snapshot) -> Self {
        let sockets = snapshot.descriptions.iter();
        let sockets = sockets.filter(|d| d.kind.get::<UnixSocket>().is_some());
        // One for the file of a name, two for a temporary listening socket.
        let spare = 3 * sockets.count() as i32;
        let mut staging = Self {
            base: 0,
            descriptions: snapshot.descriptions.len() as i32,
            files: snapshot.mapped_files.len() as i32,
            terminals: snapshot.terminals.len() as i32,
            removed: snapshot.removed.len() as i32,
            len: 0,
        };
        staging.len = staging.spare(spare as usize);
        staging.base = gap(used(snapshot), staging.len, limit());
        staging
    }

    /// The obstacle if there are not enough numbers.
    fn obstacle(self) -> Option<Obstacle> {
        (self.base + self.len > limit()).then(|| {
            Obstacle::new(
                "restore",
                format!(
                    "has no {} numbers of descriptors in a row that the job does not use, below the limit of \
                     open files, {}",
                    self.len,
                    limit()
                ),
                "raise that limit (ulimit -n) for restore",
            )
        })
    }

    /// The number of a description.
    pub fn of(self, description: DescriptionId) -> i32 {
        self.base + description.0 as i32
    }

    /// The number of a mapped file with contents from the image, opened for reading or for reading and writing.
    pub fn mapped_file(self, file: FileId, writable: bool) -> i32 {
        self.base + self.descriptions + 2 * file.0 as i32 + i32::from(writable)
    }

    /// The number of an executable, a mapped file.
    pub fn executable(self, file: FileId) -> i32 {
        self.base + self.descriptions + 2 * self.files + file.0 as i32
    }

    /// The number of a controlling terminal of a session of the job.
    pub fn terminal(self, terminal: TerminalId) -> i32 {
        self.base + self.descriptions + 3 * self.files + terminal.0 as i32
    }

    /// The number of a removed directory that is a working or root directory.
    pub fn removed(self, index: RemovedId) -> i32 {
        self.base + self.descriptions + 3 * self.files + self.terminals + index.0 as i32
    }

    /// Further numbers, used only while the plan runs.
    pub fn spare(self, number: usize) -> i32 {
        self.removed(RemovedId(0)) + self.removed + number as i32
    }

    /// The first number, and the last one.
    fn all(self) -> (i32, i32) {
        (self.base, self.base + self.len)
    }
}

/// Numbers that the job uses.
fn used(snapshot: &Snapshot) -> Vec<i32> {
    let fds = snapshot.processes.iter().flat_map(|p| &p.fds).map(|e| e.fd);
    let sets = snapshot.descriptions.iter();
    let sets = sets.filter_map(|d| d.kind.get::<Epoll>());
    let watched = sets.flat_map(|set| &set.entries);
    fds.chain(watched.map(|e| e.fd)).collect()
}

/// A range of free numbers: in a gap, so that the descriptor table does not grow, otherwise above all.
fn gap(mut used: Vec<i32>, len: i32, limit: i32) -> i32 {
    used.push(LOWEST - 1);
    used.sort_unstable();
    let above = used[used.len() - 1].saturating_add(1);
    let mut gaps = used
        .windows(2)
        .map(|pair| (pair[0].saturating_add(1).max(LOWEST), pair[1].min(limit)));
    let gap = gaps.find(|(from, to)| to - from > len);
    gap.map_or(above, |(from, _)| from)
}

/// Our own limit of numbers, which new processes have until they get theirs.
fn limit() -> i32 {
    crate::limits::raise_descriptor_limit();
    let (_, hard) = limits::current(libc::RLIMIT_NOFILE);
    hard.try_into().unwrap_or(i32::MAX)
}

/// Flags for opening it again; creation flags are not part of an open description.
pub fn reopen_flags(flags: u32) -> u32 {
    let not = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_ASYNC | libc::O_CLOEXEC;
    // O_TMPFILE includes the bit of O_DIRECTORY.
    let tmpfile = flags as i32 & libc::O_TMPFILE == libc::O_TMPFILE;
    let tmpfile = if tmpfile { libc::O_TMPFILE } else { 0 };
    (flags & !(not | tmpfile) as u32) | libc::O_NOCTTY as u32
}

/// Opens every description under its staging number. Called with no other descriptor open.
pub fn open_descriptions(
    snapshot: &Snapshot,
    options: &Options,
    terminals: &dyn terminal::Places,
    staging: Staging,
    plan: &mut Builder,
) -> Result<(), Vec<Obstacle>> {
    let mut obstacles: Vec<Obstacle> = unknown_numbers(snapshot, options).collect();
    obstacles.extend(late::out_of_reach(snapshot));
    obstacles.extend(staging.obstacle());
    let written = changed::Written::by(snapshot);
    for (index, description) in DescriptionId::each(&snapshot.descriptions) {
        let file = description.kind.file();
        let place = Place {
            index,
            flags: description.flags,
            at: staging.of(index),
            staging,
            snapshot,
            options,
            terminals,
            written: &written,
        };
        if let Some(path) = named(index, snapshot, options) {
            match file.not_replaceable(path) {
                Some(obstacle) => obstacles.push(obstacle),
                None => {
                    plan.inherit(place.at, Inherited::Named(path.clone(), place.flags));
                    continue;
                }
            }
        }
        obstacles.extend(file.open(&place, plan).err().unwrap_or_default());
    }
    late::warn_of_shared(snapshot, plan);
    if obstacles.is_empty() {
        Ok(())
    } else {
        Err(obstacles)
    }
}

/// The operand of `--fd N=PATH` for a description, by any of its numbers.
pub fn named<'a>(
    description: DescriptionId,
    snapshot: &Snapshot,
    options: &'a Options,
) -> Option<&'a std::path::PathBuf> {
    let fds = || snapshot.processes.iter().flat_map(|p| &p.fds);
    options
        .fds
        .iter()
        .find(|(fd, _)| fds().any(|e| e.fd == **fd && e.description == description))
        .map(|(_, path)| path)
}

/// Numbers of `--fd` that the job does not have.
fn unknown_numbers(snapshot: &Snapshot, options: &Options) -> impl Iterator<Item = Obstacle> {
    let has = |fd: &i32| {
        snapshot
            .processes
            .iter()
            .flat_map(|p| &p.fds)
            .any(|e| e.fd == *fd)
    };
    let unknown: Vec<i32> = options.fds.keys().copied().filter(|fd| !has(fd)).collect();
    unknown.into_iter().map(|fd| names_nothing("--fd", fd))
}

/// Moves a descriptor to its staging number, without close-on-exec, for the exec of other processes.
pub fn place(from: i32, to: i32, plan: &mut Builder, object: impl Fn() -> String) {
    let args = [from as u64, to as u64, 0];
    plan.expect(libc::SYS_dup3, &args, to as u64, &object);
    plan.syscall(libc::SYS_close, &[from as u64], &object);
}

/// When every description is open: completes those that refer to others, then sets flags and locks.
pub fn complete_descriptions(snapshot: &Snapshot, staging: Staging, plan: &mut Builder) {
    sockets::rebuild::finish(snapshot, staging, plan);
    for (index, description) in DescriptionId::each(&snapshot.descriptions) {
        let at = staging.of(index);
        description
            .kind
            .file()
            .complete(at, staging, snapshot, plan);
        rebuild_status(description, at, plan);
        rebuild_maker(description, at, plan);
        description.rebuild_ofd_locks(at, plan);
    }
}

/// Seals files, after every process has mapped them.
pub fn seal(snapshot: &Snapshot, staging: Staging, plan: &mut Builder) {
    for (index, description) in DescriptionId::each(&snapshot.descriptions) {
        let file = description.kind.file();
        file.seal(index, staging.of(index), snapshot, plan);
    }
}

/// Makes the process's own numbers, and takes its locks.
pub fn number(process: &Process, snapshot: &Snapshot, staging: Staging, plan: &mut Builder) {
    for entry in &process.fds {
        let cloexec = if entry.close_on_exec {
            libc::O_CLOEXEC
        } else {
            0
        };
        let args = [
            staging.of(entry.description) as u64,
            entry.fd as u64,
            cloexec as u64,
        ];
        plan.expect(libc::SYS_dup3, &args, entry.fd as u64, || {
            format!("fd {}", entry.fd)
        });
    }
    lock::rebuild_flocks(process, snapshot, |index| staging.of(index), plan);
    let (first, last) = staging.all();
    plan.syscall(
        libc::SYS_close_range,
        &[first as u64, last as u64, 0],
        || "the descriptors used in between".into(),
    );
    // Closing any descriptor of a file drops the process's POSIX locks on it, so they come when nothing more is
    // closed.
    lock::rebuild_record_locks(process, snapshot, plan);
}

/// Flags that F_SETFL sets.
const SETTABLE: u32 = (libc::O_APPEND | libc::O_NONBLOCK | libc::O_ASYNC) as u32;

/// Sets status flags that opening has not set already.
pub(super) fn rebuild_status(description: &Description, at: i32, plan: &mut Builder) {
    let opened = description.kind.file().opened();
    if opened == Opened::Absent || description.flags as i32 & libc::O_PATH != 0 {
        return;
    }
    let wanted = description.flags & SETTABLE & !(libc::O_ASYNC as u32);
    let noatime = description.flags & libc::O_NOATIME as u32;
    let is_set = match opened {
        Opened::WithFlags => true,
        // Without open(2) of a path, only F_SETFL sets O_NOATIME.
        Opened::WithNoAtime => wanted == 0,
        Opened::Plain => wanted == 0 && noatime == 0,
        Opened::Unknown | Opened::Absent => false,
    };
    if !is_set {
        set_flags(description, at, wanted, plan);
    }
}

/// Gives a pipe or socket to its creator. Without CAP_CHOWN it stays ours (limits.md).
fn rebuild_maker(description: &Description, at: i32, plan: &mut Builder) {
    let nameless = description.kind.file().shows_maker();
    let ours = &plan.host().credentials;
    let ours = (ours.uid[3], ours.gid[3]);
    if let Some((user, group)) = description.made_by.filter(|ids| nameless && *ids != ours) {
        let args = [at as u64, user.into(), group.into()];
        let object = || format!("the creator of an open file ({})", description.kind.label());
        plan.attempt(libc::SYS_fchown, &args, object);
    }
}

fn set_flags(description: &Description, fd: i32, settable: u32, plan: &mut Builder) {
    let object = || format!("the flags of an open file ({})", description.kind.label());
    set_status(fd, description.flags, settable, plan, object);
}

/// F_SETFL. The job may have set O_NOATIME as another user than the one with whose rights files are opened.
pub(super) fn set_status(
    fd: i32,
    flags: u32,
    settable: u32,
    plan: &mut Builder,
    object: impl Fn() -> String,
) {
    let noatime = flags & libc::O_NOATIME as u32;
    let others = flags & libc::O_DIRECT as u32 | noatime;
    let args = [fd as u64, libc::F_SETFL as u64, (settable | others).into()];
    let object = || match noatime {
        0 => object(),
        _ => format!(
            "{} with O_NOATIME, which needs {} if that is not yours",
            object(),
            Use::NoAccessTime
        ),
    };
    let set = |plan: &mut Builder| plan.syscall(libc::SYS_fcntl, &args, object);
    let rights = plan.host().rights.clone();
    match rights.filter(|_| noatime != 0) {
        Some(rights) => rights.as_ourselves(false, plan, set),
        None => set(plan),
    }
}

/// Sets the receivers of SIGIO, in the keeper of each description, or in each process that has opened it for itself.
/// All processes and threads exist by then, and leases are taken, which set an owner if there is none.
pub fn rebuild_owners(process: &Process, snapshot: &Snapshot, plan: &mut Builder) {
    let mut done = vec![false; snapshot.descriptions.len()];
    for entry in &process.fds {
        let description = &snapshot.descriptions[entry.description];
        let no_owner = Owner::default();
        let owner = description
            .owner
            .or(description.is_leased().then_some(no_owner));
        let asynchronous = description.flags as i32 & libc::O_ASYNC != 0;
        if owner.is_none() && !asynchronous {
            continue;
        }
        let sets = match late::is_late(entry.description, snapshot) {
            true => !process.shares.files,
            false => lock::keeper(entry.description, snapshot) == Some(process.pid),
        };
        if !sets || std::mem::replace(&mut done[entry.description.0], true) {
            continue;
        }
        if let Some(owner) = owner {
            owner.rebuild(entry.fd as u64, description, snapshot, plan);
        }
        if asynchronous && description.flags as i32 & libc::O_PATH == 0 {
            set_flags(description, entry.fd, description.flags & SETTABLE, plan);
        }
    }
}

impl Owner {
    fn rebuild(&self, fd: u64, of: &Description, snapshot: &Snapshot, plan: &mut Builder) {
        const F_SETOWN_EX: u64 = 15;
        const F_SETSIG: u64 = 10;
        const F_OWNER_TID: i32 = 0;
        const F_OWNER_PGRP: i32 = 2;
        let label = of.kind.label();
        let object = || format!("the owner of an open file ({label})");
        let of_process = snapshot.processes.iter().any(|process| match self.kind {
            F_OWNER_TID => process.threads.iter().any(|t| t.tid == self.id),
            F_OWNER_PGRP => process.group == self.id,
            _ => process.pid == self.id,
        });
        let of_zombie = snapshot.zombies.iter().any(|zombie| match self.kind {
            F_OWNER_PGRP => zombie.group == self.id,
            _ => zombie.pid == self.id,
        });
        let inside = self.id != 0 && (of_process || of_zombie);
        if inside || of.is_leased() {
            let id = if inside { self.id } else { 0 };
            let data = plan.data(&[self.kind, id].map(i32::to_le_bytes).concat());
            plan.syscall(libc::SYS_fcntl, &[fd, F_SETOWN_EX, data], object);
        }
        if self.id != 0 && !inside {
            plan.warn(format!(
                "{label} sent its signals to {}, which is not part of the job, and now has no owner",
                self.id
            ));
        }
        if self.signal != 0 {
            plan.syscall(libc::SYS_fcntl, &[fd, F_SETSIG, self.signal as u64], object);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::gap;

    #[test]
    fn numbers_are_found_above_or_in_a_gap() {
        assert_eq!(gap(vec![0, 1, 2], 5, 1024), 10);
        assert_eq!(gap(vec![0, 1, 14], 5, 1024), 15);
        assert_eq!(gap(vec![0, 1, 40], 5, 1024), 10);
        assert_eq!(gap(vec![0, 1, 1023], 5, 1024), 10);
        assert_eq!(gap(vec![0, 12, 500, 1023], 5, 1024), 13);
        assert_eq!(gap(vec![12, 14, 20, 1023], 5, 1024), 21);
        // Without a free number: new descriptors get the lowest one.
        assert_eq!(gap(vec![0, 16], 6, 17), 17);
        assert_eq!(gap((0..1020).collect(), 6, 1024), 1020);
    }
}
