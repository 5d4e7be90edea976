//! Mappings: addresses, backing objects, and the pages in the image.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::SpaceId;
use super::aio::Ring;
use super::bounds;
use super::files::attributes::Attributes;
use super::files::saved::Saved;
use super::memory_policy::MemoryPolicy;
use crate::index::{DescriptionId, FileId, SegmentId, SharedId};

mod capture;
mod contents;
mod file;
pub mod image;
mod inherit;
pub mod mapped;
mod rebuild;
pub mod space;
mod uses;

pub use capture::{Captured, capture, guard_pages};
pub use contents::hidden_by_guards;
pub use file::{check_file, same_file};
pub use inherit::{Inherited, inherited, intersect, join, subtract};
pub use rebuild::{
    Forked, SharedAt, allocate_keys, clear_and_move, drop_pages, finish, free_keys, map_all,
    place_shared,
};
pub use uses::Uses;

/// One mapping.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// `PROT_READ | PROT_WRITE | PROT_EXEC`.
    pub prot: u32,
    /// Its backing object.
    pub backing: Backing,
    /// Attributes beyond the protection.
    pub flags: MappingFlags,
    /// Name given by `PR_SET_VMA_ANON_NAME`.
    pub name: Option<Vec<u8>>,
    /// Protection key, pkeys(7).
    #[serde(deserialize_with = "bounds::protection_key")]
    pub protection_key: u32,
    /// Guard pages (`MADV_GUARD_INSTALL`) as address ranges.
    pub guards: Vec<(u64, u64)>,
    /// Its own memory policy (mbind(2)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<MemoryPolicy>,
}

/// The backing object of a mapping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backing {
    /// Private anonymous memory; pages are in the image unless zero.
    Anonymous,
    /// Private hugetlb memory with pages of this size.
    AnonymousHuge {
        /// Page size in bytes.
        #[serde(deserialize_with = "bounds::page")]
        page_size: u64,
    },
    /// A file, private: pages that differ from the file are in the image.
    PrivateFile {
        /// The file.
        file: FileId,
        /// Bytes.
        #[serde(deserialize_with = "bounds::bytes")]
        offset: u64,
    },
    /// A file, shared: the pages are the file's.
    SharedFile {
        /// The file.
        file: FileId,
        /// Bytes.
        #[serde(deserialize_with = "bounds::bytes")]
        offset: u64,
        /// May be made writable (the file is open for writing).
        writable: bool,
    },
    /// Shared anonymous memory.
    SharedMemory {
        /// The object.
        object: SharedId,
        /// Bytes.
        #[serde(deserialize_with = "bounds::bytes")]
        offset: u64,
    },
    /// Attached System V shared memory.
    SysV {
        /// The segment.
        segment: SegmentId,
        /// Bytes.
        #[serde(deserialize_with = "bounds::bytes")]
        offset: u64,
        /// Attached for writing.
        writable: bool,
    },
    /// A memfd or another file that the job holds open, shared: an open file description.
    Description {
        /// The description.
        description: DescriptionId,
        /// Bytes.
        #[serde(deserialize_with = "bounds::bytes")]
        offset: u64,
        /// MAP_PRIVATE.
        private: bool,
    },
    /// The ring of an AIO context.
    AioRing(Ring),
    /// A mapping of the kernel: moved, never copied.
    Kernel(KernelMapping),
}

/// Mappings that the kernel provides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum KernelMapping {
    /// Code of the fast system calls.
    Vdso,
    /// Their data.
    Vvar,
    /// Their paravirtual clocks' data (a mapping of its own since Linux 6.13).
    VvarVclock,
}

bitflags::bitflags! {
    /// Attributes of a mapping, `VmFlags` in `/proc/PID/smaps`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(transparent)]
    pub struct MappingFlags: u32 {
        /// `MAP_GROWSDOWN`.
        const GROWS_DOWN = 1 << 0;
        /// mlock(2).
        const LOCKED = 1 << 1;
        /// `MLOCK_ONFAULT`.
        const LOCK_ON_FAULT = 1 << 2;
        /// `MAP_NORESERVE`.
        const NO_RESERVE = 1 << 3;
        /// Counted against the commit limit.
        const ACCOUNTED = 1 << 4;
        /// `MADV_DONTFORK`.
        const DONT_FORK = 1 << 5;
        /// `MADV_WIPEONFORK`.
        const WIPE_ON_FORK = 1 << 6;
        /// `MADV_DONTDUMP`.
        const DONT_DUMP = 1 << 7;
        /// `MADV_MERGEABLE`.
        const MERGEABLE = 1 << 8;
        /// `MADV_HUGEPAGE`.
        const HUGE = 1 << 9;
        /// `MADV_NOHUGEPAGE`.
        const NO_HUGE = 1 << 10;
        /// `MADV_SEQUENTIAL`.
        const SEQUENTIAL = 1 << 11;
        /// `MADV_RANDOM`.
        const RANDOM = 1 << 12;
        /// mseal(2).
        const SEALED = 1 << 13;
        /// `MAP_DROPPABLE`.
        const DROPPABLE = 1 << 14;
        /// `MAP_SYNC`.
        const SYNC = 1 << 15;
    }
}

/// A file that is mapped or executed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MappedFile {
    /// Its path at the checkpoint.
    #[serde(with = "crate::raw_path")]
    pub path: PathBuf,
    /// Its identity at the checkpoint.
    pub identity: FileIdentity,
    /// Its whole contents in the image, if it has no name any more.
    pub contents: Option<SpaceId>,
    /// Its other attributes, if it has no name any more.
    #[serde(default)]
    pub attributes: Option<Attributes>,
    /// Its contents in the image, though it has a name.
    #[serde(default)]
    pub saved: Option<Saved>,
}

impl MappedFile {
    /// Its contents in the image.
    pub fn stored(&self) -> Option<SpaceId> {
        self.contents.or(self.saved.map(|saved| saved.space))
    }
}

/// Identifies the contents of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIdentity {
    /// Device, major and minor.
    pub device: (u32, u32),
    /// Inode number.
    pub inode: u64,
    /// Type and permission bits.
    #[serde(deserialize_with = "bounds::mode")]
    pub mode: u32,
    /// Size in bytes.
    #[serde(deserialize_with = "bounds::bytes")]
    pub size: u64,
    /// Time of the last change of contents, nanoseconds since 1970.
    pub modified_ns: i64,
    /// The build id of an ELF file.
    pub build_id: Option<Vec<u8>>,
    /// Creation time, nanoseconds since 1970, if the file system records it.
    #[serde(default)]
    pub created_ns: Option<i64>,
}

/// Shared anonymous memory (`MAP_SHARED | MAP_ANONYMOUS`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedMemory {
    /// Its pages in the image.
    pub space: SpaceId,
    /// Size in bytes, as far as any process of the job maps it.
    #[serde(deserialize_with = "bounds::memory")]
    pub size: u64,
    /// `/dev/zero (deleted)` inode, which identified it.
    pub inode: u64,
    /// Page size of hugetlb memory, 0 for ordinary pages.
    #[serde(deserialize_with = "bounds::page")]
    pub huge_page_size: u64,
    /// Offset of the end of its last mapping: mremap(2) makes mappings that extend past the end of the object, where
    /// any access raises SIGBUS.
    #[serde(default, deserialize_with = "bounds::memory")]
    pub reach: u64,
}
