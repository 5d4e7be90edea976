//! An image file that appears under its name only when it is complete.
//!
//! It is written under a temporary name in the same directory and renamed when everything is on disk. A process
//! killed by SIGKILL leaves its temporary file behind; the next image of the same name removes it. A temporary file
//! that is being written is locked (`flock`), which distinguishes the two. Pids would not: they mean nothing in
//! another pid namespace or after a reboot.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, IoSlice, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::header::random_id;

/// Bytes of the final name in the temporary one, which must fit into 255.
const NAME_PART: usize = 200;

/// The file an image is written to. Dropping it without [`commit`](ImageFile::commit) removes it.
#[derive(Debug)]
pub struct ImageFile {
    file: File,
    temporary: PathBuf,
    path: PathBuf,
    committed: bool,
}

impl ImageFile {
    /// Creates the temporary file `.NAME.tmp.PID.random`, mode 0600, beside `path`, after removing those of killed
    /// processes for the same name.
    ///
    /// # Errors
    /// `NotAFile` when `path` is a directory, device, fifo or socket; `Io` when it has no file name
    /// or the file cannot be created.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let fail = |action, source| Error::Io {
            path: path.into(),
            action,
            source,
        };
        let name = path
            .file_name()
            .ok_or_else(|| fail("create the image", io::ErrorKind::InvalidFilename.into()))?;
        // A rename over /dev/stdout, say, would remove it for all users.
        if fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
            return Err(Error::NotAFile { path: path.into() });
        }
        let directory = directory_of(path);
        // Stale files that cannot be removed do no harm.
        let _ = sweep_stale(directory, name);
        loop {
            let mut temporary = prefix(name);
            let random = u64::from_le_bytes(random_id()?[..8].try_into().unwrap_or_default());
            temporary.push(format!("{}.{random:016x}", std::process::id()));
            let temporary = directory.join(temporary);
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&temporary);
            let file = match file {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(fail("create the image", error)),
            };
            // Before it is locked another process may have removed the file: then try once more. Without file locks
            // stale files are not removed either.
            let locked = !matches!(file.try_lock(), Err(TryLockError::WouldBlock));
            let linked = file.metadata().is_ok_and(|metadata| metadata.nlink() > 0);
            if locked && linked {
                return Ok(ImageFile {
                    file,
                    temporary,
                    path: path.into(),
                    committed: false,
                });
            }
        }
    }

    /// The open file, also for reading what was written.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The final name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Syncs everything written so far to disk; [`commit`](Self::commit) does so too.
    ///
    /// # Errors
    /// `Io`.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|source| Error::Io {
            path: self.path.clone(),
            action: "put the image on disk",
            source,
        })
    }

    /// Syncs everything to disk and gives the file its final name, replacing an older image atomically. A symbolic
    /// link of that name is replaced, not followed.
    ///
    /// # Errors
    /// `Io`; then the older image, if any, is still there and the temporary file is removed, unless only the last step,
    /// the directory's fsync, failed.
    pub fn commit(mut self) -> Result<()> {
        let path = self.path.clone();
        let fail = |action| {
            let path = path.clone();
            move |source| Error::Io {
                path,
                action,
                source,
            }
        };
        self.sync()?;
        fs::rename(&self.temporary, &self.path).map_err(fail("give the image its name"))?;
        self.committed = true;
        let directory =
            File::open(directory_of(&self.path)).and_then(|directory| directory.sync_all());
        directory.map_err(fail("put the image's directory on disk"))
    }
}

impl Write for ImageFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.file.write_vectored(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for ImageFile {
    fn drop(&mut self) {
        if !self.committed {
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Removes the temporary files of killed processes for the image `name` in `directory`. Returns their number.
///
/// # Errors
/// When the directory cannot be read; files that cannot be opened or locked are left alone.
pub fn sweep_stale(directory: impl AsRef<Path>, name: impl AsRef<OsStr>) -> io::Result<usize> {
    let prefix = prefix(name.as_ref());
    let mut swept = 0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(rest) = name.as_bytes().strip_prefix(prefix.as_bytes()) else {
            continue;
        };
        if is_suffix(rest)
            && entry.file_type()?.is_file()
            && remove_if_unlocked(&entry.path()).is_ok_and(|gone| gone)
        {
            swept += 1;
        }
    }
    Ok(swept)
}

fn remove_if_unlocked(path: &Path) -> io::Result<bool> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)?;
    match file.try_lock() {
        // Removed under the lock: a creator that locks it afterwards sees that it has no link.
        Ok(()) => fs::remove_file(path).map(|()| true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// `.NAME.tmp.`
fn prefix(name: &OsStr) -> OsString {
    let name = name.as_bytes();
    let mut prefix = b".".to_vec();
    prefix.extend_from_slice(&name[..name.len().min(NAME_PART)]);
    prefix.extend_from_slice(b".tmp.");
    OsString::from_vec(prefix)
}

/// Whether this is `PID.random`.
fn is_suffix(rest: &[u8]) -> bool {
    let mut parts = rest.split(|byte| *byte == b'.');
    let pid = parts
        .next()
        .is_some_and(|pid| !pid.is_empty() && pid.iter().all(u8::is_ascii_digit));
    let random = parts
        .next()
        .is_some_and(|random| random.len() == 16 && random.iter().all(u8::is_ascii_hexdigit));
    pid && random && parts.next().is_none()
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
