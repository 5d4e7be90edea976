//! Writing an image, forward only: the sink may be a pipe.

use std::collections::HashSet;
use std::io::{self, IoSlice, Write};
use std::sync::Arc;
use std::thread::JoinHandle;

use zerocopy::{FromZeros, IntoBytes};

use crate::chunk::{self, Chunk};
use crate::codec::Codec;
use crate::error::{Error, Result, STREAM};
use crate::header::{HEADER_BYTES, Header, valid_page_size};
use crate::index::{
    self, FOOTER_BYTES, FOOTER_MAGIC, Footer, KIND_CHUNK, KIND_SECTION, RUN_BYTES, Record,
    SECTION_BLOCK,
};
use crate::overlap::SortedRuns;
use crate::pipeline::{Job, Pipeline, ReportPanic};

/// Records that may wait for the sink in addition to those being compressed, which absorbs jitter.
const SLACK: usize = 4;

/// Most threads by default: more compress faster than any sink takes, and each costs memory.
const MOST_THREADS: usize = 64;

/// Options of a [`Writer`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriterOptions {
    /// Compression of chunks and sections.
    pub codec: Codec,
    /// Compressing threads; 0 means one for each processor, up to 64. Each costs about 2 MiB of buffers.
    pub threads: usize,
}

/// Summary of a written image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSummary {
    /// Length of the image.
    pub bytes: u64,
    /// Number of chunks.
    pub chunks: u64,
    /// Number of pages in them.
    pub pages: u64,
    /// Uncompressed bytes of the pages.
    pub raw_page_bytes: u64,
    /// Stored bytes of the pages.
    pub stored_page_bytes: u64,
    /// Number of sections.
    pub sections: u64,
    /// Uncompressed bytes of the sections.
    pub raw_section_bytes: u64,
    /// BLAKE3 of header and index; through the digests in the index it covers everything.
    pub digest: [u8; 32],
}

/// Writes one image to a sink, compressing on several threads while the caller collects the next pages.
///
/// An error of the sink is returned by the next [`submit`](Writer::submit), [`section`](Writer::section) or
/// [`finish`](Writer::finish), and by every later one. A writer dropped before `finish` stops its threads (after a
/// write in progress) and leaves an incomplete image, which no reader accepts.
pub struct Writer<W: Write + Send + 'static> {
    pipeline: Arc<Pipeline>,
    workers: Vec<JoinHandle<()>>,
    output: Option<JoinHandle<io::Result<Output<W>>>>,
    names: HashSet<[u8; 16]>,
    page_size: u32,
}

