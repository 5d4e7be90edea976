//! Runs of pages, and the buffer in which a capture collects them.

use crate::error::{Error, Result};

/// The raw bytes that a capture collects in one chunk.
pub const CHUNK_BYTES: usize = 1 << 20;

/// The most raw bytes of a chunk in a file.
pub const MAX_CHUNK: usize = 4 << 20;

/// Consecutive pages of one space (an address space, or an object with pages of its own).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageRun {
    /// Number of the space; its meaning is up to the caller.
    pub space: u32,
    /// Byte address or offset of the first page, page-aligned.
    pub start: u64,
    /// Number of pages, at least one.
    pub pages: u32,
}

impl PageRun {
    /// Bytes of the run's pages.
    pub fn bytes(&self, page_size: u32) -> u64 {
        u64::from(self.pages) * u64::from(page_size)
    }

    /// Address after the last page; does not overflow for runs that passed the writer's or reader's checks.
    pub fn end(&self, page_size: u32) -> u64 {
        self.start.wrapping_add(self.bytes(page_size))
    }
}

/// One chunk being filled by a capture.
///
/// `data.len()` is the sum of the runs' pages in bytes, in the order of the runs. Callers should collect up to
/// [`CHUNK_BYTES`]; up to [`MAX_CHUNK`] are accepted.
#[derive(Debug, Default)]
pub struct Chunk {
    /// Which pages `data` holds.
    pub runs: Vec<PageRun>,
    /// Their contents.
    pub data: Vec<u8>,
}

impl Chunk {
    /// Bytes left up to [`CHUNK_BYTES`].
    pub fn room(&self) -> usize {
        CHUNK_BYTES.saturating_sub(self.data.len())
    }

    /// Appends pages. A run that continues the one before is merged with it.
    /// `data` must be whole pages of the image's page size, which [`Writer::submit`](crate::Writer::submit) checks.
    pub fn push(&mut self, space: u32, start: u64, page_size: u32, data: &[u8]) {
        self.note(space, start, page_size, data.len());
        self.data.extend_from_slice(data);
    }

    /// Appends `pages` zeroed pages and returns their bytes to be filled in.
    pub fn extend(&mut self, space: u32, start: u64, page_size: u32, pages: u32) -> &mut [u8] {
        let old = self.data.len();
        let new = pages as usize * page_size as usize;
        self.note(space, start, page_size, new);
        self.data.resize(old + new, 0);
        &mut self.data[old..]
    }

    fn note(&mut self, space: u32, start: u64, page_size: u32, bytes: usize) {
        let run = PageRun {
            space,
            start,
            pages: (bytes / page_size as usize) as u32,
        };
        match self.runs.last_mut() {
            Some(last) if last.space == space && last.end(page_size) == start => {
                last.pages += run.pages
            }
            _ => self.runs.push(run),
        }
    }
}

/// Checks the runs of a chunk against the format.
pub(crate) fn check(runs: &[PageRun], data: usize, page_size: u32) -> Result<()> {
    if data > MAX_CHUNK {
        return Err(Error::bad_input(format!(
            "a chunk of {data} bytes, where {MAX_CHUNK} are allowed"
        )));
    }
    let mut sum = 0u64;
    for run in runs {
        let PageRun {
            space,
            start,
            pages,
        } = *run;
        if pages == 0
            || start % u64::from(page_size) != 0
            || start.checked_add(run.bytes(page_size)).is_none()
        {
            return Err(Error::bad_input(format!(
                "{pages} pages at {start:#x} of space {space} are not a run of {page_size}-byte pages"
            )));
        }
        sum += run.bytes(page_size);
    }
    if sum != data as u64 {
        return Err(Error::bad_input(format!(
            "a chunk of {data} bytes whose runs have {sum}"
        )));
    }
    Ok(())
}
