//! Restores mappings.

use ckpt_tracer::Result;
use ckpt_tracer::capabilities::Use;
use ckpt_tracer::proc::maps::{Vma, VmaName};
use ckpt_tracer::remote::RemoteCalls;

use super::{Backing, Inherited, KernelMapping, Mapping, MappingFlags, SharedMemory, subtract};
use crate::error::Obstacle;
use crate::index::SharedId;
use crate::plan::Builder;
use crate::{Snapshot, files, memory_policy};

/// Addresses at which whole shared memory objects are mapped while they are filled; `None` for those that neither the
/// process nor its forks map.
pub type SharedAt = Vec<Option<u64>>;

/// Memory that exists when a forked process begins to rebuild its own.
#[derive(Clone, Copy, Debug, Default)]
pub struct Forked<'a> {
    /// The parent's mappings.
    pub parent: &'a [Mapping],
    /// The inherited parts.
    pub inherited: &'a [Inherited],
    /// The parent was forked itself: protections and memory policies are those of the ancestor that mapped the memory.
    pub again: bool,
}

impl Forked<'_> {
    fn ranges(&self) -> Vec<(u64, u64)> {
        self.inherited.iter().map(|i| (i.start, i.end)).collect()
    }

    /// Inherited parts of a mapping.
    fn within<'a>(&'a self, m: &Mapping) -> impl Iterator<Item = &'a Inherited> {
        let (start, end) = (m.start, m.end);
        let from = self.inherited.partition_point(|i| i.end <= start);
        self.inherited[from..]
            .iter()
            .take_while(move |i| i.start < end)
    }
}

impl Mapping {
    fn object(&self) -> String {
        format!("memory {:#x}-{:#x}", self.start, self.end)
    }

    fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Read-only private memory that is accounted was writable once; it is mapped writable and protected afterwards,
    /// which has the same effect.
    fn mapped_prot(&self) -> u64 {
        let write = libc::PROT_WRITE as u32;
        let once_writable = self.flags.contains(MappingFlags::ACCOUNTED)
            && self.prot & write == 0
            && matches!(
                self.backing,
                Backing::Anonymous | Backing::PrivateFile { .. }
            );
        u64::from(if once_writable {
            self.prot | write
        } else {
            self.prot
        })
    }

    /// The protection key that the program assigned, 0 for none; the key of an execute-only mapping is the kernel's.
    fn given_key(&self) -> u32 {
        if self.prot == libc::PROT_EXEC as u32 {
            0
        } else {
            self.protection_key
        }
    }

    /// Further `MAP_*` flags.
    fn map_flags(&self) -> i32 {
        let mut flags = libc::MAP_FIXED_NOREPLACE;
        let table = [
            (MappingFlags::GROWS_DOWN, libc::MAP_GROWSDOWN),
            (MappingFlags::NO_RESERVE, libc::MAP_NORESERVE),
        ];
        for (flag, map) in table {
            if self.flags.contains(flag) {
                flags |= map;
            }
        }
        flags
    }

    fn mmap_args(&self, flags: i32, fd: i64, offset: u64) -> [u64; 6] {
        [
            self.start,
            self.len(),
            self.mapped_prot(),
            (flags | self.map_flags()) as u64,
            fd as u64,
            offset,
        ]
    }

