//! Verification of every byte of an image, on several processors.

use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Builder};

use crate::error::{Error, Part, Result};
use crate::header::HEADER_BYTES;
use crate::index::{FOOTER_BYTES, KIND_CHUNK, RECORD_BYTES, Record};
use crate::reader::Reader;
use crate::section::{part_of, read_record, resize};

/// Most threads, so that memory is bounded on any machine: each holds a chunk's raw and stored bytes.
const THREADS: usize = 8;

/// Smaller images are read faster than a thread is started.
const WORTH_A_THREAD: u64 = 4 << 20;

/// The result of [`Reader::verify`].
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
    /// BLAKE3 of header and index; through the digests in the index it covers everything.
    pub digest: [u8; 32],
}

/// The next record to read, assigned in file order.
#[derive(Default)]
struct Queue {
    at: usize,
    chunks: usize,
    /// The first damage in the file, with its position; after a find no more records are assigned.
    damage: Option<(u64, Error)>,
}

impl Reader {
    /// Reads every byte, checks every digest, and decodes every chunk and section.
    /// `progress` is called with the bytes done and the total, in the calling thread.
    ///
    /// # Errors
    /// The first damage in file order: `Corrupt`, `Codec`, `Truncated` or `Io`.
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifySummary> {
        let footer = &self.layout.footer;
        let total = self.source.len;
        let mut done = (HEADER_BYTES + FOOTER_BYTES + self.layout.index.len()) as u64;
        progress(done, total);
        let queue = Mutex::new(Queue::default());
        let threads = match total {
            ..WORTH_A_THREAD => 0,
            _ => thread::available_parallelism()
                .map_or(1, Into::into)
                .min(THREADS),
        };
        thread::scope(|scope| {
            let (tell, told) = channel();
            let mut started = 0;
            for _ in 0..threads {
                let (tell, queue) = (tell.clone(), &queue);
                let thread = Builder::new().name("ckpt-verify".into());
                started += usize::from(
                    thread
                        .spawn_scoped(scope, move || self.verify_some(queue, &tell))
                        .is_ok(),
                );
            }
            if started == 0 {
                self.verify_some(&queue, &tell);
            }
            drop(tell);
            for bytes in told {
                done += bytes;
                progress(done, total);
            }
        });
        let damage = queue
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .damage;
        if let Some((_, error)) = damage {
            return Err(error);
        }
        Ok(VerifySummary {
            bytes: done,
            chunks: footer.chunks.get(),
            pages: footer.pages.get(),
            sections: footer.sections.get(),
            digest: footer.root,
        })
    }

    /// Main function of a verifying thread.
    fn verify_some(&self, queue: &Mutex<Queue>, tell: &Sender<u64>) {
        let index = &self.layout.index[..];
        let lock = || queue.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut raw, mut scratch) = (Vec::new(), Vec::new());
        loop {
            let mut next = lock();
            let record = index.get(next.at..).and_then(Record::at);
            let (Some(record), None) = (record, &next.damage) else {
                return;
            };
            let end = next.at + RECORD_BYTES + record.table_len.get() as usize;
            let (expected, chunk) = (&index[next.at..end], next.chunks);
            next.at = end;
            next.chunks += usize::from(record.kind == KIND_CHUNK);
            drop(next);
            let part = || {
                if record.kind == KIND_CHUNK {
                    Part::Chunk(chunk)
                } else {
                    part_of(&record)
                }
            };
            let checked = self
                .compare_header(&record, expected, &mut scratch, part)
                .and_then(|()| read_record(&self.source, &record, &mut raw, &mut scratch, part));
            match checked {
                // The calling thread receives until all senders are dropped.
                Ok(()) => drop(tell.send(record.total())),
                Err(error) => {
                    let (offset, mut queue) = (record.offset.get(), lock());
                    if queue
                        .damage
                        .as_ref()
                        .is_none_or(|(before, _)| offset < *before)
                    {
                        queue.damage = Some((offset, error));
                    }
                }
            }
        }
    }

    /// Compares the record's header and run table in the file with the index.
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
