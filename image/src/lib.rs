//! The container of a ckpt image: header, page chunks, named sections, index and footer.
//!
//! This crate knows nothing about processes: pages belong to numbered *spaces*, and sections are named bytes.
//! `docs/image-format.md` describes the file byte by byte.
//!
//! * [`Writer`] writes to any sink, forward only, and compresses on all processors meanwhile.
//! * [`ImageFile`] is a sink whose file appears only when it is complete.
//! * [`Reader`] checks header, footer and index on opening and every stored byte before decoding it; it may be shared
//!   between threads.
//!
//! ```
//! use ckpt_image::{Header, Reader, Writer, WriterOptions};
//! # fn main() -> Result<(), ckpt_image::Error> {
//! let mut writer = Writer::new(Vec::new(), &Header::default(), WriterOptions::default())?;
//! let mut chunk = writer.chunk();
//! chunk.push(0, 0x7000_0000, 4096, &[1; 8192]);
//! writer.submit(chunk)?;
//! writer.section("meta", 1, b"whatever describes the job")?;
//! let (bytes, summary) = writer.finish()?;
//! assert_eq!(summary.pages, 2);
//!
//! let reader = Reader::from_bytes(bytes)?;
//! assert_eq!(reader.section("meta", 1 << 20)?, b"whatever describes the job");
//! assert_eq!(reader.page(0, 0x7000_1000)?, Some(vec![1; 4096]));
//! # Ok(())
//! # }
//! ```

mod check;
mod chunk;
mod codec;
mod error;
mod file;
mod header;
mod index;
mod overlap;
mod pipeline;
mod reader;
mod section;
mod source;
mod verify;
mod writer;

pub use chunk::{CHUNK_BYTES, Chunk, MAX_CHUNK, PageRun};
pub use codec::{Codec, Kind};
pub use error::{Error, Part, Result, STREAM};
pub use file::{ImageFile, sweep_stale};
pub use header::{Arch, FormatVersion, HEADER_BYTES, Header, MAGIC, random_id};
pub use index::SECTION_BLOCK;
pub use reader::{ChunkEntry, Reader};
pub use section::{SectionInfo, SectionReader};
pub use verify::VerifySummary;
pub use writer::{ImageSummary, Writer, WriterOptions};
