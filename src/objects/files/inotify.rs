//! inotify(7).

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::{Path, PathBuf};

use ckpt_tracer::Pid;
use ckpt_tracer::proc::fdinfo::InotifyWatch;
use ckpt_tracer::proc::mounts;
use serde::{Deserialize, Serialize};

use super::{Look, sys};
use crate::capture::source::Source;
use crate::error::Obstacle;
use crate::restore::plan::Builder;

/// Watches on files and directories.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inotify {
    /// The watches, by ascending descriptor.
    pub watches: Vec<Watch>,
}

/// One watch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// The number that the program knows it by.
    pub wd: i32,
    /// `IN_*`.
    pub mask: u32,
    /// What is watched.
    pub path: PathBuf,
}

/// Captures the watches. The kernel keeps inodes, not names; a name is found through the file
/// handle (which wants CAP_DAC_READ_SEARCH), or among the places that the job itself knows.
pub fn capture(
    source: &Source,
    look: &Look,
    watches: &[InotifyWatch],
) -> Result<Inotify, Box<Obstacle>> {
    if sys::unread(&look.copy) > 0 {
        let obstacle = Obstacle::new(
            look.object(source),
            "is an inotify descriptor with events that the program has not read yet",
            "try again in a moment",
        );
        return Err(Box::new(obstacle.passing()));
    }
    let mut found = Vec::with_capacity(watches.len());
    for watch in watches {
        let path = path_by_handle(watch).or_else(|| path_by_search(source, watch));
        let Some(path) = path else {
            return Err(Box::new(Obstacle::new(
                look.object(source),
                format!(
                    "is an inotify descriptor whose watch {} is on inode {} of device {}:{}, for \
                     which no name was found",
                    watch.wd, watch.ino, watch.sdev.0, watch.sdev.1
                ),
                "run ckpt as root, which may ask the kernel for it",
            )));
        };
        found.push(Watch {
            wd: watch.wd,
            mask: watch.mask,
            path,
        });
    }
    found.sort_by_key(|w| w.wd);
    Ok(Inotify { watches: found })
}

fn is_it(watch: &InotifyWatch, path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|m| {
        m.ino() == watch.ino && (libc::major(m.dev()), libc::minor(m.dev())) == watch.sdev
    })
}

fn path_by_handle(watch: &InotifyWatch) -> Option<PathBuf> {
    if watch.handle.is_empty() {
        return None;
    }
    let mounts = mounts::read_mounts(Pid(std::process::id() as i32)).ok()?;
    let on_it = mounts.all().iter().filter(|m| m.dev == watch.sdev);
    on_it
        .filter_map(|mount| File::open(&mount.mount_point).ok())
        .find_map(|mount| {
            let fd = sys::open_by_handle(&mount, watch.handle_type, &watch.handle).ok()?;
            let path = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()?;
            is_it(watch, &path).then_some(path)
        })
}

/// The working directory, the directories of open files, and their ancestors and entries.
fn path_by_search(source: &Source, watch: &InotifyWatch) -> Option<PathBuf> {
    let mut places: Vec<PathBuf> = Vec::new();
    places.extend(std::fs::read_link(source.dir.join("cwd")));
    places.extend(std::fs::read_link(source.dir.join("exe")));
    if let Ok(fds) = std::fs::read_dir(source.dir.join("fd")) {
        places.extend(
            fds.flatten()
                .filter_map(|fd| std::fs::read_link(fd.path()).ok()),
        );
    }
    places.extend(["/tmp", "/etc", "/var/log", "/dev"].map(PathBuf::from));
    let mut all: Vec<&Path> = places.iter().flat_map(|p| p.ancestors()).collect();
    all.sort();
    all.dedup();
    let direct = all
        .iter()
        .find(|p| is_it(watch, p))
        .map(|p| p.to_path_buf());
    direct.or_else(|| {
        all.iter()
            .filter_map(|dir| std::fs::read_dir(dir).ok())
            .find_map(|entries| {
                entries
                    .flatten()
                    .find(|e| e.ino() == watch.ino && is_it(watch, &e.path()))
                    .map(|e| e.path())
            })
    })
}

impl Inotify {
    /// Creates it at its staging number. Watch descriptors are given out in ascending order
    /// (`idr_alloc_cyclic` in fs/notify/inotify), so gaps are made and removed again; whether
    /// each number is the wanted one is checked.
    pub fn rebuild(&self, flags: u32, at: i32, plan: &mut Builder) {
        let object = || "an inotify descriptor".to_owned();
        let flags = flags & libc::O_NONBLOCK as u32;
        plan.expect(libc::SYS_inotify_init1, &[flags.into()], 0, object);
        let mut next = 1;
        for watch in &self.watches {
            let path = plan.path(&watch.path);
            let object = || format!("the inotify watch on {}", watch.path.display());
            while next < watch.wd {
                let mask = libc::IN_DELETE_SELF.into();
                plan.expect(
                    libc::SYS_inotify_add_watch,
                    &[0, path, mask],
                    next as u64,
                    object,
                );
                plan.syscall(libc::SYS_inotify_rm_watch, &[0, next as u64], object);
                next += 1;
            }
            // IN_ONESHOT, IN_EXCL_UNLINK and the events; what the kernel adds it adds again.
            let mask = u64::from(watch.mask & !libc::IN_IGNORED & !libc::IN_UNMOUNT);
            let args = [0, path, mask];
            plan.expect(libc::SYS_inotify_add_watch, &args, watch.wd as u64, object);
            next += 1;
        }
        // Removing a watch queues IN_IGNORED; those events were never the program's.
        if self
            .watches
            .iter()
            .enumerate()
            .any(|(i, w)| w.wd != i as i32 + 1)
        {
            let room = plan.reserve(64 * 1024);
            plan.syscall(libc::SYS_read, &[0, room, 64 * 1024], object);
        }
        super::place(0, at, plan, object);
    }
}
