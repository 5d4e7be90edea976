//! Where the contents of a mapped object come from that no name leads to.

use std::fs::Metadata;

use ckpt_tracer::RemoteAddr;
use ckpt_tracer::proc::maps::Vma;

use super::{join, subtract};
use crate::capture::source::{Collector, Contents, Source};
use crate::objects::SpaceId;
use crate::objects::files::attributes::Attributes;
use crate::objects::files::regular::open_quietly;

/// Bytes of a page.
const PAGE: u64 = 4096;

/// All that a process has mapped.
#[derive(Clone, Copy)]
pub(super) struct Layout<'a> {
    pub(super) vmas: &'a [Vma],
    /// Ranges of guard pages, ascending.
    pub(super) guards: &'a [(u64, u64)],
}

/// Ranges of memory in which the object with that inode is mapped: (offset, address, bytes).
fn views(vma: &Vma, all: &[Vma], private: bool) -> Vec<(u64, u64, u64)> {
    let mut views: Vec<_> = all
        .iter()
        .filter(|v| (v.dev, v.inode) == (vma.dev, vma.inode) && v.shared != private)
        .map(|v| (v.offset, v.start, v.end - v.start))
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
fn readable(
    source: &Source,
    mut views: Vec<(u64, u64, u64)>,
    all: Layout<'_>,
) -> Vec<(u64, u64, u64)> {
    let has = |address: u64| source.mem.read(RemoteAddr(address), &mut [0]).is_ok();
    let mut ended = false;
    for (_, address, len) in &mut views {
        let (start, end) = (*address, *address + *len);
        // Guard pages cannot be read either, and are no end.
        if all.guards.iter().any(|g| g.0 < end && start < g.1) {
            continue;
        }
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
    let views = readable(source, views(vma, all.vmas, private), all);
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
    all: Layout<'_>,
    collector: &mut Collector,
) -> u64 {
    let contents = collector.contents.iter_mut().find(|(s, _)| *s == space);
    let Some((_, Contents::Memory(known))) = contents else {
        return 0;
    };
    let views = readable(source, views(vma, all.vmas, false), all);
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

/// What a file is whose contents we can read as such.
pub(super) fn looked_at(contents: &Contents) -> Option<(Metadata, Attributes)> {
    let Contents::File(file, _) = contents else {
        return None;
    };
    let meta = file.metadata().ok()?;
    let attributes = Attributes::of(file, &meta);
    Some((meta, attributes))
}
