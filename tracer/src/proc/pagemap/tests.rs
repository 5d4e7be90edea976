//! Scans of our own pages, by both methods.

use super::*;
use crate::Pid;
use crate::proc::maps::{VmaName, read_maps};
use std::io::Write;
use std::os::fd::FromRawFd;

const PAGE: usize = PAGE_SIZE as usize;

/// A mapping of our own, unmapped when dropped.
struct Pages(*mut u8, usize);

impl Pages {
    fn map(count: usize, file: Option<&File>) -> Self {
        let flags = if file.is_some() {
            0
        } else {
            libc::MAP_ANONYMOUS
        };
        let fd = file.map_or(-1, |file| file.as_raw_fd());
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe {
            let at = std::ptr::null_mut();
            let at = libc::mmap(at, count * PAGE, prot, flags | libc::MAP_PRIVATE, fd, 0);
            libc::madvise(at, count * PAGE, libc::MADV_NOHUGEPAGE);
            at
        };
        assert_ne!(at, libc::MAP_FAILED);
        Self(at.cast(), count)
    }

    fn write(&self, page: usize) {
        // SAFETY: inside the mapping, which is ours and writable.
        unsafe { self.0.add(page * PAGE).write_volatile(1) };
    }

    fn read(&self, page: usize) -> u8 {
        // SAFETY: inside the mapping, which is ours and readable.
        unsafe { self.0.add(page * PAGE).read_volatile() }
    }

    fn advise(&self, pages: Range<usize>, advice: i32) -> bool {
        // SAFETY: inside the mapping, whose contents are not in use.
        unsafe {
            libc::madvise(
                self.0.add(pages.start * PAGE).cast(),
                pages.len() * PAGE,
                advice,
            ) == 0
        }
    }

    fn range(&self) -> Range<u64> {
        self.0 as u64..self.0 as u64 + (self.1 * PAGE) as u64
    }

    /// Runs as page numbers.
    fn runs(&self, scanner: &PagemapScanner, query: PageQuery) -> Vec<(u64, u64, PageCategories)> {
        let mut runs = Vec::new();
        let base = self.0 as u64;
        let number = |at: u64| (at - base) / PAGE_SIZE;
        scanner
            .scan(self.range(), query, |run| {
                runs.push((number(run.start), number(run.end), run.categories));
            })
            .unwrap();
        runs
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no reference to it is left.
        unsafe { libc::munmap(self.0.cast(), self.1 * PAGE) };
    }
}

/// A scanner of ourselves for each method that is available.
fn scanners() -> Vec<PagemapScanner> {
    let own = Pid::own();
    let first = PagemapScanner::open(own).unwrap();
    let mut second = PagemapScanner::open(own).unwrap();
    second.method = ScanMethod::Entries;
    second.unknown = PageCategories::WPALLOWED | PageCategories::PFNZERO | PageCategories::HUGE;
    if first.method == ScanMethod::Entries {
        eprintln!("skipped: PAGEMAP_SCAN (needs Linux 6.7)");
    }
    vec![first, second]
}

fn stored(scanner: &PagemapScanner, pages: &Pages) -> Vec<(u64, u64)> {
    let own = Pid::own();
    let vmas = read_maps(own).unwrap();
    // The mapping may have been merged with a neighbour.
    let vma = vmas
        .iter()
        .find(|vma| (vma.start..vma.end).contains(&pages.range().start))
        .unwrap();
    let query = PageQuery::stored_pages(vma).unwrap();
    pages
        .runs(scanner, query)
        .into_iter()
        .map(|(start, end, _)| (start, end))
        .collect()
}

#[test]
fn anonymous_pages_that_must_be_stored() {
    let pages = Pages::map(16, None);
    pages.write(1);
    pages.write(2);
    assert_eq!(pages.read(4), 0);
    pages.write(9);
    let guarded = pages.advise(6..8, 102);
    for scanner in scanners() {
        let runs = stored(&scanner, &pages);
        // An entry of pagemap does not identify the zero page 4.
        match scanner.method {
            ScanMethod::Ioctl => assert_eq!(runs, [(1, 3), (9, 10)]),
            ScanMethod::Entries => assert_eq!(runs, [(1, 3), (4, 5), (9, 10)]),
        }
        let query = PageQuery {
            required: PageCategories::GUARD,
            report: PageCategories::GUARD | PageCategories::SWAPPED,
            ..PageQuery::default()
        };
        if guarded && scanners()[0].has_guard() {
            let guard = PageCategories::GUARD | PageCategories::SWAPPED;
            assert_eq!(pages.runs(&scanner, query), [(6, 8, guard)]);
        } else {
            eprintln!("skipped: guard pages (need Linux 6.15)");
        }
    }
}

