//! The page in which the target shows from outside that it runs.
//!
//! It is a file mapped shared by both sides, so it outlives checkpoint, kill and restore, and the
//! monotonic clock's stamps in it mean the same to both.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use anyhow::{Context, Result};

use crate::sys;

/// Threads that beat; all others sleep for ever.
pub(crate) const MAX_BEATING: usize = 8;

/// What one thread shows. Cache lines of their own, so that threads do not slow each other.
#[repr(C, align(64))]
struct Slot {
    /// When it beat last; 0 for never.
    last: AtomicU64,
    /// When it beat first after a [`BeatPage::reset`].
    first: AtomicU64,
    /// The longest time between two beats since then.
    gap: AtomicU64,
}

/// The page.
#[repr(C, align(4096))]
pub(crate) struct Page {
    slots: [Slot; MAX_BEATING],
    /// Where the target's memory is, so that the floor can read it.
    pub(crate) address: AtomicU64,
    pub(crate) len: AtomicU64,
    /// How many threads beat.
    pub(crate) beating: AtomicU32,
    /// Everything is set up.
    pub(crate) ready: AtomicU32,
}

/// The target's side or ours.
#[derive(Clone, Copy)]
pub(crate) struct BeatPage(pub(crate) &'static Page);

impl BeatPage {
    /// A new page of zeros.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).and_then(|f| f.set_len(size_of::<Page>() as u64));
        file.with_context(|| format!("cannot create {}", path.display()))?;
        Self::open(path)
    }

    /// A page that is there.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let page = File::options().read(true).write(true).open(path);
        let page = page.and_then(|file| sys::map_shared::<Page>(&file));
        page.map(BeatPage)
            .with_context(|| format!("cannot map {}", path.display()))
    }

    /// One beat of the thread with that number.
    pub(crate) fn beat(self, number: usize) {
        let slot = &self.0.slots[number];
        let now = sys::now();
        let last = slot.last.swap(now, Relaxed);
        if last != 0 {
            slot.gap.fetch_max(now - last, Relaxed);
        }
        let _ = slot.first.compare_exchange(0, now, Relaxed, Relaxed);
    }

    fn beating(self) -> &'static [Slot] {
        &self.0.slots[..self.0.beating.load(Relaxed) as usize]
    }

    /// Forgets first beats and gaps. What is running meanwhile is not counted.
    pub(crate) fn reset(self) {
        for slot in self.beating() {
            slot.last.store(0, Relaxed);
            slot.first.store(0, Relaxed);
            slot.gap.store(0, Relaxed);
        }
    }

    /// When the last of the threads beat first since the reset; `None` while one has not.
    pub(crate) fn all_beat(self) -> Option<u64> {
        let firsts: Vec<u64> = self
            .beating()
            .iter()
            .map(|s| s.first.load(Relaxed))
            .collect();
        if firsts.contains(&0) {
            None
        } else {
            firsts.into_iter().max()
        }
    }

    /// When the slowest of the threads beat last.
    pub(crate) fn last_beats(self) -> u64 {
        let lasts = self.beating().iter().map(|s| s.last.load(Relaxed));
        lasts.min().unwrap_or(u64::MAX)
    }

    /// The longest gap of any thread since the reset, in seconds.
    pub(crate) fn longest_gap(self) -> f64 {
        let gaps = self.beating().iter().map(|s| s.gap.load(Relaxed));
        gaps.max().unwrap_or(0) as f64 / 1e9
    }
}
