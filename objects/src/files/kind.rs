//! Kinds of open files: the interface that every kind implements.
//!
//! A kind is a record in a file of its own, which implements [`OpenFile`], and a line of the list in the parent
//! module. No other code distinguishes kinds, which `scripts/check-kinds` checks. Code for one kind gets its record
//! by [`Kind::get`].

use std::path::{Path, PathBuf};

use super::changed::Written;
use super::{Kind, Look, Staging, pipe, terminal};
use crate::error::{Error, Obstacle, Result};
use crate::index::DescriptionId;
use crate::memory::FileIdentity;
use crate::need::Need;
use crate::options::Options;
use crate::plan::Builder;
use crate::process::Process;
use crate::references::Faults;
use crate::source::{Collector, Source};
use crate::{Snapshot, SpaceId};

/// An open file description of a frozen job, to be captured.
pub struct Sight<'a> {
    /// The process through which it is seen.
    pub source: &'a Source,
    /// Its link, fdinfo and fstat(2).
    pub look: &'a Look,
    /// All descriptions of the job, with the index in the snapshot of the first.
    pub job: (&'a [Look], usize),
    /// The ends of pipes that the job holds.
    pub pipes: &'a pipe::Ends,
    /// The terminals of the job.
    pub terminals: &'a terminal::Ends,
}

/// The record, an obstacle, or `None` if it is of another kind.
pub type Captured = Option<Result<Kind, Box<Obstacle>>>;

/// A description that the plan of the job's first process opens.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// Its index in the snapshot.
    pub index: DescriptionId,
    /// Its access mode and status flags.
    pub flags: u32,
    /// Its staging number.
    pub at: i32,
    /// All staging numbers.
    pub staging: Staging,
    /// The snapshot.
    pub snapshot: &'a Snapshot,
    /// The options.
    pub options: &'a Options,
    /// The destination of terminals.
    pub terminals: &'a dyn terminal::Places,
    /// Files that the job has open for writing.
    pub written: &'a Written,
}

/// Which status flags a description has as soon as it is opened; `F_SETFL` sets the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opened {
    /// None: the call that makes it takes none.
    Plain,
    /// Those of its record: open(2) takes them.
    WithFlags,
    /// `O_NOATIME` alone.
    WithNoAtime,
    /// Unknown: another process opened it, or its record has flags of another time.
    Unknown,
    /// It is not opened.
    Absent,
}

/// Substitutes for the job's files in a copy of the job (`ckpt attach --rehearse`).
pub trait Substitutes {
    /// Whether a path refers to a file of the copy's own.
    fn is_own(&self, path: &Path) -> bool;
    /// A path that no other file of the copy has, for a nameless file of the job.
    fn nameless(&self, path: &Path) -> PathBuf;
    /// Creates a directory and its parents.
    fn directory(&mut self, path: &Path) -> Result<()>;
    /// Creates a file of that type and size, one for all names of the file.
    fn like(&mut self, path: &Path, was: &FileIdentity) -> Result<()>;
    /// Creates a FIFO.
    fn fifo(&mut self, path: &Path, mode: u32) -> Result<()>;
    /// Creates the file or directory to be watched.
    fn watched(&mut self, path: &Path) -> Result<()>;
    /// Binds a datagram socket to an address.
    fn socket(&mut self, address: &[u8]) -> Result<()>;
    /// Whether the job's file is on a hugetlbfs.
    fn is_of_huge_pages(&self, path: &Path) -> bool;
    /// The error for an object that cannot be copied.
    fn refusal(&self, object: String, reason: &str) -> Error;

    /// Creates the parent directory of a path.
    ///
    /// # Errors
    /// When it cannot be created.
    fn parent(&mut self, path: &Path) -> Result<()> {
        path.parent()
            .map_or(Ok(()), |parent| self.directory(parent))
    }
}

/// The operations of every kind. The defaults suit a nameless file of the job without contents.
pub trait OpenFile {
    /// Captures a description, if it is of this kind.
    fn capture(sight: &Sight, collector: &mut Collector) -> Captured
    where
        Self: Sized;

    /// The name behind `anon_inode:` of files of this kind.
    fn anon_inode() -> Option<&'static str>
    where
        Self: Sized,
    {
        None
    }

    /// The kind in tables and JSON.
    fn class(&self) -> &'static str;

    /// Its name in messages: its path, or a description.
    fn label(&self) -> String {
        self.class().into()
    }

    /// Its name in messages about its restore.
    fn object(&self) -> String {
        self.label()
    }

    /// Its name in tables, if that is more detailed.
    fn shown(&self) -> String {
        self.label()
    }

    /// Its offset in bytes, if it has one.
    fn offset(&self) -> Option<u64> {
        None
    }

    /// The space of its contents in the image, and their size in bytes.
    fn contents(&self) -> Option<(SpaceId, u64)> {
        None
    }

    /// Its requirements on the machine of the restore.
    fn needs(&self, _flags: u32, _snapshot: &Snapshot) -> Vec<Need> {
        Vec::new()
    }

    /// Checks its references and consistency; `number` is its index in the snapshot.
    fn check(&self, _number: DescriptionId, _snapshot: &Snapshot, _faults: &mut Faults) {}

    /// Calls `f` with every path that a restore uses.
    fn each_path(&mut self, _f: &mut dyn FnMut(&mut PathBuf)) {}

