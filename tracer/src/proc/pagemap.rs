//! The populated pages of an address space: `PAGEMAP_SCAN`, else `/proc/PID/pagemap`.
//!
//! The kernel's side is `pagemap_page_category` and its siblings in `fs/proc/task_mmu.c`:
//!
//! * A page matches when `((c ^ inverted) & required) == required` and, unless `anyof` is empty, `(c ^ inverted) &
//!   anyof != 0`. Address ranges without a mapping never match.
//! * `SWAPPED` means "an entry that is not present": swapped out, but also a page under migration (it has contents),
//!   a guard page (`SWAPPED | GUARD` since Linux 6.15, `SWAPPED` alone in 6.13 and 6.14), and the marker of a page
//!   that userfaultfd write-protected before it existed (`SWAPPED` without `WRITTEN`). Only `Swap:` of smaps counts
//!   real swap entries.
//! * `WRITTEN` means "not write-protected by userfaultfd", so it is set on every page of a mapping that is not
//!   registered. A hole without any page table (a huge page after `MADV_DONTNEED`) is not reported as written by
//!   kernels before the summer of 2026, though its contents changed to zeros: compare what is present with what was
//!   before, do not rely on `WRITTEN` alone.
//! * `PFNZERO` of the huge zero page is reported since Linux 6.16 and its stable siblings; before, such a page is
//!   `PRESENT | HUGE` and costs reading 2 MiB of zeros.
//! * hugetlb pages are always `HUGE`, and `FILE` when not anonymous; they have no zero page.
//! * `FILE` needs the `struct page`, so the kernel leaves it out unless it is in a mask.
//! * An unknown category gives `EINVAL`, so `GUARD` is probed.
//! * The kernel collects regions in a buffer of 512 and continues when it was full. `walk_end` is set when the buffer
//!   is full, and to the end of the range if it never was. So it is stale when the walk continued after a full buffer
//!   and then reached the end: it lies before regions that were reported (and write-protected). Regions are in order,
//!   so everything before the larger of `walk_end` and the end of the last region has been walked.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::mem::{offset_of, size_of};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::ProcDir;
use super::maps::Vma;
use crate::{Error, Result};

/// Bytes of a page; x86-64 has no other base size.
pub const PAGE_SIZE: u64 = 4096;

/// `_IOWR('f', 16, struct pm_scan_arg)` of `linux/fs.h`.
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610_u32 as libc::Ioctl;
/// `PM_SCAN_WP_MATCHING`: write-protect matching pages.
const WP_MATCHING: u64 = 1 << 0;
/// `PM_SCAN_CHECK_WPASYNC`: `EPERM` for a mapping that is not registered.
const CHECK_WPASYNC: u64 = 1 << 1;
/// Regions a call may return.
const REGIONS: usize = 1024;

/// `struct pm_scan_arg` of `linux/fs.h` (Linux 6.7).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<ScanArg>() == 96);
const _: () = assert!(offset_of!(ScanArg, walk_end) == 32);
const _: () = assert!(offset_of!(ScanArg, return_mask) == 88);

/// `struct page_region` of `linux/fs.h`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

const _: () = assert!(size_of::<Region>() == 24);
const _: () = assert!(offset_of!(Region, categories) == 16);

bitflags::bitflags! {
    /// `PAGE_IS_*` of `linux/fs.h`; details in the module's documentation.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct PageCategories: u64 {
        /// In a mapping registered with userfaultfd for asynchronous write protection.
        const WPALLOWED = 1 << 0;
        /// Not write-protected by userfaultfd.
        const WRITTEN = 1 << 1;
        /// Page of a file or of shared memory, not anonymous.
        const FILE = 1 << 2;
        /// In memory.
        const PRESENT = 1 << 3;
        /// Not present, with an entry.
        const SWAPPED = 1 << 4;
        /// The zero page.
        const PFNZERO = 1 << 5;
        /// Part of a huge page.
        const HUGE = 1 << 6;
        /// Soft-dirty.
        const SOFT_DIRTY = 1 << 7;
        /// Guard page of `MADV_GUARD_INSTALL` (Linux 6.15).
        const GUARD = 1 << 8;
    }
}

