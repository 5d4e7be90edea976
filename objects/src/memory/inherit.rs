//! Mappings that a forked process inherits from its parent.

use super::{Backing, Mapping, MappingFlags};

/// A part of a child's mapping that exists after the fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inherited {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// Index of the parent's mapping.
    pub parent: usize,
}

/// Parts of the child's mappings that a fork of the parent provides, ascending: the same backing at the same address.
/// Protections and advice may differ and are set afterwards.
pub fn inherited(parent: &[Mapping], child: &[Mapping]) -> Vec<Inherited> {
    let mut found = Vec::new();
    let mut from = 0;
    for m in child {
        while parent.get(from).is_some_and(|p| p.end <= m.start) {
            from += 1;
        }
        let overlapping = parent.iter().enumerate().skip(from);
        for (index, p) in overlapping.take_while(|(_, p)| p.start < m.end) {
            if same_object(p, m) {
                found.push(Inherited {
                    start: p.start.max(m.start),
                    end: p.end.min(m.end),
                    parent: index,
                });
            }
        }
    }
    found
}

/// Attributes that only mmap(2) sets, and advice that must precede the pages.
const FIXED: MappingFlags = MappingFlags::GROWS_DOWN
    .union(MappingFlags::NO_RESERVE)
    .union(MappingFlags::ACCOUNTED)
    .union(MappingFlags::HUGE)
    .union(MappingFlags::NO_HUGE)
    .union(MappingFlags::DROPPABLE)
    .union(MappingFlags::SYNC);

fn same_object(p: &Mapping, m: &Mapping) -> bool {
    // The address at which offset 0 of the object would be mapped.
    let origin = |m: &Mapping| offset(&m.backing).map(|o| o.wrapping_sub(m.start));
    let at_start = |b: &Backing| with_offset(b, 0);
    at_start(&p.backing) == at_start(&m.backing)
        && origin(p) == origin(m)
        && p.flags.intersection(FIXED) == m.flags.intersection(FIXED)
        && p.protection_key == m.protection_key
        && !p.flags.contains(MappingFlags::SEALED)
        // A fork empties it.
        && !p.flags.contains(MappingFlags::DROPPABLE)
        // SysV: attached by shmat(2), which counts attachments; AIO rings: created by each process.
        && !matches!(m.backing, Backing::SysV { .. } | Backing::AioRing(_))
}

/// The offset in the backing object; `None` without an object.
pub(super) fn offset(backing: &Backing) -> Option<u64> {
    match *backing {
        Backing::PrivateFile { offset, .. }
        | Backing::SharedFile { offset, .. }
        | Backing::SharedMemory { offset, .. }
        | Backing::Description { offset, .. } => Some(offset),
        Backing::Anonymous
        | Backing::AnonymousHuge { .. }
        | Backing::SysV { .. }
        | Backing::AioRing(_)
        | Backing::Kernel(_) => None,
    }
}

fn with_offset(backing: &Backing, to: u64) -> Backing {
    let mut backing = backing.clone();
    match &mut backing {
        Backing::PrivateFile { offset, .. }
        | Backing::SharedFile { offset, .. }
        | Backing::SharedMemory { offset, .. }
        | Backing::Description { offset, .. } => *offset = to,
        Backing::Anonymous
        | Backing::AnonymousHuge { .. }
        | Backing::SysV { .. }
        | Backing::AioRing(_)
        | Backing::Kernel(_) => {}
    }
    backing
}

impl Mapping {
    /// Its part between two addresses.
    pub fn part(&self, start: u64, end: u64) -> Mapping {
        let at = offset(&self.backing).map(|o| o + (start - self.start));
        Mapping {
            start,
            end,
            backing: with_offset(&self.backing, at.unwrap_or(0)),
            guards: Vec::new(),
            ..self.clone()
        }
    }
}

