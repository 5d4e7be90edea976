//! The contents of mapped objects without a name.

use std::fs::Metadata;

use ckpt_tracer::RemoteAddr;
use ckpt_tracer::proc::maps::Vma;
use ckpt_tracer::proc::pagemap::{PageQuery, PagemapScanner};

use super::inherit::offset;
use super::{Backing, Mapping, join, subtract};
use crate::SpaceId;
use crate::error::Obstacle;
use crate::files::attributes::Attributes;
use crate::files::memfd::MemFd;
use crate::files::regular::open_quietly;
use crate::source::{Collector, Contents, Source};

/// Bytes of a page.
const PAGE: u64 = 4096;

/// All mappings of a process.
#[derive(Clone, Copy)]
pub(super) struct Layout<'a> {
    pub(super) vmas: &'a [Vma],
    /// Ranges of guard pages, ascending.
    pub(super) guards: &'a [(u64, u64)],
}

/// The mappings of an object, shared or private ones.
fn mapped<'a>(vma: &Vma, all: Layout<'a>, private: bool) -> impl Iterator<Item = &'a Vma> {
    let of = (vma.dev, vma.inode);
    let mapped = all.vmas.iter();
    mapped.filter(move |v| (v.dev, v.inode) == of && v.shared != private)
}

/// The parts of an object that a process maps, and the end of the last one, as an offset in the object. Private
/// mappings count only where they show the object's own pages.
fn seen(source: &Source, vma: &Vma, all: Layout<'_>, private: bool) -> (Vec<View>, u64) {
    let whole = readable(source, views(vma, all, &[], private));
    let end = whole.last().map_or(0, |(offset, _, len)| offset + len);
    if !private {
        return (whole, end);
    }
    let mut own = Vec::new();
    if let Ok(scanner) = PagemapScanner::open(source.dir.clone()) {
        for vma in mapped(vma, all, true) {
            let query = PageQuery::stored_pages(vma).unwrap_or_default();
            // If the process ends meanwhile, nothing is read.
            let _ = scanner.scan(vma.start..vma.end, query, |run| {
                own.push((run.start, run.end))
            });
        }
    }
    let mut some = views(vma, all, &own, true);
    for (offset, _, len) in &mut some {
        *len = (*len).min(end.saturating_sub(*offset));
    }
    some.retain(|(_, _, len)| *len > 0);
    (some, end)
}

/// A range of memory that shows part of an object: offset in the object, address, bytes.
type View = (u64, u64, u64);

/// Ranges of memory that show the object with that inode. Guard pages and `own` pages (ascending) are left out.
fn views(vma: &Vma, all: Layout<'_>, own: &[(u64, u64)], private: bool) -> Vec<View> {
    let mut views: Vec<_> = mapped(vma, all, private)
        .flat_map(|v| {
            let pieces = subtract(&[(v.start, v.end)], all.guards);
            let pieces = subtract(&pieces, own).into_iter();
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

/// The readable parts of some views: mappings may extend past the end of an object, where reads fail with EIO.
fn readable(source: &Source, mut views: Vec<View>) -> Vec<View> {
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

/// The file of a mapping, through `/proc/PID/map_files` (which needs CAP_CHECKPOINT_RESTORE), or its views in memory.
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
    let (views, size) = seen(source, vma, all, private);
    let of_it = |(offset, address, len)| (source.pid, offset, address, len);
    (
        Contents::Memory(views.into_iter().map(of_it).collect()),
        size,
    )
}

/// For an object that can only be read through mappings: adds what the mappings of this process show and those of
/// earlier processes did not. Returns the end of the views, as an offset in the object.
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
    let (views, end) = seen(source, vma, all, private);
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
    end
}

/// Mappings of one process in which guard pages hide parts that no mapping of the job shows: an object that can only
/// be read through mappings is incomplete then. Called after all processes have been captured.
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

/// The space for the contents of a mapping, and the mapping's offset in it.
fn space_of(mapping: &Mapping, collector: &Collector) -> Option<(SpaceId, u64)> {
    let space = match &mapping.backing {
        Backing::SharedMemory { object, .. } => collector.shared_memory[*object].space,
        Backing::PrivateFile { file, .. } | Backing::SharedFile { file, .. } => {
            collector.mapped_files[*file].contents?
        }
        Backing::Description { description, .. } => {
            let kind = &collector.descriptions[*description].kind;
            kind.get::<MemFd>()?.contents
        }
        _ => return None,
    };
    Some((space, offset(&mapping.backing)?))
}

/// Metadata and attributes of a file whose contents are read as a file.
pub(super) fn looked_at(contents: &Contents) -> Option<(Metadata, Attributes)> {
    let file = contents.as_file()?;
    let meta = file.metadata().ok()?;
    let attributes = Attributes::of(file, &meta);
    Some((meta, attributes))
}
