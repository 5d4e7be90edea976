//! The section of the image that contains the snapshot.

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
/// Largest metadata that is accepted; 10,000 threads need about 34 MB.
const LIMIT: u64 = 1 << 30;
/// Compressed part of it; the rest is stored uncompressed, so that an image with large metadata is large.
const PACKED: usize = 2 << 20;

/// Bytes of memory for the snapshot and a plan when an image is inspected: with the program itself, and its tables of
/// the image's pages, at most 64 MiB and four times the image.
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

/// Reads and checks the snapshot of an image to be inspected, within its [`allowance`].
///
/// # Errors
/// As [`decode`]; `Metadata` for the first inconsistency.
pub fn read(image: &Reader, path: &Path) -> Result<Snapshot> {
    read_within(&mut allowance(image), image, path)
}

/// The same for an image of ours, without a limit.
///
/// # Errors
/// As [`read`].
pub fn read_unbounded(image: &Reader, path: &Path) -> Result<Snapshot> {
    read_within(&mut u64::MAX.clone(), image, path)
}

/// The same within `left` bytes of memory, from which those used are subtracted; `u64::MAX` is no limit.
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

/// Decodes the snapshot of an image without checking its consistency.
///
/// # Errors
/// `TooLarge` when it needs more memory than is left, or a larger part is compressed than [`write`](fn@write)
/// compresses; `Metadata` when it is invalid; those of [`Reader::section_reader`].
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
