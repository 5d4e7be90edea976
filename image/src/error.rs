//! Errors of reading and writing images: each is one sentence with object, reason and remedy.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use ckpt_sys::text::Shown;

use crate::header::{Arch, FormatVersion};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The path in errors about an image that was read from a stream or from memory.
pub const STREAM: &str = "<stream>";

/// The part of an image that an error is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Part {
    /// The fixed header at the start.
    Header,
    /// The index before the footer.
    Index,
    /// The footer at the very end.
    Footer,
    /// A chunk of pages, by its number in file order.
    Chunk(usize),
    /// One block of a named section.
    Section {
        /// The section's name.
        name: String,
        /// The block's number inside the section.
        block: u32,
    },
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Header => f.write_str("the header"),
            Part::Index => f.write_str("the index"),
            Part::Footer => f.write_str("the footer"),
            Part::Chunk(number) => write!(f, "page chunk {number}"),
            Part::Section { name, block } => write!(f, "section {name:?} (block {block})"),
        }
    }
}

/// An error of reading or writing an image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no such file.
    #[error("{}: there is no such image; check the path", path.shown())]
    Missing {
        /// The image's path.
        path: PathBuf,
    },
    /// The file has no bytes.
    #[error("{}: the file is empty, not an image; use another image of the job", path.shown())]
    Empty {
        /// The image's path.
        path: PathBuf,
    },
    /// The file is not an image.
    #[error("{}: this is not an image of ckpt: {reason}", path.shown())]
    NotAnImage {
        /// The image's path.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The image's end is missing.
    #[error(
        "{}: the image is incomplete: {reason}; the checkpoint was interrupted or the file was cut, use another image of the job",
        path.shown()
    )]
    Truncated {
        /// The image's path.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// The bytes differ from those written.
    #[error("{}: the image is corrupted: {part}: {reason}; use another image of the job", path.shown())]
    Corrupt {
        /// The image's path.
        path: PathBuf,
        /// The part in which the damage was found.
        part: Part,
        /// The check that failed.
        reason: String,
    },
    /// The image was written by a newer program.
    #[error(
        "{}: image format {found} is newer than this ckpt understands ({}.x); use a newer ckpt",
        path.shown(),
        FormatVersion::CURRENT.major
    )]
    NewerVersion {
        /// The image's path.
        path: PathBuf,
        /// The version found in the header.
        found: FormatVersion,
    },
    /// The image is of another processor architecture.
    #[error("{}: the image was taken on {found} and this machine is {wanted}; restore it on {found}", path.shown())]
    OtherArch {
        /// The image's path.
        path: PathBuf,
        /// The image's architecture.
        found: Arch,
        /// The architecture asked for.
        wanted: Arch,
    },
    /// The same page occurs twice.
    #[error(
        "{}: page {address:#x} of space {space} occurs twice (in chunks {first} and {second}); this is a defect of the program that wrote the image",
        path.shown()
    )]
    Overlap {
        /// The image's path.
        path: PathBuf,
        /// The address space or object.
        space: u32,
        /// The first address that occurs twice.
        address: u64,
        /// The number of one chunk that holds it.
        first: usize,
        /// The number of the other.
        second: usize,
    },
    /// The stored bytes match their digest but do not decode.
    #[error("{}: {part} does not decode as {codec}: {reason}; use another image of the job", path.shown())]
    Codec {
        /// The image's path.
        path: PathBuf,
        /// The part that does not decode.
        part: Part,
        /// Its codec.
        codec: &'static str,
        /// The decoder's error.
        reason: String,
    },
    /// The image has no section of this name.
    #[error("{}: the image has no section {name:?}; it was written by another version of ckpt", path.shown())]
    NoSection {
        /// The image's path.
        path: PathBuf,
        /// The name asked for.
        name: String,
    },
    /// A section is larger than its reader allows.
    #[error("{}: section {name:?} has {size} bytes where at most {limit} are accepted", path.shown())]
    SectionTooBig {
        /// The image's path.
        path: PathBuf,
        /// The section's name.
        name: String,
        /// Its raw length in bytes.
        size: u64,
        /// The reader's limit in bytes.
        limit: u64,
    },
    /// A system call on the image file failed.
    #[error("{}: cannot {action}: {source}{}", path.shown(), hint(source))]
    Io {
        /// The image's path.
        path: PathBuf,
        /// The failed action, as a verb phrase.
        action: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// The target path exists and is not a regular file.
    #[error(
        "{}: there is something of this name that is not a regular file, and an image is not put in its place; choose another name, or - to write a stream",
        path.shown()
    )]
    NotAFile {
        /// The image's path.
        path: PathBuf,
    },
    /// The sink failed.
    #[error("cannot write the image: {source}{}", hint(source))]
    Sink {
        /// The sink's error.
        source: io::Error,
    },
    /// The input of the writer cannot be stored.
    #[error("cannot store this in an image: {reason}")]
    BadInput {
        /// Why.
        reason: String,
    },
    /// Unknown name or level of a codec.
    #[error("unknown codec {given:?}: {reason}; use none, lz4, zstd[:1-19] or gzip[:1-9]")]
    BadCodec {
        /// The input.
        given: String,
        /// Why.
        reason: String,
    },
    /// A thread of the writer panicked.
    #[error("a thread of the image writer panicked; this is a defect of ckpt, please report it")]
    WriterDied,
}

impl Error {
    /// The system's error, if that is the cause.
    pub fn io(&self) -> Option<&io::Error> {
        match self {
            Error::Io { source, .. } | Error::Sink { source } => Some(source),
            _ => None,
        }
    }

    pub(crate) fn corrupt(path: &Path, part: Part, reason: impl Into<String>) -> Self {
        Error::Corrupt {
            path: path.into(),
            part,
            reason: reason.into(),
        }
    }

    pub(crate) fn truncated(path: &Path, reason: impl Into<String>) -> Self {
        Error::Truncated {
            path: path.into(),
            reason: reason.into(),
        }
    }

    pub(crate) fn bad_input(reason: impl Into<String>) -> Self {
        Error::BadInput {
            reason: reason.into(),
        }
    }

    pub(crate) fn reading(path: &Path, source: io::Error) -> Self {
        Error::Io {
            path: path.into(),
            action: "read the image",
            source,
        }
    }
}

/// A copy of an [`io::Error`], which cannot be cloned.
pub(crate) fn copy_of(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(errno) => io::Error::from_raw_os_error(errno),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}

/// The remedy for some system errors.
fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free some space there, or write the image elsewhere with -o"
        }
        io::ErrorKind::FileTooLarge => "; raise the file size limit (ulimit -f)",
        io::ErrorKind::PermissionDenied => "; choose a place you may access",
        io::ErrorKind::BrokenPipe => "; the program that reads the image has ended",
        _ => "",
    }
}
