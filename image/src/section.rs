//! Named sections: a sequence of bounded blocks, decoded one at a time.

use std::io::{self, Read};

use crate::codec::{Kind, decode};
use crate::error::{Error, Part, Result};
use crate::index::{RECORD_BYTES, Record, payload_digest, section_name};
use crate::source::Source;

/// The index entry of one section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SectionInfo {
    pub(crate) place: [u8; 16],
    version: u16,
    raw_len: u64,
    stored_len: u64,
    /// Position of the first block's record in the index; the others follow.
    first: u64,
    blocks: u32,
    seen: u32,
}

impl SectionInfo {
    pub(crate) fn first(record: &Record, at: usize) -> Self {
        let mut info = SectionInfo {
            place: record.name,
            version: record.version.get(),
            raw_len: 0,
            stored_len: 0,
            first: at as u64,
            blocks: record.blocks.get(),
            seen: 0,
        };
        info.add(record);
        info
    }

    pub(crate) fn add(&mut self, record: &Record) {
        self.raw_len += u64::from(record.raw_len.get());
        self.stored_len += u64::from(record.stored_len.get());
        self.seen += 1;
    }

    pub(crate) fn continues(&self, next: &Record) -> bool {
        (self.place, self.version, self.blocks)
            == (next.name, next.version.get(), next.blocks.get())
            && self.seen == next.block.get()
            && !self.is_whole()
    }

    pub(crate) fn is_whole(&self) -> bool {
        self.seen == self.blocks
    }

    /// The section's name.
    pub fn name(&self) -> &str {
        section_name(&self.place).unwrap_or_default()
    }

    /// Version of the section's contents, set by its writer.
    pub fn version(&self) -> u16 {
        self.version
    }

    /// Bytes of the section when decoded.
    pub fn raw_len(&self) -> u64 {
        self.raw_len
    }

    /// Bytes of the section in the file.
    pub fn stored_len(&self) -> u64 {
        self.stored_len
    }
}

/// Reads one section; see [`Reader::section_reader`](crate::Reader::section_reader).
///
/// Each block is checked against its digest before it is decoded. An error is an [`io::Error`] that holds an [`Error`].
pub struct SectionReader<'a> {
    source: &'a Source,
    /// The index from this section's next block on.
    index: &'a [u8],
    left: u32,
    block: Vec<u8>,
    at: usize,
    scratch: Vec<u8>,
}

impl<'a> SectionReader<'a> {
    pub(crate) fn new(source: &'a Source, index: &'a [u8], info: &SectionInfo) -> Self {
        let index = index.get(info.first as usize..).unwrap_or_default();
        SectionReader {
            source,
            index,
            left: info.blocks,
            block: Vec::new(),
            at: 0,
            scratch: Vec::new(),
        }
    }

    /// Decodes the next block into `block`; false at the end.
    pub(crate) fn next_block(&mut self) -> Result<bool> {
        if self.left == 0 {
            return Ok(false);
        }
        let Some(record) = Record::at(self.index) else {
            return Ok(false);
        };
        read_record(
            self.source,
            &record,
            &mut self.block,
            &mut self.scratch,
            || part_of(&record),
        )?;
        self.index = &self.index[RECORD_BYTES..];
        self.left -= 1;
        self.at = 0;
        Ok(true)
    }

    pub(crate) fn block(&self) -> &[u8] {
        &self.block
    }
}

impl Read for SectionReader<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.at == self.block.len() {
            if !self.next_block().map_err(io::Error::other)? {
                return Ok(0);
            }
        }
        let count = into.len().min(self.block.len() - self.at);
        into[..count].copy_from_slice(&self.block[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

/// The part that an error about a record names.
pub(crate) fn part_of(record: &Record) -> Part {
    Part::Section {
        name: section_name(&record.name).unwrap_or_default().into(),
        block: record.block.get(),
    }
}

/// Reads the stored bytes of a record, checks their digest, then decodes them into `into`.
pub(crate) fn read_record(
    source: &Source,
    record: &Record,
    into: &mut Vec<u8>,
    scratch: &mut Vec<u8>,
    part: impl Fn() -> Part,
) -> Result<()> {
    let codec = Kind::from_byte(record.codec).unwrap_or(Kind::None);
    let payload = record.offset.get() + RECORD_BYTES as u64 + u64::from(record.table_len.get());
    let stored = if codec == Kind::None {
        &mut *into
    } else {
        &mut *scratch
    };
    resize(stored, record.stored_len.get() as usize);
    source.read_exact_at(stored, payload)?;
    if payload_digest(stored) != record.digest {
        return Err(Error::corrupt(
            &source.path,
            part(),
            "its bytes do not match its digest",
        ));
    }
    if codec != Kind::None {
        resize(into, record.raw_len.get() as usize);
        decode(codec, scratch, into).map_err(|reason| Error::Codec {
            path: source.path.clone(),
            part: part(),
            codec: codec.name(),
            reason,
        })?;
    }
    Ok(())
}

/// Reserves exactly `len` bytes; doubling would exceed the documented bounds.
pub(crate) fn resize(buffer: &mut Vec<u8>, len: usize) {
    buffer.reserve_exact(len.saturating_sub(buffer.len()));
    buffer.resize(len, 0);
}
