//! Mappings, and the spaces whose pages are in the image.

use std::collections::HashMap;

use ckpt_image::Reader;

use crate::memory::{Backing, Mapping};
use crate::process::Process;
use crate::{Snapshot, SpaceId};

use super::{Faults, require};

/// No mapping of a program ends above this address: user space of five-level page tables.
const TOP: u64 = 1 << 56;
/// `PROT_READ | PROT_WRITE | PROT_EXEC`
const PROTECTIONS: u32 = 7;

/// Checks of a process's mappings.
pub(super) fn mappings(snapshot: &Snapshot, process: &Process, page: u32, faults: &mut Faults) {
    let (pid, memory) = (process.pid, &process.memory);
    require!(
        faults,
        memory.executable.find(&snapshot.mapped_files).is_some(),
        "the executable of process {pid} is file {}, which does not exist",
        memory.executable
    );
    require!(
        faults,
        memory.auxv.len() % 16 == 0,
        "the auxiliary vector of process {pid} is truncated"
    );
    let mut last = 0;
    for mapping in &memory.mappings {
        let Mapping { start, end, .. } = *mapping;
        require!(
            faults,
            start < end && end <= TOP && aligned(start, page) && aligned(end, page),
            "the mapping {start:#x}-{end:#x} of process {pid} is no range of pages"
        );
        require!(
            faults,
            start >= last,
            "the mapping {start:#x}-{end:#x} of process {pid} overlaps the one before or is out of order"
        );
        last = last.max(end);
        require!(
            faults,
            mapping.prot & !PROTECTIONS == 0,
            "the mapping {start:#x}-{end:#x} of process {pid} has the unknown protection {:#x}",
            mapping.prot
        );
        if let Err(reason) = backing(snapshot, mapping, page) {
            faults.add(format_args!(
                "the mapping {start:#x}-{end:#x} of process {pid} {reason}"
            ));
        }
        let mut guarded = start;
        for (first, after) in &mapping.guards {
            require!(
                faults,
                guarded <= *first
                    && first < after
                    && *after <= end
                    && aligned(*first, page)
                    && aligned(*after, page),
                "the guard pages {first:#x}-{after:#x} of process {pid} do not lie in their mapping"
            );
            guarded = guarded.max(*after);
        }
    }
}

fn backing(snapshot: &Snapshot, mapping: &Mapping, page: u32) -> Result<(), String> {
    let size = mapping.end.saturating_sub(mapping.start);
    let (what, number, count, offset) = match &mapping.backing {
        Backing::Anonymous | Backing::Kernel(_) => return Ok(()),
        Backing::AioRing(ring) => {
            let plain = mapping.prot == (libc::PROT_READ | libc::PROT_WRITE) as u32;
            let fault = ring.fault(size);
            let fault = fault.or_else(|| (!plain).then(|| "is an AIO ring, and protected".into()));
            return fault.map_or(Ok(()), Err);
        }
        Backing::AnonymousHuge { page_size } => {
            let fits = page_size.is_power_of_two()
                && *page_size >= page.into()
                && mapping.start.is_multiple_of(*page_size)
                && mapping.end.is_multiple_of(*page_size);
            return if fits {
                Ok(())
            } else {
                Err(format!("has no whole pages of {page_size} bytes"))
            };
        }
        Backing::PrivateFile { file, offset } | Backing::SharedFile { file, offset, .. } => {
            ("file", file.0, snapshot.mapped_files.len(), *offset)
        }
        Backing::SharedMemory { object, offset } => (
            "shared memory object",
            object.0,
            snapshot.shared_memory.len(),
            *offset,
        ),
        Backing::SysV {
            segment, offset, ..
        } => ("segment", segment.0, snapshot.ipc.segments.len(), *offset),
        Backing::Description {
            description,
            offset,
            ..
        } => (
            "description",
            description.0,
            snapshot.descriptions.len(),
            *offset,
        ),
    };
    if number >= count {
        return Err(format!("refers to {what} {number}, which does not exist"));
    }
    let Some(end) = offset.checked_add(size).filter(|_| aligned(offset, page)) else {
        return Err(format!("begins at the impossible offset {offset:#x}"));
    };
    match &mapping.backing {
        Backing::SharedMemory { object, .. } => {
            let object = object.find(&snapshot.shared_memory);
            match object {
                Some(object) if end > round_up(object.size.max(object.reach), page.into()) => {
                    Err(format!(
                        "reaches beyond the {} bytes of shared memory {number}",
                        object.size
                    ))
                }
                _ => Ok(()),
            }
        }
        Backing::SysV { segment, .. } => match segment.find(&snapshot.ipc.segments) {
            // mremap(2) makes ordinary pages reach beyond the end.
            Some(found)
                if found.huge_page_size != 0
                    && end > round_up(found.size, found.huge_page_size) =>
            {
                Err(format!(
                    "reaches beyond the {} bytes of segment {number}",
                    found.size
                ))
            }
            _ => Ok(()),
        },
        _ => Ok(()),
    }
}