/// Adjacent pages with the same categories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// Their categories, as far as the query reports them.
    pub categories: PageCategories,
}

impl PageRun {
    /// Whether these may be markers of userfaultfd, without contents: not present, and write-protected. A page that
    /// was swapped out, or is under migration, since it was protected looks the same. The former is excluded where
    /// [`Vma::swap`] is 0; the latter lasts microseconds, so ask again. Reading a marker makes the kernel allocate
    /// page tables in the target. Needs `PRESENT`, `SWAPPED` and `WRITTEN` in [`PageQuery::report`].
    pub fn may_be_marker(&self) -> bool {
        let of_interest =
            PageCategories::PRESENT | PageCategories::SWAPPED | PageCategories::WRITTEN;
        self.categories & of_interest == PageCategories::SWAPPED
    }
}

/// A query. `Default` matches every page and reports no categories.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageQuery {
    /// All of these must be set (or clear, if inverted).
    pub required: PageCategories,
    /// One of these must be set (or clear, if inverted), unless empty.
    pub anyof: PageCategories,
    /// Categories to invert.
    pub inverted: PageCategories,
    /// Categories to report.
    pub report: PageCategories,
}

impl PageQuery {
    /// The pages of a mapping that must be stored, because nothing else can restore them:
    ///
    /// * private anonymous memory: what is present or swapped, zero page and guard pages excepted;
    /// * private mapping of a file: what is present or swapped and not the file's own page. The zero
    ///   page counts: a private mapping of shared memory can have one where its file has bytes.
    ///
    /// In memory that is write-protected by userfaultfd see [`PageRun::may_be_marker`]. `None` for a
    /// shared mapping, whose contents belong to its object. Without
    /// [`PagemapScanner::has_guard`] guard pages are not left out.
    pub fn stored_pages(vma: &Vma) -> Option<Self> {
        if vma.shared {
            return None;
        }
        let not = if vma.is_private_anonymous() {
            PageCategories::PFNZERO | PageCategories::GUARD
        } else {
            PageCategories::FILE | PageCategories::GUARD
        };
        Some(Self {
            required: not,
            inverted: not,
            anyof: PageCategories::PRESENT | PageCategories::SWAPPED,
            report: PageCategories::PRESENT
                | PageCategories::SWAPPED
                | PageCategories::WRITTEN
                | PageCategories::HUGE,
        })
    }

    fn without(self, unknown: PageCategories) -> Self {
        // A required category that is inverted holds for every page of a kernel without it; one that is not inverted
        // holds for none, see `impossible`.
        Self {
            required: self.required - unknown,
            anyof: self.anyof - unknown,
            inverted: self.inverted - unknown,
            report: self.report - unknown,
        }
    }

    /// Whether it requires what this kernel never reports.
    fn impossible(self, unknown: PageCategories) -> bool {
        (self.required & unknown).intersects(!self.inverted)
    }

    fn matches(self, categories: PageCategories) -> bool {
        let seen = categories ^ self.inverted;
        seen.contains(self.required) && (self.anyof.is_empty() || seen.intersects(self.anyof))
    }
}

/// How pages are queried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScanMethod {
    /// `PAGEMAP_SCAN` (Linux 6.7).
    Ioctl,
    /// One 64-bit entry for each page; no `PFNZERO`, no `WPALLOWED`, no `HUGE`. Unmapped ranges look like empty
    /// pages, so scan mapping by mapping.
    Entries,
}

/// A process's page tables, open for scanning.
#[derive(Debug)]
pub struct PagemapScanner {
    dir: ProcDir,
    file: File,
    method: ScanMethod,
    unknown: PageCategories,
}

