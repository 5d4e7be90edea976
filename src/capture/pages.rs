//! Writes pages to the image.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

use ckpt_image::{Chunk, Writer};
use ckpt_sys::files;
use ckpt_sys::sysv::Attached;
use ckpt_tracer::RemoteAddr;
use ckpt_tracer::mem::{self, MAX_PIECES, ProcessMemory};

use crate::error::{Error, Result};
use crate::objects::SpaceId;
use crate::objects::source::Contents;
use crate::progress::Progress;

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// How pages of a mapping are read.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// Whether zero pages are left out, because absent pages are zero.
    pub zero_is_default: bool,
    /// Whether other processes may share the pages since a fork. process_vm_readv(2) pins pages, and the kernel first
    /// unshares them (`gup_must_unshare`, mm/internal.h), so the job would grow; reading `/proc/PID/mem` leaves them
    /// shared.
    pub shared: bool,
}

/// Collects pages into chunks and submits full chunks to the writer.
pub struct PageSink<'a, W: Write + Send + 'static> {
    writer: &'a mut Writer<W>,
    chunk: Chunk,
    progress: &'a dyn Progress,
    stored: u64,
}

impl<'a, W: Write + Send + 'static> PageSink<'a, W> {
    /// A sink for a writer.
    pub fn new(writer: &'a mut Writer<W>, progress: &'a dyn Progress) -> Self {
        let chunk = writer.chunk();
        Self {
            writer,
            chunk,
            progress,
            stored: 0,
        }
    }

    /// Bytes of pages stored so far.
    pub fn stored(&self) -> u64 {
        self.stored
    }

    /// Stores ranges of a process's memory.
    pub fn memory(
        &mut self,
        mem: &ProcessMemory,
        space: SpaceId,
        ranges: impl IntoIterator<Item = (u64, u64)>,
        how: Reading,
    ) -> Result<()> {
        let views = ranges.into_iter().map(|(s, e)| (s, s, e - s));
        self.views(mem, space, views, how)
    }

    /// Stores memory that maps an object at other offsets than its addresses: (offset, address, bytes).
    fn views(
        &mut self,
        mem: &ProcessMemory,
        space: SpaceId,
        views: impl IntoIterator<Item = (u64, u64, u64)>,
        how: Reading,
    ) -> Result<()> {
        let mut batch: Vec<(u64, u64, usize)> = Vec::new();
        let mut room = self.chunk.room();
        for (mut offset, mut address, mut left) in views {
            while left > 0 {
                if room < PAGE || batch.len() == MAX_PIECES {
                    self.read_batch(mem, space, &batch, how)?;
                    batch.clear();
                    room = self.chunk.room();
                    if room < PAGE {
                        self.submit()?;
                        room = self.chunk.room();
                    }
                }
                let piece = left.min((room / PAGE * PAGE) as u64);
                batch.push((offset, address, piece as usize));
                room -= piece as usize;
                (offset, address, left) = (offset + piece, address + piece, left - piece);
            }
        }
        self.read_batch(mem, space, &batch, how)
    }

    fn read_batch(
        &mut self,
        mem: &ProcessMemory,
        space: SpaceId,
        batch: &[(u64, u64, usize)],
        how: Reading,
    ) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        let from = self.chunk.data.len();
        let pieces: Vec<(u64, usize)> = batch.iter().map(|&(_, a, len)| (a, len)).collect();
        let total: usize = pieces.iter().map(|(_, len)| len).sum();
        let mut got = match how.shared {
            true => 0,
            false => mem::append_vm(mem.pid(), &pieces, &mut self.chunk.data)?,
        };
        if got < total {
            // PROT_NONE and the like: /proc/PID/mem overrides page protections.
            self.chunk.data.resize(from + total, 0);
            let mut at = 0;
            for &(address, len) in &pieces {
                let skip = got.min(len);
                got -= skip;
                if skip < len {
                    let into = &mut self.chunk.data[from + at + skip..from + at + len];
                    mem.read(RemoteAddr(address + skip as u64), into)?;
                }
                at += len;
            }
        }
        self.progress.advance(total as u64);
        self.note(space, batch, from, how.zero_is_default);
        Ok(())
    }

    /// Adds the runs that were read, without zero pages where zero is the default.
    fn note(
        &mut self,
        space: SpaceId,
        batch: &[(u64, u64, usize)],
        from: usize,
        zero_is_default: bool,
    ) {
        let (mut read, mut write) = (from, from);
        for &(offset, _, len) in batch {
            for page in (0..len).step_by(PAGE) {
                let at = read + page;
                if zero_is_default && is_zero(&self.chunk.data[at..at + PAGE]) {
                    continue;
                }
                if at != write {
                    self.chunk.data.copy_within(at..at + PAGE, write);
                }
                write += PAGE;
                self.push_run(space, offset + page as u64);
            }
            read += len;
        }
        self.chunk.data.truncate(write);
    }

    fn push_run(&mut self, space: SpaceId, start: u64) {
        match self.chunk.runs.last_mut() {
            Some(run) if run.space == space.0 && run.end(PAGE as u32) == start => run.pages += 1,
            _ => self.chunk.runs.push(ckpt_image::PageRun {
                space: space.0,
                start,
                pages: 1,
            }),
        }
    }

    fn submit(&mut self) -> Result<()> {
        let next = self.writer.chunk();
        let full = std::mem::replace(&mut self.chunk, next);
        self.stored += full.data.len() as u64;
        self.writer.submit(full)?;
        Ok(())
    }

    /// Stores the contents of a space that is not an address space.
    pub fn contents(&mut self, space: SpaceId, contents: &Contents) -> Result<()> {
        match contents {
            Contents::File(file, size) => self.file(space, (file, *size), next_data),
            // Without searching holes.
            Contents::Held(file, size) => {
                let rest = |_: &File, from, size| (from < size).then_some((from, size));
                self.file(space, (file, *size), rest)
            }
            Contents::Memory(views) => {
                for of_one in views.chunk_by(|a, b| a.0 == b.0) {
                    let mem = ProcessMemory::open(of_one[0].0)?;
                    let views = of_one.iter().map(|v| (v.1, v.2, v.3));
                    let how = Reading {
                        zero_is_default: true,
                        shared: false,
                    };
                    self.views(&mem, space, views, how)?;
                }
                Ok(())
            }
            Contents::Segment(id, size) => self.segment(space, *id, *size),
        }
    }

    /// Stores the contents of a System V segment, which is attached temporarily.
    fn segment(&mut self, space: SpaceId, id: i32, size: u64) -> Result<()> {
        let attached = Attached::new(id, size, false).map_err(Error::file(
            "attach",
            format!("System V shared memory {id}"),
        ))?;
        let size = size.next_multiple_of(PAGE as u64);
        let mut offset = 0;
        while offset < size {
            if self.chunk.room() < PAGE {
                self.submit()?;
            }
            let room = (self.chunk.room() / PAGE * PAGE) as u64;
            let len = room.min(size - offset) as usize;
            let from = self.chunk.data.len();
            self.chunk.data.resize(from + len, 0);
            attached.read(offset, &mut self.chunk.data[from..]);
            self.progress.advance(len as u64);
            self.note(space, &[(offset, 0, len)], from, true);
            offset += len as u64;
        }
        Ok(())
    }

    /// Stores a file's data; `next` finds the next data range at or after an offset. Holes stay holes.
    fn file(
        &mut self,
        space: SpaceId,
        (file, size): (&File, u64),
        next: impl Fn(&File, u64, u64) -> Option<(u64, u64)>,
    ) -> Result<()> {
        let error = Error::file("read", "a file of the job");
        let mut at = 0;
        while let Some((start, end)) = next(file, at, size) {
            let start = start / PAGE as u64 * PAGE as u64;
            let mut offset = start;
            while offset < end {
                if self.chunk.room() < PAGE {
                    self.submit()?;
                }
                let room = (self.chunk.room() / PAGE * PAGE) as u64;
                let len = room.min((end - offset).next_multiple_of(PAGE as u64)) as usize;
                let from = self.chunk.data.len();
                self.chunk.data.resize(from + len, 0);
                let wanted = (len as u64).min(size - offset) as usize;
                read_up_to(file, &mut self.chunk.data[from..from + wanted], offset)
                    .map_err(&error)?;
                self.progress.advance(len as u64);
                self.note(space, &[(offset, 0, len)], from, true);
                offset += len as u64;
            }
            at = offset;
        }
        Ok(())
    }

    /// Submits the last chunk; returns the bytes of pages stored in all.
    pub fn finish(mut self) -> Result<u64> {
        let last = std::mem::take(&mut self.chunk);
        self.stored += last.data.len() as u64;
        self.writer.submit(last)?;
        Ok(self.stored)
    }
}

