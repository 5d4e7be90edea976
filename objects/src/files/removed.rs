//! Objects without a name that are not regular files: directories, and through `O_PATH` handles symbolic links, FIFOs
//! and sockets. The restoring process creates each under a name, opens it for all that have it, and removes the name.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::attributes::Attributes;
use crate::Snapshot;
use crate::bounds;
use crate::index::RemovedId;
use crate::text::Shown;

/// An object without a name. Descriptions, working and root directories refer to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removed {
    /// Its former name.
    #[serde(with = "crate::raw_path")]
    pub path: PathBuf,
    /// Its type.
    pub what: What,
    /// Device, major and minor.
    pub device: (u32, u32),
    /// Inode number.
    pub inode: u64,
    /// Permission bits.
    #[serde(deserialize_with = "bounds::mode")]
    pub mode: u32,
    /// Its other attributes.
    pub attributes: Attributes,
}

/// Types that can be created again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    /// A directory, which is empty.
    Directory,
    /// A symbolic link with this target.
    Link(#[serde(with = "crate::raw_path")] PathBuf),
    /// A FIFO.
    Fifo,
    /// The file of a unix socket.
    Socket,
}

/// Adds the object that a path of `/proc/PID` refers to, once, to `all`; returns its index. `handle` is any
/// descriptor of it, `path` its former name.
///
/// # Errors
/// Those of stat(2) and readlink(2); `Unsupported` for what cannot be created again.
pub fn enter(path: &Path, handle: &OwnedFd, all: &mut Vec<Removed>) -> io::Result<RemovedId> {
    let again = format!("/proc/self/fd/{}", handle.as_raw_fd());
    let meta = File::from(handle.try_clone()?).metadata()?;
    let device = (libc::major(meta.dev()), libc::minor(meta.dev()));
    let known = |r: &Removed| (r.device, r.inode) == (device, meta.ino());
    if let Some(id) = RemovedId::position(all, known) {
        return Ok(id);
    }
    if super::changed::is_of_the_kernel(Path::new(&again)) {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let what = match meta.mode() & libc::S_IFMT {
        libc::S_IFDIR => What::Directory,
        libc::S_IFLNK => What::Link(ckpt_sys::files::link_target(handle)?),
        libc::S_IFIFO => What::Fifo,
        libc::S_IFSOCK => What::Socket,
        _ => return Err(io::ErrorKind::Unsupported.into()),
    };
    // Extended attributes need a descriptor open for reading. A watch of the job would report another open.
    let is_path = ckpt_sys::files::flags(handle)? & libc::O_PATH != 0;
    let file = match what {
        What::Directory if is_path => super::regular::open_quietly(Path::new(&again)).ok(),
        _ => None,
    };
    let file = file.map_or_else(|| handle.try_clone().map(File::from), Ok)?;
    let removed = Removed {
        path: path.to_owned(),
        what,
        device,
        inode: meta.ino(),
        mode: meta.mode() & 0o7777,
        attributes: Attributes::of(&file, &meta).changeable(),
    };
    Ok(RemovedId::push(all, removed))
}

/// Whether it is the working or root directory of a process.
pub fn is_place(index: RemovedId, snapshot: &Snapshot) -> bool {
    let places = snapshot.processes.iter().map(|p| p.removed);
    let mut places = places.flat_map(|places| [places.cwd, places.root]);
    places.any(|place| place == Some(index))
}

impl Removed {
    /// Creates it and opens it with each of the flags, then removes its name. Also returns attributes that could not
    /// be set.
    ///
    /// # Errors
    /// Those of creating and opening it.
    pub fn make(&self, flags: &[u32]) -> io::Result<(Vec<OwnedFd>, Vec<String>)> {
        let mut failed = None;
        for path in self.places() {
            let mut parents = Parents::default();
            match parents.make(&path).and_then(|()| self.create(&path)) {
                Ok(()) => {}
                Err(e) => {
                    failed.get_or_insert(e);
                    continue;
                }
            }
            let opened = flags
                .iter()
                .map(|flags| Ok(ckpt_sys::files::open(&path, *flags as i32)?));
            let opened: io::Result<Vec<OwnedFd>> = opened.collect();
            let lost = self.complete(&path);
            match self.what {
                What::Directory => fs::remove_dir(&path)?,
                _ => fs::remove_file(&path)?,
            }
            return opened.map(|opened| (opened, lost));
        }
        Err(failed.unwrap_or_else(|| io::ErrorKind::NotFound.into()))
    }

    /// Its own name if that is free; otherwise one beside it, or in a temporary directory.
    fn places(&self) -> Vec<PathBuf> {
        let name = self.path.file_name().unwrap_or_default();
        let short: String = name.to_string_lossy().chars().take(50).collect();
        let other = format!(".{short}.{}.{}", std::process::id(), self.inode);
        let temporary = std::env::temp_dir().join(&other);
        vec![
            self.path.clone(),
            self.path.with_file_name(&other),
            temporary,
        ]
    }

    fn create(&self, path: &Path) -> io::Result<()> {
        let make = |kind| Ok(ckpt_sys::files::make_node(path, kind, 0o700)?);
        match &self.what {
            What::Directory => fs::create_dir(path),
            What::Link(target) => std::os::unix::fs::symlink(target, path),
            What::Fifo => make(libc::S_IFIFO),
            What::Socket => make(libc::S_IFSOCK),
        }
    }

    fn complete(&self, path: &Path) -> Vec<String> {
        let lost = match self.what {
            What::Directory => match File::open(path) {
                Ok(file) => self.attributes.give(&file, self.mode),
                Err(e) => vec![format!("its attributes: {e}")],
            },
            What::Link(_) => self.attributes.give_to_name(path, None),
            What::Fifo | What::Socket => self.attributes.give_to_name(path, Some(self.mode)),
        };
        let name = self.path.shown();
        lost.into_iter()
            .map(|what| format!("{name} (deleted): could not be given back: {what}"))
            .collect()
    }
}

/// Missing parent directories, removed together with it.
#[derive(Default)]
struct Parents(Vec<PathBuf>);

impl Parents {
    fn make(&mut self, path: &Path) -> io::Result<()> {
        let missing = path
            .ancestors()
            .skip(1)
            .take_while(|p| fs::symlink_metadata(p).is_err());
        let missing: Vec<&Path> = missing.collect();
        for directory in missing.into_iter().rev() {
            fs::create_dir(directory)?;
            self.0.push(directory.to_owned());
        }
        Ok(())
    }
}

impl Drop for Parents {
    fn drop(&mut self) {
        for directory in self.0.iter().rev() {
            let _ = fs::remove_dir(directory);
        }
    }
}