impl Mapping {
    /// The same with the guards there, of a segment as well.
    pub(crate) fn piece(&self, start: u64, end: u64) -> Mapping {
        let mut piece = self.part(start, end);
        if let Backing::SysV { offset, .. } = &mut piece.backing {
            *offset += start - self.start;
        }
        piece.guards = intersect(&self.guards, &[(start, end)]);
        piece
    }
}

/// `ranges` minus `without`; both ascending and without overlaps.
pub fn subtract(ranges: &[(u64, u64)], without: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut left = Vec::new();
    let mut next = 0;
    for &(mut start, end) in ranges {
        while without.get(next).is_some_and(|w| w.1 <= start) {
            next += 1;
        }
        for &(from, to) in without[next..].iter().take_while(|w| w.0 < end) {
            if start < from {
                left.push((start, from));
            }
            start = start.max(to);
        }
        if start < end {
            left.push((start, end));
        }
    }
    left
}

/// The intersection; both ascending and without overlaps.
pub fn intersect(ranges: &[(u64, u64)], others: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut both = Vec::new();
    let mut next = 0;
    for &(start, end) in ranges {
        while others.get(next).is_some_and(|o| o.1 <= start) {
            next += 1;
        }
        for &(from, to) in others[next..].iter().take_while(|o| o.0 < end) {
            both.push((start.max(from), end.min(to)));
        }
    }
    both
}

/// Sorted, with adjacent and overlapping ranges merged.
pub fn join(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    ranges.sort_unstable();
    let mut joined: Vec<(u64, u64)> = Vec::with_capacity(ranges.len());
    for (start, end) in ranges {
        match joined.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => joined.push((start, end)),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::FileId;

    fn anonymous(start: u64, end: u64) -> Mapping {
        Mapping {
            start,
            end,
            prot: 3,
            backing: Backing::Anonymous,
            flags: MappingFlags::ACCOUNTED,
            name: None,
            protection_key: 0,
            guards: Vec::new(),
            policy: None,
        }
    }

    fn file(start: u64, end: u64, offset: u64) -> Mapping {
        let backing = Backing::PrivateFile {
            file: FileId(3),
            offset,
        };
        Mapping {
            backing,
            ..anonymous(start, end)
        }
    }

    fn ranges(parent: &[Mapping], child: &[Mapping]) -> Vec<(u64, u64)> {
        let found = inherited(parent, child);
        found.iter().map(|i| (i.start, i.end)).collect()
    }

    #[test]
    fn overlapping_equal_mappings_are_inherited() {
        let parent = [anonymous(10, 20), file(20, 30, 5), anonymous(40, 50)];
        // Grown, split by a hole, another file offset, gone.
        let child = [anonymous(5, 15), file(20, 22, 5), file(24, 30, 9)];
        assert_eq!(ranges(&parent, &child), [(10, 15), (20, 22), (24, 30)]);
        assert_eq!(ranges(&parent, &[file(20, 30, 6)]), []);
        assert_eq!(ranges(&parent, &[anonymous(20, 30)]), []);
        assert_eq!(ranges(&parent, &[anonymous(12, 45)]), [(12, 20), (40, 45)]);
    }

    #[test]
    fn a_part_keeps_what_it_shows() {
        let part = file(20, 30, 5).part(24, 28);
        assert_eq!((part.start, part.end), (24, 28));
        assert_eq!(
            part.backing,
            Backing::PrivateFile {
                file: FileId(3),
                offset: 9
            }
        );
    }

    #[test]
    fn sets_of_addresses() {
        let a = [(0, 10), (20, 30), (40, 50)];
        let b = [(5, 25), (28, 29), (45, 60)];
        assert_eq!(subtract(&a, &b), [(0, 5), (25, 28), (29, 30), (40, 45)]);
        assert_eq!(intersect(&a, &b), [(5, 10), (20, 25), (28, 29), (45, 50)]);
        assert_eq!(subtract(&a, &[]), a);
        assert_eq!(intersect(&a, &[]), []);
        assert_eq!(
            join(vec![(20, 30), (0, 5), (5, 9), (25, 40)]),
            [(0, 9), (20, 40)]
        );
    }
}
