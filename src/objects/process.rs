//! One process: what its threads share.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::address_space::AddressSpace;
use super::files::FdEntry;
use super::limits::Limit;
use super::signals::{Action, Pending};
use super::thread::Thread;
use super::timers::{IntervalTimers, PosixTimer};

/// A process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Its parent's id; 0 when the parent is not part of what it can see.
    pub parent: i32,
    /// Process group.
    pub group: i32,
    /// Session.
    pub session: i32,
    /// It was stopped (by a signal) when the checkpoint began.
    pub stopped: bool,
    /// Command line, `\0` after each argument.
    #[serde(with = "serde_bytes")]
    pub command_line: Vec<u8>,
    /// Memory.
    pub memory: AddressSpace,
    /// Threads; the first one is the leader.
    pub threads: Vec<Thread>,
    /// Actions that are not the default.
    pub actions: Vec<Action>,
    /// Signals waiting for the process.
    pub pending: Vec<Pending>,
    /// Interval timers.
    pub interval_timers: IntervalTimers,
    /// POSIX timers, by ascending id.
    pub posix_timers: Vec<PosixTimer>,
    /// Descriptors, ascending.
    pub fds: Vec<FdEntry>,
    /// Current directory.
    pub cwd: PathBuf,
    /// Root directory.
    pub root: PathBuf,
    /// umask(2).
    pub umask: u32,
    /// Limits.
    pub limits: Vec<Limit>,
    /// personality(2).
    pub personality: u32,
    /// `PR_GET_CHILD_SUBREAPER`.
    pub child_subreaper: bool,
    /// `/proc/PID/oom_score_adj`.
    pub oom_score_adj: i32,
    /// `/proc/PID/coredump_filter`.
    pub coredump_filter: Option<u32>,
}
