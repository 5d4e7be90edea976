//! The file of an image to be restored: its owner and its contents, through one descriptor.
//!
//! The contents of an image run with the ids in it. So an image is restored for its owner only; and an image that
//! others may have written is refused. All of this is checked on the file that is read: its name may refer to another
//! one a moment later.

use std::fs::{File, Metadata};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ckpt_image::Reader;
use nix::unistd::{getegid, geteuid};

use crate::error::{Error, Obstacle, Result};
use crate::text::Shown;

/// An image that is open for reading.
#[derive(Debug)]
pub struct ImageFile {
    file: File,
    path: PathBuf,
    /// Its fstat(2).
    meta: Metadata,
}

impl ImageFile {
    /// Opens a regular file; a FIFO or device is opened without waiting, and refused.
    ///
    /// # Errors
    /// [`Error::Image`] when it is not a readable file.
    pub fn open(path: &Path) -> Result<Self> {
        let opened = File::options()
            .read(true)
            // Opening a FIFO without a writer must not wait; regular files ignore the flag.
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path);
        let opened = opened.map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => ckpt_image::Error::Missing { path: path.into() },
            _ => ckpt_image::Error::Io {
                path: path.into(),
                action: "open the image",
                source,
            },
        })?;
        Self::of(opened, path)
    }

    /// From an open file; `path` is for messages.
    ///
    /// # Errors
    /// As [`ImageFile::open`].
    pub fn of(file: File, path: &Path) -> Result<Self> {
        let failed = Error::file("look at", path);
        let meta = file.metadata().map_err(failed)?;
        if !meta.is_file() {
            return Err(ckpt_image::Error::NotAnImage {
                path: path.into(),
                reason: "it is not a regular file".into(),
            }
            .into());
        }
        Ok(Self {
            file,
            path: path.into(),
            meta,
        })
    }

    /// Only its owner may write to it.
    fn is_written_by_us_alone(&self) -> Result<()> {
        let (mode, gid) = (self.meta.mode(), self.meta.gid());
        let reason = if mode & 0o002 != 0 {
            "can be written by all users".to_owned()
        } else if mode & 0o020 != 0 && gid != getegid().as_raw() {
            format!("can be written by the members of the group {gid}")
        } else {
            return Ok(());
        };
        Err(Error::refuse(Obstacle::new(
            format!("the image {}", self.path.shown()),
            reason,
            "if you trust its contents, remove that permission with chmod go-w",
        )))
    }

    /// Root refuses an image in a directory where other users may replace it by another of root's files.
    fn stays_in_its_place(&self) -> Result<()> {
        let link = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let place = std::fs::read_link(link).ok();
        let Some(directory) = place.as_deref().and_then(Path::parent) else {
            return Ok(());
        };
        let Ok(meta) = std::fs::metadata(directory) else {
            return Ok(());
        };
        let replaceable = meta.mode() & 0o002 != 0 && meta.mode() & 0o1000 == 0;
        if !replaceable {
            return Ok(());
        }
        Err(Error::refuse(Obstacle::new(
            format!("the image {}", self.path.shown()),
            format!(
                "is in the directory {}, where any user may replace it",
                directory.shown()
            ),
            "move it to a directory that belongs to root",
        )))
    }

    /// Its owner.
    pub fn owner(&self) -> u32 {
        self.meta.uid()
    }

    /// The path by which it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads it, if it belongs to the caller.
    ///
    /// # Errors
    /// [`Error::Refused`] for an image of another user, one that others may write to, or one of root's that others
    /// may replace; [`Error::Image`] for one that cannot be read.
    pub fn ours(self) -> Result<Reader> {
        let me = geteuid();
        if self.owner() != me.as_raw() {
            let remedy = match me.is_root() {
                true => "with --any-owner it is restored as that user",
                false => "if you trust its owner, make a copy of your own",
            };
            return Err(Error::refuse(Obstacle::new(
                format!("the image {}", self.path.shown()),
                format!("belongs to uid {} and you are uid {me}", self.owner()),
                remedy,
            )));
        }
        self.is_written_by_us_alone()?;
        if me.is_root() {
            self.stays_in_its_place()?;
        }
        Ok(Reader::from_file(self.file, self.path)?)
    }
}

impl AsFd for ImageFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