fn read_up_to(file: &File, mut into: &mut [u8], mut offset: u64) -> std::io::Result<()> {
    while !into.is_empty() {
        let read = match file.read_at(into, offset) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => read_page(file, into, offset),
            read => read,
        };
        match read {
            // Truncated meanwhile: the missing part reads as zeros.
            Ok(0) => return Ok(()),
            Ok(n) => {
                into = &mut into[n..];
                offset += n as u64;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Reads one page, or less at the end: through a descriptor of the job's with O_DIRECT the kernel may only read whole
/// pages, into aligned memory (open(2)).
fn read_page(file: &File, into: &mut [u8], offset: u64) -> std::io::Result<usize> {
    let mut room = vec![0; 2 * PAGE];
    let at = room.as_ptr().align_offset(PAGE);
    let within = (offset % PAGE as u64) as usize;
    let read = file.read_at(&mut room[at..at + PAGE], offset - within as u64)?;
    let there = &room[at..at + read];
    let there = there.get(within..).unwrap_or_default();
    let there = &there[..there.len().min(into.len())];
    into[..there.len()].copy_from_slice(there);
    Ok(there.len())
}

/// The next data range at or after `from`; everything if the file system does not report holes.
fn next_data(file: &File, from: u64, size: u64) -> Option<(u64, u64)> {
    use nix::errno::Errno;
    if from >= size {
        return None;
    }
    match files::seek(file, from, libc::SEEK_DATA) {
        Ok(start) => {
            let end = files::seek(file, start, libc::SEEK_HOLE).unwrap_or(size);
            Some((start, end.min(size)))
        }
        Err(Errno::ENXIO) => None,
        Err(_) => Some((from, size)),
    }
}

/// Whether a page is all zeros; for a data page the first words usually decide.
fn is_zero(page: &[u8]) -> bool {
    page.chunks_exact(64)
        .all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_o_direct_is_read_to_its_end() {
        use std::os::unix::fs::OpenOptionsExt;
        // Not on a tmpfs, which requires no alignment.
        let path = std::env::current_exe().unwrap().with_extension("direct");
        let bytes: Vec<u8> = (0..2 * PAGE + 700).map(|at| (at % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let mut options = std::fs::OpenOptions::new();
        let file = options.read(true).custom_flags(libc::O_DIRECT).open(&path);
        std::fs::remove_file(&path).unwrap();
        let mut read = vec![0; bytes.len() + 1];
        read_up_to(&file.unwrap(), &mut read[1..], 0).unwrap();
        assert_eq!(read[1..], bytes);
    }

    #[test]
    fn zero_is_zero_to_the_last_byte() {
        let mut page = vec![0; PAGE];
        assert!(is_zero(&page));
        page[PAGE - 1] = 1;
        assert!(!is_zero(&page));
        page[PAGE - 1] = 0;
        page[0] = 0x80;
        assert!(!is_zero(&page));
    }
}
