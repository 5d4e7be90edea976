//! Objects of an IPC namespace, which live on without their processes: System V shared memory,
//! semaphores and message queues, and POSIX message queues.
//!
//! # Which of them are the job's
//!
//! The kernel does not say. What a process of the job has attached, was the last to operate on
//! or waits for now is in *use*, and comes back or the restore is refused. What merely was made by
//! the job's user since the job began is *possible*: it may belong to another program.
//!
//! # What a restore does with them
//!
//! Killing a process removes none of them (but shared memory that is marked for it). So they are
//! mostly still there at the restore, and others may have come to rely on what they hold now:
//!
//! - One that is missing is created under its old id, which the kernel offers to those with
//!   CAP_CHECKPOINT_RESTORE in the namespace (`/proc/sys/kernel/*_next_id`).
//! - One that is there is put back to what it held only if everything that can be seen says that
//!   nobody but the job used it.
//! - Else the restore is refused. In an IPC namespace of its own every object is missing.

use serde::{Deserialize, Serialize};

use ckpt_image::Reader;
use ckpt_sys::sysv;
use ckpt_tracer::capabilities::Use;
use ckpt_tracer::proc::ProcRoot;
use ckpt_tracer::proc::maps::Vma;
use ckpt_tracer::proc::syscall::{InSyscall, read_syscall};
use ckpt_tracer::proc::tasks;
use nix::errno::Errno;

use super::Snapshot;
use crate::bounds;
use crate::clock;
use crate::error::{Error, Obstacle, Result};
use crate::options::Options;
use crate::source::{Collector, Source};

pub mod mqueue;
pub mod notice;
pub mod sysv_msg;
pub mod sysv_sem;
pub mod sysv_shm;
pub mod table;
pub mod undo;

use table::{Row, Type};

/// The job's objects in its IPC namespace.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ipc {
    /// Where they were.
    pub place: Place,
    /// Segments of System V shared memory, referred to by their index.
    pub segments: Vec<sysv_shm::Segment>,
    /// Sets of System V semaphores, referred to by their index.
    pub semaphores: Vec<sysv_sem::Set>,
    /// System V message queues.
    pub queues: Vec<sysv_msg::Queue>,
}

/// How an object is known to be the job's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Claim {
    /// A process of the job used it last, or waits for it.
    Used,
    /// The job's user made or changed it since the job began; it may be another program's.
    Possible,
}

/// What tells an object from one that has the same id elsewhere.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot: String,
    /// Inode number of the IPC namespace.
    pub namespace: u64,
}

impl Place {
    /// Where we are.
    pub fn here() -> Self {
        use std::os::unix::fs::MetadataExt;
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
        let namespace = std::fs::metadata("/proc/self/ns/ipc");
        Self {
            boot: boot.unwrap_or_default().trim().to_owned(),
            namespace: namespace.map_or(0, |m| m.ino()),
        }
    }
}

/// What all System V objects have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object {
    /// Its id.
    #[serde(deserialize_with = "bounds::id")]
    pub id: i32,
    /// Its key, 0 for a private one.
    pub key: i32,
    /// Permission bits.
    #[serde(deserialize_with = "bounds::mode")]
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Who created it.
    pub creator_uid: u32,
    /// With which group.
    pub creator_gid: u32,
}

impl Object {
    fn of(row: &Row) -> Self {
        Self {
            id: row.id(),
            key: row.key(),
            mode: row.get("perms") as u32 & 0o777,
            uid: row.get("uid") as u32,
            gid: row.get("gid") as u32,
            creator_uid: row.get("cuid") as u32,
            creator_gid: row.get("cgid") as u32,
        }
    }

    /// Its name in messages.
    pub fn title(&self, kind: Type) -> String {
        match self.key {
            0 => format!("{} {}", kind.label(), self.id),
            key => format!("{} {} (key {key:#010x})", kind.label(), self.id),
        }
    }

    fn access(&self) -> sysv::Access {
        sysv::Access {
            uid: self.uid,
            gid: self.gid,
            mode: self.mode,
        }
    }

