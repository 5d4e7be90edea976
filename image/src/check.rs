//! Checks of footer and index, before any other part of an image is used.

use std::path::Path;

use zerocopy::FromBytes;

use crate::chunk::MAX_CHUNK;
use crate::codec::Kind;
use crate::error::{Error, Part, Result};
use crate::header::{HEADER_BYTES, Header};
use crate::index::{
    FOOTER_BYTES, FOOTER_MAGIC, Footer, KIND_CHUNK, KIND_SECTION, RECORD_BYTES, RUN_BYTES, Record,
    SECTION_BLOCK, run_at, section_name,
};
use crate::overlap::{MAX_INDEX, SortedRuns};
use crate::reader::ChunkEntry;
use crate::section::SectionInfo;
use crate::source::Source;

/// Header, footer and index of an image, checked against each other and the file's length.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) header: Header,
    pub(crate) footer: Footer,
    pub(crate) index: Vec<u8>,
    pub(crate) chunks: Vec<ChunkEntry>,
    pub(crate) sections: Vec<SectionInfo>,
    pub(crate) runs: SortedRuns,
}

impl Layout {
    pub(crate) fn read(source: &Source) -> Result<Layout> {
        let path = source.path.as_path();
        let mut first = [0; HEADER_BYTES];
        let first = &mut first[..source.len.min(HEADER_BYTES as u64) as usize];
        source.read_exact_at(first, 0)?;
        let header = Header::parse(first, path)?;
        let footer = read_footer(source, &header)?;
        let index = source.read_vec(footer.index_len.get() as usize, footer.index_offset.get())?;
        let mut root = blake3::Hasher::new();
        root.update(first).update(&index);
        if *root.finalize().as_bytes() != footer.root {
            let reason = "header and index do not match the digest in the footer";
            return Err(Error::corrupt(path, Part::Index, reason));
        }
        let mut walk = Walk::new(path, &header, &footer);
        walk.records(&index)?;
        let Walk {
            chunks, sections, ..
        } = walk;
        check_names(path, &sections)?;
        let runs = SortedRuns::new(&index, header.page_size, footer.runs.get() as usize);
        if let Some((space, address, first, second)) = runs.overlap(&index, header.page_size) {
            let (first, second) = (chunk_of(&chunks, first), chunk_of(&chunks, second));
            return Err(Error::Overlap {
                path: path.into(),
                space,
                address,
                first,
                second,
            });
        }
        Ok(Layout {
            header,
            footer,
            index,
            chunks,
            sections,
            runs,
        })
    }
}

/// The number of the chunk whose run table contains a position in the index.
pub(crate) fn chunk_of(chunks: &[ChunkEntry], place: usize) -> usize {
    chunks
        .partition_point(|chunk| chunk.table <= place as u64)
        .saturating_sub(1)
}

fn read_footer(source: &Source, header: &Header) -> Result<Footer> {
    let path = source.path.as_path();
    let Some(at) = source
        .len
        .checked_sub(FOOTER_BYTES as u64)
        .filter(|at| *at >= HEADER_BYTES as u64)
    else {
        return Err(Error::truncated(
            path,
            format!("it ends after {} bytes, without a footer", source.len),
        ));
    };
    let mut bytes = [0; FOOTER_BYTES];
    source.read_exact_at(&mut bytes, at)?;
    let corrupt = |reason: &str| Err(Error::corrupt(path, Part::Footer, reason));
    let Ok(footer) = Footer::read_from_bytes(&bytes) else {
        return corrupt("it has the wrong length");
    };
    if footer.magic != FOOTER_MAGIC {
        return Err(Error::truncated(path, "it does not end with a footer"));
    }
    if footer.seal != footer.own_seal() {
        return corrupt("its bytes do not match its digest");
    }
    if footer.image_id != header.image_id {
        return corrupt("it belongs to another image than the header");
    }
    if footer.total_len.get() != source.len {
        let reason = format!(
            "it has {} bytes and should have {}",
            source.len, footer.total_len
        );
        return Err(Error::truncated(path, reason));
    }
    let (index, len) = (footer.index_offset.get(), footer.index_len.get());
    if index < HEADER_BYTES as u64 || index.checked_add(len) != Some(at) {
        return corrupt("it puts the index elsewhere than between the records and itself");
    }
    // Every record is in the file a second time, so the index has at most half of what follows the header.
    if len > index - HEADER_BYTES as u64 || len >= MAX_INDEX {
        return corrupt("its index is longer than the records it describes");
    }
    // The counts must fit the index before memory is allocated for them.
    let records = footer.records.get().checked_mul(RECORD_BYTES as u64);
    let runs = footer.runs.get().checked_mul(RUN_BYTES as u64);
    let known = footer.chunks.get().checked_add(footer.sections.get());
    let fits = records
        .zip(runs)
        .and_then(|(records, runs)| records.checked_add(runs))
        == Some(len);
    if !fits || known.is_none_or(|known| known > footer.records.get()) {
        return corrupt("its counts do not fit the length of the index");
    }
    Ok(footer)
}

