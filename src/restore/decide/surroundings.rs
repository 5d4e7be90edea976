//! Requirements on the machine and its user, checked before anything is created.

use std::collections::BTreeMap;
use std::path::Path;

use ckpt_tracer::capabilities::Use;
use ckpt_tracer::features::KernelFeatures;
use nix::unistd::AccessFlags;

use crate::error::Obstacle;
use crate::objects::access::{MISSING, may};
use crate::objects::files::procfs;
use crate::objects::index::FileId;
use crate::objects::memory::{Backing, Mapping, MappingFlags};
use crate::objects::process::Process;
use crate::objects::{Snapshot, aio};
use crate::restore::run::next_pid;
use crate::text::Shown;

/// All such obstacles to a restore, except open and mapped files. Limited resources of a job that is `leaving` will
/// be free.
pub fn in_the_way(snapshot: &Snapshot, kernel: &KernelFeatures, leaving: bool) -> Vec<Obstacle> {
    let mut obstacles: Vec<Obstacle> = programs(snapshot).collect();
    obstacles.extend(directories(snapshot, kernel));
    let missing = kernel_needs(snapshot)
        .into_iter()
        .filter(|need| !(need.available)(kernel));
    obstacles.extend(missing.map(|need| need.missing()));
    obstacles.extend(aio::in_the_way(snapshot, leaving));
    if leaving {
        return obstacles;
    }
    let pools = huge_pages(snapshot);
    obstacles.extend(
        pools
            .iter()
            .filter_map(|(size, bytes)| pool_too_small(*size, *bytes)),
    );
    obstacles
}

fn programs(snapshot: &Snapshot) -> impl Iterator<Item = Obstacle> {
    let mut files: Vec<FileId> = snapshot
        .processes
        .iter()
        .map(|p| p.memory.executable)
        .collect();
    files.sort_unstable();
    files.dedup();
    let files = files.into_iter().map(|file| &snapshot.mapped_files[file]);
    let named = files.filter(|file| file.contents.is_none() && file.path.exists());
    named.filter_map(|file| {
        let error = may(&file.path, AccessFlags::X_OK).err()?;
        let object = format!("the program {}", file.path.shown());
        let reason = format!("cannot be executed: {}", error.desc());
        Some(Obstacle::new(
            object,
            reason,
            "make it executable for you, or restore as root",
        ))
    })
}

/// Working and root directories, each once.
fn directories(snapshot: &Snapshot, kernel: &KernelFeatures) -> Vec<Obstacle> {
    let mut obstacles = Vec::new();
    let mut seen: Vec<&Path> = Vec::new();
    for process in snapshot.processes.iter().filter(|p| !p.shares.fs) {
        for (what, path, removed) in [
            ("the working directory", &process.cwd, process.removed.cwd),
            ("the root directory", &process.root, process.removed.root),
        ] {
            if removed.is_some() || seen.contains(&path.as_path()) {
                continue;
            }
            seen.push(path);
            if !procfs::is_of_job(path, snapshot) {
                obstacles.extend(directory(what, path));
            }
        }
    }
    let changed = |p: &&Process| p.root != Path::new("/");
    if let Some(process) = snapshot.processes.iter().find(changed)
        && !kernel.capabilities.allows(Use::RootDirectory)
    {
        obstacles.push(Obstacle::new(
            format!("the root directory {}", process.root.shown()),
            format!("cannot be changed to: that needs {}", Use::RootDirectory),
            "run restore as root, or in a user namespace",
        ));
    }
    obstacles
}

fn directory(what: &str, path: &Path) -> Option<Obstacle> {
    let object = format!("{what} {}", path.shown());
    let reason = match std::fs::metadata(path) {
        Ok(meta) if meta.is_dir() => match may(path, AccessFlags::X_OK) {
            Ok(()) => return None,
            Err(e) => format!("cannot be entered: {}", e.desc()),
        },
        Ok(_) => "is no directory any more".into(),
        Err(e) => format!("cannot be entered: {e}"),
    };
    Some(Obstacle::new(object, reason, MISSING))
}

