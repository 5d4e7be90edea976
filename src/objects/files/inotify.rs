//! inotify(7).
//!
//! Events that nobody has read cannot be looked at without taking them, nor brought about again.
//! A restored queue begins with `IN_Q_OVERFLOW` in their place: look at everything anew.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::{Path, PathBuf};

use ckpt_tracer::Pid;
use ckpt_tracer::capabilities::Use;
use ckpt_tracer::proc::fdinfo::InotifyWatch;
use ckpt_tracer::proc::mounts;
use serde::{Deserialize, Serialize};

use super::{Look, sys};
use crate::capture::source::{Collector, Patience, Source};
use crate::error::{Error, Obstacle};
use crate::objects::Snapshot;
use crate::restore::plan::{Builder, Inherit, Inherited};
use crate::restore::surroundings::MISSING;

/// Watches on files and directories.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inotify {
    /// The watches, by ascending descriptor.
    pub watches: Vec<Watch>,
    /// Events were waiting that the program had not read.
    #[serde(default)]
    pub unread: bool,
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
    collector: &mut Collector,
) -> Result<Inotify, Box<Obstacle>> {
    let unread = sys::unread(&look.copy) > 0;
    if unread {
        not_read_yet(look.object(source), collector)?;
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
                format!(
                    "run ckpt as root, or with {}, to ask the kernel for it",
                    Use::FileHandles
                ),
            )));
        };
        found.push(Watch {
            wd: watch.wd,
            mask: watch.mask,
            path,
        });
    }
    found.sort_by_key(|w| w.wd);
    Ok(Inotify {
        watches: found,
        unread,
    })
}

/// As a rule the program reads its events soon; of those that stay there is a warning.
fn not_read_yet(object: String, collector: &mut Collector) -> Result<(), Box<Obstacle>> {
    let what = "is an inotify descriptor with events that the program has not read";
    match collector.patience {
        Patience::Running => {}
        Patience::Some => {
            let obstacle = Obstacle::new(object, what, "try again in a moment");
            return Err(Box::new(obstacle.passing()));
        }
        Patience::None => collector.warnings.push(format!(
            "{object} {what}; they are not in the image, and a restored program is told that \
             events were lost (IN_Q_OVERFLOW)"
        )),
    }
    Ok(())
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
    let mounts = mounts::read_mounts(Pid::own()).ok()?;
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

/// More events than this, of 64 bytes or so each, are not queued to bring about an overflow.
const MOST_QUEUED: u64 = 1 << 20;

impl Inotify {
    /// Watches on what is not there any more.
    pub fn missing(&self) -> impl Iterator<Item = Obstacle> {
        self.watches.iter().filter_map(|watch| {
            let error = std::fs::symlink_metadata(&watch.path).err()?;
            let object = format!("the inotify watch on {}", watch.path.display());
            Some(Obstacle::new(
                object,
                format!("cannot be set: {error}"),
                MISSING,
            ))
        })
    }

    /// Watches what was watched, on a descriptor that was made by [`create`]. Watch descriptors are
    /// given out in ascending order (`idr_alloc_cyclic` in fs/notify/inotify), so gaps are made and
    /// removed again; whether each number is the wanted one is checked.
    pub fn rebuild(&self, index: usize, at: i32, plan: &mut Builder) -> Result<(), Box<Obstacle>> {
        if self.unread {
            let most = max_queued_events().unwrap_or(0);
            if most > MOST_QUEUED {
                return Err(Box::new(Obstacle::new(
                    "an inotify descriptor with events that were not read",
                    format!("cannot be made to overflow, since its queue would hold {most} events"),
                    format!("lower /proc/sys/fs/inotify/max_queued_events to {MOST_QUEUED}"),
                )));
            }
        }
        plan.inherit(at, Inherited::Inotify(index));
        let fd = at as u64;
        let mut next = 1;
        for watch in &self.watches {
            let path = plan.path(&watch.path);
            let object = || format!("the inotify watch on {}", watch.path.display());
            while next < watch.wd {
                let args = [fd, path, libc::IN_DELETE_SELF.into()];
                plan.expect(libc::SYS_inotify_add_watch, &args, next as u64, object);
                plan.syscall(libc::SYS_inotify_rm_watch, &[fd, next as u64], object);
                next += 1;
            }
            // IN_ONESHOT, IN_EXCL_UNLINK and the events; what the kernel adds it adds again.
            let mask = u64::from(watch.mask & !libc::IN_IGNORED & !libc::IN_UNMOUNT);
            let args = [fd, path, mask];
            plan.expect(libc::SYS_inotify_add_watch, &args, watch.wd as u64, object);
            next += 1;
        }
        // Removing a watch queues IN_IGNORED; those events were never the program's.
        let numbered = self.watches.iter().zip(1..);
        if numbered
            .into_iter()
            .any(|(watch, number)| watch.wd != number)
        {
            let room = plan.reserve(64 * 1024);
            plan.syscall(libc::SYS_read, &[fd, room, 64 * 1024], || {
                "an inotify descriptor".to_owned()
            });
        }
        Ok(())
    }
}

/// The size of a queue that is made now.
fn max_queued_events() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").ok()?;
    text.trim().parse().ok()
}

