//! The snapshot as a section of the image.

use std::path::Path;

use ckpt_image::Reader;

use crate::error::{Error, Result};
use crate::objects::Snapshot;

/// Name of the image's section that holds the snapshot.
pub const SECTION: &str = "snapshot";
/// Version of the section's contents.
pub const VERSION: u16 = 2;
/// More metadata than this is not believed; 10,000 threads make about 40 MB.
const LIMIT: u64 = 1 << 30;

/// The snapshot as CBOR (RFC 8949).
pub fn encode(snapshot: &Snapshot) -> Vec<u8> {
    let mut bytes = Vec::new();
    ciborium::into_writer(snapshot, &mut bytes).expect("records are plain data");
    bytes
}

/// Reads and decodes the snapshot of an image.
pub fn read(image: &Reader, path: &Path) -> Result<Snapshot> {
    let bytes = image.section(SECTION, LIMIT)?;
    ciborium::from_reader(bytes.as_slice()).map_err(|e| Error::Metadata {
        path: path.to_owned(),
        what: e.to_string(),
    })
}
