//! Kernel objects: one file each, holding the object's record, how it is captured from a
//! frozen process and how it is rebuilt.
//!
//! A record is what the image keeps (CBOR, see docs/image-format.md). `capture` fills it from
//! outside or by remote calls; `rebuild` appends operations to a plan.

// A test executes code that it has made.
#![cfg_attr(not(test), forbid(unsafe_code))]

pub mod access;
pub mod address_space;
pub mod aio;
pub mod births;
pub mod bounds;
pub mod bundle;
pub mod cgroup;
pub mod clock;
pub mod core_scheduling;
pub mod credentials;
pub mod dispatch;
pub mod dynamic_state;
pub mod error;
pub mod files;
#[cfg(any(test, feature = "fixture"))]
pub mod fixture;
pub mod frames;
pub mod holes;
pub mod ipc;
pub mod job;
pub mod landlock;
pub mod limits;
pub mod memory;
pub mod memory_policy;
pub mod namespaces;
pub mod need;
pub mod open;
pub mod options;
pub mod outsiders;
pub mod plan;
pub mod process;
pub mod processor;
pub mod raw_path;
pub mod references;
pub mod rights;
pub mod save_files;
pub mod scheduling;
pub mod seccomp;
pub mod security;
pub mod segments;
pub mod session;
pub mod signals;
pub mod sockets;
pub mod source;
pub mod switches;
pub mod text;
pub mod thread;
pub mod timers;
pub mod uring;
pub mod vdso;
pub mod zombie;

pub use error::{Error, Obstacle, Result};

use serde::{Deserialize, Serialize};

/// Names a run of pages in the image: an address space, a shared memory object or the
/// contents of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SpaceId(pub u32);

/// The model of a frozen job: everything but the pages.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// What the job ran on.
    pub host: Host,
    /// Its processes; parents before their children, the root of the job first.
    pub processes: Vec<process::Process>,
    /// Processes that have ended and were not waited for.
    pub zombies: Vec<zombie::Zombie>,
    /// Open file descriptions, referred to by their index.
    pub descriptions: Vec<files::Description>,
    /// Terminals, referred to by their index.
    pub terminals: Vec<files::terminal::Terminal>,
    /// Files that are mapped, referred to by their index.
    pub mapped_files: Vec<memory::MappedFile>,
    /// Directories and the like without a name, referred to by their index.
    #[serde(default)]
    pub removed: Vec<files::removed::Removed>,
    /// Shared anonymous memory, referred to by its index.
    pub shared_memory: Vec<memory::SharedMemory>,
    /// Objects of the IPC namespace.
    #[serde(default)]
    pub ipc: ipc::Ipc,
    /// Files that are in the image as well.
    #[serde(default)]
    pub bundle: Vec<bundle::Bundled>,
    /// Control groups with their settings, a hierarchy each.
    #[serde(default)]
    pub cgroups: Vec<cgroup::settings::Hierarchy>,
    /// Namespaces that the job had to itself.
    #[serde(default)]
    pub namespaces: namespaces::Namespaces,
}

impl Snapshot {
    /// Whether a process with this pid is of the job, or has been and is a zombie.
    pub fn knows(&self, pid: i32) -> bool {
        let zombie = || self.zombies.iter().any(|z| z.pid == pid);
        self.processes.iter().any(|p| p.pid == pid) || zombie()
    }

    /// Whether a process does at a restore what the one with this pid did: itself, and the first one for zombies.
    pub fn acts_for(&self, process: &process::Process, pid: i32) -> bool {
        let first = self.processes.first().map(|p| p.pid);
        let zombie = || self.zombies.iter().any(|z| z.pid == pid);
        pid == process.pid || first == Some(process.pid) && zombie()
    }

    /// How many seccomp filters of its surroundings the job was under.
    pub fn filters_around(&self) -> u32 {
        let threads = self.processes.iter().flat_map(|p| &p.threads);
        threads.map(|t| t.seccomp.around).max().unwrap_or(0)
    }

    /// In a user namespace in which groups are fixed, all tasks have those of whoever made it; most of
    /// them have no number inside.
    pub fn show_groups(&mut self, groups: &[u32]) {
        if self
            .namespaces
            .user
            .as_ref()
            .is_some_and(|u| u.groups_are_fixed)
        {
            let threads = self.processes.iter_mut().flat_map(|p| &mut p.threads);
            threads.for_each(|thread| thread.credentials.groups = groups.to_vec());
        }
    }
}

/// What the job ran on, and how the checkpoint was taken.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// `uname -r`.
    pub kernel: String,
    /// `uname -n`.
    pub name: String,
    /// The vDSO's bytes, empty where there is none.
    #[serde(with = "serde_bytes", default)]
    pub vdso: Vec<u8>,
    /// Size of the xsave area that threads were captured with, in bytes.
    #[serde(deserialize_with = "bounds::state")]
    pub xstate_size: u32,
    /// `XCR0`: the state components that the processor had enabled.
    pub xcr0: u64,
    /// `CLOCK_MONOTONIC` at the checkpoint as the job saw it, nanoseconds.
    #[serde(deserialize_with = "bounds::clock")]
    pub monotonic_ns: u64,
    /// `CLOCK_BOOTTIME` at the checkpoint as the job saw it, nanoseconds.
    #[serde(deserialize_with = "bounds::clock")]
    pub boottime_ns: u64,
    /// `CLOCK_MONOTONIC_RAW` at the checkpoint as the job saw it, nanoseconds; 0 is not known.
    #[serde(default, deserialize_with = "bounds::clock")]
    pub monotonic_raw_ns: u64,
    /// `CLOCK_REALTIME` at the checkpoint, nanoseconds since 1970.
    #[serde(deserialize_with = "bounds::clock")]
    pub realtime_ns: u64,
    /// What the processor told programs of itself.
    #[serde(default)]
    pub processor: processor::Processor,
    /// What of it the job was started to use, if not all.
    #[serde(default)]
    pub baseline: Option<processor::Baseline>,
    /// All programs were started with `LD_BIND_NOW` (ld.so(8)).
    #[serde(default)]
    pub binds_at_once: bool,
    /// The command line that took the checkpoint.
    #[serde(default)]
    pub command: Vec<String>,
}
