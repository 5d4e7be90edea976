//! The two-letter `VmFlags` of `/proc/PID/smaps`.

bitflags::bitflags! {
    /// Flags of a mapping, as `show_smap_vma_flags` in the kernel's `fs/proc/task_mmu.c` prints them.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct VmFlags: u64 {
        /// `rd` readable.
        const READ = 1 << 0;
        /// `wr` writable.
        const WRITE = 1 << 1;
        /// `ex` executable.
        const EXEC = 1 << 2;
        /// `sh` shared.
        const SHARED = 1 << 3;
        /// `mr` may be made readable.
        const MAY_READ = 1 << 4;
        /// `mw` may be made writable.
        const MAY_WRITE = 1 << 5;
        /// `me` may be made executable.
        const MAY_EXEC = 1 << 6;
        /// `ms` may be shared: a shared mapping of a file opened for writing.
        const MAY_SHARE = 1 << 7;
        /// `gd` grows down, as a stack does.
        const GROWS_DOWN = 1 << 8;
        /// `pf` pure page frame range, no `struct page` behind it.
        const PFN_MAP = 1 << 9;
        /// `dw` writes to the mapped file are denied (older kernels).
        const DENY_WRITE = 1 << 10;
        /// `lo` locked in memory, by `mlock` or `MAP_LOCKED`.
        const LOCKED = 1 << 11;
        /// `io` memory-mapped I/O.
        const IO = 1 << 12;
        /// `sr` `MADV_SEQUENTIAL`.
        const SEQ_READ = 1 << 13;
        /// `rr` `MADV_RANDOM`.
        const RAND_READ = 1 << 14;
        /// `dc` not copied by fork (`MADV_DONTFORK`).
        const DONT_COPY = 1 << 15;
        /// `de` cannot be grown by `mremap`.
        const DONT_EXPAND = 1 << 16;
        /// `lf` locked on fault (`MLOCK_ONFAULT`).
        const LOCK_ON_FAULT = 1 << 17;
        /// `ac` accounted against the commit limit.
        const ACCOUNT = 1 << 18;
        /// `nr` no swap space reserved (`MAP_NORESERVE`).
        const NO_RESERVE = 1 << 19;
        /// `ht` pages of hugetlbfs.
        const HUGETLB = 1 << 20;
        /// `sf` synchronous page faults (`MAP_SYNC`).
        const SYNC_FAULT = 1 << 21;
        /// `ar` architecture specific.
        const ARCH = 1 << 22;
        /// `wf` wiped in the child of a fork (`MADV_WIPEONFORK`).
        const WIPE_ON_FORK = 1 << 23;
        /// `dd` left out of core dumps (`MADV_DONTDUMP`).
        const DONT_DUMP = 1 << 24;
        /// `sd` soft-dirty: the mapping is newer than the last `clear_refs`.
        const SOFT_DIRTY = 1 << 25;
        /// `mm` may hold both page frames and `struct page`s.
        const MIXED_MAP = 1 << 26;
        /// `hg` `MADV_HUGEPAGE`.
        const HUGEPAGE = 1 << 27;
        /// `nh` `MADV_NOHUGEPAGE`.
        const NO_HUGEPAGE = 1 << 28;
        /// `mg` `MADV_MERGEABLE`.
        const MERGEABLE = 1 << 29;
        /// `bt` guarded pages of arm64.
        const ARM_BTI = 1 << 30;
        /// `mt` memory tagging of arm64.
        const MTE = 1 << 31;
        /// `um` registered with userfaultfd for missing pages.
        const UFFD_MISSING = 1 << 32;
        /// `uw` registered with userfaultfd for write protection.
        const UFFD_WP = 1 << 33;
        /// `ui` registered with userfaultfd for minor faults.
        const UFFD_MINOR = 1 << 34;
        /// `ss` shadow stack.
        const SHADOW_STACK = 1 << 35;
        /// `sl` sealed by `mseal`.
        const SEALED = 1 << 36;
        /// `dp` may be dropped under memory pressure (`MAP_DROPPABLE`).
        const DROPPABLE = 1 << 37;
        /// `wc` write-combining.
        const WRITE_COMBINE = 1 << 38;
        /// `gu` may have guard regions (Linux 6.19).
        const MAYBE_GUARD = 1 << 39;
    }
}

impl VmFlags {
    /// The flag that two letters stand for.
    pub(crate) fn from_letters(letters: &[u8]) -> Option<Self> {
        Some(match letters {
            b"rd" => Self::READ,
            b"wr" => Self::WRITE,
            b"ex" => Self::EXEC,
            b"sh" => Self::SHARED,
            b"mr" => Self::MAY_READ,
            b"mw" => Self::MAY_WRITE,
            b"me" => Self::MAY_EXEC,
            b"ms" => Self::MAY_SHARE,
            b"gd" => Self::GROWS_DOWN,
            b"pf" => Self::PFN_MAP,
            b"dw" => Self::DENY_WRITE,
            b"lo" => Self::LOCKED,
            b"io" => Self::IO,
            b"sr" => Self::SEQ_READ,
            b"rr" => Self::RAND_READ,
            b"dc" => Self::DONT_COPY,
            b"de" => Self::DONT_EXPAND,
            b"lf" => Self::LOCK_ON_FAULT,
            b"ac" => Self::ACCOUNT,
            b"nr" => Self::NO_RESERVE,
            b"ht" => Self::HUGETLB,
            b"sf" => Self::SYNC_FAULT,
            b"ar" => Self::ARCH,
            b"wf" => Self::WIPE_ON_FORK,
            b"dd" => Self::DONT_DUMP,
            b"sd" => Self::SOFT_DIRTY,
            b"mm" => Self::MIXED_MAP,
            b"hg" => Self::HUGEPAGE,
            b"nh" => Self::NO_HUGEPAGE,
            b"mg" => Self::MERGEABLE,
            b"bt" => Self::ARM_BTI,
            b"mt" => Self::MTE,
            b"um" => Self::UFFD_MISSING,
            b"uw" => Self::UFFD_WP,
            b"ui" => Self::UFFD_MINOR,
            b"ss" => Self::SHADOW_STACK,
            b"sl" => Self::SEALED,
            b"dp" => Self::DROPPABLE,
            b"wc" => Self::WRITE_COMBINE,
            b"gu" => Self::MAYBE_GUARD,
            _ => return None,
        })
    }
}
