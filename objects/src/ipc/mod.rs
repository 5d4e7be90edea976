//! Objects of an IPC namespace, which outlive their processes: System V shared memory, semaphores and message queues,
//! and POSIX message queues.
//!
//! # Which of them belong to the job
//!
//! The kernel does not record it. An object that a process of the job has attached, was the last to operate on, or
//! waits for is *used*: it is restored or the restore is refused. An object that was only created by the job's user
//! since the job began is *possible*: it may belong to another program.
//!
//! # What a restore does with them
//!
//! Killing a process removes none of them (except shared memory marked for removal). So they usually still exist at
//! the restore, and other processes may rely on their present contents:
//!
//! - A missing one is created under its old id, which needs CAP_CHECKPOINT_RESTORE in the namespace
//!   (`/proc/sys/kernel/*_next_id`).
//! - An existing one gets its old contents only if all evidence says that only the job used it.
//! - Otherwise the restore is refused. In a new IPC namespace every object is missing.

use serde::{Deserialize, Serialize};

use ckpt_image::Reader;
use ckpt_tracer::proc::ProcRoot;
use ckpt_tracer::proc::maps::Vma;
use ckpt_tracer::proc::syscall::{InSyscall, read_syscall};
use ckpt_tracer::proc::tasks;

use super::Snapshot;
use crate::clock;
use crate::error::{Error, Obstacle, Result};
use crate::options::Options;
use crate::plan::Builder;
use crate::process::Process;
use crate::references::Faults;
use crate::source::{Collector, Source};

pub mod mqueue;
pub mod notice;
mod sysv;
pub mod sysv_msg;
pub mod sysv_sem;
pub mod sysv_shm;
pub mod table;
pub mod undo;

pub use sysv::Object;
use sysv::{IpcObject, Ready, Sight, Site, each_kind};
use table::Row;

/// The job's objects in its IPC namespace.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ipc {
    /// Identifies their namespace.
    pub place: Place,
    /// Segments of System V shared memory, referred to by their index.
    pub segments: Vec<sysv_shm::Segment>,
    /// Sets of System V semaphores, referred to by their index.
    pub semaphores: Vec<sysv_sem::Set>,
    /// System V message queues.
    pub queues: Vec<sysv_msg::Queue>,
}

/// Why an object is attributed to the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Claim {
    /// A process of the job used it last, or waits for it.
    Used,
    /// The job's user created or changed it since the job began; it may be another program's.
    Possible,
}

/// Distinguishes objects with equal ids on different systems.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot: String,
    /// Inode number of the IPC namespace.
    pub namespace: u64,
}

impl Place {
    /// The present system.
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

/// Properties of the job that decide whether an object belongs to it.
struct Job {
    /// Of its processes and its zombies.
    pids: Vec<i32>,
    uids: Vec<u32>,
    /// Its start time, seconds since 1970.
    began: i64,
    /// System calls in which its threads wait, with the first operand.
    waits: Vec<(i64, i32)>,
    /// The namespace has no other processes, so all objects are the job's.
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

