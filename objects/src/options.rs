//! What a restore is asked for, as far as single objects heed it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use ckpt_tracer::Pid;

/// What to do with files that are not as they were at the checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FilesPolicy {
    /// Refuse, naming the file and what changed.
    #[default]
    Strict,
    /// Take what is there.
    Adopt,
    /// As strict, and files that the job writes lose what was appended after the checkpoint.
    Truncate,
}

/// The options of one restore.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// About changed files.
    pub files: FilesPolicy,
    /// Descriptors that get another file than they had (`--fd N=PATH`).
    pub fds: BTreeMap<i32, PathBuf>,
    /// Processes that have the job's state now and will have ended when it is restored: pids, names and
    /// objects that they hold count as free. For questions before a job is ended, never for a restore.
    pub leaving: Vec<Pid>,
}