/// Names must be unique, or the result of `section` would depend on the reader.
fn check_names(path: &Path, sections: &[SectionInfo]) -> Result<()> {
    let mut order: Vec<u32> = (0..sections.len() as u32).collect();
    order.sort_unstable_by_key(|number| &sections[*number as usize].place);
    for pair in order.windows(2) {
        let (a, b) = (&sections[pair[0] as usize], &sections[pair[1] as usize]);
        if a.place == b.place {
            return Err(Error::corrupt(
                path,
                Part::Index,
                format!("section {:?} occurs twice", a.name()),
            ));
        }
    }
    Ok(())
}

/// A pass over the records of an index, in file order.
struct Walk<'a> {
    path: &'a Path,
    page_size: u32,
    footer: &'a Footer,
    /// Where the next record must be, so that there are no gaps between records.
    offset: u64,
    pages: u64,
    chunks: Vec<ChunkEntry>,
    sections: Vec<SectionInfo>,
}

impl<'a> Walk<'a> {
    fn new(path: &'a Path, header: &Header, footer: &'a Footer) -> Self {
        Walk {
            path,
            page_size: header.page_size,
            footer,
            offset: HEADER_BYTES as u64,
            pages: 0,
            chunks: Vec::with_capacity(footer.chunks.get() as usize),
            sections: Vec::with_capacity(footer.sections.get() as usize),
        }
    }

    fn records(&mut self, index: &[u8]) -> Result<()> {
        let mut at = 0;
        while at < index.len() {
            let Some(record) = Record::at(&index[at..]) else {
                return Err(self.bad_index(format!("it ends inside a record at its byte {at}")));
            };
            let end = (at + RECORD_BYTES).checked_add(record.table_len.get() as usize);
            let Some(table) = end.and_then(|end| index.get(at + RECORD_BYTES..end)) else {
                return Err(self.bad_index(format!("it ends inside a run table at its byte {at}")));
            };
            match record.kind {
                KIND_CHUNK => self.chunk(&record, table, at)?,
                KIND_SECTION => self.section(&record, at)?,
                kind => {
                    return Err(
                        self.bad_index(format!("a record of unknown kind {kind} at its byte {at}"))
                    );
                }
            }
            self.offset += record.total();
            at += RECORD_BYTES + table.len();
        }
        let footer = self.footer;
        let counts = [
            self.chunks.len() as u64,
            self.sections.len() as u64,
            self.pages,
        ];
        if counts
            != [
                footer.chunks.get(),
                footer.sections.get(),
                footer.pages.get(),
            ]
        {
            return Err(self.bad_index("its records are not as many as the footer says".into()));
        }
        if self.offset != footer.index_offset.get() {
            return Err(self.bad_index(format!(
                "its records end at {} and not where it begins",
                self.offset
            )));
        }
        match self.sections.last() {
            Some(last) if !last.is_whole() => {
                Err(self.bad_index(format!("section {:?} lacks its last blocks", last.name())))
            }
            _ => Ok(()),
        }
    }

