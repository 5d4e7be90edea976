//! Input and tables of a capture: the process as seen from outside, and objects that may be shared.

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
use crate::files::lock::Held;
use crate::files::removed::Removed;
use crate::findings::Findings;
use crate::index::FileId;
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
    /// Refers to this very process.
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

/// The source of the contents of a space, other than an address space's own pages.
#[derive(Debug)]
pub enum Contents {
    /// A file of that size.
    File(File, u64),
    /// The same through the job's own open file description, whose offset must not change.
    Held(File, u64),
    /// Memory of processes that show it: (process, offset in the object, address, bytes).
    Memory(Vec<(Pid, u64, u64, u64)>),
    /// A System V segment that no process has attached: its id, its size.
    Segment(i32, u64),
}

impl Contents {
    /// The file to read from.
    pub fn as_file(&self) -> Option<&File> {
        match self {
            Contents::File(file, _) | Contents::Held(file, _) => Some(file),
            Contents::Memory(_) | Contents::Segment(..) => None,
        }
    }
}

/// How a capture treats a transient obstacle ([`Obstacle::passing`]) that could also be left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Patience {
    /// The job runs and is only inspected: ignored.
    #[default]
    Running,
    /// There will be another attempt.
    Some,
    /// This is the last attempt.
    None,
}

/// How descriptors of the job are duplicated.
#[derive(Debug, Default)]
pub enum Copies {
    /// By pidfd_getfd(2); kcmp(2) identifies shared ones.
    #[default]
    Taken,
    /// Not at all: one of the two is not available, and the job runs. The files are still visible.
    None,
    /// The job has sent them.
    Lent(HashMap<(Pid, i32), OwnedFd>),
}

/// Tables of shared objects, filled during the capture, and all obstacles.
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
    /// Processes whose mappings of an object have all been read for its contents.
    pub viewed: HashSet<(Pid, SpaceId)>,
    /// Rings of AIO contexts by inode, with their process.
    pub aio_rings: Vec<(u64, Pid)>,
    /// Open files that are read through the job's descriptions.
    pub held: Held,
    /// What processes share with their parents.
    pub shares: HashMap<Pid, Shares>,
    /// Ids of all tasks of the job.
    pub tasks: HashSet<i32>,
    /// The job's zombies.
    pub ended: Vec<i32>,
    /// The job's first process.
    pub first: Option<i32>,
    /// Files whose contents are stored.
    pub save_files: SaveFiles,
    /// Descriptors to be dropped or replaced.
    pub choices: Choices,
    /// The job's internet sockets.
    pub inet: crate::sockets::inet::Survey,
    /// See [`Copies`].
    pub copies: Copies,
    /// Obstacles, and warnings of a successful checkpoint.
    pub findings: Findings,
    /// The job's IPC namespace has no other processes.
    pub alone_in_ipc: bool,
    /// It is the copy of a rehearsal.
    pub is_copy: bool,
    /// See [`Patience`].
    pub patience: Patience,
    surroundings: Option<Surroundings>,
    files_by_key: HashMap<(PathBuf, u64), FileId>,
    spaces: u32,
}

impl Collector {
    /// For a frozen job. While it runs, contents that are changing are no obstacle and need not be read.
    pub fn frozen(&self) -> bool {
        self.patience != Patience::Running
    }

    /// The same for a running job: without duplicates if they cannot be made.
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

    /// Records an obstacle once.
    pub fn refuse(&mut self, obstacle: Obstacle) {
        self.findings.refuse(obstacle);
    }

    /// The seccomp filters of our environment, determined once.
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

    /// A known mapped file.
    pub fn known_file(&self, path: &Path, inode: u64) -> Option<FileId> {
        self.files_by_key.get(&(path.to_owned(), inode)).copied()
    }

    /// Handles events that the program has not read: usually it does so soon. For the rest there is a warning, which
    /// says what becomes of them.
    ///
    /// # Errors
    /// A transient obstacle, while there are further attempts.
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
            Patience::None => self.findings.notes.push(format!("{object} {what}; {then}")),
        }
        Ok(())
    }

    /// A mapped file, added if new.
    pub fn mapped_file(
        &mut self,
        path: &Path,
        inode: u64,
        make: impl FnOnce(&mut Self) -> MappedFile,
    ) -> FileId {
        let key = (path.to_owned(), inode);
        if let Some(&index) = self.files_by_key.get(&key) {
            return index;
        }
        let file = make(self);
        let id = FileId::push(&mut self.mapped_files, file);
        self.files_by_key.insert(key, id);
        id
    }
}