/// A kernel feature that the job requires.
pub struct KernelNeed {
    /// The feature, and the first kernel with it.
    pub feature: &'static str,
    /// The part of the job that requires it.
    pub what: &'static str,
    available: fn(&KernelFeatures) -> bool,
}

impl KernelNeed {
    fn missing(&self) -> Obstacle {
        let reason = format!("needs {}, which this kernel does not have", self.feature);
        Obstacle::new(
            format!("the job's {}", self.what),
            reason,
            "restore it on a newer kernel",
        )
    }
}

/// Kernel features that this job requires and that are not universal.
pub fn kernel_needs(snapshot: &Snapshot) -> Vec<KernelNeed> {
    let any = |is: fn(&Mapping) -> bool| {
        let mut mappings = snapshot.processes.iter().flat_map(|p| &p.memory.mappings);
        mappings.any(is)
    };
    let mut needs = vec![KernelNeed {
        feature: "clone3 with set_tid (Linux 5.5)",
        what: "pids",
        available: |kernel| kernel.clone3 || next_pid::can_be_awaited(),
    }];
    if any(|m| !m.guards.is_empty()) {
        needs.push(KernelNeed {
            feature: "MADV_GUARD_INSTALL (Linux 6.13)",
            what: "guard pages",
            available: |kernel| kernel.guard_install,
        });
    }
    if any(|m| m.flags.contains(MappingFlags::SEALED) && !matches!(m.backing, Backing::Kernel(_))) {
        needs.push(KernelNeed {
            feature: "mseal (Linux 6.10)",
            what: "sealed mappings",
            available: |kernel| kernel.mseal,
        });
    }
    let threads = snapshot.processes.iter().flat_map(|p| &p.threads);
    let dispatches: Vec<_> = threads.filter_map(|t| t.dispatch).collect();
    if !dispatches.is_empty() {
        needs.push(KernelNeed {
            feature: "PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG (Linux 6.4)",
            what: "syscall user dispatch",
            available: |kernel| kernel.version() >= (6, 4),
        });
    }
    if dispatches.iter().any(|d| d.is_inclusive()) {
        needs.push(KernelNeed {
            feature: "PR_SYS_DISPATCH_INCLUSIVE_ON (Linux 6.17)",
            what: "syscall user dispatch",
            available: |kernel| kernel.version() >= (6, 17),
        });
    }
    needs
}

/// Bytes of huge pages that the job maps, by page size.
pub fn huge_pages(snapshot: &Snapshot) -> BTreeMap<u64, u64> {
    let mut pools = BTreeMap::new();
    // A fork does not reserve any.
    let processes = snapshot.processes.iter().filter(|p| !p.forked);
    for mapping in processes.flat_map(|p| &p.memory.mappings) {
        let reserved = !mapping.flags.contains(MappingFlags::NO_RESERVE);
        if let Backing::AnonymousHuge { page_size } = mapping.backing
            && reserved
        {
            *pools.entry(page_size).or_default() += mapping.end - mapping.start;
        }
    }
    for object in snapshot
        .shared_memory
        .iter()
        .filter(|o| o.huge_page_size != 0)
    {
        *pools.entry(object.huge_page_size).or_default() += object.mapped_len();
    }
    pools
}

fn pool_too_small(page_size: u64, bytes: u64) -> Option<Obstacle> {
    let (wanted, free) = (bytes / page_size, free_huge_pages(page_size)?);
    (free < wanted).then(|| {
        let kib = page_size / 1024;
        Obstacle::new(
            format!("the job's memory of huge pages of {kib} KiB"),
            format!("needs {wanted} of them, and {free} are free"),
            format!("raise /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages"),
        )
    })
}

/// Huge pages available for a new mapping (Documentation/admin-guide/mm/hugetlbpage.rst); `None` if the kernel does
/// not show them.
fn free_huge_pages(page_size: u64) -> Option<u64> {
    let directory = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page_size / 1024);
    let number = |name: &str| {
        let text = std::fs::read_to_string(format!("{directory}/{name}"));
        text.ok()?.trim().parse::<u64>().ok()
    };
    let may_come = number("nr_overcommit_hugepages")?.saturating_sub(number("surplus_hugepages")?);
    Some(number("free_hugepages")?.saturating_sub(number("resv_hugepages")?) + may_come)
}
