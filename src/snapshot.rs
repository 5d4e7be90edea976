//! The snapshot as a section of the image.

use std::io::Write;
use std::path::Path;

use ckpt_image::{Reader, SECTION_BLOCK, Writer};

use crate::error::{Error, Result};
use crate::metered::{self, Fault};
use crate::objects::{Snapshot, references};

/// Name of the image's section that holds the snapshot.
pub const SECTION: &str = "snapshot";
/// Version of the section's contents.
pub const VERSION: u16 = 2;
/// More metadata than this is not believed; 10,000 threads make about 34 MB.
const LIMIT: u64 = 1 << 30;
/// As much of it is packed; the rest is stored as it is, so that an image is large where its metadata are.
const PACKED: usize = 2 << 20;

/// Bytes of memory that looking at an image may take for its snapshot and a plan: with the program itself, and its tables
/// of the image's pages, at most 64 MiB and four times the image.
pub fn allowance(image: &Reader) -> u64 {
    (40 << 20) + 3 * image.bytes()
}

/// The snapshot as CBOR (RFC 8949).
pub fn encode(snapshot: &Snapshot) -> Vec<u8> {
    let mut bytes = Vec::new();
    ciborium::into_writer(snapshot, &mut bytes).expect("records are plain data");
    bytes
}

/// Stores a snapshot in an image.
pub fn write<W: Write + Send + 'static>(
    writer: &mut Writer<W>,
    snapshot: &Snapshot,
) -> ckpt_image::Result<()> {
    writer.section_packed(SECTION, VERSION, &encode(snapshot), PACKED)
}

/// The snapshot of an image that is looked at, read within its [`allowance`]; what it says fits together.
///
/// # Errors
/// As [`decode`]; `Metadata` for the first thing that does not fit.
pub fn read(image: &Reader, path: &Path) -> Result<Snapshot> {
    read_within(&mut allowance(image), image, path)
}

/// The same of an image of ours, without a limit.
///
/// # Errors
/// As [`read`].
pub fn read_unbounded(image: &Reader, path: &Path) -> Result<Snapshot> {
    read_within(&mut u64::MAX.clone(), image, path)
}

/// The same within `left` bytes of memory, of which what was taken is subtracted; `u64::MAX` is no limit.
///
/// # Errors
/// As [`read`].
pub fn read_within(left: &mut u64, image: &Reader, path: &Path) -> Result<Snapshot> {
    let snapshot = decode(left, image, path)?;
    match references::check(&snapshot, image).into_iter().next() {
        None => Ok(snapshot),
        Some(what) => Err(Error::Metadata {
            path: path.to_owned(),
            what,
        }),
    }
}

/// Decodes the snapshot of an image, whether it fits together or not.
///
/// # Errors
/// `TooLarge` when it takes more than is left, or more of it is packed than [`write`](fn@write) packs; `Metadata` when it is none;
/// those of [`Reader::section_reader`].
pub fn decode(left: &mut u64, image: &Reader, path: &Path) -> Result<Snapshot> {
    let path = path.to_owned();
    let limit = match *left {
        u64::MAX => LIMIT,
        _ => LIMIT.min(image.bytes() + (PACKED + SECTION_BLOCK) as u64),
    };
    let section = match image.section_reader(SECTION, limit) {
        Err(ckpt_image::Error::SectionTooBig { .. }) if limit < LIMIT => {
            return Err(Error::TooLarge { path });
        }
        section => section?,
    };
    metered::decode(section, left).map_err(|fault| match fault {
        Fault::TooLarge => Error::TooLarge { path },
        Fault::Io(error) => match error.downcast::<ckpt_image::Error>() {
            Ok(error) => error.into(),
            Err(error) => Error::Metadata {
                path,
                what: error.to_string(),
            },
        },
        Fault::Meaning(what) => Error::Metadata { path, what },
    })
}