    /// What is there under its id or key.
    fn find<'a>(&self, kind: Type, rows: &'a [Row], here: bool) -> Result<Found<'a>, Obstacle> {
        let remedy = format!(
            "remove that one if nobody needs it (ipcrm {} ID), or restore in an IPC namespace of \
             its own: unshare --ipc restore IMAGE",
            kind.ipcrm_option()
        );
        if let Some(row) = rows.iter().find(|row| row.id() == self.id) {
            let same = here && row.key() == self.key && row.get("cuid") as u32 == self.creator_uid;
            return match same {
                true => Ok(Found::Same(row)),
                false => Err(Obstacle::new(
                    self.title(kind),
                    "does not exist any more, and another object has its id",
                    remedy,
                )),
            };
        }
        match rows
            .iter()
            .find(|row| self.key != 0 && row.key() == self.key)
        {
            None => Ok(Found::Missing),
            Some(row) => Err(Obstacle::new(
                self.title(kind),
                format!(
                    "does not exist any more, and {} has its key",
                    Object::of(row).id
                ),
                remedy,
            )),
        }
    }
}

/// Whether an object is still there.
enum Found<'a> {
    Same(&'a Row),
    Missing,
}

/// The obstacle that something is missing and may not be created under its id, if that is so.
fn may_create(object: &Object, kind: Type) -> Result<(), Obstacle> {
    let path = format!("/proc/sys/kernel/{}_next_id", kind.name());
    match std::fs::OpenOptions::new().write(true).open(path) {
        Ok(_) => Ok(()),
        Err(e) => Err(Obstacle::new(
            object.title(kind),
            format!(
                "does not exist any more, and you may not create one under that id, which needs {} ({})",
                Use::ChooseIpcIds,
                e.kind()
            ),
            "run restore as root, or in an IPC namespace of its own: \
             unshare --map-root-user --ipc restore IMAGE",
        )),
    }
}

/// What stands in the way of an object of the job: it may not be created, or what is there may not be
/// changed, which `changeable` tells.
fn one_in_the_way(
    claim: Claim,
    object: &Object,
    (kind, rows, here): (Type, &[Row], bool),
    changeable: impl FnOnce(&Row) -> Result<(), Obstacle>,
) -> Result<(), Obstacle> {
    if claim == Claim::Possible {
        return Ok(());
    }
    match object.find(kind, rows, here)? {
        Found::Missing => may_create(object, kind),
        Found::Same(row) => changeable(row),
    }
}

/// Creates an object under its id. `create` makes it, `remove` takes back one that got another id.
fn create(
    object: &Object,
    kind: Type,
    create: impl FnOnce() -> Result<i32, Errno> + Send,
    remove: impl FnOnce(i32),
) -> Result<()> {
    let path = format!("/proc/sys/kernel/{}_next_id", kind.name());
    std::fs::write(&path, object.id.to_string()).map_err(|source| Error::File {
        what: "choose an id with",
        path: path.into(),
        source,
    })?;
    let made = as_creator(object.creator_uid, object.creator_gid, create);
    match made {
        Ok(id) if id == object.id => Ok(()),
        Ok(other) => {
            remove(other);
            Err(Error::refuse(Obstacle::new(
                object.title(kind),
                format!(
                    "does not exist any more, and its place in the kernel's table is taken: a new \
                     one got the id {other}"
                ),
                "restore in an IPC namespace of its own: unshare --ipc restore IMAGE",
            )))
        }
        Err(errno) => Err(failed(object, kind, "created", errno)),
    }
}

fn failed(object: &Object, kind: Type, what: &str, errno: Errno) -> Error {
    Error::Restore(format!(
        "the {} cannot be {what}: {}",
        object.title(kind),
        errno.desc()
    ))
}

/// The job, as far as it shows whose an object is.
struct Job {
    /// Of its processes, and of its zombies.
    pids: Vec<i32>,
    uids: Vec<u32>,
    /// When it began, seconds since 1970.
    began: i64,
    /// What its threads wait for: the system call and its first operand.
    waits: Vec<(i64, i32)>,
    /// It has the namespace to itself, and with it all that is in it.
    alone: bool,
}

