//! Where the contents of a mapped object come from that no name leads to.

use std::fs::Metadata;

use ckpt_tracer::RemoteAddr;
use ckpt_tracer::proc::maps::Vma;

use super::inherit::offset;
use super::{Backing, Mapping, join, subtract};
use crate::SpaceId;
use crate::error::Obstacle;
use crate::files::Kind;
use crate::files::attributes::Attributes;
use crate::files::regular::open_quietly;
use crate::source::{Collector, Contents, Source};

/// Bytes of a page.
const PAGE: u64 = 4096;

/// All that a process has mapped.
#[derive(Clone, Copy)]
pub(super) struct Layout<'a> {
    pub(super) vmas: &'a [Vma],
    /// Ranges of guard pages, ascending.
    pub(super) guards: &'a [(u64, u64)],
}

/// Ranges of memory in which the object with that inode is seen: (offset, address, bytes). Guard pages
/// show nothing of it.
fn views(vma: &Vma, all: Layout<'_>, private: bool) -> Vec<(u64, u64, u64)> {
    let mapped = all.vmas.iter();
    let mapped = mapped.filter(|v| (v.dev, v.inode) == (vma.dev, vma.inode) && v.shared != private);
    let mut views: Vec<_> = mapped
        .flat_map(|v| {
            let pieces = subtract(&[(v.start, v.end)], all.guards).into_iter();
            pieces.map(|(start, end)| (v.offset + (start - v.start), start, end - start))
        })
        .collect();
    views.sort_unstable();
    // Every offset once.
    let mut done = 0;
    views.retain_mut(|(offset, address, len)| {
        let skip = done.max(*offset) - *offset;
        if skip >= *len {
            return false;
        }
        (*offset, *address, *len) = (*offset + skip, *address + skip, *len - skip);
        done = *offset + *len;
        true
    });
    views
}

/// What of some views can be read: mappings may reach beyond the end of an object, where the kernel
/// answers EIO.
fn readable(source: &Source, mut views: Vec<(u64, u64, u64)>) -> Vec<(u64, u64, u64)> {
    let has = |address: u64| source.mem.read(RemoteAddr(address), &mut [0]).is_ok();
    let mut ended = false;
    for (_, address, len) in &mut views {
        let (start, end) = (*address, *address + *len);
        if ended || !has(end - 1) {
            let (mut low, mut high) = (0, if ended { 0 } else { *len / PAGE });
            while low < high {
                let middle = low + (high - low) / 2;
                match has(start + middle * PAGE) {
                    true => low = middle + 1,
                    false => high = middle,
                }
            }
            *len = low * PAGE;
            ended = true;
        }
    }
    views.retain(|(_, _, len)| *len > 0);
    views
}

/// The file behind a mapping, through `/proc/PID/map_files` (which wants
/// CAP_CHECKPOINT_RESTORE), or its views in memory.
pub(super) fn contents_of(
    source: &Source,
    vma: &Vma,
    all: Layout<'_>,
    private: bool,
) -> (Contents, u64) {
    let name = format!("map_files/{:x}-{:x}", vma.start, vma.end);
    if let Ok(file) = open_quietly(&source.dir.join(name))
        && let Ok(meta) = file.metadata()
    {
        let size = meta.len();
        return (Contents::File(file, size), size);
    }
    let views = readable(source, views(vma, all, private));
    let size = views.last().map_or(0, |(offset, _, len)| offset + len);
    let of_it = |(offset, address, len)| (source.pid, offset, address, len);
    (
        Contents::Memory(views.into_iter().map(of_it).collect()),
        size,
    )
}

/// Where an object can only be read through mappings: what all mappings of this process show of it
/// and no process before did. Returns the end of what they show, in bytes from the object's beginning.
pub(super) fn add_views(
    space: SpaceId,
    source: &Source,
    vma: &Vma,
    (all, private): (Layout<'_>, bool),
    collector: &mut Collector,
) -> u64 {
    let contents = collector.contents.iter_mut().find(|(s, _)| *s == space);
    let Some((_, Contents::Memory(known))) = contents else {
        return 0;
    };
    let views = readable(source, views(vma, all, private));
    let shown = join(known.iter().map(|v| (v.1, v.1 + v.3)).collect());
    let ranges: Vec<(u64, u64)> = views.iter().map(|v| (v.0, v.0 + v.2)).collect();
    let mut views = views.iter().peekable();
    for (from, to) in subtract(&ranges, &shown) {
        // Both ascend, and each piece lies in one view.
        while views.next_if(|v| v.0 + v.2 <= from).is_some() {}
        if let Some((offset, address, _)) = views.peek() {
            known.push((source.pid, from, address + (from - offset), to - from));
        }
    }
    ranges.last().map_or(0, |range| range.1)
}

/// Mappings of one process in which guard pages hide what no mapping of the job shows: where an object can
/// only be read through mappings, that cannot be had. Asked when all processes have been looked at.
pub fn hidden_by_guards(source: &Source, mappings: &[Mapping], collector: &mut Collector) {
    for mapping in mappings.iter().filter(|m| !m.guards.is_empty()) {
        let Some((space, offset)) = space_of(mapping, collector) else {
            continue;
        };
        let contents = collector.contents.iter().find(|(s, _)| *s == space);
        let Some((_, Contents::Memory(views))) = contents else {
            continue;
        };
        let shown = join(views.iter().map(|v| (v.1, v.1 + v.3)).collect());
        let in_object = |at: u64| offset + (at - mapping.start);
        let guards = mapping.guards.iter();
        let guards: Vec<_> = guards.map(|g| (in_object(g.0), in_object(g.1))).collect();
        if !subtract(&guards, &shown).is_empty() {
            collector.refuse(Obstacle::new(
                format!(
                    "memory {:#x}-{:#x} of {}",
                    mapping.start,
                    mapping.end,
                    source.title()
                ),
                "has guard pages (MADV_GUARD_INSTALL) over shared memory, and only root can see what is \
                 behind them",
                "run ckpt as root, or let the program map that memory a second time",
            ));
        }
    }
}

/// Where the contents of what a mapping shows go, and where in them it begins.
fn space_of(mapping: &Mapping, collector: &Collector) -> Option<(SpaceId, u64)> {
    let space = match &mapping.backing {
        Backing::SharedMemory { object, .. } => collector.shared_memory[*object].space,
        Backing::PrivateFile { file, .. } | Backing::SharedFile { file, .. } => {
            collector.mapped_files[*file].contents?
        }
        Backing::Description { description, .. } => {
            match &collector.descriptions[*description].kind {
                Kind::MemFd(memfd) => memfd.contents,
                _ => return None,
            }
        }
        _ => return None,
    };
    Some((space, offset(&mapping.backing)?))
}

/// What a file is whose contents we can read as such.
pub(super) fn looked_at(contents: &Contents) -> Option<(Metadata, Attributes)> {
    let file = contents.as_file()?;
    let meta = file.metadata().ok()?;
    let attributes = Attributes::of(file, &meta);
    Some((meta, attributes))
}