    /// Maps private anonymous memory without contents, by calls in the task itself.
    pub fn map_empty(&self, calls: &mut RemoteCalls<'_>) -> Result<()> {
        let args = self.mmap_args(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
        calls.call("mmap", libc::SYS_mmap, args)?;
        for advice in self.huge_advice() {
            let args = [self.start, self.len(), advice, 0, 0, 0];
            // May fail as in a plan, if the kernel has no huge pages.
            let _ = calls.call("madvise", libc::SYS_madvise, args);
        }
        if self.mapped_prot() != u64::from(self.prot) {
            let args = [self.start, self.len(), self.prot.into(), 0, 0, 0];
            calls.call("mprotect", libc::SYS_mprotect, args)?;
        }
        Ok(())
    }

    fn map(&self, flags: i32, fd: i64, offset: u64, plan: &mut Builder) {
        let args = self.mmap_args(flags, fd, offset);
        plan.expect(libc::SYS_mmap, &args, self.start, || self.object());
        // Before the pages are filled, which are then huge or not.
        self.advise_huge(plan);
        // Before the pages are filled, which are then allocated on its nodes.
        if self.policy.is_some() {
            self.rebuild_policy(plan);
        }
    }

    /// Advises huge pages on or off; the kernel may not support them.
    pub(crate) fn advise_huge(&self, plan: &mut Builder) {
        for advice in self.huge_advice() {
            let args = [self.start, self.len(), advice];
            plan.attempt(libc::SYS_madvise, &args, || self.object());
        }
    }

    /// The `MADV_*` values for huge pages.
    fn huge_advice(&self) -> impl Iterator<Item = u64> {
        let flags = self.flags;
        let all = [
            (MappingFlags::HUGE, libc::MADV_HUGEPAGE),
            (MappingFlags::NO_HUGE, libc::MADV_NOHUGEPAGE),
        ];
        let given = all
            .into_iter()
            .filter(move |(flag, _)| flags.contains(*flag));
        given.map(|(_, advice)| advice as u64)
    }
}

/// Unmaps everything in the new process and moves the kernel's mappings to the job's addresses. Ranges in `keep`
/// (ascending) stay.
pub fn clear_and_move(
    mappings: &[Mapping],
    present: &[Vma],
    keep: &[(u64, u64)],
    hole: u64,
    plan: &mut Builder,
) -> std::result::Result<(), Box<Obstacle>> {
    let kind = KernelMapping::of;
    for vma in present
        .iter()
        .filter(|v| kind(v).is_none() && v.name != VmaName::Vsyscall)
    {
        for (start, end) in subtract(&[(vma.start, vma.end)], keep) {
            plan.syscall(libc::SYS_munmap, &[start, end - start], || {
                "the address space of the new process".into()
            });
        }
    }
    let kernels: Vec<&Vma> = present.iter().filter(|v| kind(v).is_some()).collect();
    let wanted = |v: &Vma| {
        mappings
            .iter()
            .find(|m| kind(v).is_some_and(|k| m.backing == Backing::Kernel(k)))
    };
    for m in mappings {
        if let Backing::Kernel(k) = m.backing
            && !kernels
                .iter()
                .any(|v| kind(v) == Some(k) && v.len() == m.len())
        {
            return Err(Box::new(Obstacle::without_remedy(
                m.object(),
                format!("is the kernel's {k:?}, which this kernel does not have in that size"),
            )));
        }
    }
    // Through a free range if any of them overlaps a target.
    let crowded = kernels.iter().any(|v| {
        mappings
            .iter()
            .any(|m| matches!(m.backing, Backing::Kernel(_)) && m.start < v.end && v.start < m.end)
    });
    let mut at: Vec<u64> = kernels.iter().map(|v| v.start).collect();
    let steps = if crowded { 2 } else { 1 };
    for step in 0..steps {
        let mut aside = hole;
        for (i, vma) in kernels.iter().enumerate() {
            let object = || format!("the kernel's {}", kind(vma).map_or("", |k| k.label()));
            let Some(m) = wanted(vma) else {
                if step == 0 {
                    plan.syscall(libc::SYS_munmap, &[vma.start, vma.len()], object);
                }
                continue;
            };
            let to = if step + 1 == steps { m.start } else { aside };
            aside += vma.len();
            if to != at[i] {
                let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
                let args = [at[i], vma.len(), vma.len(), flags, to];
                plan.expect(libc::SYS_mremap, &args, to, object);
                at[i] = to;
            }
        }
    }
    Ok(())
}

impl KernelMapping {
    /// The kind of a mapping.
    pub fn of(vma: &Vma) -> Option<Self> {
        match vma.name {
            VmaName::Vdso => Some(KernelMapping::Vdso),
            VmaName::Vvar => Some(KernelMapping::Vvar),
            VmaName::VvarVclock => Some(KernelMapping::VvarVclock),
            _ => None,
        }
    }

    /// Its name in `/proc/PID/maps`.
    pub fn label(self) -> &'static str {
        match self {
            KernelMapping::Vdso => "[vdso]",
            KernelMapping::Vvar => "[vvar]",
            KernelMapping::VvarVclock => "[vvar_vclock]",
        }
    }
}