impl Job {
    fn of(processes: &[(&Source, &[Vma])], ended: &[i32]) -> Self {
        let sources = || processes.iter().map(|(source, _)| source);
        let ticks = sources().map(|s| s.stat.starttime).min().unwrap_or(0);
        Self {
            pids: sources()
                .map(|s| s.pid.raw())
                .chain(ended.to_vec())
                .collect(),
            uids: sources().map(|s| s.status.uid.effective).collect(),
            began: clock::unix_time_of_ticks(ticks),
            waits: Vec::new(),
            alone: false,
        }
    }

    /// Whether a thread of the job is in one of these calls for the object with that id.
    fn waits(&self, id: i32, calls: &[i64]) -> bool {
        let mut waits = self.waits.iter();
        waits.any(|(call, object)| *object == id && calls.contains(call))
    }

    /// How an object is the job's, if it is.
    fn claim(&self, row: &Row, used: bool) -> Option<Claim> {
        let possible =
            self.uids.contains(&(row.get("cuid") as u32)) && row.get("ctime") >= self.began;
        match (used || self.alone, possible) {
            (true, _) => Some(Claim::Used),
            (false, true) => Some(Claim::Possible),
            (false, false) => None,
        }
    }
}

/// Runs `create` with these effective ids, which then are the creator's. For a thread alone: the
/// C library would change those of all.
fn as_creator<T: Send>(
    uid: u32,
    gid: u32,
    create: impl FnOnce() -> Result<T, Errno> + Send,
) -> Result<T, Errno> {
    let me = (
        nix::unistd::geteuid().as_raw(),
        nix::unistd::getegid().as_raw(),
    );
    if me == (uid, gid) || me.0 != 0 {
        return create();
    }
    let thread = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                ckpt_sys::credentials::set_effective(uid, gid);
                create()
            })
            .join()
    });
    thread.unwrap_or(Err(Errno::EIO))
}

/// System calls that threads of a process are in, with their first operands.
fn waits(source: &Source) -> Vec<(i64, i32)> {
    let call = |tid| {
        let dir = (source.pid, tid);
        match read_syscall(dir).ok()? {
            InSyscall::Inside { nr, args, .. } => Some((nr, args[0] as i32)),
            _ => None,
        }
    };
    let tasks = tasks::list_tasks(source.pid).unwrap_or_default();
    tasks.into_iter().filter_map(call).collect()
}

/// Enters everything that belongs to the job, once all its processes have been looked at from
/// outside. Touches nothing.
pub fn capture(processes: &[(&Source, &[Vma])], collector: &mut Collector) -> Result<()> {
    let kinds = [Type::Shm, Type::Sem, Type::Msg];
    let [shm, sem, msg] = kinds.map(table::read);
    let (shm, sem, msg) = (shm?, sem?, msg?);
    let mut job = Job::of(processes, &collector.ended);
    job.alone = collector.alone_in_ipc;
    if !(sem.is_empty() && msg.is_empty()) {
        job.waits = processes
            .iter()
            .flat_map(|(source, _)| waits(source))
            .collect();
    }
    collector.ipc.place = Place::here();
    if job.alone && !collector.is_copy {
        mqueue::refuse_contents(&collector.descriptions, &mut collector.obstacles);
    }
    sysv_shm::survey(processes, &job, &shm, collector);
    sysv_sem::survey(&job, &sem, collector);
    sysv_msg::survey(&job, &msg, collector);
    Ok(())
}

/// Whether an object that may be another program's is to be created; a warning tells what becomes
/// of it unless it is still there. One with a key stays away: others would come across it.
fn wants_possible(
    object: &Object,
    kind: Type,
    rows: &[Row],
    here: bool,
    warnings: &mut Vec<String>,
) -> bool {
    let reason = match object.find(kind, rows, here) {
        Ok(Found::Same(_)) => return false,
        Ok(Found::Missing) if object.key == 0 => match may_create(object, kind) {
            Ok(()) => return true,
            Err(obstacle) => obstacle.reason,
        },
        Ok(Found::Missing) => "does not exist any more".into(),
        Err(obstacle) => obstacle.reason,
    };
    warnings.push(format!(
        "{} was made by the job's user while the job ran, but not used by it so far; it {reason} and \
         is left so",
        object.title(kind),
    ));
    false
}

