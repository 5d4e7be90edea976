//! The encoding of records: record headers, run tables, the footer.
//!
//! The index of an image repeats its record headers and run tables, in file order, so there is one encoding and the
//! copies are compared as bytes.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::chunk::PageRun;

/// The most raw bytes in one block of a section.
pub const SECTION_BLOCK: usize = 256 << 10;

pub(crate) const FOOTER_BYTES: usize = 160;
pub(crate) const FOOTER_MAGIC: [u8; 8] = *b"CKPTEND\n";
pub(crate) const RECORD_BYTES: usize = size_of::<Record>();
pub(crate) const RUN_BYTES: usize = size_of::<RawRun>();

pub(crate) const KIND_CHUNK: u8 = 1;
pub(crate) const KIND_SECTION: u8 = 2;

/// The header of one record: a chunk of pages or a block of a section.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Record {
    pub(crate) kind: u8,
    pub(crate) codec: u8,
    /// Version of the section; 0 for a chunk.
    pub(crate) version: U16,
    pub(crate) raw_len: U32,
    pub(crate) stored_len: U32,
    /// Bytes of the run table that follows; 0 for a section.
    pub(crate) table_len: U32,
    /// Position of this record in the file.
    pub(crate) offset: U64,
    /// XXH3-128 of the stored bytes, little-endian.
    pub(crate) digest: [u8; 16],
    /// Number of this block in its section; 0 for a chunk.
    pub(crate) block: U32,
    /// Number of blocks of the section; 0 for a chunk.
    pub(crate) blocks: U32,
    /// Padded with zeros; all zeros for a chunk.
    pub(crate) name: [u8; 16],
}

const _: () = assert!(RECORD_BYTES == 64);

impl Record {
    pub(crate) fn zeroed(kind: u8) -> Self {
        Record {
            kind,
            ..Record::new_zeroed()
        }
    }

    /// The record at the start of `bytes`; the checks of the index guarantee it.
    pub(crate) fn at(bytes: &[u8]) -> Option<Record> {
        Record::read_from_prefix(bytes)
            .ok()
            .map(|(record, _)| record)
    }

    /// Bytes of header, run table and stored bytes.
    pub(crate) fn total(&self) -> u64 {
        RECORD_BYTES as u64 + u64::from(self.table_len.get()) + u64::from(self.stored_len.get())
    }
}

pub(crate) fn payload_digest(stored: &[u8]) -> [u8; 16] {
    xxhash_rust::xxh3::xxh3_128(stored).to_le_bytes()
}

/// A run in twelve bytes: the number of the first page times 4096, plus the number of pages minus one.
///
/// Page numbers have at most 52 bits, because pages have at least 4096 bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRun {
    space: U32,
    packed: U64,
}

/// The most pages that one table entry can name; more than a chunk can have.
const RUN_PAGES: u64 = 4096;
const _: () = assert!(crate::chunk::MAX_CHUNK as u64 / 4096 <= RUN_PAGES);

pub(crate) fn push_run(table: &mut Vec<u8>, run: &PageRun, page_size: u32) {
    let page = run.start / u64::from(page_size);
    let packed = (page << 12) | (u64::from(run.pages - 1) % RUN_PAGES);
    table.extend_from_slice(
        RawRun {
            space: run.space.into(),
            packed: packed.into(),
        }
        .as_bytes(),
    );
}

/// The run at the start of `bytes`, or `None` when there are too few bytes or its end exceeds 64 bits.
pub(crate) fn run_at(bytes: &[u8], page_size: u32) -> Option<PageRun> {
    let (raw, _) = RawRun::ref_from_prefix(bytes).ok()?;
    let packed = raw.packed.get();
    let start = (packed >> 12).checked_mul(page_size.into())?;
    let run = PageRun {
        space: raw.space.get(),
        start,
        pages: (packed % RUN_PAGES) as u32 + 1,
    };
    start.checked_add(run.bytes(page_size))?;
    Some(run)
}

/// The last bytes of an image.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Footer {
    pub(crate) image_id: [u8; 16],
    pub(crate) index_offset: U64,
    pub(crate) index_len: U64,
    pub(crate) total_len: U64,
    pub(crate) records: U64,
    pub(crate) chunks: U64,
    pub(crate) sections: U64,
    pub(crate) runs: U64,
    pub(crate) pages: U64,
    pub(crate) reserved: [u8; 8],
    /// BLAKE3 of the header and the index.
    pub(crate) root: [u8; 32],
    /// BLAKE3 of the footer's bytes before this field.
    pub(crate) seal: [u8; 32],
    pub(crate) magic: [u8; 8],
}

const _: () = assert!(size_of::<Footer>() == FOOTER_BYTES);

impl Footer {
    /// The digest of the footer's fields.
    pub(crate) fn own_seal(&self) -> [u8; 32] {
        let covered = FOOTER_BYTES - self.seal.len() - self.magic.len();
        *blake3::hash(&self.as_bytes()[..covered]).as_bytes()
    }
}

/// The name in a section's record, if it is one to sixteen characters of `a-z 0-9 . _ -` padded with zeros.
pub(crate) fn section_name(place: &[u8; 16]) -> Option<&str> {
    let end = place
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(place.len());
    let (name, padding) = place.split_at(end);
    let allowed =
        |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(byte);
    if name.is_empty() || !name.iter().all(allowed) || padding.iter().any(|byte| *byte != 0) {
        return None;
    }
    std::str::from_utf8(name).ok()
}

/// The sixteen bytes of a section's name in its records.
pub(crate) fn section_place(name: &str) -> Option<[u8; 16]> {
    let mut place = [0; 16];
    place
        .get_mut(..name.len())?
        .copy_from_slice(name.as_bytes());
    section_name(&place)?.eq(name).then_some(place)
}

/// The number of the chunk whose run table contains the position `place` of an index.
pub(crate) fn chunk_at(index: &[u8], place: usize) -> usize {
    let (mut at, mut chunk) = (0, 0);
    while let Some(record) = index.get(at..).and_then(Record::at) {
        at += RECORD_BYTES + record.table_len.get() as usize;
        if at > place {
            break;
        }
        chunk += usize::from(record.kind == KIND_CHUNK);
    }
    chunk
}
