//! Pages that a forked process shares with its parent are stored once.

use std::fs::File;
use std::os::unix::fs::FileExt;

use ckpt_tracer::mem::ProcessMemory;
use ckpt_tracer::proc::ProcDir;

use super::pages::PAGE;
use crate::error::Result;
use crate::objects::memory::{intersect, join};

/// Bytes compared at a time.
const BATCH: u64 = 1 << 20;
/// `PM_MMAP_EXCLUSIVE`: no other process maps the page (Documentation/admin-guide/mm/pagemap.rst). Visible without
/// privilege, unlike the page's number.
const EXCLUSIVE: u64 = 1 << 56;

/// Compares a child with its parent.
pub(super) struct Comparison<'a> {
    /// The parent's memory.
    pub parent: &'a ProcessMemory,
    /// The child's.
    pub child: &'a ProcessMemory,
    /// Ranges of common origin: pages of the parent, in mappings inherited by the fork. Ascending.
    pub common: Vec<(u64, u64)>,
    /// `/proc/PID/pagemap` of the child; without it contents alone decide.
    pub pagemap: Option<File>,
}

/// Pages of the child, in two parts.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Split {
    /// To be stored.
    pub own: Vec<(u64, u64)>,
    /// Equal to the parent's.
    pub inherited: Vec<(u64, u64)>,
}

impl Comparison<'_> {
    /// The child's pagemap.
    pub(super) fn pagemap(child: &ProcDir) -> Option<File> {
        File::open(child.join("pagemap")).ok()
    }

    /// Splits pages of the child (ascending) into its own and those equal to its parent's.
    pub(super) fn split(&self, pages: &[(u64, u64)]) -> Result<Split> {
        let mut inherited = Vec::new();
        for (mut at, end) in intersect(pages, &self.common) {
            while at < end {
                let len = (end - at).min(BATCH);
                self.compare(at, len, &mut inherited)?;
                at += len;
            }
        }
        let inherited = join(inherited);
        let own = crate::objects::memory::subtract(pages, &inherited);
        Ok(Split { own, inherited })
    }

    fn compare(&self, at: u64, len: u64, inherited: &mut Vec<(u64, u64)>) -> Result<()> {
        let pages = (len / PAGE as u64) as usize;
        let mut entries = vec![0; pages * 8];
        let shown = self.pagemap.as_ref().is_some_and(|file| {
            let offset = at / PAGE as u64 * 8;
            file.read_exact_at(&mut entries, offset).is_ok()
        });
        let shared = |page: usize| {
            let entry = entries[page * 8..][..8].first_chunk();
            !shown || entry.is_none_or(|e| u64::from_le_bytes(*e) & EXCLUSIVE == 0)
        };
        if (0..pages).all(|page| !shared(page)) {
            return Ok(());
        }
        // Not by process_vm_readv(2): see `Reading::shared`.
        let of = |memory: &ProcessMemory| {
            let mut bytes = vec![0; len as usize];
            memory.read(ckpt_tracer::RemoteAddr(at), &mut bytes)?;
            Ok::<_, ckpt_tracer::Error>(bytes)
        };
        let (parent, child) = (of(self.parent)?, of(self.child)?);
        for page in (0..pages).filter(|page| shared(*page)) {
            let range = page * PAGE..(page + 1) * PAGE;
            if parent[range.clone()] == child[range] {
                let start = at + (page * PAGE) as u64;
                inherited.push((start, start + PAGE as u64));
            }
        }
        Ok(())
    }
}