    /// Why an object is attributed to the job, if it is.
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

/// System calls in which threads of a process are, with their first operands.
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

/// Adds all objects of the job, after all its processes have been captured from outside. Changes nothing.
pub fn capture(processes: &[(&Source, &[Vma])], collector: &mut Collector) -> Result<()> {
    let mut job = Job::of(processes, &collector.ended);
    job.alone = collector.alone_in_ipc;
    let tables = each_kind!(Kind => table::read(Kind::TYPE)?);
    // Threads wait for semaphores and messages.
    let [_, semaphores, queues] = &tables;
    if !semaphores.is_empty() || !queues.is_empty() {
        job.waits = processes
            .iter()
            .flat_map(|(source, _)| waits(source))
            .collect();
    }
    collector.ipc.place = Place::here();
    if job.alone && !collector.is_copy {
        mqueue::refuse_contents(&collector.descriptions, &mut collector.findings.obstacles);
    }
    let mut tables = tables.iter();
    each_kind!(Kind => if let Some(rows) = tables.next() {
        let job = &job;
        Kind::capture(&Sight { job, processes, rows }, collector);
    });
    Ok(())
}

/// Checks the objects (`references`).
pub(crate) fn check(snapshot: &Snapshot, faults: &mut Faults) {
    each_kind!(Kind => Kind::each(&snapshot.ipc).iter().for_each(|object| object.check(faults)));
}

/// Names of all System V objects of a job, for display.
pub fn titles(ipc: &Ipc) -> Vec<String> {
    each_kind!(Kind => Kind::each(ipc).iter().map(Kind::title).collect::<Vec<_>>()).concat()
}

/// Ids of System V objects that certainly belong to the job, for each kind.
pub fn used(ipc: &Ipc) -> Vec<Vec<i32>> {
    let of_kind = each_kind!(Kind => {
        let used = Kind::each(ipc).iter().filter(|object| object.claim() == Claim::Used);
        used.map(|object| object.object().id).collect()
    });
    of_kind.to_vec()
}

/// Removes differences of a copy in a new IPC namespace; `used` is that of the job.
pub fn make_comparable(ipc: &mut Ipc, used: &[Vec<i32>]) {
    let mut used = used.iter();
    each_kind!(Kind => if let Some(ids) = used.next() {
        let all = Kind::all(ipc);
        all.retain(|object| !Kind::MAY_BE_OTHERS || ids.contains(&object.object().id));
        all.iter_mut().for_each(Kind::make_comparable);
    });
}

/// Appends what a process does for System V objects before its threads are created.
pub fn rebuild(process: &Process, snapshot: &Snapshot, plan: &mut Builder) {
    each_kind!(Kind => Kind::rebuild(process, snapshot, plan));
}

/// The same, after all processes have done that.
pub fn finish(process: &Process, snapshot: &Snapshot, plan: &mut Builder) {
    each_kind!(Kind => Kind::finish(process, snapshot, plan));
}

/// Whether our namespace has no System V semaphores.
pub fn no_semaphores() -> bool {
    table::read(table::Type::Sem).is_ok_and(|sets| sets.is_empty())
}

/// Refuses a restore here if there is an obstacle.
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
    each_kind!(Kind => {
        let rows = &table::read(Kind::TYPE)?;
        let site = Site::of(snapshot, rows, leaving);
        let all = Kind::each(&snapshot.ipc).iter().enumerate();
        obstacles.extend(all.filter_map(|(index, object)| object.in_the_way(index, &site).err()));
    });
    Ok(obstacles)
}

/// Objects prepared for a restore. Unless they are [kept](Self::keep), created ones are removed and changes undone.
#[derive(Default)]
pub struct Prepared {
    objects: Vec<Box<dyn Ready>>,
    warnings: Vec<String>,
}

impl Prepared {
    /// Creates missing objects and restores existing ones. The job does not run yet.
    pub fn new(snapshot: &Snapshot, image: &Reader, options: &Options) -> Result<Self> {
        let mut prepared = Self {
            objects: mqueue::prepare(snapshot, options)?,
            ..Self::default()
        };
        each_kind!(Kind => {
            let rows = &table::read(Kind::TYPE)?;
            let site = Site::of(snapshot, rows, false);
            for object in Kind::each(&snapshot.ipc).iter().enumerate() {
                let ready = sysv::prepare(object, &site, image, &mut prepared.warnings)?;
                prepared.objects.extend(ready);
            }
        });
        Ok(prepared)
    }

    /// The job owns them now; returns differences.
    pub fn keep(self) -> Vec<String> {
        self.objects.into_iter().for_each(Ready::keep);
        self.warnings
    }
}

/// Processes outside the job with a mapping that `mapped` recognizes by its line of maps.
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
