//! Scratch memory of remote calls: a new mapping, or an extension of an existing one.
//!
//! A process with the most mappings that it may have (`vm.max_map_count`) gets no new one, not even one that the
//! kernel would merge with a neighbour (`do_mmap`, mm/mmap.c). But a mapping may grow in place (mremap(2)), and the
//! extension is unmapped like a mapping of its own.

use crate::RemoteAddr;
use crate::proc::maps::{VmFlags, Vma};

/// Bytes of a page.
const PAGE: u64 = 4096;
/// The kernel's gap below a mapping that grows down (`stack_guard_gap`).
const STACK_GAP: u64 = 1 << 20;

/// Address of scratch memory, and how it is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scratch {
    pub(super) at: RemoteAddr,
    pub(super) len: u64,
    grown: bool,
}

/// The call that maps it.
pub(super) struct Mapping {
    pub(super) name: &'static str,
    pub(super) nr: i64,
    pub(super) args: [u64; 6],
    /// Its result on success.
    pub(super) answer: u64,
}

impl Scratch {
    /// A new mapping in a hole that the caller found; `len` in bytes.
    pub fn in_hole(at: RemoteAddr, len: u64) -> Self {
        Self {
            at,
            len,
            grown: false,
        }
    }

    /// An extension of a mapping that can grow by that many bytes. `vmas` have their flags (smaps).
    pub fn behind(vmas: &[Vma], len: u64) -> Option<Self> {
        let next = vmas.iter().skip(1).map(Some).chain([None]);
        let mut free = vmas.iter().zip(next).filter(|(vma, next)| {
            let gap = match next {
                Some(next) if next.flags.contains(VmFlags::GROWS_DOWN) => PAGE + STACK_GAP,
                // A gap, since the two would be merged.
                _ => PAGE,
            };
            next.is_some_and(|next| next.start - vma.end >= len.next_multiple_of(PAGE) + gap)
                && grows(vma)
        });
        let (vma, _) = free.next()?;
        Some(Self {
            at: RemoteAddr(vma.end),
            len: len.next_multiple_of(PAGE),
            grown: true,
        })
    }

    /// Its address.
    pub fn at(&self) -> RemoteAddr {
        self.at
    }

    pub(super) fn mapping(&self) -> Mapping {
        let (at, len) = (self.at.raw(), self.len);
        if self.grown {
            let last = at - PAGE;
            return Mapping {
                name: "mremap",
                nr: libc::SYS_mremap,
                args: [last, PAGE, PAGE + len, 0, 0, 0],
                answer: last,
            };
        }
        let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        Mapping {
            name: "mmap",
            nr: libc::SYS_mmap,
            args: [at, len, prot, flags as u64, u64::MAX, 0],
            answer: at,
        }
    }
}

/// Whether it has the attributes of our scratch memory, and may grow.
fn grows(vma: &Vma) -> bool {
    let odd = VmFlags::GROWS_DOWN
        | VmFlags::LOCKED
        | VmFlags::DONT_EXPAND
        | VmFlags::PFN_MAP
        | VmFlags::HUGETLB
        | VmFlags::SHADOW_STACK
        | VmFlags::SEALED
        | VmFlags::UFFD_MISSING
        | VmFlags::UFFD_WP
        | VmFlags::UFFD_MINOR;
    vma.is_private_anonymous()
        && vma.read
        && vma.write
        && vma.protection_key == 0
        && !vma.flags.intersects(odd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Pid;
    use crate::proc::maps::read_smaps;

    #[test]
    fn only_memory_with_room_behind_it_grows() {
        let vmas = read_smaps(Pid::own()).expect("we live");
        let len = 3 * PAGE + 1;
        let scratch = Scratch::behind(&vmas, len).expect("we have a heap");
        assert_eq!(scratch.len, 4 * PAGE);
        let (at, end) = (scratch.at().raw(), scratch.at().raw() + scratch.len);
        assert!(vmas.iter().all(|vma| vma.end <= at || end < vma.start));
        let below = vmas.iter().find(|vma| vma.end == at);
        assert!(below.is_some_and(|vma| vma.write && !vma.shared));
        assert_eq!(Scratch::behind(&vmas, 1 << 47), None);
        let locked = vmas.into_iter().map(|mut vma| {
            vma.flags |= VmFlags::LOCKED;
            vma
        });
        assert_eq!(Scratch::behind(&locked.collect::<Vec<_>>(), len), None);
    }
}