impl PagemapScanner {
    /// Opens `/proc/PID/pagemap` and probes what the kernel supports.
    ///
    /// # Errors
    /// See [`ProcDir::read`]; `EACCES` without the right to ptrace the process.
    pub fn open(process: impl Into<ProcDir>) -> Result<Self> {
        let dir = process.into();
        let path = dir.join("pagemap");
        let file = File::open(&path).map_err(|source| dir.error(path, source))?;
        let mut scanner = Self {
            dir,
            file,
            method: ScanMethod::Ioctl,
            unknown: PageCategories::empty(),
        };
        for unknown in [PageCategories::empty(), PageCategories::GUARD] {
            scanner.unknown = unknown;
            let mut arg = ScanArg {
                return_mask: (!unknown).bits(),
                ..ScanArg::default()
            };
            match scanner.ioctl(&mut arg, &mut []) {
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => break,
                Err(error) => return Err(scanner.error(error)),
                Ok(_) => return Ok(scanner),
            }
        }
        scanner.method = ScanMethod::Entries;
        // A kernel without the call (before Linux 6.7) has no guard pages (Linux 6.13) either.
        scanner.unknown = PageCategories::WPALLOWED
            | PageCategories::PFNZERO
            | PageCategories::HUGE
            | PageCategories::GUARD;
        Ok(scanner)
    }

    /// How pages are queried.
    pub fn method(&self) -> ScanMethod {
        self.method
    }

    /// Whether guard pages can be distinguished from swapped pages.
    pub fn has_guard(&self) -> bool {
        !self.unknown.contains(PageCategories::GUARD)
    }

    /// Calls `found` with each run of matching pages in the range, in order. The range is page aligned.
    ///
    /// # Errors
    /// [`Error::Died`] when the process ended or called exec after [`open`](Self::open), whatever was found until
    /// then; otherwise [`Error::Proc`].
    pub fn scan(
        &self,
        range: Range<u64>,
        query: PageQuery,
        found: impl FnMut(PageRun),
    ) -> Result<()> {
        let mut merge = Merge {
            pending: None,
            found,
        };
        if query.impossible(self.unknown) || range.is_empty() {
            return Ok(());
        }
        let query = query.without(self.unknown);
        match self.method {
            ScanMethod::Ioctl => self.walk(range, query, 0, &mut merge)?,
            ScanMethod::Entries => self.read_entries(range, query, &mut merge)?,
        }
        merge.finish();
        self.check_alive()
    }

    /// Calls `found` with each run of pages written since the last call, and write-protects them, atomically, so that
    /// no write is missed. A run that is neither `PRESENT` nor `SWAPPED` was discarded (`MADV_DONTNEED`) and reads as
    /// zeros. Every mapping in the range must be registered with userfaultfd for asynchronous write protection
    /// (otherwise `EPERM`).
    ///
    /// # Errors
    /// As [`scan`](Self::scan); `ENOTTY` when the kernel lacks the call.
    pub fn scan_written_and_protect(
        &self,
        range: Range<u64>,
        report: PageCategories,
        found: impl FnMut(PageRun),
    ) -> Result<()> {
        if self.method == ScanMethod::Entries {
            return Err(self.error(io::Error::from_raw_os_error(libc::ENOTTY)));
        }
        let query = PageQuery {
            required: PageCategories::WRITTEN,
            report,
            ..PageQuery::default()
        };
        let mut merge = Merge {
            pending: None,
            found,
        };
        let flags = WP_MATCHING | CHECK_WPASYNC;
        self.walk(range, query.without(self.unknown), flags, &mut merge)?;
        merge.finish();
        self.check_alive()
    }

    fn walk(
        &self,
        range: Range<u64>,
        query: PageQuery,
        flags: u64,
        merge: &mut Merge<impl FnMut(PageRun)>,
    ) -> Result<()> {
        let mut regions = vec![Region::default(); REGIONS];
        let mut start = range.start;
        while start < range.end {
            let mut arg = ScanArg {
                flags,
                start,
                end: range.end,
                category_inverted: query.inverted.bits(),
                category_mask: query.required.bits(),
                category_anyof_mask: query.anyof.bits(),
                return_mask: query.report.bits(),
                ..ScanArg::default()
            };
            let filled = self
                .ioctl(&mut arg, &mut regions)
                .map_err(|error| self.error(error))?;
            let found = &regions[..filled.min(REGIONS)];
            for region in found {
                let categories = PageCategories::from_bits_truncate(region.categories);
                merge.push(PageRun {
                    start: region.start,
                    end: region.end,
                    categories,
                });
            }
            // `walk_end` may be stale, see above.
            let walked = arg.walk_end.max(found.last().map_or(0, |last| last.end));
            // Without progress this would loop forever.
            if walked <= start {
                return Err(self
                    .dir
                    .syntax("pagemap", format!("no progress at {start:#x}")));
            }
            start = walked;
        }
        Ok(())
    }

