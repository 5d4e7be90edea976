//! Images for tests.
#![allow(dead_code, missing_docs, unreachable_pub)]

pub mod forge;

use std::io::Write;

use ckpt_image::{Chunk, Codec, Header, ImageSummary, Result, Writer, WriterOptions};

pub const PAGE: usize = 4096;

pub const CODECS: [Codec; 4] = [Codec::None, Codec::Lz4, Codec::Zstd(1), Codec::Gzip(1)];

pub fn header() -> Header {
    Header {
        image_id: *b"an image's own i",
        pid: 4711,
        processes: 2,
        threads: 3,
        comm: "sleeper".into(),
        command_line: "sleeper --long 10".into(),
        ..Header::default()
    }
}

pub fn options(codec: Codec) -> WriterOptions {
    WriterOptions { codec, threads: 2 }
}

/// A compressible page, identified by its number.
pub fn page(number: u64) -> Vec<u8> {
    let mut page = vec![(number % 251) as u8; PAGE];
    page[..8].copy_from_slice(&number.to_le_bytes());
    page
}

/// Bytes that do not compress.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(step).take(len).collect()
}

pub fn chunk_of(pages: &[(u32, u64, Vec<u8>)]) -> Chunk {
    let mut chunk = Chunk::default();
    for (space, start, data) in pages {
        chunk.push(*space, *start, PAGE as u32, data);
    }
    chunk
}

/// Three chunks in two spaces and two sections.
pub fn tiny(codec: Codec) -> Vec<u8> {
    write_small(codec, header(), 0).0
}

/// The same with a third section of two blocks; a few kilobytes when compressed.
pub fn small(codec: Codec) -> (Vec<u8>, ImageSummary) {
    write_small(codec, header(), 300 << 10)
}

pub fn write_small(codec: Codec, header: Header, long: usize) -> (Vec<u8>, ImageSummary) {
    let mut writer = Writer::new(Vec::new(), &header, options(codec)).unwrap();
    fill_small(&mut writer, long).unwrap();
    writer.finish().unwrap()
}

pub fn fill_small<W: Write + Send + 'static>(writer: &mut Writer<W>, long: usize) -> Result<()> {
    writer.section("meta", 7, b"about the job")?;
    let (near, far) = ([page(8), page(9)].concat(), page(1));
    writer.submit(chunk_of(&[(1, 0x8000, near), (0, 0x1000, far)]))?;
    writer.submit(chunk_of(&[(1, 0x1000, page(101))]))?;
    writer.section("empty", 1, b"")?;
    writer.submit(chunk_of(&[(0, 0x4000, page(4)), (0, 0x6000, page(6))]))?;
    if long > 0 {
        writer.section("long", 1, &vec![42; long])?;
    }
    Ok(())
}
