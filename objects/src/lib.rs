//! Kernel objects: one module for each, with its record, its capture from a frozen process and its restoration.
//!
//! A record is what the image stores (CBOR, see docs/image-format.md). `capture` fills it from outside or by remote
//! calls; `rebuild` appends operations to a plan.

// One test executes generated code.
#![cfg_attr(not(test), forbid(unsafe_code))]

pub mod access;
pub mod address_space;
pub mod aio;
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
pub mod findings;
#[cfg(any(test, feature = "fixture"))]
pub mod fixture;
pub mod frames;
pub mod holes;
pub mod index;
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
pub mod process_tree;
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
pub mod thread;
pub mod timers;
pub mod uring;
pub mod vdso;
pub mod zombie;

pub use ckpt_sys::text;
pub use error::{Error, Obstacle, Result};
pub use findings::Findings;

use serde::{Deserialize, Serialize};

/// Identifies a sequence of pages in the image: an address space, a shared memory object or the contents of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SpaceId(pub u32);

/// The model of a frozen job: everything except pages.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The host of the checkpoint.
    pub host: Host,
    /// Its processes; parents before their children, the root of the job first.
    pub processes: Vec<process::Process>,
    /// Its zombies.
    pub zombies: Vec<zombie::Zombie>,
    /// Open file descriptions, referred to by their index.
    pub descriptions: Vec<files::Description>,
    /// Terminals, referred to by their index.
    pub terminals: Vec<files::terminal::Terminal>,
    /// Mapped files, referred to by their index.
    pub mapped_files: Vec<memory::MappedFile>,
    /// Directories and the like without a name, referred to by their index.
    #[serde(default)]
    pub removed: Vec<files::removed::Removed>,
    /// Shared anonymous memory, referred to by its index.
    pub shared_memory: Vec<memory::SharedMemory>,
    /// Objects of the IPC namespace.
    #[serde(default)]
    pub ipc: ipc::Ipc,
    /// Files stored in the image too.
    #[serde(default)]
    pub bundle: Vec<bundle::Bundled>,
    /// Control groups with their settings, one entry for each hierarchy.
    #[serde(default)]
    pub cgroups: Vec<cgroup::settings::Hierarchy>,
    /// Namespaces of the job's own.
    #[serde(default)]
    pub namespaces: namespaces::Namespaces,
}

impl Snapshot {
    /// Whether the process with this pid belongs to the job, as a live process or a zombie.
    pub fn knows(&self, pid: i32) -> bool {
        let zombie = || self.zombies.iter().any(|z| z.pid == pid);
        self.processes.iter().any(|p| p.pid == pid) || zombie()
    }

    /// Whether a process acts at a restore for the one with this pid: for itself, and the first one also for zombies.
    pub fn acts_for(&self, process: &process::Process, pid: i32) -> bool {
        let first = self.processes.first().map(|p| p.pid);
        let zombie = || self.zombies.iter().any(|z| z.pid == pid);
        pid == process.pid || first == Some(process.pid) && zombie()
    }

    /// Number of inherited seccomp filters of the job's surroundings.
    pub fn filters_around(&self) -> u32 {
        let threads = self.processes.iter().flat_map(|p| &p.threads);
        threads.map(|t| t.seccomp.around).max().unwrap_or(0)
    }

    /// In a user namespace with setgroups(2) denied, all tasks have the groups of its creator, most of which are not
    /// mapped inside.
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

/// The host of the checkpoint, and how it was taken.
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
    /// `CLOCK_MONOTONIC_RAW` at the checkpoint as the job saw it, nanoseconds; 0 if unknown.
    #[serde(default, deserialize_with = "bounds::clock")]
    pub monotonic_raw_ns: u64,
    /// `CLOCK_REALTIME` at the checkpoint, nanoseconds since 1970.
    #[serde(deserialize_with = "bounds::clock")]
    pub realtime_ns: u64,
    /// The processor as programs see it.
    #[serde(default)]
    pub processor: processor::Processor,
    /// The baseline for which the job was started, if any.
    #[serde(default)]
    pub baseline: Option<processor::Baseline>,
    /// All programs were started with `LD_BIND_NOW` (ld.so(8)).
    #[serde(default)]
    pub binds_at_once: bool,
    /// The command line that took the checkpoint.
    #[serde(default)]
    pub command: Vec<String>,
}
