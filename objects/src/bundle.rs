//! Files stored in the image, so that the restore does not need them: programs, libraries, and files that the job
//! only reads.

use std::fs::File;

use serde::{Deserialize, Serialize};

use super::memory::FileIdentity;
use super::{Snapshot, SpaceId};
use crate::bounds;

/// A bundled file. Files with equal contents share one space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bundled {
    /// Device, major and minor; with the inode it identifies the files of the snapshot.
    pub device: (u32, u32),
    /// Inode number.
    pub inode: u64,
    /// Size in bytes.
    #[serde(deserialize_with = "bounds::bytes")]
    pub size: u64,
    /// BLAKE3 of its contents.
    #[serde(with = "serde_bytes")]
    pub digest: Vec<u8>,
    /// Its contents in the image.
    pub contents: SpaceId,
}

impl Snapshot {
    /// The bundled copy of a file.
    pub fn bundled(&self, file: &FileIdentity) -> Option<&Bundled> {
        let of_it = |b: &&Bundled| (b.device, b.inode) == (file.device, file.inode);
        self.bundle.iter().find(of_it)
    }
}

/// BLAKE3 of a file, from its beginning.
///
/// # Errors
/// Those of read(2).
pub fn digest(file: &File) -> std::io::Result<blake3::Hash> {
    use std::os::unix::fs::FileExt;
    let mut hasher = blake3::Hasher::new();
    let mut piece = vec![0; 1 << 18];
    let mut at = 0;
    loop {
        match file.read_at(&mut piece, at) {
            Ok(0) => return Ok(hasher.finalize()),
            Ok(n) => {
                hasher.update(&piece[..n]);
                at += n as u64;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}