/// Whether there are no System V semaphores where we are.
pub fn no_semaphores() -> bool {
    table::read(table::Type::Sem).is_ok_and(|sets| sets.is_empty())
}

/// Refuses a restore here if anything stands in its way.
pub fn refuse(snapshot: &Snapshot, options: &Options) -> Result<()> {
    match in_the_way(snapshot, options)? {
        obstacles if obstacles.is_empty() => Ok(()),
        obstacles => Err(Error::Refused(obstacles)),
    }
}

fn in_the_way(snapshot: &Snapshot, options: &Options) -> Result<Vec<Obstacle>> {
    let here = snapshot.ipc.place == Place::here();
    let leaving = !options.leaving.is_empty();
    let mut obstacles = mqueue::in_the_way(snapshot, here, options);
    let rows = table::read(Type::Shm)?;
    for segment in &snapshot.ipc.segments {
        obstacles.extend(segment.in_the_way(&rows, here, leaving).err());
    }
    let rows = table::read(Type::Sem)?;
    for (index, set) in snapshot.ipc.semaphores.iter().enumerate() {
        obstacles.extend(set.in_the_way(index, &rows, here, snapshot).err());
    }
    let rows = table::read(Type::Msg)?;
    for queue in &snapshot.ipc.queues {
        obstacles.extend(queue.in_the_way(&rows, here, snapshot).err());
    }
    Ok(obstacles)
}

/// Objects made ready for a restore. What was created goes again, and what was changed is undone,
/// unless it is [kept](Self::keep).
#[derive(Default)]
pub struct Prepared {
    segments: Vec<sysv_shm::Ready>,
    semaphores: Vec<sysv_sem::Ready>,
    queues: Vec<sysv_msg::Ready>,
    posix: Vec<mqueue::Ready>,
    warnings: Vec<String>,
}

impl Prepared {
    /// Creates what is missing and puts back what is there. Nothing of the job runs.
    pub fn new(snapshot: &Snapshot, image: &Reader, options: &Options) -> Result<Self> {
        let here = snapshot.ipc.place == Place::here();
        let mut prepared = Self {
            posix: mqueue::prepare(snapshot, options)?,
            ..Self::default()
        };
        let rows = table::read(Type::Shm)?;
        for segment in &snapshot.ipc.segments {
            let ready = segment.prepare(&rows, here, image, &mut prepared.warnings)?;
            prepared.segments.push(ready);
        }
        let rows = table::read(Type::Sem)?;
        for (index, set) in snapshot.ipc.semaphores.iter().enumerate() {
            let ready = set.prepare(index, &rows, here, snapshot, &mut prepared.warnings)?;
            prepared.semaphores.extend(ready);
        }
        let rows = table::read(Type::Msg)?;
        for queue in &snapshot.ipc.queues {
            let ready = queue.prepare(&rows, here, snapshot, &mut prepared.warnings)?;
            prepared.queues.extend(ready);
        }
        Ok(prepared)
    }

    /// The job has them now; returns what is not as it was.
    pub fn keep(self) -> Vec<String> {
        self.segments.into_iter().for_each(sysv_shm::Ready::keep);
        self.semaphores.into_iter().for_each(sysv_sem::Ready::keep);
        self.queues.into_iter().for_each(sysv_msg::Ready::keep);
        self.posix.into_iter().for_each(mqueue::Ready::keep);
        self.warnings
    }
}

/// Processes outside the job that have something mapped which `mapped` tells by a line of maps.
fn who_maps(job: &[i32], mapped: impl Fn(&str) -> bool) -> Vec<i32> {
    let entries = std::fs::read_dir(ProcRoot::default().path()).into_iter();
    let pids = entries
        .flatten()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &i32| !job.contains(pid))
        .filter(|pid| {
            let maps = std::fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
            String::from_utf8_lossy(&maps).lines().any(&mapped)
        })
        .collect()
}
