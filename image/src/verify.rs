//! Reading every byte of an image.

use crate::error::{Error, Part, Result};
use crate::header::HEADER_BYTES;
use crate::index::{FOOTER_BYTES, KIND_CHUNK, RECORD_BYTES, Record};
use crate::reader::Reader;
use crate::section::{part_of, read_record, resize};

/// What [`Reader::verify`] found whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VerifySummary {
    /// Bytes of the image, each covered by a check.
    pub bytes: u64,
    /// Number of chunks.
    pub chunks: u64,
    /// Number of pages.
    pub pages: u64,
    /// Number of sections.
    pub sections: u64,
    /// BLAKE3 of header and index, and with the digests in the index of everything.
    pub digest: [u8; 32],
}

impl Reader {
    /// Reads every byte, checks every digest, and decodes every chunk and section.
    /// `progress` is told bytes done and bytes in total.
    ///
    /// # Errors
    /// The first damage in file order: `Corrupt`, `Codec`, `Truncated` or `Io`.
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifySummary> {
        let index = &self.layout.index[..];
        let total = self.source.len;
        let mut done = (HEADER_BYTES + FOOTER_BYTES + index.len()) as u64;
        let (mut raw, mut scratch) = (Vec::new(), Vec::new());
        let (mut at, mut chunk) = (0, 0);
        progress(done, total);
        while let Some(record) = index.get(at..).and_then(Record::at) {
            let end = at + RECORD_BYTES + record.table_len.get() as usize;
            let part = || {
                if record.kind == KIND_CHUNK {
                    Part::Chunk(chunk)
                } else {
                    part_of(&record)
                }
            };
            self.compare_header(&record, &index[at..end], &mut scratch, part)?;
            read_record(&self.source, &record, &mut raw, &mut scratch, part)?;
            chunk += usize::from(record.kind == KIND_CHUNK);
            at = end;
            done += record.total();
            progress(done, total);
        }
        let footer = &self.layout.footer;
        Ok(VerifySummary {
            bytes: done,
            chunks: footer.chunks.get(),
            pages: footer.pages.get(),
            sections: footer.sections.get(),
            digest: footer.root,
        })
    }

    /// The record's header and run table in the file must be those in the index.
    fn compare_header(
        &self,
        record: &Record,
        expected: &[u8],
        scratch: &mut Vec<u8>,
        part: impl Fn() -> Part,
    ) -> Result<()> {
        resize(scratch, expected.len());
        self.source.read_exact_at(scratch, record.offset.get())?;
        if scratch != expected {
            let reason = "its header in the file differs from that in the index";
            return Err(Error::corrupt(&self.source.path, part(), reason));
        }
        Ok(())
    }
}