    /// One call; returns the number of regions filled.
    fn ioctl(&self, arg: &mut ScanArg, regions: &mut [Region]) -> io::Result<usize> {
        arg.size = size_of::<ScanArg>() as u64;
        arg.vec = if regions.is_empty() {
            0
        } else {
            regions.as_mut_ptr() as u64
        };
        arg.vec_len = regions.len() as u64;
        // SAFETY: `arg` is a live pm_scan_arg whose size field is its size, and `vec`/`vec_len`
        // describe `regions`, which is borrowed mutably for the time of the call.
        let rc = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut *arg) };
        usize::try_from(rc).map_err(|_| io::Error::last_os_error())
    }

    fn read_entries(
        &self,
        range: Range<u64>,
        query: PageQuery,
        merge: &mut Merge<impl FnMut(PageRun)>,
    ) -> Result<()> {
        let mut buffer = vec![0u8; 64 << 10];
        let mut at = range.start;
        while at < range.end {
            let pages = (range.end - at)
                .div_ceil(PAGE_SIZE)
                .min(buffer.len() as u64 / 8);
            let want = &mut buffer[..pages as usize * 8];
            let offset = at / PAGE_SIZE * 8;
            let got = self
                .file
                .read_at(want, offset)
                .map_err(|error| self.error(error))?;
            if got < 8 {
                // Past the end of user addresses.
                break;
            }
            for entry in want[..got].chunks_exact(8) {
                let entry = entry.try_into().map_or(0, u64::from_ne_bytes);
                let categories = entry_categories(entry);
                if query.matches(categories) {
                    let categories = categories & query.report;
                    merge.push(PageRun {
                        start: at,
                        end: at + PAGE_SIZE,
                        categories,
                    });
                }
                at += PAGE_SIZE;
            }
        }
        Ok(())
    }

    /// The address space of a process that ended scans as empty, without an error. pagemap gives entries only while
    /// it has users, so reading one shows that it is alive.
    fn check_alive(&self) -> Result<()> {
        match self.file.read_at(&mut [0; 8], 0) {
            Ok(0) => Err(Error::Died {
                tid: self.dir.tid(),
            }),
            Ok(_) => Ok(()),
            Err(error) => Err(self.error(error)),
        }
    }

    fn error(&self, source: io::Error) -> Error {
        self.dir.error(self.dir.join("pagemap"), source)
    }
}

/// `Documentation/admin-guide/mm/pagemap.rst`; bits 0-54 (the frame) are 0 without privilege.
fn entry_categories(entry: u64) -> PageCategories {
    let bit = |number: u32, category: PageCategories| {
        if entry >> number & 1 == 1 {
            category
        } else {
            PageCategories::empty()
        }
    };
    let mut categories = bit(55, PageCategories::SOFT_DIRTY)
        | bit(58, PageCategories::GUARD)
        | bit(61, PageCategories::FILE)
        | bit(62, PageCategories::SWAPPED)
        | bit(63, PageCategories::PRESENT);
    // Bit 57: write-protected by userfaultfd (Linux 5.13).
    if entry >> 57 & 1 == 0
        && categories.intersects(PageCategories::PRESENT | PageCategories::SWAPPED)
    {
        categories |= PageCategories::WRITTEN;
    }
    categories
}

/// Merges adjacent runs: the kernel ends one at each page table and at each full buffer.
struct Merge<F: FnMut(PageRun)> {
    pending: Option<PageRun>,
    found: F,
}

impl<F: FnMut(PageRun)> Merge<F> {
    fn push(&mut self, run: PageRun) {
        match &mut self.pending {
            Some(last) if last.end == run.start && last.categories == run.categories => {
                last.end = run.end;
            }
            pending => {
                if let Some(last) = pending.replace(run) {
                    (self.found)(last);
                }
            }
        }
    }

    fn finish(mut self) {
        if let Some(last) = self.pending.take() {
            (self.found)(last);
        }
    }
}

#[cfg(test)]
mod tests;
