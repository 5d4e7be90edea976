//! Free ranges of an address space.

use ckpt_tracer::RemoteAddr;
use ckpt_tracer::features::max_map_count;
use ckpt_tracer::proc::maps::{VmFlags, Vma, VmaName};
use ckpt_tracer::remote::Scratch;
use nix::errno::Errno;

use crate::error::Obstacle;
use crate::limits;
use crate::source::Source;

/// End of user memory with four-level page tables.
pub const TOP: u64 = 0x7fff_ffff_f000;
/// Lowest address used; far above `vm.mmap_min_addr`.
const BOTTOM: u64 = 0x1_0000_0000;
/// Distance to existing mappings: a stack below may grow, and the kernel keeps a gap (`stack_guard_gap`, 1 MiB) below
/// stacks.
const MARGIN: u64 = 4 << 20;

/// The free ranges, ascending, with a margin around existing mappings. `taken` need not be sorted and may overlap.
fn holes(taken: impl IntoIterator<Item = (u64, u64)>) -> impl Iterator<Item = (u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = taken.into_iter().collect();
    ranges.sort_unstable();
    let mut free_from = BOTTOM;
    let holes = ranges.into_iter().chain([(TOP, TOP)]);
    let holes = holes.map(move |(start, end)| {
        let from = free_from.saturating_add(MARGIN);
        free_from = free_from.max(end);
        (from, start.min(TOP).saturating_sub(MARGIN))
    });
    holes.filter(|(from, to)| from < to)
}

/// Finds `len` free bytes, page aligned, with a margin around. The ranges need not be sorted and may overlap. Returns
/// the highest hole that fits.
pub fn find(taken: impl IntoIterator<Item = (u64, u64)>, len: u64) -> Option<u64> {
    let len = len.checked_next_multiple_of(4096)?;
    let fitting = holes(taken).filter(|(from, to)| to - from >= len);
    fitting.last().map(|(_, to)| (to - len) & !4095)
}

/// The largest hole of this kind, page aligned: for a plan, whose length is only known once it is made.
pub fn largest(taken: impl IntoIterator<Item = (u64, u64)>) -> Option<(u64, u64)> {
    let pages = holes(taken).map(|(from, to)| (from.next_multiple_of(4096), to & !4095));
    pages
        .filter(|(from, to)| from < to)
        .max_by_key(|(from, to)| to - from)
}

/// Whether the limits of a process with these mappings permit that much more memory. Unreadable limits are detected
/// at the call.
pub fn permitted(source: &Source, vmas: &[Vma], len: u64) -> Result<(), Obstacle> {
    let limits = limits::capture(source.pid).unwrap_or_default();
    let locked = || limits::locked_without_room(&limits, source, vmas, len);
    let Some((option, wanted)) = limits::without_room(&limits, vmas, len).or_else(locked) else {
        return Ok(());
    };
    Err(Obstacle::new(
        source.title(),
        format!("may not map {len} more bytes of memory, which remote calls need"),
        format!(
            "raise its limit: prlimit {option}={wanted}: --pid {}",
            source.pid
        ),
    ))
}

/// The error of beginning remote calls. A process whose mappings are locked as they are made may have no room although
/// not all of them are locked by now: that is a refusal too.
pub fn refusal(source: &Source, len: u64, error: ckpt_tracer::Error) -> crate::Error {
    match error {
        ckpt_tracer::Error::Remote {
            call: "mmap",
            errno: Errno::EAGAIN,
            ..
        } => crate::Error::refuse(Obstacle::new(
            source.title(),
            format!("may not map {len} more bytes of memory, which remote calls need"),
            format!(
                "raise its limit: prlimit --memlock=unlimited: --pid {}",
                source.pid
            ),
        )),
        other => other.into(),
    }
}

/// Scratch memory for remote calls in a process with these mappings (of smaps). If it may not have another mapping,
/// one is extended.
pub fn scratch(source: &Source, vmas: &[Vma], len: u64) -> Result<Scratch, Obstacle> {
    permitted(source, vmas, len)?;
    let title = source.title();
    let limit = max_map_count();
    let count = vmas.iter().filter(|v| v.name != VmaName::Vsyscall).count() as u64;
    // `do_mmap`, mm/mmap.c.
    if count <= limit {
        let hole = find(vmas.iter().map(|v| (v.start, v.end)), len);
        let reason = "has no free room in its address space for remote calls";
        return hole
            .map(|at| Scratch::in_hole(RemoteAddr(at), len))
            .ok_or_else(|| Obstacle::without_remedy(title, reason));
    }
    // Whether future mappings are locked (mlockall(2)) is visible only in a new one.
    let locked = vmas.iter().any(|v| v.flags.contains(VmFlags::LOCKED));
    let grown = Scratch::behind(vmas, len).filter(|_| !locked);
    grown.ok_or_else(|| {
        Obstacle::new(
            title,
            format!(
                "has {count} mappings, more than vm.max_map_count ({limit}) leaves room for, and none \
                 of them can grow for remote calls"
            ),
            raise(count),
        )
    })
}

/// The remedy for a process with that many mappings.
pub fn raise(count: u64) -> String {
    let enough = (count + 1).next_power_of_two();
    format!("raise the limit: sysctl vm.max_map_count={enough}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hole_keeps_its_distance() {
        let taken = [
            (0x7f00_0000_0000, TOP),
            (0x5555_0000_0000, 0x5555_1000_0000),
        ];
        let at = find(taken, 10_000).unwrap();
        assert_eq!(at % 4096, 0);
        assert!(at + 12_288 + MARGIN <= 0x7f00_0000_0000);
        assert!(at >= 0x5555_1000_0000 + MARGIN);
    }

    #[test]
    fn the_largest_hole_is_larger_than_all_others() {
        let taken = [
            (0x7f00_0000_0000, TOP),
            (0x6000_0000_0000, 0x6800_0000_0000),
            (0x1000_0000_0000, 0x2000_0000_0000),
        ];
        let hole = (0x2000_0000_0000 + MARGIN, 0x6000_0000_0000 - MARGIN);
        assert_eq!(largest(taken), Some(hole));
        // What is not at the end of a page keeps its distance, too.
        let above = largest([(0, 0x5555_1000_0001), (0x5600_0000_0000, TOP)]);
        let hole = (0x5555_1000_1000 + MARGIN, 0x5600_0000_0000 - MARGIN);
        assert_eq!(above, Some(hole));
        assert_eq!(largest([(0, TOP - 2 * MARGIN)]), None);
    }

    #[test]
    fn no_hole_is_no_hole() {
        assert_eq!(find([(0, TOP)], 4096), None);
        assert!(find([], 4096).is_some());
        // Overlapping and unsorted.
        assert_eq!(
            find([(0x10_0000_0000, TOP), (0, 0x20_0000_0000)], 4096),
            None
        );
    }
}
