//! Reading an image: random access, from several threads, with a check before every use.

use std::fs::File;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::check::{Layout, chunk_of};
use crate::chunk::PageRun;
use crate::codec::Kind;
use crate::error::{Error, Part, Result};
use crate::header::{Arch, Header};
use crate::index::{RECORD_BYTES, RUN_BYTES, Record, run_at};
use crate::section::{SectionInfo, SectionReader, read_record};
use crate::source::Source;

/// The index entry of one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkEntry {
    /// Position of the chunk's record in the file.
    pub offset: u64,
    /// Position of the run table in the index.
    pub(crate) table: u64,
    /// Number of page runs; [`Reader::runs`] gives them.
    pub runs: u32,
    /// Bytes of the chunk's pages.
    pub raw_len: u32,
    /// Bytes of the pages as stored.
    pub stored_len: u32,
    /// Their codec.
    pub codec: Kind,
    /// XXH3-128 of the stored bytes, little-endian.
    pub digest: [u8; 16],
}

/// An open image. Header, footer and index have been checked; pages and sections are checked when they are read.
///
/// May be shared between threads: reads are positioned, so several chunks can be read at once.
#[derive(Debug)]
pub struct Reader {
    pub(crate) source: Source,
    pub(crate) layout: Layout,
    /// The chunk that [`Reader::page`] read last; pages are usually read in sequence.
    last: Mutex<LastChunk>,
}

#[derive(Debug, Default)]
struct LastChunk {
    number: Option<usize>,
    data: Vec<u8>,
    scratch: Vec<u8>,
}

impl Reader {
    /// Opens an image file and checks header, footer and index. Nothing else is read.
    ///
    /// # Errors
    /// `Missing`, `Empty`, `NotAnImage`, `Truncated`, `NewerVersion`, `Corrupt`, `Overlap` or `Io`.
    pub fn open(path: impl AsRef<Path>) -> Result<Reader> {
        Reader::new(Source::open(path.as_ref())?)
    }

    /// Reads an image from a file that is already open; `path` is for messages.
    ///
    /// # Errors
    /// As [`Reader::open`].
    pub fn from_file(file: File, path: impl AsRef<Path>) -> Result<Reader> {
        Reader::new(Source::from_file(file, path.as_ref())?)
    }

