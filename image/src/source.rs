//! The source of an image: a file, read by position, or memory.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result, STREAM};

#[derive(Debug)]
enum Bytes {
    File(File),
    Memory(Vec<u8>),
}

/// The bytes of an image, and their number when it was opened.
#[derive(Debug)]
pub(crate) struct Source {
    bytes: Bytes,
    pub(crate) len: u64,
    pub(crate) path: PathBuf,
}

impl Source {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        // O_NONBLOCK: opening a FIFO without a writer must not wait. It has no effect on regular files.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path);
        let file = file.map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => Error::Missing { path: path.into() },
            _ => Error::Io {
                path: path.into(),
                action: "open the image",
                source,
            },
        })?;
        Source::from_file(file, path)
    }

    pub(crate) fn from_file(file: File, path: &Path) -> Result<Self> {
        let metadata = file
            .metadata()
            .map_err(|source| Error::reading(path, source))?;
        if !metadata.is_file() {
            let reason = "it is not a regular file".into();
            return Err(Error::NotAnImage {
                path: path.into(),
                reason,
            });
        }
        Ok(Source {
            bytes: Bytes::File(file),
            len: metadata.len(),
            path: path.into(),
        })
    }

    pub(crate) fn from_bytes(bytes: Vec<u8>) -> Self {
        Source {
            len: bytes.len() as u64,
            bytes: Bytes::Memory(bytes),
            path: STREAM.into(),
        }
    }

    /// Fills `into` from `offset`. A file that was cut since it was opened is `Truncated`.
    pub(crate) fn read_exact_at(&self, into: &mut [u8], offset: u64) -> Result<()> {
        let end = offset.saturating_add(into.len() as u64);
        let ends = || Error::truncated(&self.path, format!("it ends before byte {end}"));
        match &self.bytes {
            Bytes::Memory(bytes) => {
                let from = usize::try_from(offset)
                    .ok()
                    .and_then(|offset| bytes.get(offset..));
                let part = from
                    .and_then(|from| from.get(..into.len()))
                    .ok_or_else(ends)?;
                into.copy_from_slice(part);
                Ok(())
            }
            Bytes::File(file) => {
                file.read_exact_at(into, offset)
                    .map_err(|source| match source.kind() {
                        io::ErrorKind::UnexpectedEof => ends(),
                        _ => Error::reading(&self.path, source),
                    })
            }
        }
    }

    /// `len` bytes from `offset`; the caller has checked the length of the source.
    pub(crate) fn read_vec(&self, len: usize, offset: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let room = bytes.try_reserve_exact(len);
        room.map_err(|_| Error::reading(&self.path, io::ErrorKind::OutOfMemory.into()))?;
        bytes.resize(len, 0);
        self.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }
}
