//! The mappings, and how much of each the image stores.

use std::collections::HashMap;

use ckpt_image::Reader;
use serde::Serialize;

use crate::objects::memory::{Backing, KernelMapping, MappedFile, Mapping};
use crate::objects::{Snapshot, SpaceId};

/// A mapping as `ckpt inspect --maps` shows it; the JSON keys are fixed.
#[derive(Clone, Debug, Serialize)]
pub struct MapView {
    /// Its process.
    pub pid: i32,
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// As in `/proc/PID/maps`: `rw-p`.
    pub permissions: String,
    /// Offset in the file or object, in bytes.
    pub offset: u64,
    /// Bytes of its pages stored in the image, before compression. Pages of shared memory count at each of their
    /// mappings.
    pub stored_bytes: u64,
    /// The file's path, `[heap]`, `[stack]`, `[vdso]`, `[anon:NAME]` or nothing.
    pub path: String,
}

/// All mappings of a snapshot.
pub fn maps(reader: &Reader, snapshot: &Snapshot) -> Vec<MapView> {
    let mut views = Vec::new();
    let mut stored: HashMap<SpaceId, Stored> = HashMap::new();
    let mut count = |space, start, end| {
        stored
            .entry(space)
            .or_insert_with(|| Stored::of(reader, space))
            .between(start, end)
    };
    for process in &snapshot.processes {
        for mapping in &process.memory.mappings {
            let (offset, shared) = object(snapshot, &mapping.backing);
            let mut bytes = count(process.memory.space, mapping.start, mapping.end);
            if let Some(space) = shared {
                let size = mapping.end.saturating_sub(mapping.start);
                bytes = bytes.saturating_add(count(space, offset, offset.saturating_add(size)));
            }
            views.push(MapView {
                pid: process.pid,
                start: mapping.start,
                end: mapping.end,
                permissions: permissions(mapping),
                offset,
                stored_bytes: bytes,
                path: path(snapshot, process.memory.layout, mapping),
            });
        }
    }
    views
}

/// The offset of a mapping in its object, and the object's space, if it has one of its own.
fn object(snapshot: &Snapshot, backing: &Backing) -> (u64, Option<SpaceId>) {
    match backing {
        Backing::PrivateFile { file, offset } | Backing::SharedFile { file, offset, .. } => (
            *offset,
            file.find(&snapshot.mapped_files)
                .and_then(MappedFile::stored),
        ),
        Backing::SharedMemory { object, offset } => (
            *offset,
            object
                .find(&snapshot.shared_memory)
                .map(|object| object.space),
        ),
        Backing::SysV {
            segment, offset, ..
        } => {
            let segment = segment.find(&snapshot.ipc.segments);
            (*offset, segment.map(|segment| segment.contents))
        }
        Backing::Description {
            description,
            offset,
            ..
        } => {
            let description = description.find(&snapshot.descriptions);
            let contents = description.and_then(|d| d.kind.file().contents());
            (*offset, contents.map(|(space, _)| space))
        }
        _ => (0, None),
    }
}

fn permissions(mapping: &Mapping) -> String {
    let letter = |bit: i32, letter| {
        if mapping.prot & bit as u32 != 0 {
            letter
        } else {
            '-'
        }
    };
    let shared = match mapping.backing {
        Backing::SharedFile { .. } | Backing::SharedMemory { .. } => 's',
        Backing::SysV { .. } | Backing::AioRing(_) => 's',
        Backing::Description { private: false, .. } => 's',
        _ => 'p',
    };
    let letters = [
        letter(libc::PROT_READ, 'r'),
        letter(libc::PROT_WRITE, 'w'),
        letter(libc::PROT_EXEC, 'x'),
        shared,
    ];
    letters.iter().collect()
}

fn path(
    snapshot: &Snapshot,
    layout: crate::objects::address_space::Layout,
    mapping: &Mapping,
) -> String {
    match &mapping.backing {
        Backing::PrivateFile { file, .. } | Backing::SharedFile { file, .. } => {
            let file = file.find(&snapshot.mapped_files);
            file.map_or_else(String::new, |file| crate::text::of_path(&file.path))
        }
        Backing::Description { description, .. } => {
            let description = description.find(&snapshot.descriptions);
            description.map_or_else(String::new, |found| found.kind.file().shown())
        }
        Backing::SharedMemory { object, .. } => format!("[shared:{object}]"),
        Backing::SysV { segment, .. } => {
            let segment = segment.find(&snapshot.ipc.segments);
            let key = segment.map_or(0, |segment| segment.object.key);
            format!("/SYSV{key:08x}")
        }
        Backing::AioRing(_) => "/[aio]".into(),
        Backing::Kernel(KernelMapping::Vdso) => "[vdso]".into(),
        Backing::Kernel(KernelMapping::Vvar) => "[vvar]".into(),
        Backing::Kernel(KernelMapping::VvarVclock) => "[vvar_vclock]".into(),
        Backing::Anonymous | Backing::AnonymousHuge { .. } => {
            let range = mapping.start..mapping.end;
            match &mapping.name {
                Some(name) => format!("[anon:{}]", crate::text::of(name)),
                // As show_map_vma in fs/proc/task_mmu.c names them.
                None if mapping.start < layout.brk && mapping.end > layout.start_brk => {
                    "[heap]".into()
                }
                None if range.contains(&layout.start_stack) => "[stack]".into(),
                None => String::new(),
            }
        }
    }
}

/// Stored bytes of a space up to each of its runs.
pub(super) struct Stored {
    /// Start of a run, its end, and the total bytes of all previous runs; ascending.
    runs: Vec<(u64, u64, u64)>,
}

impl Stored {
    pub(super) fn of(reader: &Reader, space: SpaceId) -> Self {
        let page = reader.header().page_size;
        let mut before = 0u64;
        let runs = reader.runs_of(space.0).map(|(run, _)| {
            let entry = (run.start, run.end(page), before);
            before = before.saturating_add(run.bytes(page));
            entry
        });
        Stored {
            runs: runs.collect(),
        }
    }

    /// Bytes stored from `start` to `end`.
    pub(super) fn between(&self, start: u64, end: u64) -> u64 {
        self.below(end).saturating_sub(self.below(start))
    }

    fn below(&self, address: u64) -> u64 {
        let after = self.runs.partition_point(|(start, ..)| *start < address);
        let last = after.checked_sub(1).and_then(|at| self.runs.get(at));
        last.map_or(0, |(start, end, before)| {
            before.saturating_add(address.min(*end) - start)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_bytes_are_counted_by_range() {
        let stored = Stored {
            runs: vec![(0x1000, 0x3000, 0), (0x5000, 0x6000, 0x2000)],
        };
        assert_eq!(stored.between(0, u64::MAX), 0x3000);
        assert_eq!(stored.between(0x2000, 0x5000), 0x1000);
        assert_eq!(stored.between(0x3000, 0x5000), 0);
        assert_eq!(stored.between(0x5000, 0x6000), 0x1000);
        assert_eq!(
            stored.between(0x6000, 0x5000),
            0,
            "a range that ends before it begins"
        );
    }
}