#[test]
fn private_pages_of_a_file_that_must_be_stored() {
    // SAFETY: the new descriptor belongs to the File alone.
    let mut file = unsafe {
        let fd = libc::memfd_create(c"pagemap test".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.write_all(&vec![7; 8 * PAGE]).unwrap();
    let pages = Pages::map(8, Some(&file));
    assert_eq!((pages.read(0), pages.read(6)), (7, 7));
    pages.write(2);
    pages.write(3);
    for scanner in scanners() {
        assert_eq!(stored(&scanner, &pages), [(2, 4)], "{:?}", scanner.method);
    }
}

#[test]
fn more_runs_than_fit_in_one_answer_and_across_page_tables() {
    let pages = Pages::map(6000, None);
    for page in (0..5000).step_by(2) {
        pages.write(page);
    }
    (5000..6000).for_each(|page| pages.write(page));
    let expected: Vec<_> = (0..2500)
        .map(|n| (2 * n, 2 * n + 1))
        .chain([(5000, 6000)])
        .collect();
    for scanner in scanners() {
        assert_eq!(stored(&scanner, &pages), expected, "{:?}", scanner.method);
    }
}

/// The kernel's own buffer has 512 regions: the last page of these is found after it was flushed.
const COUNTS: [usize; 12] = [
    1, 511, 512, 513, 1023, 1024, 1025, 1535, 1536, 1537, 2048, 4000,
];

#[test]
fn each_run_comes_once_however_many_there_are() {
    let pages = Pages::map(2 * COUNTS[COUNTS.len() - 1], None);
    let mut written = 0;
    for count in COUNTS {
        (written..count).for_each(|run| pages.write(2 * run));
        written = count;
        let expected: Vec<_> = (0..count as u64).map(|n| (2 * n, 2 * n + 1)).collect();
        for scanner in scanners() {
            let runs = stored(&scanner, &pages);
            assert!(runs == expected, "{count} runs, {:?}", scanner.method);
        }
    }
}

#[test]
fn masks_mean_the_same_in_both_methods() {
    let pages = Pages::map(8, None);
    pages.write(1);
    pages.write(5);
    let query = PageQuery {
        required: PageCategories::PRESENT,
        inverted: PageCategories::PRESENT,
        report: PageCategories::PRESENT,
        ..PageQuery::default()
    };
    let none = PageCategories::empty();
    for scanner in scanners() {
        let runs = pages.runs(&scanner, query);
        assert_eq!(
            runs,
            [(0, 1, none), (2, 5, none), (6, 8, none)],
            "{:?}",
            scanner.method
        );
        // What the kernel cannot report matches nothing and gives no error.
        let impossible = PageQuery {
            required: scanner.unknown,
            ..PageQuery::default()
        };
        if !scanner.unknown.is_empty() {
            assert_eq!(pages.runs(&scanner, impossible), []);
        }
    }
}

#[test]
fn shared_memory_is_stored_with_its_object() {
    let own = Pid::own();
    let mut vma = read_maps(own)
        .unwrap()
        .into_iter()
        .find(|v| v.name == VmaName::Stack)
        .unwrap();
    assert!(PageQuery::stored_pages(&vma).is_some());
    vma.shared = true;
    assert_eq!(PageQuery::stored_pages(&vma), None);
}

#[test]
fn a_dead_process_is_dead() {
    let mut child = std::process::Command::new("sleep")
        .arg("60")
        .spawn()
        .unwrap();
    let scanner = PagemapScanner::open(Pid(child.id() as i32)).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let query = PageQuery {
        required: PageCategories::PRESENT,
        ..PageQuery::default()
    };
    let answer = scanner.scan(0x1000..0x10_0000, query, |_| {});
    assert!(matches!(answer, Err(Error::Died { .. })), "{answer:?}");
}

#[repr(C)]
struct UffdRange {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// A userfaultfd that write-protects all of `pages` asynchronously.
fn protect(pages: &Pages) -> Option<File> {
    let range = pages.range();
    let mut api: [u64; 3] = [0xaa, 1 << 13 | 1 << 15, 0];
    let (start, len) = (range.start, range.end - range.start);
    let mut register = UffdRange {
        start,
        len,
        mode: 2,
        ioctls: 0,
    };
    let mut protect: [u64; 3] = [start, len, 1];
    // SAFETY: the ioctls (UFFDIO_API, UFFDIO_REGISTER, UFFDIO_WRITEPROTECT) read and fill the
    // three structs, which live on; they concern our own pages.
    unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | 1) as i32;
        if fd < 0 {
            return None;
        }
        let file = File::from_raw_fd(fd);
        let done = libc::ioctl(fd, 0xc018_aa3f_u32 as _, &raw mut api) == 0
            && libc::ioctl(fd, 0xc020_aa00_u32 as _, &raw mut register) == 0
            && libc::ioctl(fd, 0xc018_aa06_u32 as _, &raw mut protect) == 0;
        done.then_some(file)
    }
}

#[test]
fn writes_are_seen_once_and_markers_hold_nothing() {
    let pages = Pages::map(16, None);
    (0..8).for_each(|page| pages.write(page));
    let scanner = &scanners()[0];
    let Some(_uffd) = protect(&pages) else {
        eprintln!("skipped: userfaultfd write protection in async mode (needs Linux 6.7)");
        return;
    };
    let here = PageCategories::PRESENT | PageCategories::SWAPPED;
    let written = || {
        let mut runs = Vec::new();
        let number = |at: u64| (at - pages.range().start) / PAGE_SIZE;
        let found = |run: PageRun| {
            runs.push((number(run.start), number(run.end), run.categories));
        };
        scanner
            .scan_written_and_protect(pages.range(), here, found)
            .unwrap();
        runs
    };
    let (present, nothing) = (PageCategories::PRESENT, PageCategories::empty());
    assert_eq!(written(), []);
    pages.write(3);
    pages.write(12);
    assert_eq!(written(), [(3, 4, present), (12, 13, present)]);
    assert_eq!(written(), []);
    pages.write(12);
    // Discarded pages read as zeros; they are reported, as neither present nor swapped.
    assert!(pages.advise(4..6, libc::MADV_DONTNEED));
    assert_eq!(written(), [(4, 6, nothing), (12, 13, present)]);
    // Pages that do not exist carry a marker by now, which reads as "swapped".
    let query = PageQuery {
        required: PageCategories::SWAPPED,
        report: here | PageCategories::WRITTEN,
        ..PageQuery::default()
    };
    let marked = PageCategories::SWAPPED;
    let expected = [(4, 6, marked), (8, 12, marked), (13, 16, marked)];
    assert_eq!(pages.runs(scanner, query), expected);
    let run = PageRun {
        start: 0,
        end: PAGE_SIZE,
        categories: marked,
    };
    assert!(run.may_be_marker());
    let swapped = PageRun {
        categories: marked | PageCategories::WRITTEN,
        ..run
    };
    assert!(!swapped.may_be_marker());
}

#[test]
fn written_runs_come_once_though_they_are_written_meanwhile() {
    let pages = Pages::map(2 * COUNTS[COUNTS.len() - 1], None);
    (0..pages.1).for_each(|page| pages.write(page));
    let scanner = &scanners()[0];
    let Some(_uffd) = protect(&pages) else {
        eprintln!("skipped: userfaultfd write protection in async mode (needs Linux 6.7)");
        return;
    };
    for count in COUNTS {
        (0..count).for_each(|run| pages.write(2 * run));
        let mut runs = Vec::new();
        let found = |run: PageRun| {
            let number = (run.start - pages.range().start) / PAGE_SIZE;
            runs.push(number);
            pages.write(number as usize);
        };
        scanner
            .scan_written_and_protect(pages.range(), PageCategories::PRESENT, found)
            .unwrap();
        let expected: Vec<_> = (0..count as u64).map(|run| 2 * run).collect();
        assert!(runs == expected, "{count} runs come as {}", runs.len());
    }
}
