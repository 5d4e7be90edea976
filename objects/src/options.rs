//! The options of a restore that concern single objects.

use std::collections::BTreeMap;
use std::path::PathBuf;

use ckpt_tracer::Pid;

/// What to do with files that have changed since the checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FilesPolicy {
    /// Refuse, and name the file and the change.
    #[default]
    Strict,
    /// Use the present file.
    Adopt,
    /// Refuse, but truncate files that the job writes to their size at the checkpoint.
    Truncate,
}

/// The options of one restore.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// For changed files.
    pub files: FilesPolicy,
    /// Descriptors that get another file (`--fd N=PATH`).
    pub fds: BTreeMap<i32, PathBuf>,
    /// Processes that will have ended when the job is restored: pids, names and objects that they hold count as free.
    /// For checks before a job is ended, never for a restore.
    pub leaving: Vec<Pid>,
}
