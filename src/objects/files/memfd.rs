//! memfd_create(2).

use serde::{Deserialize, Serialize};

use crate::objects::SpaceId;

/// A file that lives in memory. Descriptions of one file share `inode`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemFd {
    /// Its name, without the `memfd:` before it.
    #[serde(with = "serde_bytes")]
    pub name: Vec<u8>,
    /// Inode number; the same file may be open several times.
    pub inode: u64,
    /// Size in bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// `F_GET_SEALS`.
    pub seals: u32,
    /// Offset in bytes.
    pub offset: u64,
    /// Page size of hugetlb memory, 0 for ordinary pages.
    pub huge_page_size: u64,
    /// Its contents in the image.
    pub contents: SpaceId,
}
