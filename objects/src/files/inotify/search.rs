//! Finds paths of watched inodes. The kernel keeps inodes, and fdinfo shows their file handles.
//!
//! A handle is opened if that is permitted and the file system supports it (CAP_DAC_READ_SEARCH; not on overlayfs
//! without `nfs_export`). Otherwise the path is searched: near the job's open files, below its watches, and by root
//! on the whole mount.

use std::collections::HashSet;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::{Path, PathBuf};

use ckpt_tracer::Pid;
use ckpt_tracer::proc::fdinfo::InotifyWatch;
use ckpt_tracer::proc::mounts::{self, Mount};

use crate::open::{Handle, Last};
use crate::source::Source;

/// Most directory entries read for one descriptor, since the job stands still meanwhile.
const MOST: usize = 200_000;

/// The paths of watched inodes, as far as they are found.
pub(in crate::files) struct Search<'a> {
    source: &'a Source,
    mounts: Vec<Mount>,
    /// Watched directories with known paths.
    watched: Vec<PathBuf>,
    /// Entries that may still be read.
    left: usize,
}

impl<'a> Search<'a> {
    pub(in crate::files) fn of(source: &'a Source) -> Self {
        let mounts = mounts::read_mounts(Pid::own());
        Self {
            source,
            mounts: mounts.map(|table| table.all().to_vec()).unwrap_or_default(),
            watched: Vec::new(),
            left: MOST,
        }
    }

    /// A path of each; `None` if not found. Easy ones come first, since others are found below them.
    pub(in crate::files) fn all(&mut self, watches: &[&InotifyWatch]) -> Vec<Option<PathBuf>> {
        let mut found: Vec<Option<PathBuf>> = vec![None; watches.len()];
        for (watch, name) in watches.iter().zip(&mut found) {
            *name = self.by_handle(watch).or_else(|| self.nearby(watch));
            self.watched.extend(name.clone());
        }
        for place in [Self::watched_places, Self::whole_mounts] {
            for (index, watch) in watches.iter().enumerate() {
                if found[index].is_some() {
                    continue;
                }
                // Directories on the path found are likely to be watched too.
                let rest = || (0..watches.len()).filter(|i| watches[*i].sdev == watch.sdev);
                let rest: Vec<usize> = rest().filter(|i| found[*i].is_none()).collect();
                let wanted: Vec<&InotifyWatch> = rest.iter().map(|i| watches[*i]).collect();
                let places = place(self, watch);
                for (number, path) in self.below(places, &wanted) {
                    found[rest[number]] = Some(path);
                }
            }
        }
        found
    }

    fn by_handle(&self, watch: &InotifyWatch) -> Option<PathBuf> {
        if watch.handle.is_empty() {
            return None;
        }
        let on_it = self.mounts.iter().filter(|m| m.dev == watch.sdev);
        on_it
            .filter_map(|mount| Handle::of(&mount.mount_point, Last::IsIt).ok())
            // A FIFO or device may be a mount point too.
            .filter(|mount| mount.meta().is_dir() || mount.meta().is_file())
            .filter_map(|mount| mount.read().ok())
            .find_map(|mount| {
                let fd = ckpt_sys::files::open_by_handle(&mount, watch.handle_type, &watch.handle)
                    .ok()?;
                let path = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()?;
                is_it(watch, &path).then_some(path)
            })
    }

    /// The working directory, the directories of open files, and their ancestors and entries.
    fn nearby(&self, watch: &InotifyWatch) -> Option<PathBuf> {
        let dir = &self.source.dir;
        let mut places: Vec<PathBuf> = Vec::new();
        places.extend(fs::read_link(dir.join("cwd")));
        places.extend(fs::read_link(dir.join("exe")));
        if let Ok(fds) = fs::read_dir(dir.join("fd")) {
            places.extend(fds.flatten().filter_map(|fd| fs::read_link(fd.path()).ok()));
        }
        places.extend(["/tmp", "/etc", "/var/log", "/dev"].map(PathBuf::from));
        let mut all: Vec<&Path> = places.iter().flat_map(|p| p.ancestors()).collect();
        all.sort();
        all.dedup();
        let direct = all.iter().find(|p| is_it(watch, p));
        direct.map(|p| p.to_path_buf()).or_else(|| {
            let mut listed = all.iter().filter_map(|dir| fs::read_dir(dir).ok());
            listed.find_map(|entries| {
                let entry = entries.flatten().find(|e| {
                    // overlayfs may list another number than the inode's.
                    (e.ino() == watch.ino || is_dir(e)) && is_it(watch, &e.path())
                });
                entry.map(|e| e.path())
            })
        })
    }

    fn watched_places(&self, _: &InotifyWatch) -> Vec<PathBuf> {
        self.watched.clone()
    }

    /// Without root it would end in directories that may not be read.
    fn whole_mounts(&self, watch: &InotifyWatch) -> Vec<PathBuf> {
        if !nix::unistd::geteuid().is_root() {
            return Vec::new();
        }
        let on_it = self.mounts.iter().filter(|m| m.dev == watch.sdev);
        on_it.map(|mount| mount.mount_point.clone()).collect()
    }

    /// Searches below these directories, level by level, until all are found. Returns indices and paths of those
    /// found.
    fn below(&mut self, mut next: Vec<PathBuf>, wanted: &[&InotifyWatch]) -> Vec<(usize, PathBuf)> {
        let mut found: Vec<(usize, PathBuf)> = Vec::new();
        let mut seen: HashSet<(u64, u64)> = HashSet::new();
        let devices: HashSet<(u32, u32)> = wanted.iter().map(|watch| watch.sdev).collect();
        while let Some(dir) = (!next.is_empty()).then(|| next.remove(0)) {
            let Ok(meta) = fs::metadata(&dir) else {
                continue;
            };
            if !seen.insert((meta.dev(), meta.ino())) {
                continue;
            }
            for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
                if self.left == 0 || found.len() == wanted.len() {
                    return found;
                }
                self.left -= 1;
                let directory = is_dir(&entry);
                let may_be = |watch: &&&InotifyWatch| directory || watch.ino == entry.ino();
                if wanted.iter().any(|watch| may_be(&watch)) {
                    let path = entry.path();
                    let it = wanted.iter().position(|watch| is_it(watch, &path));
                    let new = it.filter(|it| found.iter().all(|(number, _)| number != it));
                    found.extend(new.map(|number| (number, path.clone())));
                    let inside = directory && is_on(&devices, &path, &meta);
                    next.extend(inside.then_some(path));
                }
            }
        }
        found
    }
}

fn is_dir(entry: &fs::DirEntry) -> bool {
    entry.file_type().is_ok_and(|kind| kind.is_dir())
}

/// Whether a directory is on the file system of a wanted inode, or on that of its parent.
fn is_on(devices: &HashSet<(u32, u32)>, path: &Path, above: &fs::Metadata) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| {
        let device = (libc::major(meta.dev()), libc::minor(meta.dev()));
        meta.dev() == above.dev() || devices.contains(&device)
    })
}

/// By its inode number, or on overlayfs, whose numbers differ from the kernel's, by its handle.
pub(super) fn is_it(watch: &InotifyWatch, path: &Path) -> bool {
    let Ok(meta) = fs::metadata(path) else {
        return false;
    };
    if (libc::major(meta.dev()), libc::minor(meta.dev())) == watch.sdev {
        return meta.ino() == watch.ino;
    }
    !watch.handle.is_empty()
        && ckpt_sys::files::handle_of(path)
            .is_ok_and(|(kind, handle)| kind == watch.handle_type && handle == watch.handle)
}
