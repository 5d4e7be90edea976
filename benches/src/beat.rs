//! The page through which the target shows that it runs.
//!
//! It is a file mapped shared by both sides, so it survives checkpoint, kill and restore, and both use timestamps of
//! the monotonic clock.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use anyhow::{Context, Result};

use crate::sys;

/// Most threads that beat; all others sleep.
pub(crate) const MAX_BEATING: usize = 8;

/// State of one thread, in a cache line of its own, so that threads do not slow each other.
#[repr(C, align(64))]
struct Slot {
    /// Time of the last beat; 0 for never.
    last: AtomicU64,
    /// Time of the first beat after a [`BeatPage::reset`].
    first: AtomicU64,
    /// The longest time between two beats since then.
    gap: AtomicU64,
}

/// The page.
#[repr(C, align(4096))]
pub(crate) struct Page {
    slots: [Slot; MAX_BEATING],
    /// Address of the target's memory, for the floor measurement.
    pub(crate) address: AtomicU64,
    pub(crate) len: AtomicU64,
    /// Number of beating threads.
    pub(crate) beating: AtomicU32,
    /// Everything is set up.
    pub(crate) ready: AtomicU32,
}

/// The target's side or ours.
#[derive(Clone, Copy)]
pub(crate) struct BeatPage(pub(crate) &'static Page);

impl BeatPage {
    /// Creates a page of zeros.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).and_then(|f| f.set_len(size_of::<Page>() as u64));
        file.with_context(|| format!("cannot create {}", path.display()))?;
        Self::open(path)
    }

    /// Opens an existing page.
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

    /// Resets first beats and gaps. Beats during the reset do not count.
    pub(crate) fn reset(self) {
        for slot in self.beating() {
            slot.last.store(0, Relaxed);
            slot.first.store(0, Relaxed);
            slot.gap.store(0, Relaxed);
        }
    }

    /// Time when the last of the threads beat first since the reset; `None` while one has not.
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

    /// Time of the last beat of the slowest thread.
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
