//! Kinds of open files: what the rest of the program asks of any of them.
//!
//! A kind is a record in a file of its own, which implements [`OpenFile`], and a line of the list in the parent module. No other place
//! tells kinds apart, which `scripts/check-kinds` checks. What concerns one kind alone takes its record by [`Kind::get`].

use std::path::{Path, PathBuf};

use super::changed::Written;
use super::{Kind, Look, Staging, pipe, terminal};
use crate::error::{Error, Obstacle, Result};
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
    /// What is seen of it.
    pub look: &'a Look,
    /// All of the job, with the index in the snapshot of the first.
    pub job: (&'a [Look], usize),
    /// Which ends of pipes the job has.
    pub pipes: &'a pipe::Ends,
    /// What the job has of terminals.
    pub terminals: &'a terminal::Ends,
}

/// The record of what is seen, an obstacle, or `None` where it is of another kind.
pub type Captured = Option<Result<Kind, Box<Obstacle>>>;

/// A description that the plan of the job's first process opens.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// Its index in the snapshot.
    pub index: usize,
    /// Its access mode and status flags.
    pub flags: u32,
    /// The number at which it is opened.
    pub at: i32,
    /// All numbers of this kind.
    pub staging: Staging,
    /// What is restored.
    pub snapshot: &'a Snapshot,
    /// How.
    pub options: &'a Options,
    /// What becomes of terminals.
    pub terminals: &'a dyn terminal::Places,
    /// Files that the job has open for writing.
    pub written: &'a Written,
}

/// Which status flags a description has as soon as it is opened; the others are set by `F_SETFL`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opened {
    /// None: the call that makes it takes none.
    Plain,
    /// Those of its record: open(2) takes them.
    WithFlags,
    /// `O_NOATIME` alone.
    WithNoAtime,
    /// Any: it was opened by somebody else.
    Unknown,
    /// It is not opened.
    Absent,
}

/// What a copy of the job has in the place of its files (`ckpt attach --rehearse`).
pub trait Substitutes {
    /// Whether a path leads to what the copy has of its own.
    fn is_own(&self, path: &Path) -> bool;
    /// A path that no other file of the copy has, for what has no name in the job.
    fn nameless(&self, path: &Path) -> PathBuf;
    /// Makes a directory with those above it.
    fn directory(&mut self, path: &Path) -> Result<()>;
    /// Makes a file of that type and size; the same one for each name of it.
    fn like(&mut self, path: &Path, was: &FileIdentity) -> Result<()>;
    /// Makes a FIFO.
    fn fifo(&mut self, path: &Path, mode: u32) -> Result<()>;
    /// Makes what is there, a file or a directory, for it to be watched.
    fn watched(&mut self, path: &Path) -> Result<()>;
    /// Binds a datagram socket to an address.
    fn socket(&mut self, address: &[u8]) -> Result<()>;
    /// Whether the file of the job is of a hugetlbfs.
    fn is_of_huge_pages(&self, path: &Path) -> bool;
    /// The error that something has no copy.
    fn refusal(&self, object: String, reason: &str) -> Error;

    /// Makes the directory that a path is in.
    ///
    /// # Errors
    /// Where it cannot be made.
    fn parent(&mut self, path: &Path) -> Result<()> {
        path.parent()
            .map_or(Ok(()), |parent| self.directory(parent))
    }
}

/// What is asked of every kind. The defaults are those of a file without a name and without contents that belongs to the job.
pub trait OpenFile {
    /// Captures what is seen, if it is of this kind.
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

    /// What it is called in messages: its path, or what stands for one.
    fn label(&self) -> String {
        self.class().into()
    }

    /// What it is called in messages about its restore.
    fn object(&self) -> String {
        self.label()
    }

    /// What it is called in tables, where that says more.
    fn shown(&self) -> String {
        self.label()
    }

    /// Its offset in bytes, where it has one.
    fn offset(&self) -> Option<u64> {
        None
    }

    /// Where in the image its contents are, and their size in bytes.
    fn contents(&self) -> Option<(SpaceId, u64)> {
        None
    }

    /// What it needs of the machine that it is restored on.
    fn needs(&self, _flags: u32, _snapshot: &Snapshot) -> Vec<Need> {
        Vec::new()
    }