/// Maps everything, so that pages can be filled.
pub fn map_all(
    mappings: &[Mapping],
    snapshot: &Snapshot,
    staging: files::Staging,
    shared_at: &SharedAt,
    forked: Forked<'_>,
    plan: &mut Builder,
) {
    let there = forked.ranges();
    let missing = mappings.iter().flat_map(|m| {
        let pieces = subtract(&[(m.start, m.end)], &there);
        pieces.into_iter().map(|(start, end)| m.part(start, end))
    });
    // The policy of an object comes last: children would have their mappings divided as this process has them.
    let missing = missing.map(|m| Mapping {
        policy: (m.policy.clone()).filter(|_| policy_object(&m, snapshot).is_none()),
        ..m
    });
    for m in missing {
        match &m.backing {
            Backing::Anonymous => {
                let droppable = m.flags.contains(MappingFlags::DROPPABLE);
                let kind = if droppable {
                    MAP_DROPPABLE
                } else {
                    libc::MAP_PRIVATE
                };
                m.map(kind | libc::MAP_ANONYMOUS, -1, 0, plan);
            }
            Backing::AnonymousHuge { page_size } => {
                let size = page_size.trailing_zeros() << libc::MAP_HUGE_SHIFT;
                let huge = libc::MAP_HUGETLB | size as i32;
                m.map(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | huge, -1, 0, plan);
            }
            Backing::PrivateFile { file, offset } => {
                let fd = staging.mapped_file(*file, false).into();
                m.map(libc::MAP_PRIVATE, fd, *offset, plan);
            }
            Backing::SharedFile {
                file,
                offset,
                writable,
            } => {
                let fd = staging.mapped_file(*file, *writable).into();
                let kind = match m.flags.contains(MappingFlags::SYNC) {
                    true => libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC,
                    false => libc::MAP_SHARED,
                };
                m.map(kind, fd, *offset, plan);
            }
            Backing::Description {
                description,
                offset,
                private,
            } => {
                let how = if *private {
                    libc::MAP_PRIVATE
                } else {
                    libc::MAP_SHARED
                };
                m.map(how, staging.of(*description).into(), *offset, plan);
            }
            // Segments are attached by shmat(2), rings are created with their contexts.
            Backing::SharedMemory { .. }
            | Backing::SysV { .. }
            | Backing::AioRing(_)
            | Backing::Kernel(_) => {}
        }
    }
    // A forked process inherits them from its parent.
    if forked.parent.is_empty() {
        map_shared(snapshot, shared_at, plan);
    }
}

/// Maps whole shared memory objects, to be filled.
fn map_shared(snapshot: &Snapshot, shared_at: &SharedAt, plan: &mut Builder) {
    let no_reserve = |index: SharedId| {
        let mut mappings = snapshot.processes.iter().flat_map(|p| &p.memory.mappings);
        mappings.any(|m| {
            m.flags.contains(MappingFlags::NO_RESERVE)
                && matches!(m.backing, Backing::SharedMemory { object, .. } if object == index)
        })
    };
    for ((index, object), at) in SharedId::each(&snapshot.shared_memory).zip(shared_at) {
        let Some(at) = at else { continue };
        let mut flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        if object.huge_page_size != 0 {
            flags |= libc::MAP_HUGETLB
                | (object.huge_page_size.trailing_zeros() << libc::MAP_HUGE_SHIFT) as i32;
        } else if no_reserve(index) {
            flags |= libc::MAP_NORESERVE;
        }
        let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let (len, staged) = (object.mapped_len(), object.staged_len());
        let args = [*at, len, prot, flags as u64, u64::MAX, 0];
        plan.expect(libc::SYS_mmap, &args, *at, || "shared memory".into());
        if staged > len {
            // Grown in place; the object keeps its size.
            plan.expect(libc::SYS_mremap, &[*at, len, staged, 0], *at, || {
                "shared memory beyond its end".into()
            });
        }
    }
}

impl SharedMemory {
    /// Bytes of the object, whole pages.
    pub fn mapped_len(&self) -> u64 {
        let page = self.huge_page_size.max(4096);
        self.size.checked_next_multiple_of(page).unwrap_or(u64::MAX)
    }

