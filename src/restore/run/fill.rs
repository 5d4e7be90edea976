//! Fills pages of the image into the memory of new processes, on all processors.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use ckpt_image::{PageRun, Reader};
use ckpt_tracer::mem::{self, ProcessMemory};
use ckpt_tracer::{Pid, RemoteAddr};

use crate::error::{Error, Result};
use crate::objects::Snapshot;
use crate::objects::memory::{Mapping, SharedAt, intersect};
use crate::progress::Progress;

/// The image, with an index of the chunks of each space.
pub struct Pages<'a> {
    image: &'a Reader,
    chunks: HashMap<u32, Vec<usize>>,
    progress: &'a dyn Progress,
    alone: bool,
}

/// The destination of the pages of one space.
enum Place {
    /// An address space: at their addresses; only those within the ranges, if there are any.
    Memory(Option<Vec<(u64, u64)>>),
    /// A shared memory object: address of offset 0, and its size in bytes.
    Shared(u64, u64),
}

/// Destinations in one process.
struct Places<'a> {
    mappings: &'a [Mapping],
    by_space: HashMap<u32, Place>,
}

impl<'a> Pages<'a> {
    /// Indexes an image.
    pub fn of(image: &'a Reader, progress: &'a dyn Progress) -> Self {
        let mut chunks: HashMap<u32, Vec<usize>> = HashMap::new();
        for chunk in 0..image.chunks().len() {
            for run in image.runs(chunk) {
                let list = chunks.entry(run.space).or_default();
                if list.last() != Some(&chunk) {
                    list.push(chunk);
                }
            }
        }
        Self {
            image,
            chunks,
            progress,
            alone: false,
        }
    }

    /// Whether to use no further threads.
    pub fn alone(self, alone: bool) -> Self {
        Self { alone, ..self }
    }

    /// Fills one process. Every chunk is checked against its digest before its pages are used. A forked process
    /// inherits its parent's pages and shared memory.
    pub fn fill(
        &self,
        snapshot: &Snapshot,
        index: usize,
        forked: bool,
        shared_at: &SharedAt,
    ) -> Result<()> {
        let process = &snapshot.processes[index];
        let pid = Pid(process.pid);
        let mem = ProcessMemory::open(pid)?;
        let mut by_space = HashMap::new();
        by_space.insert(process.memory.space.0, Place::Memory(None));
        if !forked {
            from_ancestors(snapshot, index, &mut by_space);
            let shared = snapshot.shared_memory.iter().zip(shared_at);
            by_space.extend(
                shared.filter_map(|(m, at)| {
                    at.map(|at| (m.space.0, Place::Shared(at, m.mapped_len())))
                }),
            );
        }
        let places = Places {
            mappings: &process.memory.mappings,
            by_space,
        };
        let lists = places.by_space.keys().filter_map(|s| self.chunks.get(s));
        let mut chunks: Vec<usize> = lists.flatten().copied().collect();
        chunks.sort_unstable();
        chunks.dedup();
        self.fill_chunks(&chunks, &places, &mem)
    }