impl<W: Write + Send + 'static> Writer<W> {
    /// Starts an image by writing the header.
    ///
    /// `header.version` and `header.codec` are replaced by the actual ones.
    ///
    /// # Errors
    /// `BadInput` for a page size the format does not have, `Io` when threads cannot be started.
    /// Errors of the sink come later.
    pub fn new(sink: W, header: &Header, options: WriterOptions) -> Result<Self> {
        if !valid_page_size(header.page_size) {
            return Err(Error::bad_input(format!(
                "pages of {} bytes",
                header.page_size
            )));
        }
        let threads = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get().min(MOST_THREADS)),
            threads => threads,
        };
        let pipeline = Arc::new(Pipeline::new(threads + SLACK));
        let mut writer = Writer {
            pipeline: pipeline.clone(),
            workers: Vec::with_capacity(threads),
            output: None,
            names: HashSet::new(),
            page_size: header.page_size,
        };
        for _ in 0..threads {
            let pipeline = pipeline.clone();
            writer.workers.push(spawn("ckpt-compress", move || {
                pipeline.work(options.codec)
            })?);
        }
        let output = Output::new(sink, header, options.codec);
        writer.output = Some(spawn("ckpt-write", move || output.run(&pipeline))?);
        Ok(writer)
    }

    /// An empty chunk to fill, from a pool. Blocks while as many chunks as there are threads, and four more, are in
    /// flight; this bounds the writer's memory.
    pub fn chunk(&mut self) -> Chunk {
        Chunk {
            runs: Vec::new(),
            data: self.pipeline.buffer(),
        }
    }

    /// Submits a chunk for compression and writing; an empty one is recycled.
    ///
    /// Each page may be submitted once: [`finish`](Writer::finish) fails when pages overlap.
    ///
    /// # Errors
    /// `BadInput` when runs and data do not match, `Sink` when an earlier write failed.
    pub fn submit(&mut self, chunk: Chunk) -> Result<()> {
        let Chunk { mut runs, data } = chunk;
        if data.is_empty() && runs.is_empty() {
            self.pipeline.recycle(data);
            return self.pipeline.check();
        }
        chunk::check(&runs, data.len(), self.page_size)?;
        let page_size = self.page_size;
        runs.dedup_by(|next, last| {
            let continues = next.space == last.space && last.end(page_size) == next.start;
            last.pages += if continues { next.pages } else { 0 };
            continues
        });
        let mut table = Vec::with_capacity(runs.len() * RUN_BYTES);
        runs.iter()
            .for_each(|run| index::push_run(&mut table, run, page_size));
        let mut record = Record::zeroed(KIND_CHUNK);
        record.raw_len.set(data.len() as u32);
        record.table_len.set(table.len() as u32);
        self.pipeline.submit(Job {
            record,
            table,
            raw: data,
            out: Vec::new(),
            packed: true,
        })
    }

    /// Stores a named section. Names have 1 to 16 characters of `a-z 0-9 . _ -` and occur once.
    /// Blocks like [`chunk`](Writer::chunk) while too much is in flight.
    ///
    /// # Errors
    /// `BadInput` for a bad or repeated name or more than 2⁵⁰ bytes, `Sink` when an earlier write failed.
    pub fn section(&mut self, name: &str, version: u16, bytes: &[u8]) -> Result<()> {
        self.section_packed(name, version, bytes, usize::MAX)
    }

    /// The same; bytes past the first `packed` (rounded to blocks) are stored uncompressed.
    ///
    /// # Errors
    /// As [`Writer::section`].
    pub fn section_packed(
        &mut self,
        name: &str,
        version: u16,
        bytes: &[u8],
        packed: usize,
    ) -> Result<()> {
        let place = index::section_place(name)
            .ok_or_else(|| Error::bad_input(format!("{name:?} is not a name for a section")))?;
        let blocks = u32::try_from(bytes.len().div_ceil(SECTION_BLOCK).max(1))
            .map_err(|_| Error::bad_input(format!("section {name:?} has {} bytes", bytes.len())))?;
        if !self.names.insert(place) {
            return Err(Error::bad_input(format!("a second section {name:?}")));
        }
        for block in 0..blocks {
            let from = block as usize * SECTION_BLOCK;
            let part = &bytes[from..bytes.len().min(from + SECTION_BLOCK)];
            let mut raw = self.pipeline.buffer();
            raw.extend_from_slice(part);
            let mut record = Record::zeroed(KIND_SECTION);
            record.version.set(version);
            record.raw_len.set(part.len() as u32);
            record.block.set(block);
            record.blocks.set(blocks);
            record.name = place;
            self.pipeline.submit(Job {
                record,
                table: Vec::new(),
                raw,
                out: Vec::new(),
                packed: from < packed,
            })?;
        }
        Ok(())
    }

    /// Waits until everything is written, writes index and footer, flushes, and returns the sink.
    ///
    /// # Errors
    /// `Sink` when a write failed, `Overlap` when a page was submitted twice.
    pub fn finish(mut self) -> Result<(W, ImageSummary)> {
        self.pipeline.close();
        let output = self.output.take().map(JoinHandle::join);
        self.pipeline.check()?;
        match output {
            Some(Ok(Ok(output))) => output.finish(),
            Some(Ok(Err(source))) => Err(Error::Sink { source }),
            Some(Err(_)) | None => Err(Error::WriterDied),
        }
    }
}

impl<W: Write + Send + 'static> Drop for Writer<W> {
    fn drop(&mut self) {
        self.pipeline.abort();
        // A thread that panicked has already made every later call fail.
        self.workers
            .drain(..)
            .for_each(|worker| drop(worker.join()));
        drop(self.output.take().map(JoinHandle::join));
    }
}

fn spawn<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>> {
    let thread = std::thread::Builder::new().name(name.into()).spawn(body);
    thread.map_err(|source| Error::Io {
        path: STREAM.into(),
        action: "start a thread to write the image",
        source,
    })
}

/// State of the writer thread: the sink, and the future index and footer.
struct Output<W> {
    sink: W,
    header: [u8; HEADER_BYTES],
    image_id: [u8; 16],
    page_size: u32,
    index: Vec<u8>,
    footer: Footer,
    offset: u64,
    raw: [u64; 2],
    stored: [u64; 2],
}