    /// Whether what it refers to is there, and its parts fit together; `number` is its index in the snapshot.
    fn check(&self, _number: usize, _snapshot: &Snapshot, _faults: &mut Faults) {}

    /// Calls `f` with every path that a restore uses.
    fn each_path(&mut self, _f: &mut dyn FnMut(&mut PathBuf)) {}

    /// Calls `f` with the index of every description that it refers to.
    fn each_reference(&self, _f: &mut dyn FnMut(usize)) {}

    /// Calls `f` with every inode number that a restore changes.
    fn each_inode(&mut self, _f: &mut dyn FnMut(&mut u64)) {}

    /// Takes out what a copy has otherwise by the way it is made (docs/limits.md).
    fn make_comparable(&mut self, _flags: &mut u32) {}

    /// Makes what a copy of the job opens in its place.
    ///
    /// # Errors
    /// Where there is no such thing.
    fn substitute(&mut self, _flags: &mut u32, _by: &mut dyn Substitutes) -> Result<()> {
        Ok(())
    }

    /// Whether a copy of the job opens the same paths as the job.
    fn keeps_paths(&self, _flags: u32) -> bool {
        false
    }

    /// Whether it leads to something that is there without the job.
    fn is_of_surroundings(&self) -> bool {
        false
    }

    /// Whether it shows who made it (fstat(2)), which a restore has to set.
    fn shows_maker(&self) -> bool {
        false
    }

    /// Which of its status flags are set by opening it.
    fn opened(&self) -> Opened {
        Opened::Plain
    }

    /// Why `--fd` cannot have another file in its place.
    fn not_replaceable(&self, _by: &Path) -> Option<Obstacle> {
        None
    }

    /// Whether it cannot be opened before there are other processes than the first one, `first`.
    fn is_late(&self, _first: Option<i32>) -> bool {
        false
    }

    /// Opens it at its number, or what stands in for it while it is late.
    ///
    /// # Errors
    /// What stands in the way.
    fn open(&self, place: &Place, plan: &mut Builder) -> Result<(), Vec<Obstacle>>;

    /// Opens what is late in a process that has it, as the lowest free number `at`.
    fn open_late(&self, _flags: u32, _at: i32, _process: &Process, _plan: &mut Builder) {}

    /// Makes what refers to other descriptions, with all of them open.
    fn complete(&self, _at: i32, _staging: Staging, _snapshot: &Snapshot, _plan: &mut Builder) {}

    /// Seals it, when every process has mapped it.
    fn seal(&self, _index: usize, _at: i32, _snapshot: &Snapshot, _plan: &mut Builder) {}
}

/// Records that are of a kind.
pub trait Record: Sized {
    /// The record, if it is of this kind.
    fn of(kind: &Kind) -> Option<&Self>;
    /// Likewise.
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
            /// What captures a description of each kind, in the order in which they are asked.
            const CAPTURES: &[fn(&kind::Sight, &mut Collector) -> kind::Captured] =
                &[$($(#[cfg($cfg)])? { <$record as kind::OpenFile>::capture },)+];

            /// The names behind `anon_inode:` that are of a kind.
            const ANON_INODES: &[fn() -> Option<&'static str>] =
                &[$($(#[cfg($cfg)])? { <$record as kind::OpenFile>::anon_inode },)+];

            /// What all kinds have in common.
            pub fn file(&self) -> &dyn kind::OpenFile {
                match self {
                    $($(#[cfg($cfg)])? Kind::$name(file) => file,)+
                }
            }

            /// Likewise.
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
    /// Whether files of that name behind `anon_inode:` are of a kind.
    pub(super) fn has_anon_inode(name: &str) -> bool {
        Self::ANON_INODES.iter().any(|of| of() == Some(name))
    }

    /// Captures what is seen; `None` where it is of no kind.
    pub(super) fn capture(sight: &Sight, collector: &mut Collector) -> Captured {
        Self::CAPTURES
            .iter()
            .find_map(|capture| capture(sight, collector))
    }

    /// The record, if it is of that kind.
    pub fn get<T: Record>(&self) -> Option<&T> {
        T::of(self)
    }

    /// Likewise.
    pub fn get_mut<T: Record>(&mut self) -> Option<&mut T> {
        T::of_mut(self)
    }

    /// What it is called in messages.
    pub fn label(&self) -> String {
        self.file().label()
    }
}