/// The owner of a space.
enum Owner<'a> {
    /// An address space: pages lie in its mappings.
    Memory(&'a Process),
    /// An object with a size in bytes.
    Object { size: u64 },
}

/// Each space has one owner, and its pages lie inside.
pub(super) fn spaces(snapshot: &Snapshot, reader: &Reader, faults: &mut Faults) {
    let mut owners: HashMap<SpaceId, Owner<'_>> = HashMap::new();
    let own = |p: &&Process| !p.shares.memory;
    for process in snapshot.processes.iter().filter(own) {
        let space = process.memory.space;
        let before = owners.insert(space, Owner::Memory(process));
        require!(
            faults,
            before.is_none(),
            "space {} belongs to two address spaces",
            space.0
        );
    }
    let objects = snapshot
        .shared_memory
        .iter()
        .map(|object| (object.space, object.size));
    let mapped = snapshot
        .mapped_files
        .iter()
        .map(|file| (file.stored(), file.identity.size));
    let mapped = mapped.filter_map(|(space, size)| Some((space?, size)));
    let open = snapshot.descriptions.iter();
    let open = open.filter_map(|d| d.kind.file().contents());
    let segments = snapshot.ipc.segments.iter();
    let segments = segments.map(|segment| (segment.contents, segment.size));
    let bundled = snapshot.bundle.iter();
    let bundled = bundled.map(|file| (file.contents, file.size));
    let files = mapped.chain(open).chain(bundled);
    for (space, size) in objects.chain(files).chain(segments) {
        // One file may be open several times, and mapped too.
        match owners.entry(space).or_insert(Owner::Object { size }) {
            Owner::Object { size: largest } => *largest = size.max(*largest),
            Owner::Memory(_) => {
                faults.add(format_args!(
                    "space {} belongs to a process and to a file",
                    space.0
                ));
            }
        }
    }
    let page = reader.header().page_size;
    for space in reader.spaces() {
        match owners.get(&SpaceId(space)) {
            None => faults.add(format_args!("the pages of space {space} belong to nothing")),
            Some(Owner::Object { size }) => {
                let last = reader
                    .runs_of(space)
                    .last()
                    .map_or(0, |(run, _)| run.end(page));
                require!(
                    faults,
                    last <= round_up(*size, page.into()),
                    "the pages of space {space} reach beyond the {size} bytes of what they belong to"
                );
            }
            Some(Owner::Memory(process)) => pages(process, reader, faults),
        }
    }
}

/// Every stored page of an address space lies in a mapping that has pages of its own: writing it through a shared
/// mapping would change a file.
fn pages(process: &Process, reader: &Reader, faults: &mut Faults) {
    let page = reader.header().page_size;
    let private = |mapping: &&Mapping| {
        matches!(
            mapping.backing,
            Backing::Anonymous
                | Backing::AnonymousHuge { .. }
                | Backing::PrivateFile { .. }
                | Backing::Description { private: true, .. }
        )
    };
    let mut mappings = process.memory.mappings.iter().filter(private).peekable();
    for (run, _) in reader.runs_of(process.memory.space.0) {
        let mut at = run.start;
        while at < run.end(page) {
            // Runs ascend; if mappings do not, that is a fault already and this ends early.
            while mappings.peek().is_some_and(|mapping| mapping.end <= at) {
                mappings.next();
            }
            match mappings.peek() {
                Some(mapping) if mapping.start <= at => at = mapping.end,
                _ => {
                    let pid = process.pid;
                    faults.add(format_args!(
                        "the stored page at {at:#x} of process {pid} lies in no mapping with pages of its own"
                    ));
                    break;
                }
            }
        }
    }
}

fn aligned(address: u64, page: u32) -> bool {
    address.is_multiple_of(u64::from(page))
}

fn round_up(size: u64, page: u64) -> u64 {
    size.checked_next_multiple_of(page).unwrap_or(u64::MAX)
}