impl<W: Write> Output<W> {
    fn new(sink: W, header: &Header, codec: Codec) -> Self {
        Output {
            sink,
            header: header.encode(codec),
            image_id: header.image_id,
            page_size: header.page_size,
            index: Vec::new(),
            footer: Footer::new_zeroed(),
            offset: 0,
            raw: [0; 2],
            stored: [0; 2],
        }
    }

    /// Main function of the writer thread.
    fn run(mut self, pipeline: &Pipeline) -> io::Result<Self> {
        let _guard = ReportPanic(pipeline);
        match self.write_records(pipeline) {
            Ok(()) => Ok(self),
            Err(error) => {
                pipeline.fail(crate::error::copy_of(&error));
                Err(error)
            }
        }
    }

    fn write_records(&mut self, pipeline: &Pipeline) -> io::Result<()> {
        self.sink.write_all(&self.header)?;
        self.offset = HEADER_BYTES as u64;
        while let Some(mut job) = pipeline.next_done() {
            job.record.offset.set(self.offset);
            write_all(
                &mut self.sink,
                job.record.as_bytes(),
                &job.table,
                job.stored(),
            )?;
            self.note(&job);
            pipeline.written(job);
        }
        Ok(())
    }

    fn note(&mut self, job: &Job) {
        self.offset += job.record.total();
        self.index.extend_from_slice(job.record.as_bytes());
        self.index.extend_from_slice(&job.table);
        let footer = &mut self.footer;
        footer.records += 1;
        let raw = u64::from(job.record.raw_len.get());
        let is_section = job.record.kind == KIND_SECTION;
        if !is_section {
            footer.chunks += 1;
            footer.runs += (job.table.len() / RUN_BYTES) as u64;
            footer.pages += raw / u64::from(self.page_size);
        } else if job.record.block.get() == 0 {
            footer.sections += 1;
        }
        self.raw[usize::from(is_section)] += raw;
        self.stored[usize::from(is_section)] += u64::from(job.record.stored_len.get());
    }

    /// Runs in the caller's thread after the writer thread has ended.
    fn finish(mut self) -> Result<(W, ImageSummary)> {
        let sorted = SortedRuns::new(&self.index, self.page_size, self.footer.runs.get() as usize);
        if let Some((space, address, first, second)) = sorted.overlap(&self.index, self.page_size) {
            let chunk = |place| index::chunk_at(&self.index, place);
            let (first, second) = (chunk(first), chunk(second));
            return Err(Error::Overlap {
                path: STREAM.into(),
                space,
                address,
                first,
                second,
            });
        }
        let mut root = blake3::Hasher::new();
        root.update(&self.header).update(&self.index);
        let footer = &mut self.footer;
        footer.image_id = self.image_id;
        footer.index_offset.set(self.offset);
        footer.index_len.set(self.index.len() as u64);
        footer
            .total_len
            .set(self.offset + self.index.len() as u64 + FOOTER_BYTES as u64);
        footer.root = *root.finalize().as_bytes();
        footer.seal = footer.own_seal();
        footer.magic = FOOTER_MAGIC;
        let end = [self.index.as_slice(), footer.as_bytes()];
        let written = end
            .iter()
            .try_for_each(|bytes| self.sink.write_all(bytes))
            .and_then(|()| self.sink.flush());
        written.map_err(|source| Error::Sink { source })?;
        let summary = ImageSummary {
            bytes: footer.total_len.get(),
            chunks: footer.chunks.get(),
            pages: footer.pages.get(),
            raw_page_bytes: self.raw[0],
            stored_page_bytes: self.stored[0],
            sections: footer.sections.get(),
            raw_section_bytes: self.raw[1],
            digest: footer.root,
        };
        Ok((self.sink, summary))
    }
}

/// Writes three buffers with as few calls as possible.
fn write_all(sink: &mut impl Write, header: &[u8], table: &[u8], stored: &[u8]) -> io::Result<()> {
    let mut parts = [
        IoSlice::new(header),
        IoSlice::new(table),
        IoSlice::new(stored),
    ];
    let mut left = &mut parts[..];
    // Drops leading empty buffers: a sink that returns 0 is an error only when there is something to write.
    IoSlice::advance_slices(&mut left, 0);
    while !left.is_empty() {
        match sink.write_vectored(left) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut left, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