    /// Bytes to map so that every mapping of it is a part.
    pub fn staged_len(&self) -> u64 {
        self.mapped_len().max(self.reach)
    }
}

/// Moves filled shared memory to its addresses.
pub fn place_shared(
    mappings: &[Mapping],
    objects: &[SharedMemory],
    shared_at: &SharedAt,
    forked: Forked<'_>,
    plan: &mut Builder,
) {
    let there = forked.ranges();
    for m in mappings {
        let Backing::SharedMemory { object, .. } = m.backing else {
            continue;
        };
        let Some(at) = shared_at[object.0] else {
            continue;
        };
        for (start, end) in subtract(&[(m.start, m.end)], &there) {
            let part = m.part(start, end);
            let Backing::SharedMemory { offset, .. } = part.backing else {
                continue;
            };
            // An old length of 0 makes another mapping of shared pages (mremap(2)). Huge pages can only be moved
            // (`resize_is_valid`, mm/mremap.c), which suffices for one mapping.
            let moved = objects[object.0].huge_page_size != 0;
            let old = if moved { part.len() } else { 0 };
            let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
            let args = [at + offset, old, part.len(), flags, part.start];
            plan.expect(libc::SYS_mremap, &args, part.start, || part.object());
            part.advise_huge(plan);
        }
    }
}

/// Drops inherited pages that the process did not have.
pub fn drop_pages(pages: &[(u64, u64)], plan: &mut Builder) {
    for (start, end) in pages {
        let args = [*start, end - start, libc::MADV_DONTNEED as u64];
        plan.syscall(libc::SYS_madvise, &args, || {
            "pages that only the parent has".into()
        });
    }
}

/// The object whose policy a mapping has.
fn policy_object(m: &Mapping, snapshot: &Snapshot) -> Option<((u8, usize), u64)> {
    memory_policy::object(&m.backing, &snapshot.descriptions, &snapshot.mapped_files)
}

/// Sets protections and advice, after all pages are filled and all forks made.
pub fn finish(
    mappings: &[Mapping],
    snapshot: &Snapshot,
    shared_at: &SharedAt,
    forked: Forked<'_>,
    plan: &mut Builder,
) {
    for (object, at) in snapshot.shared_memory.iter().zip(shared_at) {
        let Some(at) = at else { continue };
        plan.syscall(libc::SYS_munmap, &[*at, object.staged_len()], || {
            "shared memory".into()
        });
    }
    let mut all = snapshot.processes.iter().flat_map(|p| &p.memory.mappings);
    let policies = forked.again && all.any(|m| m.policy.is_some());
    for m in mappings {
        let shared = matches!(m.backing, Backing::SharedMemory { .. })
            || forked.within(m).any(|i| {
                forked.again || forked.parent[i.parent].mapped_prot() != u64::from(m.prot)
            });
        if m.given_key() != 0 {
            let args = [m.start, m.len(), m.prot.into(), m.given_key().into()];
            plan.syscall(libc::SYS_pkey_mprotect, &args, || m.object());
        } else if shared || m.mapped_prot() != u64::from(m.prot) {
            let args = [m.start, m.len(), m.prot.into()];
            plan.syscall(libc::SYS_mprotect, &args, || m.object());
        }
        // Mappings that are a process's own have it since they were mapped.
        let shared = policy_object(m, snapshot).is_some();
        let of_parent = |i: &Inherited| &forked.parent[i.parent].policy;
        let others = || forked.within(m).any(|i| *of_parent(i) != m.policy);
        let of_ancestor = || policies && forked.within(m).next().is_some();
        let sets = match shared {
            true => m.policy.is_some(),
            false => others() || of_ancestor(),
        };
        if sets {
            m.rebuild_policy(plan);
        }
        m.advise(plan);
    }
}

/// Frees protection keys that a forked process inherited.
pub fn free_keys(parent: &[Mapping], plan: &mut Builder) {
    let mut keys: Vec<u32> = parent.iter().map(Mapping::given_key).collect();
    keys.sort_unstable();
    keys.dedup();
    for key in keys.into_iter().filter(|key| *key != 0) {
        plan.syscall(libc::SYS_pkey_free, &[key.into()], || {
            format!("protection key {key}")
        });
    }
}

