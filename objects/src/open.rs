//! Opens files by untrusted names: those of a record, and those that a running job gives.
//!
//! A user with write permission to a directory may replace what its names refer to, at any moment. So a name is
//! looked up once, for a handle (`O_PATH`), which opens nothing: it does not wait at a FIFO and has no effect on a
//! device. The handle is checked, and then that inode is opened, through `/proc/self/fd`, as the caller needs it.
//!
//! Magic links of `/proc` (openat2(2)) are not followed. They are used where a process's own files are read
//! (`/proc/PID/exe`, `fd`, `map_files`), which are not untrusted names, and where the user gives the name (the image,
//! `--fd`, `--replace-fd`), which is opened as a shell would.

use std::ffi::{CStr, CString};
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ckpt_sys::{as_owner, files, lookup};
use nix::errno::Errno;
use nix::unistd::{AccessFlags, getegid, geteuid};

use super::access::may;

/// What to do with a symbolic link at the end of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Last {
    /// It is the object itself: the kernel reports no path that ends in a link, so it is newer.
    IsIt,
    /// It is followed.
    LeadsOn,
}

/// The object that a name refers to.
#[derive(Debug)]
pub struct Handle {
    fd: OwnedFd,
    path: PathBuf,
    meta: Metadata,
}

impl Handle {
    /// Looks up a path.
    ///
    /// # Errors
    /// Those of openat2(2).
    pub fn of(path: &Path, last: Last) -> io::Result<Self> {
        let name = CString::new(path.as_os_str().as_bytes())?;
        let follow = match last {
            Last::IsIt => libc::O_NOFOLLOW,
            Last::LeadsOn => 0,
        };
        let file = without_magic_links(&name, libc::O_PATH | follow)?;
        Ok(Self {
            meta: file.metadata()?,
            fd: file.into(),
            path: path.to_owned(),
        })
    }

    /// Looks up a regular file, through any links.
    ///
    /// # Errors
    /// Those of openat2(2); `InvalidInput` for anything but a regular file.
    pub fn of_regular(path: &Path) -> io::Result<Self> {
        let handle = Self::of(path, Last::LeadsOn)?;
        match handle.meta.is_file() {
            true => Ok(handle),
            false => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is no regular file",
            )),
        }
    }

    /// Its fstat(2).
    pub fn meta(&self) -> &Metadata {
        &self.meta
    }

    /// A path that refers to exactly this inode, for calls that need a path.
    pub fn link(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.fd.as_raw_fd()).into()
    }

    /// Its path as the kernel reports it.
    pub fn place(&self) -> Option<PathBuf> {
        std::fs::read_link(self.link()).ok()
    }

    /// Whether we may open it with this access, as [`open`](Self::open) would.
    ///
    /// # Errors
    /// Those of access(2).
    pub fn may(&self, how: AccessFlags) -> nix::Result<()> {
        match may(&self.link(), how) {
            Err(Errno::EACCES) if self.is_ours() => {
                let link = CString::new(self.link().as_os_str().as_bytes());
                as_owner::may(&link.unwrap_or_default(), how.bits()).map_err(|_| Errno::EACCES)
            }
            other => other,
        }
    }

    /// Whether we may change the mode of the file.
    fn is_ours(&self) -> bool {
        let ids = (geteuid().as_raw(), getegid().as_raw());
        self.meta.is_file() && (self.meta.uid(), self.meta.gid()) == ids
    }

    /// Opens this inode. For a FIFO or device this may wait, unless the flags say otherwise.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn open(&self, flags: i32) -> io::Result<File> {
        if flags & libc::O_NOFOLLOW != 0 {
            return self.open_by_name(flags);
        }
        let link = CString::new(self.link().as_os_str().as_bytes())?;
        match open(&link, flags) {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied && self.is_ours() => {
                as_owner::open(&link, flags, self.fd.try_clone()?)
                    .map(File::from)
                    .map_err(|_| e)
            }
            other => other,
        }
    }

    /// Opens it for reading.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn read(&self) -> io::Result<File> {
        self.open(libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY)
    }

    /// `O_NOFOLLOW` stays in the description's flags, and cannot be used through a link. So the name is opened once
    /// more, without waiting or following; if it is another inode by now, that is closed unused.
    fn open_by_name(&self, flags: i32) -> io::Result<File> {
        let name = CString::new(self.path.as_os_str().as_bytes())?;
        let waits = flags & (libc::O_PATH | libc::O_NONBLOCK) == 0;
        let without = if waits { libc::O_NONBLOCK } else { 0 };
        let file = without_magic_links(&name, flags | without)?;
        let now = file.metadata()?;
        if (now.dev(), now.ino()) != (self.meta.dev(), self.meta.ino()) {
            return Err(io::Error::other("another file has its name by now"));
        }
        if waits {
            files::set_flags(&file, flags)?;
        }
        Ok(file)
    }
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Opens the target of a link of our own `/proc`. `O_CLOEXEC` would show in the description's flags forever.
fn open(link: &CStr, flags: i32) -> io::Result<File> {
    Ok(files::open_plainly(link, flags)?.into())
}

/// Opens a path that contains no magic link.
fn without_magic_links(name: &CStr, flags: i32) -> io::Result<File> {
    // openat2(2) rejects other flags together with `O_PATH`; open(2) ignores them.
    let flags = match flags & libc::O_PATH {
        0 => flags,
        _ => flags & (libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW),
    };
    match lookup::open_without_magic_links(name, flags) {
        // With both flags, a link at the end is opened itself.
        Err(Errno::ELOOP) if flags & libc::O_PATH != 0 => Err(io::Error::other(
            "it leads through a link of /proc, or through too many links",
        )),
        opened => Ok(opened?.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("ckpt-open-{name}.{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir(&dir).unwrap();
        dir
    }

    fn flags(file: &File) -> i32 {
        files::flags(file).unwrap()
    }

    #[test]
    fn magic_links_are_not_followed() {
        for link in [
            "/proc/self/exe",
            "/proc/self/fd/0",
            "/proc/self/cwd/x",
            "/dev/stdin",
        ] {
            let error = Handle::of(Path::new(link), Last::LeadsOn).unwrap_err();
            assert!(
                error.to_string().contains("link of /proc"),
                "{link}: {error}"
            );
        }
        // This path has no magic link.
        Handle::of_regular(Path::new("/proc/self/status")).unwrap();
        Handle::of_regular(Path::new("/dev/null")).unwrap_err();
    }

    #[test]
    fn the_inode_that_was_looked_up_is_opened() {
        let dir = place("inode");
        let (path, other) = (dir.join("file"), dir.join("other"));
        std::fs::write(&path, "old").unwrap();
        std::fs::write(&other, "new").unwrap();
        let handle = Handle::of(&path, Last::IsIt).unwrap();
        let nofollow = libc::O_RDONLY | libc::O_NOFOLLOW;
        let opened = handle.open(nofollow).unwrap();
        let kept = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
        assert_eq!(flags(&opened) & kept, libc::O_NOFOLLOW);
        std::fs::rename(&other, &path).unwrap();
        let opened = handle.open(libc::O_RDONLY).unwrap();
        assert_eq!(flags(&opened) & kept, 0);
        assert_eq!(std::io::read_to_string(opened).unwrap(), "old");
        handle.open(nofollow).unwrap_err();
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/null", &path).unwrap();
        assert!(Handle::of(&path, Last::IsIt).unwrap().meta().is_symlink());
        assert!(
            !Handle::of(&path, Last::LeadsOn)
                .unwrap()
                .meta()
                .is_symlink()
        );
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