/// A new one, without watches.
pub fn create(flags: u32) -> Result<OwnedFd, Error> {
    sys::inotify(flags as i32 & libc::O_NONBLOCK).map_err(|e| {
        let reason = e.desc();
        Error::Restore(format!(
            "an inotify descriptor cannot be created: {reason}; \
             see /proc/sys/fs/inotify/max_user_instances"
        ))
    })
}

/// Queues that are to overflow before the job runs: descriptors of ours beside the job's.
pub struct Overflows(Vec<OwnedFd>);

impl Overflows {
    /// Those of the descriptors that are handed over, each with its number.
    pub fn of(
        inherit: &[Inherit],
        descriptors: &[(OwnedFd, i32)],
        snapshot: &Snapshot,
    ) -> Result<Self, Error> {
        let unread = |what: &Inherited| match what {
            Inherited::Inotify(index) => matches!(
                &snapshot.descriptions[*index].kind,
                super::Kind::Inotify(inotify) if inotify.unread
            ),
            _ => false,
        };
        let wanted = inherit
            .iter()
            .zip(descriptors)
            .filter(|(i, _)| unread(&i.what));
        let copies = wanted.map(|(_, (fd, _))| fd.try_clone().map_err(cannot_overflow));
        Ok(Self(copies.collect::<Result<_, _>>()?))
    }

    /// Brings the overflows about, with all watches in place.
    pub fn make(self) -> Result<(), Error> {
        self.0
            .into_iter()
            .try_for_each(|queue| overflow(queue).map_err(cannot_overflow))
    }
}

fn cannot_overflow(error: std::io::Error) -> Error {
    Error::Restore(format!(
        "the queue of an inotify descriptor cannot be made to overflow: {error}"
    ))
}

/// Fills a queue by events of a file of ours until the kernel adds `IN_Q_OVERFLOW`, then reads
/// away all before it. What else comes meanwhile is among what the overflow stands for.
fn overflow(queue: OwnedFd) -> std::io::Result<()> {
    /// `struct inotify_event` without a name.
    const EVENT: usize = 16;
    let scratch = sys::memfd("ckpt-inotify")?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", scratch.as_raw_fd()));
    let mut queue = File::from(queue);
    let watch = sys::inotify_watch(&queue, &path, libc::IN_OPEN | libc::IN_CLOSE)?;
    let mut before = None;
    let mut full = sys::unread(&queue);
    while before != Some(full) {
        before = Some(full);
        // Two events that differ, so that none is merged with the one before.
        drop(File::open(&path)?);
        full = sys::unread(&queue);
    }
    // IN_IGNORED finds no room.
    sys::inotify_remove(&queue, watch)?;
    let mut left = full
        .checked_sub(EVENT)
        .ok_or(std::io::ErrorKind::Unsupported)?;
    let mut events = [0; 64 * 1024];
    while left > 0 {
        let most = left.min(events.len());
        left -= std::io::Read::read(&mut queue, &mut events[..most])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_that_overflowed_tells_only_of_that() {
        let made = sys::inotify(libc::O_NONBLOCK).expect("it can be made");
        let mut queue = File::from(made.try_clone().expect("it can be copied"));
        let dir = std::env::temp_dir();
        let watch = sys::inotify_watch(&queue, &dir, libc::IN_DELETE_SELF).expect("it exists");
        overflow(made).expect("it overflows");
        let mut event = [0; 64];
        let mut read = || std::io::Read::read(&mut queue, &mut event).map(|n| event[..n].to_vec());
        let words = [(-1i32).to_ne_bytes(), libc::IN_Q_OVERFLOW.to_ne_bytes()];
        let seen = read().expect("it is not empty");
        assert_eq!(seen[..8], words.concat());
        assert_eq!(seen.len(), 16);
        assert!(read().is_err(), "it is empty");
        sys::inotify_remove(&queue, watch).expect("it is still there");
    }
}