/// Allocates protection keys, lowest first; keys that no mapping uses are freed again. Done before anything is
/// mapped: the kernel takes a key of its own for execute-only mappings (`execute_only_pkey`, arch/x86/mm/pkeys.c).
pub fn allocate_keys(mappings: &[Mapping], plan: &mut Builder) {
    let highest = mappings.iter().map(Mapping::given_key).max().unwrap_or(0);
    for key in 1..=highest {
        plan.expect(libc::SYS_pkey_alloc, &[0, 0], key.into(), || {
            format!("protection key {key}")
        });
    }
    for key in 1..highest {
        if !mappings.iter().any(|m| m.given_key() == key) {
            plan.syscall(libc::SYS_pkey_free, &[key.into()], || {
                format!("protection key {key}")
            });
        }
    }
}

/// `MAP_DROPPABLE` (Linux 6.11), in place of `MAP_PRIVATE`.
const MAP_DROPPABLE: i32 = 8;
/// `MADV_GUARD_INSTALL` (Linux 6.13).
const MADV_GUARD_INSTALL: u64 = 102;

impl Mapping {
    fn advise(&self, plan: &mut Builder) {
        let advice = [
            (MappingFlags::DONT_FORK, libc::MADV_DONTFORK),
            (MappingFlags::WIPE_ON_FORK, libc::MADV_WIPEONFORK),
            (MappingFlags::DONT_DUMP, libc::MADV_DONTDUMP),
            (MappingFlags::MERGEABLE, libc::MADV_MERGEABLE),
            (MappingFlags::SEQUENTIAL, libc::MADV_SEQUENTIAL),
            (MappingFlags::RANDOM, libc::MADV_RANDOM),
        ];
        if matches!(self.backing, Backing::Kernel(_)) {
            return;
        }
        let range = [self.start, self.len()];
        for (flag, advice) in advice {
            // hugetlb mappings have such flags by default, and may refuse the advice.
            if self.flags.contains(flag) {
                let args = [range[0], range[1], advice as u64];
                plan.syscall(libc::SYS_madvise, &args, || self.object());
            }
        }
        for (start, end) in &self.guards {
            let args = [*start, end - start, MADV_GUARD_INSTALL];
            plan.syscall(libc::SYS_madvise, &args, || {
                format!("guard pages in {}", self.object())
            });
        }
        if let Some(name) = &self.name {
            let mut name = name.clone();
            name.push(0);
            let name = plan.data(&name);
            let args = [
                u64::from(libc::PR_SET_VMA as u32),
                0,
                range[0],
                range[1],
                name,
            ];
            plan.attempt(libc::SYS_prctl, &args, || self.object());
        }
        if self.flags.contains(MappingFlags::LOCKED) {
            let warning = format!(
                "{} is not locked in memory; it may need {}",
                self.object(),
                Use::LockMemory
            );
            let on_fault = [range[0], range[1], libc::MLOCK_ONFAULT as u64];
            plan.try_syscall(libc::SYS_mlock2, &on_fault, &warning);
            if !self.flags.contains(MappingFlags::LOCK_ON_FAULT) {
                // Fails for pages that cannot exist, past the end of a file or without access, but sets the flag
                // (`do_mlock`, mm/mlock.c).
                plan.attempt(libc::SYS_mlock2, &[range[0], range[1], 0], || self.object());
            }
        }
    }

    /// Removes the mark of [`switches::MEMORY_MERGE`](crate::switches::MEMORY_MERGE) if the mapping did not have it.
    pub fn unmerge(&self, plan: &mut Builder) {
        let kernels = matches!(self.backing, Backing::Kernel(_));
        if !kernels && !self.flags.contains(MappingFlags::MERGEABLE) {
            let args = [self.start, self.len(), libc::MADV_UNMERGEABLE as u64];
            plan.attempt(libc::SYS_madvise, &args, || self.object());
        }
    }

    /// Seals the mapping; it cannot be changed any more.
    pub fn seal(&self, plan: &mut Builder) {
        const SYS_MSEAL: i64 = 462;
        if self.flags.contains(MappingFlags::SEALED) && !matches!(self.backing, Backing::Kernel(_))
        {
            plan.syscall(SYS_MSEAL, &[self.start, self.len(), 0], || self.object());
        }
    }
}
