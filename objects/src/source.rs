//! What a capture works on: the process as it is seen from outside, and the tables of what
//! several objects may share.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use ckpt_tracer::kcmp;
use ckpt_tracer::mem::ProcessMemory;
use ckpt_tracer::pidfd::PidFd;
use ckpt_tracer::proc::stat::{Stat, read_stat};
use ckpt_tracer::proc::status::{Status, read_status};
use ckpt_tracer::proc::{ProcDir, ProcRoot};
use ckpt_tracer::{Error, Pid};

use super::save_files::SaveFiles;
use crate::SpaceId;
use crate::error::{Obstacle, Result};
use crate::files::Description;
use crate::files::left::Choices;
use crate::files::lock::WriteLeases;
use crate::files::removed::Removed;
use crate::ipc::Ipc;
use crate::memory::{MappedFile, SharedMemory};
use crate::process::Shares;
use crate::seccomp::surroundings::Surroundings;

/// A process seen from outside.
pub struct Source {
    /// Its id.
    pub pid: Pid,
    /// `/proc/PID`.
    pub dir: ProcDir,
    /// Handle that stays tied to this very process.
    pub pidfd: PidFd,
    /// Its memory.
    pub mem: ProcessMemory,
    /// `/proc/PID/stat`.
    pub stat: Stat,
    /// `/proc/PID/status`.
    pub status: Status,
}

impl Source {
    /// Opens the handles and reads what is cheap.
    pub fn open(pid: Pid) -> Result<Self, Error> {
        let dir = ProcRoot::default().process(pid);
        Ok(Self {
            pidfd: PidFd::open(pid)?,
            mem: ProcessMemory::open(pid)?,
            stat: read_stat(dir.clone())?,
            status: read_status(dir.clone())?,
            dir,
            pid,
        })
    }

    /// `process 12 (name)`, for messages.
    pub fn title(&self) -> String {
        format!("process {} ({})", self.pid, self.stat.comm)
    }
}

/// Where the contents of a space come from, other than an address space's own pages.
#[derive(Debug)]
pub enum Contents {
    /// A file of that size.
    File(File, u64),
    /// The same through the job's own open file description, whose offset is to stay.
    Held(File, u64),
    /// Memory of processes that show it: (process, offset in the object, address, bytes).
    Memory(Vec<(Pid, u64, u64, u64)>),
    /// A System V segment that nobody has attached: its id, its size.
    Segment(i32, u64),
}

impl Contents {
    /// The file that they are read from.
    pub fn as_file(&self) -> Option<&File> {
        match self {
            Contents::File(file, _) | Contents::Held(file, _) => Some(file),
            Contents::Memory(_) | Contents::Segment(..) => None,
        }
    }
}

/// How a capture takes what goes by itself ([`Obstacle::passing`]) and could also be left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Patience {
    /// The job runs and is only looked at: it is none of its concern.
    #[default]
    Running,
    /// There will be another attempt.
    Some,
    /// This is the last attempt.
    None,
}

/// How we come by copies of the job's descriptors.
#[derive(Debug, Default)]
pub enum Copies {
    /// By pidfd_getfd(2); what is shared is told by kcmp(2).
    #[default]
    Taken,
    /// Not at all: one of the two is withheld, and the job runs. What files they are can be seen.
    None,
    /// The job has handed them out.
    Lent(HashMap<(Pid, i32), OwnedFd>),
}