    /// Checks common to all records.
    fn record(&self, record: &Record, part: &Part) -> Result<Kind> {
        let corrupt = |reason: String| Err(Error::corrupt(self.path, part.clone(), reason));
        if record.offset.get() != self.offset {
            return corrupt(format!(
                "it is said to be at byte {} and not {}",
                record.offset, self.offset
            ));
        }
        if self.offset + record.total() > self.footer.index_offset.get() {
            return corrupt(format!("its {} bytes reach into the index", record.total()));
        }
        let Some(codec) = Kind::from_byte(record.codec) else {
            return corrupt(format!("it names the unknown codec {}", record.codec));
        };
        let (raw, stored) = (record.raw_len.get(), record.stored_len.get());
        if (codec == Kind::None && stored != raw) || (codec != Kind::None && stored >= raw) {
            return corrupt(format!(
                "{raw} bytes cannot be stored as {} in {stored}",
                codec.name()
            ));
        }
        Ok(codec)
    }

    fn chunk(&mut self, record: &Record, table: &[u8], at: usize) -> Result<()> {
        let part = Part::Chunk(self.chunks.len());
        self.finished_section(&part)?;
        let codec = self.record(record, &part)?;
        let corrupt = |reason: String| Err(Error::corrupt(self.path, part.clone(), reason));
        let raw = record.raw_len.get();
        let unused = [
            record.block.get(),
            record.blocks.get(),
            record.version.get().into(),
        ];
        if unused != [0; 3] || record.name != [0; 16] {
            return corrupt("it has fields of a section".into());
        }
        if raw == 0
            || raw as usize > MAX_CHUNK
            || table.is_empty()
            || !table.len().is_multiple_of(RUN_BYTES)
        {
            return corrupt(format!(
                "it has {raw} bytes of pages and a run table of {} bytes",
                table.len()
            ));
        }
        let mut sum = 0;
        for entry in table.chunks_exact(RUN_BYTES) {
            match run_at(entry, self.page_size) {
                Some(run) => sum += run.bytes(self.page_size),
                None => return corrupt("one of its runs reaches beyond the last address".into()),
            }
        }
        if sum != raw.into() {
            return corrupt(format!("its runs have {sum} bytes and its pages {raw}"));
        }
        self.pages += sum / u64::from(self.page_size);
        // Memory was allocated for the number in the footer; more must not extend it.
        if self.chunks.len() == self.chunks.capacity() {
            return corrupt("there are more chunks than the footer says".into());
        }
        self.chunks.push(ChunkEntry {
            offset: self.offset,
            table: (at + RECORD_BYTES) as u64,
            runs: (table.len() / RUN_BYTES) as u32,
            raw_len: raw,
            stored_len: record.stored_len.get(),
            codec,
            digest: record.digest,
        });
        Ok(())
    }

    fn section(&mut self, record: &Record, at: usize) -> Result<()> {
        let Some(name) = section_name(&record.name) else {
            return Err(self.bad_index(format!("a section without a proper name at its byte {at}")));
        };
        let (block, blocks, raw) = (
            record.block.get(),
            record.blocks.get(),
            record.raw_len.get() as usize,
        );
        let part = Part::Section {
            name: name.into(),
            block,
        };
        self.record(record, &part)?;
        let corrupt = |reason: String| Err(Error::corrupt(self.path, part.clone(), reason));
        if record.table_len.get() != 0 {
            return corrupt("it has fields of a chunk".into());
        }
        if block >= blocks {
            return corrupt(format!("it is said to be one of {blocks} blocks"));
        }
        let last = block == blocks - 1;
        if raw > SECTION_BLOCK || (!last && raw != SECTION_BLOCK) || (raw == 0 && blocks > 1) {
            return corrupt(format!("block {block} of {blocks} has {raw} bytes"));
        }
        if block == 0 {
            self.finished_section(&part)?;
            if self.sections.len() == self.sections.capacity() {
                return corrupt("there are more sections than the footer says".into());
            }
            self.sections.push(SectionInfo::first(record, at));
            return Ok(());
        }
        match self.sections.last_mut() {
            Some(section) if section.continues(record) => section.add(record),
            _ => return corrupt("it does not follow the block before".into()),
        }
        Ok(())
    }

    /// The blocks of a section are adjacent.
    fn finished_section(&self, next: &Part) -> Result<()> {
        match self.sections.last() {
            Some(last) if !last.is_whole() => {
                let reason = format!("it stands where section {:?} should go on", last.name());
                Err(Error::corrupt(self.path, next.clone(), reason))
            }
            _ => Ok(()),
        }
    }

    fn bad_index(&self, reason: String) -> Error {
        Error::corrupt(self.path, Part::Index, reason)
    }
}