    /// Reads an image from memory.
    ///
    /// # Errors
    /// As [`Reader::open`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Reader> {
        Reader::new(Source::from_bytes(bytes))
    }

    fn new(source: Source) -> Result<Reader> {
        let layout = Layout::read(&source)?;
        Ok(Reader {
            source,
            layout,
            last: Mutex::default(),
        })
    }

    /// The path of the image, or [`STREAM`](crate::STREAM).
    pub fn path(&self) -> &Path {
        &self.source.path
    }

    /// Length of the image in bytes.
    pub fn bytes(&self) -> u64 {
        self.source.len
    }

    /// Number of pages in all chunks.
    pub fn pages(&self) -> u64 {
        self.layout.footer.pages.get()
    }

    /// BLAKE3 of header and index; through the digests in the index it covers everything.
    pub fn digest(&self) -> [u8; 32] {
        self.layout.footer.root
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.layout.header
    }

    /// Checks that the image is of this architecture.
    ///
    /// # Errors
    /// `OtherArch`.
    pub fn require_arch(&self, wanted: Arch) -> Result<()> {
        match self.header().arch {
            found if found == wanted => Ok(()),
            found => Err(Error::OtherArch {
                path: self.path().into(),
                found,
                wanted,
            }),
        }
    }

    /// All sections in file order.
    pub fn sections(&self) -> &[SectionInfo] {
        &self.layout.sections
    }

    fn find_section(&self, name: &str) -> Result<&SectionInfo> {
        let found = self
            .sections()
            .iter()
            .find(|section| section.name() == name);
        found.ok_or_else(|| Error::NoSection {
            path: self.path().into(),
            name: name.into(),
        })
    }

    /// Reads a whole section of at most `limit` bytes.
    ///
    /// # Errors
    /// `NoSection`, `SectionTooBig`, `Corrupt`, `Codec`, `Io`.
    pub fn section(&self, name: &str, limit: u64) -> Result<Vec<u8>> {
        // Grows with the decoded bytes: a forged length allocates nothing.
        let mut bytes = Vec::new();
        let mut reader = self.section_reader(name, limit)?;
        while reader.next_block()? {
            bytes.extend_from_slice(reader.block());
        }
        Ok(bytes)
    }

    /// Reads a section of at most `limit` bytes incrementally, with the memory of one block.
    ///
    /// # Errors
    /// `NoSection`, `SectionTooBig`; reading gives [`std::io::Error`]s that hold an [`Error`].
    pub fn section_reader(&self, name: &str, limit: u64) -> Result<SectionReader<'_>> {
        let info = self.find_section(name)?;
        let size = info.raw_len();
        if size > limit {
            return Err(Error::SectionTooBig {
                path: self.path().into(),
                name: name.into(),
                size,
                limit,
            });
        }
        Ok(SectionReader::new(&self.source, &self.layout.index, info))
    }

    /// All chunks in file order.
    pub fn chunks(&self) -> &[ChunkEntry] {
        &self.layout.chunks
    }

    /// The page runs of a chunk in the order of its bytes; empty when there is no such chunk.
    pub fn runs(&self, chunk: usize) -> impl ExactSizeIterator<Item = PageRun> + Clone + '_ {
        let table = self.chunks().get(chunk).and_then(|chunk| {
            let from = chunk.table as usize;
            self.layout
                .index
                .get(from..from + chunk.runs as usize * RUN_BYTES)
        });
        let page_size = self.header().page_size;
        let none = PageRun {
            space: 0,
            start: 0,
            pages: 0,
        };
        // The runs were checked when the image was opened.
        let run = move |entry: &[u8]| run_at(entry, page_size).unwrap_or(none);
        table.unwrap_or_default().chunks_exact(RUN_BYTES).map(run)
    }

    /// Reads and checks a chunk: `into` receives the bytes of its pages. `scratch` is working memory; both keep their
    /// capacity for the next call.
    ///
    /// # Errors
    /// `Corrupt` when the stored bytes do not match their digest, `Codec` when they do not decode to the right length,
    /// `Truncated` when the file was cut since it was opened, `BadInput` when there is no such chunk, `Io`.
    pub fn read_chunk(
        &self,
        chunk: usize,
        into: &mut Vec<u8>,
        scratch: &mut Vec<u8>,
    ) -> Result<()> {
        let entry = self.chunks().get(chunk);
        let record = entry.and_then(|entry| {
            Record::at(
                self.layout
                    .index
                    .get(entry.table as usize - RECORD_BYTES..)?,
            )
        });
        let count = self.chunks().len();
        let record = record.ok_or_else(|| {
            Error::bad_input(format!("chunk {chunk} of an image that has {count}"))
        })?;
        read_record(&self.source, &record, into, scratch, || Part::Chunk(chunk))
    }

    /// The numbers of all spaces that have pages, ascending.
    pub fn spaces(&self) -> Vec<u32> {
        self.layout
            .runs
            .spaces(&self.layout.index, self.header().page_size)
    }

    /// The runs of a space by address, each with the number of its chunk.
    pub fn runs_of(&self, space: u32) -> impl Iterator<Item = (PageRun, usize)> + '_ {
        let runs = self
            .layout
            .runs
            .of_space(&self.layout.index, self.header().page_size, space);
        runs.map(|(run, place)| (run, chunk_of(self.chunks(), place)))
    }

    /// The chunk that contains the page at `address`, and the page's offset in the chunk's bytes.
    pub fn locate(&self, space: u32, address: u64) -> Option<(usize, usize)> {
        let page_size = self.header().page_size;
        let (run, place) = self
            .layout
            .runs
            .find(&self.layout.index, page_size, space, address)?;
        let chunk = chunk_of(self.chunks(), place);
        let entry = self.chunks().get(chunk)?;
        let before = (place as u64 - entry.table) as usize / RUN_BYTES;
        let skipped: u64 = self
            .runs(chunk)
            .take(before)
            .map(|run| run.bytes(page_size))
            .sum();
        let page = (address - run.start) / u64::from(page_size) * u64::from(page_size);
        Some((chunk, (skipped + page) as usize))
    }

    /// The page at `address`, or `None` if the image does not contain it.
    ///
    /// # Errors
    /// As [`Reader::read_chunk`].
    pub fn page(&self, space: u32, address: u64) -> Result<Option<Vec<u8>>> {
        let Some((chunk, at)) = self.locate(space, address) else {
            return Ok(None);
        };
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let LastChunk {
            number,
            data,
            scratch,
        } = &mut *last;
        if *number != Some(chunk) {
            *number = None;
            self.read_chunk(chunk, data, scratch)?;
            *number = Some(chunk);
        }
        Ok(data
            .get(at..at + self.header().page_size as usize)
            .map(<[u8]>::to_vec))
    }
}
