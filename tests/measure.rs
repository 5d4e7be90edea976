//! How much memory and processor time this program takes, and a limit for the memory.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// The system's allocator, which counts.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

/// Notes how much is taken, and says whether it is within the limit.
fn has_room(now: usize) -> bool {
    PEAK.fetch_max(now, Ordering::Relaxed);
    if now <= LIMIT.load(Ordering::Relaxed) {
        return true;
    }
    // Who asked is of more use than the message that follows.
    LIMIT.store(usize::MAX, Ordering::Relaxed);
    eprintln!("{} bytes in all\n{}", now, Backtrace::force_capture());
    false
}

// SAFETY: all is done by the system's allocator; a null pointer says that there is no memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        if !has_room(now) {
            return std::ptr::null_mut();
        }
        // SAFETY: as the caller says.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Memory of any size is moved by the kernel, not copied.
        let now = match size.checked_sub(layout.size()) {
            Some(more) => NOW.fetch_add(more, Ordering::Relaxed) + more,
            None => NOW.fetch_sub(layout.size() - size, Ordering::Relaxed),
        };
        if !has_room(now) {
            return std::ptr::null_mut();
        }
        // SAFETY: as the caller says.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller says.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Does work that may take `bytes` more than is taken now; at more the program ends ("memory allocation failed").
/// Answers what it took at most.
pub(crate) fn within<T>(bytes: usize, work: impl FnOnce() -> T) -> (T, usize) {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    LIMIT.store(before + bytes, Ordering::Relaxed);
    let done = work();
    LIMIT.store(usize::MAX, Ordering::Relaxed);
    (done, PEAK.load(Ordering::Relaxed) - before)
}

/// The time that this thread has spent on a processor.
pub(crate) fn processor_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes one timespec.
    let r = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    assert_eq!(r, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