    /// Calls `f` with the index of every description that it refers to.
    fn each_reference(&self, _f: &mut dyn FnMut(DescriptionId)) {}

    /// Calls `f` with every inode number that a restore changes.
    fn each_inode(&mut self, _f: &mut dyn FnMut(&mut u64)) {}

    /// Removes differences that result from the way a copy is made (docs/limits.md).
    fn make_comparable(&mut self, _flags: &mut u32) {}

    /// Creates the file that a copy of the job opens instead.
    ///
    /// # Errors
    /// When that is not possible.
    fn substitute(&mut self, _flags: &mut u32, _by: &mut dyn Substitutes) -> Result<()> {
        Ok(())
    }

    /// Whether a copy of the job opens the same paths as the job.
    fn keeps_paths(&self, _flags: u32) -> bool {
        false
    }

    /// Whether it refers to an object outside the job.
    fn is_of_surroundings(&self) -> bool {
        false
    }

    /// Whether fstat(2) shows its creator, which a restore has to set.
    fn shows_maker(&self) -> bool {
        false
    }

    /// Which of its status flags are set when it is opened.
    fn opened(&self) -> Opened {
        Opened::Plain
    }

    /// Why `--fd` cannot replace it by another file.
    fn not_replaceable(&self, _by: &Path) -> Option<Obstacle> {
        None
    }

    /// Whether it cannot be opened until processes other than the first one, `first`, exist.
    fn is_late(&self, _first: Option<i32>) -> bool {
        false
    }

    /// Opens it under its number, or a placeholder if it is late.
    ///
    /// # Errors
    /// The obstacles.
    fn open(&self, place: &Place, plan: &mut Builder) -> Result<(), Vec<Obstacle>>;

    /// Opens a late file in a process that holds it, as the lowest free number `at`.
    fn open_late(&self, _flags: u32, _at: i32, _process: &Process, _plan: &mut Builder) {}

    /// Completes what refers to other descriptions, when all are open.
    fn complete(&self, _at: i32, _staging: Staging, _snapshot: &Snapshot, _plan: &mut Builder) {}

    /// Seals it, after every process has mapped it.
    fn seal(&self, _index: DescriptionId, _at: i32, _snapshot: &Snapshot, _plan: &mut Builder) {}
}

/// Records of a kind.
pub trait Record: Sized {
    /// The record, if it is of this kind.
    fn of(kind: &Kind) -> Option<&Self>;
    /// The same, mutable.
    fn of_mut(kind: &mut Kind) -> Option<&mut Self>;
}

/// The list of kinds as types and functions; called once, in the parent module.
macro_rules! kinds {
    ($($(#[doc = $doc:expr])* $(#[cfg($cfg:meta)])? $name:ident($record:ty),)+) => {
        /// Kinds of open files.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        pub enum Kind {
            $($(#[doc = $doc])* $(#[cfg($cfg)])? $name($record),)+
        }

        impl Kind {
            /// The capture function of each kind, in order.
            const CAPTURES: &[fn(&kind::Sight, &mut Collector) -> kind::Captured] =
                &[$($(#[cfg($cfg)])? { <$record as kind::OpenFile>::capture },)+];

            /// The names behind `anon_inode:` of each kind.
            const ANON_INODES: &[fn() -> Option<&'static str>] =
                &[$($(#[cfg($cfg)])? { <$record as kind::OpenFile>::anon_inode },)+];

            /// The operations of its kind.
            pub fn file(&self) -> &dyn kind::OpenFile {
                match self {
                    $($(#[cfg($cfg)])? Kind::$name(file) => file,)+
                }
            }

            /// The same, mutable.
            pub fn file_mut(&mut self) -> &mut dyn kind::OpenFile {
                match self {
                    $($(#[cfg($cfg)])? Kind::$name(file) => file,)+
                }
            }
        }

        $(
            $(#[cfg($cfg)])?
            impl From<$record> for Kind {
                fn from(record: $record) -> Self {
                    Kind::$name(record)
                }
            }

            $(#[cfg($cfg)])?
            impl kind::Record for $record {
                fn of(kind: &Kind) -> Option<&Self> {
                    match kind {
                        Kind::$name(record) => Some(record),
                        _ => None,
                    }
                }

                fn of_mut(kind: &mut Kind) -> Option<&mut Self> {
                    match kind {
                        Kind::$name(record) => Some(record),
                        _ => None,
                    }
                }
            }
        )+
    };
}
pub(super) use kinds;

impl Kind {
    /// Whether files of that name behind `anon_inode:` are of a known kind.
    pub(super) fn has_anon_inode(name: &str) -> bool {
        Self::ANON_INODES.iter().any(|of| of() == Some(name))
    }

    /// Captures a description; `None` if it is of no known kind.
    pub(super) fn capture(sight: &Sight, collector: &mut Collector) -> Captured {
        Self::CAPTURES
            .iter()
            .find_map(|capture| capture(sight, collector))
    }

    /// The record, if it is of that kind.
    pub fn get<T: Record>(&self) -> Option<&T> {
        T::of(self)
    }

    /// The same, mutable.
    pub fn get_mut<T: Record>(&mut self) -> Option<&mut T> {
        T::of_mut(self)
    }

    /// Its name in messages.
    pub fn label(&self) -> String {
        self.file().label()
    }
}