/// Tables of what is shared, filled while objects are captured; and everything that stands
/// in the way.
#[derive(Default)]
pub struct Collector {
    /// See [`Snapshot::descriptions`](crate::Snapshot).
    pub descriptions: Vec<Description>,
    /// See [`Snapshot::mapped_files`](crate::Snapshot).
    pub mapped_files: Vec<MappedFile>,
    /// See [`Snapshot::removed`](crate::Snapshot).
    pub removed: Vec<Removed>,
    /// See [`Snapshot::shared_memory`](crate::Snapshot).
    pub shared_memory: Vec<SharedMemory>,
    /// See [`Snapshot::terminals`](crate::Snapshot).
    pub terminals: Vec<crate::files::terminal::Terminal>,
    /// See [`Snapshot::ipc`](crate::Snapshot).
    pub ipc: Ipc,
    /// Spaces to be written besides the address spaces.
    pub contents: Vec<(SpaceId, Contents)>,
    /// Processes of which all mappings of an object were looked at for its contents.
    pub viewed: HashSet<(Pid, SpaceId)>,
    /// Rings of AIO contexts by inode, and whose they are.
    pub aio_rings: Vec<(u64, Pid)>,
    /// Open files that no other open may disturb.
    pub write_leases: WriteLeases,
    /// What processes share with their parents.
    pub shares: HashMap<Pid, Shares>,
    /// Ids of all tasks of the job.
    pub tasks: HashSet<i32>,
    /// The job's zombies.
    pub ended: Vec<i32>,
    /// The job's first process.
    pub first: Option<i32>,
    /// Files whose contents are wanted.
    pub save_files: SaveFiles,
    /// Descriptors that are not wanted.
    pub choices: Choices,
    /// See [`Copies`].
    pub copies: Copies,
    /// What cannot be captured.
    pub obstacles: Vec<Obstacle>,
    /// The job has its IPC namespace to itself.
    pub alone_in_ipc: bool,
    /// It is the copy of a rehearsal.
    pub is_copy: bool,
    /// See [`Patience`].
    pub patience: Patience,
    /// What the user should know of a checkpoint that succeeds, one sentence each.
    pub warnings: Vec<String>,
    surroundings: Option<Surroundings>,
    files_by_key: HashMap<(PathBuf, u64), usize>,
    spaces: u32,
}

impl Collector {
    /// The job is frozen. While it runs, contents that are just being changed are no obstacle and
    /// need not be read.
    pub fn frozen(&self) -> bool {
        self.patience != Patience::Running
    }

    /// The same for a job that runs: without copies where they cannot be taken.
    pub fn for_a_look() -> Self {
        let copies = match kcmp::withheld() {
            None => Copies::Taken,
            Some(_) => Copies::None,
        };
        Self {
            copies,
            ..Self::default()
        }
    }

    /// Notes what cannot be captured; the same is told once.
    pub fn refuse(&mut self, obstacle: Obstacle) {
        if !self.obstacles.contains(&obstacle) {
            self.obstacles.push(obstacle);
        }
    }

    /// The seccomp filters around us, looked at once.
    pub fn surroundings(&mut self) -> Surroundings {
        let known = self.surroundings.get_or_insert_with(Surroundings::look);
        known.clone()
    }

    /// What a process shares with its parent.
    pub fn shares(&self, pid: Pid) -> Shares {
        self.shares.get(&pid).copied().unwrap_or_default()
    }

    /// A new space.
    pub fn new_space(&mut self) -> SpaceId {
        self.spaces += 1;
        SpaceId(self.spaces - 1)
    }

    /// A new space with contents to be written.
    pub fn space_for(&mut self, contents: Contents) -> SpaceId {
        let space = self.new_space();
        self.contents.push((space, contents));
        space
    }

    /// The index of a mapped file that was entered already.
    pub fn known_file(&self, path: &Path, inode: u64) -> Option<usize> {
        self.files_by_key.get(&(path.to_owned(), inode)).copied()
    }

    /// Events that the program has not read: as a rule it does so soon; of those that stay there is a warning, which says what
    /// becomes of them.
    ///
    /// # Errors
    /// What passes, as long as it is waited for.
    pub fn not_read_yet(
        &mut self,
        object: String,
        what: &str,
        then: &str,
    ) -> Result<(), Box<Obstacle>> {
        match self.patience {
            Patience::Running => {}
            Patience::Some => {
                let obstacle = Obstacle::new(object, what, "try again in a moment");
                return Err(Box::new(obstacle.passing()));
            }
            Patience::None => self.warnings.push(format!("{object} {what}; {then}")),
        }
        Ok(())
    }

    /// The index of a mapped file, entered on first sight.
    pub fn mapped_file(
        &mut self,
        path: &Path,
        inode: u64,
        make: impl FnOnce(&mut Self) -> MappedFile,
    ) -> usize {
        let key = (path.to_owned(), inode);
        if let Some(&index) = self.files_by_key.get(&key) {
            return index;
        }
        let file = make(self);
        self.mapped_files.push(file);
        self.files_by_key.insert(key, self.mapped_files.len() - 1);
        self.mapped_files.len() - 1
    }
}
