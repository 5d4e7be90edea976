//! Bounds of memory: of the reader by the file, of the writer by its threads.
//!
//! One test only, because the counting allocator counts the whole process.
#![allow(missing_docs, unsafe_code)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{Read, Write};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use ckpt_image::{CHUNK_BYTES, Codec, MAX_CHUNK, Reader, Writer, WriterOptions};
use common::forge::{Forged, forge, reseal};
use common::*;

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), SeqCst) + layout.size();
        PEAK.fetch_max(now, SeqCst);
        // SAFETY: the caller's promises are those that System asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), SeqCst);
        // SAFETY: as above.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The peak of allocated bytes above those at its start.
fn peak<T>(body: impl FnOnce() -> T) -> (T, usize) {
    let before = NOW.load(SeqCst);
    PEAK.store(before, SeqCst);
    let result = body();
    (result, PEAK.load(SeqCst) - before)
}

/// Allowance above the file's size: for each verifying thread one decoded chunk and one being decoded, decoder state,
/// error texts.
fn constant(chunk: usize) -> usize {
    let threads = std::thread::available_parallelism()
        .map_or(1, Into::into)
        .min(8);
    threads * 2 * chunk + (1 << 20)
}

fn read_all(path: &std::path::Path) {
    let Ok(reader) = Reader::open(path) else {
        return;
    };
    let _ = reader.verify(&mut |_, _| {});
    for section in reader.sections() {
        let Ok(mut section) = reader.section_reader(section.name(), u64::MAX) else {
            continue;
        };
        let mut buffer = [0; 4096];
        while section.read(&mut buffer).is_ok_and(|count| count > 0) {}
    }
}

#[test]
fn memory_is_bounded() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let measure = |what: &str, bytes: &[u8], constant: usize| {
        std::fs::write(&path, bytes).unwrap();
        let ((), used) = peak(|| read_all(&path));
        assert!(
            used <= bytes.len() + constant,
            "{what}: {used} bytes for a file of {}",
            bytes.len()
        );
        used
    };

    // Forged numbers, at every position.
    let good = tiny(Codec::Zstd(1));
    let from = forge::index(&good).unwrap().start;
    for at in (16..good.len() - 80).filter(|at| *at < 24 || *at >= from) {
        for value in [u64::MAX, 1 << 62, u64::from(u32::MAX), 1 << 24] {
            let mut bad = good.clone();
            bad[at..at + 8].copy_from_slice(&value.to_le_bytes());
            reseal(&mut bad);
            measure("a lying number", &bad, constant(MAX_CHUNK));
        }
    }

    // The most memory that an index can require: only runs of one page, in the worst order.
    let zeros = zstd::bulk::compress(&vec![0; 256 * PAGE], 1).unwrap();
    let chunks: Vec<_> = (0..1500u64)
        .rev()
        .map(|chunk| {
            let runs: Vec<_> = (0..256)
                .rev()
                .map(|page| (1, (chunk * 256 + page) * 2, 1))
                .collect();
            Forged::chunk(2, &runs, zeros.clone())
        })
        .collect();
    let bytes = forge(&good, &chunks);
    assert!(bytes.len() > 9 << 20);
    measure("runs of one page", &bytes, constant(CHUNK_BYTES));

    // Only the smallest chunks and sections.
    let zeros = zstd::bulk::compress(&[0; PAGE], 1).unwrap();
    let chunks: Vec<_> = (0..30_000)
        .map(|n| Forged::chunk(2, &[(1, n, 1)], zeros.clone()))
        .collect();
    measure("smallest chunks", &forge(&good, &chunks), constant(PAGE));
    let sections: Vec<_> = (0..30_000u32)
        .map(|n| Forged::block(format!("s{n}").as_bytes(), 0, 1, vec![]))
        .collect();
    std::fs::write(directory.path().join("sections"), forge(&good, &sections)).unwrap();
    let file = directory.path().join("sections");
    let (opened, used) = peak(|| Reader::open(&file));
    let len = std::fs::metadata(&file).unwrap().len() as usize;
    assert!(
        opened.is_ok() && used <= len + (1 << 16),
        "{used} bytes for {len}"
    );

    // A section that decodes to a thousand times the file, read incrementally.
    let zeros = zstd::bulk::compress(&vec![0; 256 << 10], 1).unwrap();
    let blocks = 400;
    let bomb: Vec<_> = (0..blocks)
        .map(|n| Forged {
            codec: 2,
            raw: 256 << 10,
            ..Forged::block(b"bomb", n, blocks, zeros.clone())
        })
        .collect();
    let bytes = forge(&good, &bomb);
    assert!(bytes.len() < 100_000);
    let used = measure("a section's bomb", &bytes, constant(256 << 10));
    assert!(used > 256 << 10, "the section was not read");

    the_writer_is_bounded();
}

struct Slow;

impl Write for Slow {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        std::thread::sleep(std::time::Duration::from_micros(200));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn the_writer_is_bounded() {
    for codec in CODECS {
        let threads = 2;
        let options = WriterOptions { codec, threads };
        let ((), used) = peak(|| {
            let mut writer = Writer::new(Slow, &header(), options).unwrap();
            for n in 0..100 {
                let mut chunk = writer.chunk();
                let room = (chunk.room() / PAGE) as u32;
                chunk.extend(0, n << 20, PAGE as u32, room).fill(n as u8);
                writer.submit(chunk).unwrap();
            }
            writer.finish().unwrap();
        });
        // In flight: two threads and four more; one held by the caller. Raw and, with lz4, 1.1 times as much again.
        let bound = (threads + 4 + 1) * (2 * CHUNK_BYTES + CHUNK_BYTES / 8) + (1 << 20);
        assert!(
            used < bound,
            "{codec}: {used} bytes where {bound} are the bound"
        );
    }
}
