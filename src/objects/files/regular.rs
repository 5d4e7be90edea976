//! Regular files, directories and `O_PATH` handles.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::objects::SpaceId;
use crate::objects::memory::FileIdentity;

/// A file with a name, or one that had one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Regular {
    /// Where it was, or is.
    pub path: PathBuf,
    /// What it was.
    pub identity: FileIdentity,
    /// Offset in bytes (for a directory, the file system's cookie).
    pub offset: u64,
    /// Its contents in the image, where no name leads to it any more.
    pub contents: Option<SpaceId>,
    /// Locks held through this description, or by the process on this file.
    pub locks: Vec<Lock>,
}

/// A file lock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lock {
    /// flock(2), POSIX or OFD (fcntl(2)).
    pub kind: LockKind,
    /// For writing.
    pub exclusive: bool,
    /// First byte.
    pub start: u64,
    /// Bytes; 0 up to the end of the file.
    pub len: u64,
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
}
