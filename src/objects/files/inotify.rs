//! inotify(7).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Watches on files and directories.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inotify {
    /// The watches, by ascending descriptor.
    pub watches: Vec<Watch>,
}

/// One watch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// The number that the program knows it by.
    pub wd: i32,
    /// `IN_*`.
    pub mask: u32,
    /// What is watched.
    pub path: PathBuf,
}