    fn fill_chunks(
        &self,
        chunks: &[usize],
        places: &Places<'_>,
        mem: &ProcessMemory,
    ) -> Result<()> {
        let next = AtomicUsize::new(0);
        let failed = AtomicBool::new(false);
        let work = || -> Result<()> {
            let (mut data, mut scratch) = (Vec::new(), Vec::new());
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(&chunk) = chunks.get(at).filter(|_| !failed.load(Ordering::Relaxed))
                else {
                    return Ok(());
                };
                let done = self.fill_chunk(chunk, places, mem, &mut data, &mut scratch);
                if done.is_err() {
                    failed.store(true, Ordering::Relaxed);
                }
                self.progress.advance(done? as u64);
            }
        };
        let workers = std::thread::available_parallelism()
            .map_or(1, usize::from)
            .min(chunks.len());
        if workers <= 1 || self.alone {
            return work();
        }
        std::thread::scope(|scope| {
            // If no thread can be created, this one does it all.
            let start = || std::thread::Builder::new().spawn_scoped(scope, work).ok();
            let handles: Vec<_> = (1..workers).filter_map(|_| start()).collect();
            let mut result = work();
            for handle in handles {
                let other = handle.join().unwrap_or_else(|_| {
                    Err(Error::Bug("a thread that fills in memory panicked".into()))
                });
                result = result.and(other);
            }
            result
        })
    }

    /// Fills from one chunk; returns the bytes for this process.
    fn fill_chunk(
        &self,
        chunk: usize,
        places: &Places<'_>,
        mem: &ProcessMemory,
        data: &mut Vec<u8>,
        scratch: &mut Vec<u8>,
    ) -> Result<usize> {
        self.image.read_chunk(chunk, data, scratch)?;
        let page_size = self.image.header().page_size;
        let (mut at, mut filled) = (0, 0);
        for run in self.image.runs(chunk) {
            let len = run.bytes(page_size) as usize;
            let bytes = data
                .get(at..at + len)
                .ok_or_else(|| Error::Pages(format!("chunk {chunk} is shorter than its runs")))?;
            at += len;
            for (start, address, len, writable) in places.of(&run, len as u64)? {
                let from = (start - run.start) as usize;
                write(mem, address, &bytes[from..from + len as usize], writable)?;
                filled += len as usize;
            }
        }
        Ok(filled)
    }
}

fn write(mem: &ProcessMemory, address: u64, bytes: &[u8], writable: bool) -> Result<()> {
    let address = RemoteAddr(address);
    let done = if writable {
        mem::write_vm(mem.pid(), address, bytes).unwrap_or(0)
    } else {
        0
    };
    if done < bytes.len() {
        mem.write(address + done as u64, &bytes[done..])?;
    }
    Ok(())
}

/// Pages that the process shared with its parent but does not inherit by a fork: they are stored with an ancestor.
fn from_ancestors(snapshot: &Snapshot, index: usize, by_space: &mut HashMap<u32, Place>) {
    let mut process = &snapshot.processes[index];
    let mut wanted = process.memory.inherited.clone();
    while !wanted.is_empty() {
        let parent = process.parent;
        let Some(next) = snapshot.processes.iter().find(|p| p.pid == parent) else {
            return;
        };
        let same = process.shares.memory;
        process = next;
        if same {
            continue;
        }
        let inherited = &process.memory.inherited;
        let further = intersect(&wanted, inherited);
        let stored = crate::objects::memory::subtract(&wanted, inherited);
        by_space.insert(process.memory.space.0, Place::Memory(Some(stored)));
        wanted = further;
    }
}

impl Places<'_> {
    /// Pieces of a run for this process: (position, address, bytes, whether it is writable). Empty for pages of
    /// another process, or of a file, which exist already.
    fn of(&self, run: &PageRun, len: u64) -> Result<Vec<(u64, u64, u64, bool)>> {
        let outside = || {
            let (start, space) = (run.start, run.space);
            Error::Pages(format!(
                "it has pages at {start:#x} of space {space} where nothing is mapped"
            ))
        };
        let whole = (run.start, run.start + len);
        match self.by_space.get(&run.space) {
            None => Ok(Vec::new()),
            Some(Place::Memory(None)) => Ok(vec![self.in_memory(whole).ok_or_else(outside)?]),
            Some(Place::Memory(Some(ranges))) => intersect(&[whole], ranges)
                .into_iter()
                .map(|piece| self.in_memory(piece).ok_or_else(outside))
                .collect(),
            Some(Place::Shared(base, size)) => {
                let end = run.start.checked_add(len).filter(|end| end <= size);
                end.ok_or_else(outside)?;
                Ok(vec![(run.start, base + run.start, len, true)])
            }
        }
    }

    fn in_memory(&self, (start, end): (u64, u64)) -> Option<(u64, u64, u64, bool)> {
        let at = self.mappings.partition_point(|m| m.end <= start);
        let mapping = self.mappings.get(at).filter(|m| m.start <= start)?;
        // A run may extend into the next mapping; /proc/PID/mem writes both.
        let whole = end <= mapping.end;
        let writable = mapping.prot & libc::PROT_WRITE as u32 != 0;
        let writable = whole && writable && mapping.protection_key == 0;
        Some((start, start, end - start, writable))
    }
}
