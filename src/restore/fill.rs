//! Pages of the image into the memory of the new process, on all processors.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use ckpt_image::{PageRun, Reader};
use ckpt_tracer::mem::{self, ProcessMemory};
use ckpt_tracer::{Pid, RemoteAddr};

use super::Request;
use crate::error::{Error, Result};
use crate::objects::Snapshot;
use crate::objects::memory::Mapping;

/// Where the pages of each space go.
struct Places<'a> {
    /// Address spaces: their pages go where they were.
    mappings: &'a [Mapping],
    address_space: u32,
    /// Shared memory objects: (space, address of offset 0, bytes).
    shared: Vec<(u32, u64, u64)>,
}

impl Places<'_> {
    /// Address and writability; `None` for pages that belong to a file and are there already.
    fn of(&self, run: &PageRun, len: u64) -> Result<Option<(u64, bool)>> {
        let outside = || {
            Error::Restore(format!(
                "the image has pages at {:#x} of space {} where nothing is mapped; it is damaged",
                run.start, run.space
            ))
        };
        if run.space == self.address_space {
            let at = self.mappings.partition_point(|m| m.end <= run.start);
            let mapping = self.mappings.get(at).filter(|m| m.start <= run.start);
            let mapping = mapping.ok_or_else(outside)?;
            // A run may go on into the next mapping; /proc/PID/mem takes both.
            let whole = run.start + len <= mapping.end;
            let writable = mapping.prot & libc::PROT_WRITE as u32 != 0;
            return Ok(Some((
                run.start,
                whole && writable && mapping.protection_key == 0,
            )));
        }
        for &(space, base, size) in &self.shared {
            if space == run.space {
                let end = run.start.checked_add(len).filter(|end| *end <= size);
                end.ok_or_else(outside)?;
                return Ok(Some((base + run.start, true)));
            }
        }
        Ok(None)
    }
}

/// Fills in everything. Every chunk is checked against its digest before its pages are used.
pub fn fill(
    image: &Reader,
    snapshot: &Snapshot,
    shared_at: &[u64],
    pid: i32,
    request: &Request<'_>,
) -> Result<()> {
    let process = &snapshot.processes[0];
    let pid = Pid(pid);
    let mem = ProcessMemory::open(pid)?;
    let places = Places {
        mappings: &process.memory.mappings,
        address_space: process.memory.space.0,
        shared: snapshot
            .shared_memory
            .iter()
            .zip(shared_at)
            .map(|(m, at)| (m.space.0, *at, m.mapped_len()))
            .collect(),
    };
    let page_size = image.header().page_size;
    let chunks = image.chunks().len();
    request.progress.begin(image.pages() * u64::from(page_size));
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let work = || -> Result<()> {
        let (mut data, mut scratch) = (Vec::new(), Vec::new());
        loop {
            let chunk = next.fetch_add(1, Ordering::Relaxed);
            if chunk >= chunks || failed.load(Ordering::Relaxed) {
                return Ok(());
            }
            let done = fill_chunk(image, chunk, &places, pid, &mem, &mut data, &mut scratch);
            if done.is_err() {
                failed.store(true, Ordering::Relaxed);
            }
            request.progress.advance(done? as u64);
        }
    };
    let workers = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(chunks.max(1));
    let result = std::thread::scope(|scope| {
        let handles: Vec<_> = (1..workers).map(|_| scope.spawn(work)).collect();
        let mut result = work();
        for handle in handles {
            let other = handle.join().unwrap_or_else(|_| {
                Err(Error::Restore(
                    "a thread that fills in memory panicked".into(),
                ))
            });
            result = result.and(other);
        }
        result
    });
    request.progress.end();
    result
}

fn fill_chunk(
    image: &Reader,
    chunk: usize,
    places: &Places<'_>,
    pid: Pid,
    mem: &ProcessMemory,
    data: &mut Vec<u8>,
    scratch: &mut Vec<u8>,
) -> Result<usize> {
    image.read_chunk(chunk, data, scratch)?;
    let page_size = image.header().page_size;
    let mut at = 0;
    for run in image.runs(chunk) {
        let len = run.bytes(page_size) as usize;
        let bytes = data.get(at..at + len).ok_or_else(|| {
            Error::Restore(format!(
                "chunk {chunk} of the image is shorter than its runs"
            ))
        })?;
        at += len;
        let Some((address, writable)) = places.of(&run, len as u64)? else {
            continue;
        };
        let address = RemoteAddr(address);
        let done = if writable {
            mem::write_vm(pid, address, bytes).unwrap_or(0)
        } else {
            0
        };
        if done < len {
            mem.write(address + done as u64, &bytes[done..])?;
        }
    }
    Ok(at)
}
