//! An image becomes a running job: the plan, and its execution.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::progress::Progress;

pub mod plan;

/// What to do with files that are not as they were at the checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FilesPolicy {
    /// Refuse, naming the file and what changed.
    #[default]
    Strict,
    /// Take what is there.
    Adopt,
}

/// A wish for a restore.
pub struct Request<'a> {
    /// The image.
    pub image: &'a Path,
    /// About changed files.
    pub files: FilesPolicy,
    /// Descriptors that get another file than they had (`--fd N=PATH`).
    pub fds: BTreeMap<i32, PathBuf>,
    /// Leave the job stopped, for a debugger.
    pub stopped: bool,
    /// Who is told how far it is.
    pub progress: &'a dyn Progress,
}

/// A restored job: its root is a child of the caller.
#[derive(Debug)]
pub struct Restored {
    /// The root's pid.
    pub pid: i32,
    /// What could not be brought back exactly, without harm to the job (a hard limit, say);
    /// one sentence each.
    pub warnings: Vec<String>,
}

impl Restored {
    /// Waits for the root's end; its exit code, or 128 plus the signal that ended it. Signals
    /// that the caller gets meanwhile are not passed on here; see `supervise`.
    pub fn wait(self) -> Result<i32> {
        let _ = self.pid;
        Err(crate::Error::Restore("not built yet".into()))
    }
}

/// The plan as text, one operation a line. Touches nothing.
pub fn dry_run(request: &Request<'_>) -> Result<String> {
    let _ = request;
    Err(crate::Error::Restore("not built yet".into()))
}

/// Restores. On error no process is left behind.
pub fn restore(request: &Request<'_>) -> Result<Restored> {
    let _ = request;
    Err(crate::Error::Restore("not built yet".into()))
}
