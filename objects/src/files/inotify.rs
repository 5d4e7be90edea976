//! inotify(7).
//!
//! Unread events cannot be peeked at, nor generated again. In their place a restored queue begins with
//! `IN_Q_OVERFLOW`: the program has to rescan.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use ckpt_tracer::capabilities::Use;
use ckpt_tracer::proc::fdinfo::{FdDetail, InotifyWatch};
use ckpt_tracer::proc::fdlink::FdLink;
use serde::{Deserialize, Serialize};

use super::kind::{Captured, OpenFile, Place, Sight, Substitutes};
use super::{Look, Staging};
use crate::Snapshot;
use crate::access::MISSING;
use crate::bounds;
use crate::error::{Error, Obstacle};
use crate::index::DescriptionId;
use crate::need::Need;
use crate::plan::{Builder, Inherit, Inherited};
use crate::references::{Faults, require};
use crate::rights::{self, Rights};
use crate::source::{Collector, Source};
use crate::text::Shown;

pub(super) mod search;

use search::Search;

/// Watches on files and directories.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inotify {
    /// The watches, by ascending descriptor.
    pub watches: Vec<Watch>,
    /// There were unread events.
    #[serde(default)]
    pub unread: bool,
}

/// A watch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// Its watch descriptor.
    #[serde(deserialize_with = "bounds::watch")]
    pub wd: i32,
    /// `IN_*`.
    pub mask: u32,
    /// The watched path; empty for a nameless file.
    #[serde(with = "crate::raw_path")]
    pub path: PathBuf,
    /// The description that refers to the watched file, an index in the snapshot's.
    #[serde(default)]
    pub open: Option<DescriptionId>,
}

/// Captures the watches. A nameless file is watched through a description of the job that refers to it: `job` has all
/// of them, and the index of the first.
fn capture(
    source: &Source,
    look: &Look,
    watches: &[InotifyWatch],
    job: (&[Look], usize),
    collector: &mut Collector,
) -> Result<Inotify, Box<Obstacle>> {
    let unread = ckpt_sys::files::unread(&look.copy) > 0;
    if unread {
        let what = "is an inotify descriptor with events that the program has not read";
        collector.not_read_yet(look.object(source), what, "they are not in the image, and a restored program is told that events were lost (IN_Q_OVERFLOW)")?;
    }
    let nameless: Vec<Option<DescriptionId>> =
        watches.iter().map(|w| open_nameless(w, job)).collect();
    let named = watches.iter().zip(&nameless).filter(|(_, n)| n.is_none());
    let named: Vec<&InotifyWatch> = named.map(|(watch, _)| watch).collect();
    let mut names = Search::of(source).all(&named).into_iter();
    let mut found = Vec::with_capacity(watches.len());
    for (watch, open) in watches.iter().zip(nameless) {
        let path = match open {
            Some(_) => Some(PathBuf::new()),
            None => names.next().flatten(),
        };
        let Some(path) = path else {
            return Err(Box::new(no_name(source, look, watch)));
        };
        found.push(Watch {
            wd: watch.wd,
            mask: watch.mask,
            path,
            open,
        });
    }
    found.sort_by_key(|w| w.wd);
    let inotify = Inotify {
        watches: found,
        unread,
    };
    match inotify.out_of_reach() {
        Some(reason) => Err(Box::new(Obstacle::without_remedy(
            look.object(source),
            reason,
        ))),
        None => Ok(inotify),
    }
}

fn no_name(source: &Source, look: &Look, watch: &InotifyWatch) -> Obstacle {
    let remedy = match nix::unistd::geteuid().is_root() {
        true => "let the program remove that watch before the checkpoint".to_owned(),
        false => format!(
            "run ckpt as root, or with {}, to ask the kernel for it",
            Use::FileHandles
        ),
    };
    Obstacle::new(
        look.object(source),
        format!(
            "is an inotify descriptor whose watch {} is on inode {} of device {}:{}, for which no name \
             was found",
            watch.wd, watch.ino, watch.sdev.0, watch.sdev.1
        ),
        remedy,
    )
}

/// The description of the job that refers to a watched nameless file.
fn open_nameless(watch: &InotifyWatch, (looks, first): (&[Look], usize)) -> Option<DescriptionId> {
    let is_it = |look: &Look| {
        let stat = &look.stat;
        let device = (libc::major(stat.st_dev), libc::minor(stat.st_dev));
        stat.st_nlink == 0 && stat.st_ino == watch.ino && device == watch.sdev
    };
    Some(DescriptionId(first + looks.iter().position(is_it)?))
}

/// Most watches that are added and removed again, so that a later one gets its number.
const MOST_PASSING: i32 = 1 << 17;
/// Events in a read of [`ROOM`] bytes.
const EVENTS: usize = ROOM / 16;
/// Bytes.
const ROOM: usize = 64 * 1024;

/// Most events, of about 64 bytes each, that are queued to cause an overflow.
const MOST_QUEUED: u64 = 1 << 20;

impl OpenFile for Inotify {
    fn capture(sight: &Sight, collector: &mut Collector) -> Captured {
        let watches = match (&sight.look.link, &sight.look.info.detail) {
            (FdLink::AnonInode(_), FdDetail::Inotify { watches }) => watches.as_slice(),
            (FdLink::AnonInode(name), _) if name == "inotify" => &[],
            _ => return None,
        };
        let captured = capture(sight.source, sight.look, watches, sight.job, collector);
        Some(captured.map(Into::into))
    }

    fn anon_inode() -> Option<&'static str> {
        Some("inotify")
    }

    fn class(&self) -> &'static str {
        "inotify"
    }

    fn shown(&self) -> String {
        format!("inotify:{} watches", self.watches.len())
    }

    fn needs(&self, _: u32, _: &Snapshot) -> Vec<Need> {
        let named = self.watches.iter().filter(|watch| watch.open.is_none());
        let needed = |watch: &Watch| Need::new("watched file", watch.path.shown(), "for inotify");
        named.map(needed).collect()
    }

    fn check(&self, number: DescriptionId, snapshot: &Snapshot, faults: &mut Faults) {
        if let Some(reason) = self.out_of_reach() {
            faults.add(format_args!("description {number} {reason}"));
        }
        require!(
            faults,
            self.watches.is_sorted_by(|a, b| a.wd < b.wd),
            "watches of the inotify in description {number} are out of order"
        );
        for open in self.watches.iter().filter_map(|watch| watch.open) {
            require!(
                faults,
                open.find(&snapshot.descriptions).is_some() && open != number,
                "a watch of the inotify in description {number} refers to description {open}, which it cannot watch"
            );
        }
    }

    fn each_path(&mut self, f: &mut dyn FnMut(&mut PathBuf)) {
        let named = self.watches.iter_mut().filter(|watch| watch.open.is_none());
        named.for_each(|watch| f(&mut watch.path));
    }

    fn each_reference(&self, f: &mut dyn FnMut(DescriptionId)) {
        self.watches
            .iter()
            .filter_map(|watch| watch.open)
            .for_each(f);
    }

    fn substitute(&mut self, _: &mut u32, by: &mut dyn Substitutes) -> Result<(), Error> {
        let mut named = self.watches.iter().filter(|watch| watch.open.is_none());
        named.try_for_each(|watch| by.watched(&watch.path))
    }

    fn is_of_surroundings(&self) -> bool {
        true
    }

    /// Takes a descriptor made by [`create`].
    fn open(&self, place: &Place, plan: &mut Builder) -> Result<(), Vec<Obstacle>> {
        let mut obstacles: Vec<Obstacle> = self.missing(plan.host().rights.as_ref()).collect();
        obstacles.extend(self.cannot_overflow());
        if !obstacles.is_empty() {
            return Err(obstacles);
        }
        plan.inherit(place.at, Inherited::Inotify(place.index));
        Ok(())
    }

    fn complete(&self, at: i32, staging: Staging, _: &Snapshot, plan: &mut Builder) {
        self.rebuild_watches(at, staging, plan);
    }
}

impl Inotify {
    /// Why its watches cannot get their numbers.
    fn out_of_reach(&self) -> Option<String> {
        let last = self.watches.iter().map(|watch| watch.wd).max()?;
        let passing = last.saturating_sub(self.watches.len() as i32);
        (passing > MOST_PASSING).then(|| {
            format!(
                "is an inotify descriptor with a watch {last}, a number that is not reached: the program has \
                 added and removed very many watches"
            )
        })
    }

    /// Watches on paths that do not exist any more, or may not be read with these rights.
    fn missing(&self, rights: Option<&Rights>) -> impl Iterator<Item = Obstacle> {
        let named = self.watches.iter().filter(|watch| watch.open.is_none());
        named.filter_map(move |watch| {
            let object = || format!("the inotify watch on {}", watch.path.shown());
            if let Err(error) = std::fs::symlink_metadata(&watch.path) {
                let reason = format!("cannot be set: {error}");
                return Some(Obstacle::new(object(), reason, MISSING));
            }
            // inotify_add_watch(2) requires it.
            let error = rights::may_open(rights, &watch.path, libc::O_RDONLY).err()?;
            let reason = format!("cannot be set by the job's user: {}", error.desc());
            Some(Obstacle::new(object(), reason, "let that user read it"))
        })
    }

    /// Why IN_Q_OVERFLOW cannot stand for the unread events.
    fn cannot_overflow(&self) -> Option<Obstacle> {
        let most = max_queued_events().unwrap_or(0);
        (self.unread && most > MOST_QUEUED).then(|| {
            Obstacle::new(
                "an inotify descriptor with events that were not read",
                format!("cannot be made to overflow, since its queue would hold {most} events"),
                format!("lower /proc/sys/fs/inotify/max_queued_events to {MOST_QUEUED}"),
            )
        })
    }

    /// Adds the watches, when every description is open. Watch descriptors are assigned in ascending order
    /// (`idr_alloc_cyclic` in fs/notify/inotify), so watches for gaps are added and removed again; each number is
    /// checked.
    fn rebuild_watches(&self, at: i32, staging: Staging, plan: &mut Builder) {
        let fd = at as u64;
        let (mut next, mut queued) = (1, 0);
        let last = self.watches.last().map_or(0, |watch| watch.wd);
        let room = match last as usize > self.watches.len() {
            true => plan.reserve(ROOM),
            false => 0,
        };
        // Removing a watch queues IN_IGNORED; those events are not the program's.
        let forget = |plan: &mut Builder| {
            let object = || "an inotify descriptor".to_owned();
            plan.syscall(libc::SYS_read, &[fd, room, ROOM as u64], object);
        };
        for watch in &self.watches {
            let watched = match watch.open {
                Some(description) => format!("/proc/self/fd/{}", staging.of(description)).into(),
                None => watch.path.clone(),
            };
            let path = plan.path(&watched);
            let object = || match watch.open {
                Some(_) => "the inotify watch on a file without a name".to_owned(),
                None => format!("the inotify watch on {}", watch.path.shown()),
            };
            while next < watch.wd {
                let args = [fd, path, libc::IN_DELETE_SELF.into()];
                plan.expect(libc::SYS_inotify_add_watch, &args, next as u64, object);
                plan.syscall(libc::SYS_inotify_rm_watch, &[fd, next as u64], object);
                next += 1;
                queued += 1;
                if queued == EVENTS {
                    forget(plan);
                    queued = 0;
                }
            }
            // IN_ONESHOT, IN_EXCL_UNLINK and the events; the kernel adds its own flags again.
            let mask = u64::from(watch.mask & !libc::IN_IGNORED & !libc::IN_UNMOUNT);
            let args = [fd, path, mask];
            plan.expect(libc::SYS_inotify_add_watch, &args, watch.wd as u64, object);
            next += 1;
        }
        if queued > 0 {
            forget(plan);
        }
    }
}

/// The limit of a new queue.
fn max_queued_events() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").ok()?;
    text.trim().parse().ok()
}

/// A new instance, without watches.
pub fn create(flags: u32) -> Result<OwnedFd, Error> {
    ckpt_sys::events::inotify(flags as i32 & libc::O_NONBLOCK).map_err(|e| {
        let reason = e.desc();
        let reason = format!("{reason}; see /proc/sys/fs/inotify/max_user_instances");
        Error::object("an inotify descriptor", "created", reason)
    })
}

/// Queues that have to overflow before the job runs: descriptors of ours, shared with the job.
pub struct Overflows(Vec<OwnedFd>);

impl Overflows {
    /// Those of the inherited descriptors, each with its number.
    pub fn of(
        inherit: &[Inherit],
        descriptors: &[(OwnedFd, i32)],
        snapshot: &Snapshot,
    ) -> Result<Self, Error> {
        let unread = |what: &Inherited| match what {
            Inherited::Inotify(index) => {
                let inotify = snapshot.descriptions[*index].kind.get::<Inotify>();
                inotify.is_some_and(|inotify| inotify.unread)
            }
            _ => false,
        };
        let wanted = inherit
            .iter()
            .zip(descriptors)
            .filter(|(i, _)| unread(&i.what));
        let copies = wanted.map(|(_, (fd, _))| fd.try_clone().map_err(cannot_overflow));
        Ok(Self(copies.collect::<Result<_, _>>()?))
    }

    /// Makes them overflow, with all watches in place.
    pub fn make(self) -> Result<(), Error> {
        self.0
            .into_iter()
            .try_for_each(|queue| overflow(queue).map_err(cannot_overflow))
    }
}

fn cannot_overflow(error: std::io::Error) -> Error {
    Error::object(
        "the queue of an inotify descriptor",
        "made to overflow",
        error,
    )
}

/// Fills a queue with events of a file of ours until the kernel adds `IN_Q_OVERFLOW`, then reads everything before
/// it. The overflow stands for other events that arrive meanwhile too.
fn overflow(queue: OwnedFd) -> std::io::Result<()> {
    /// `struct inotify_event` without a name.
    const EVENT: usize = 16;
    let scratch = ckpt_sys::files::memfd(c"ckpt-inotify", 0)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", scratch.as_raw_fd()));
    let mut queue = File::from(queue);
    let watch = ckpt_sys::events::inotify_watch(&queue, &path, libc::IN_OPEN | libc::IN_CLOSE)?;
    let mut before = None;
    let mut full = ckpt_sys::files::unread(&queue);
    while before != Some(full) {
        before = Some(full);
        // Two different events, so that none is merged with the previous one.
        drop(File::open(&path)?);
        full = ckpt_sys::files::unread(&queue);
    }
    // IN_IGNORED finds no room.
    ckpt_sys::events::inotify_remove(&queue, watch)?;
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
        let made = ckpt_sys::events::inotify(libc::O_NONBLOCK).expect("it can be made");
        let mut queue = File::from(made.try_clone().expect("it can be copied"));
        let dir = std::env::temp_dir();
        let watch =
            ckpt_sys::events::inotify_watch(&queue, &dir, libc::IN_DELETE_SELF).expect("it exists");
        overflow(made).expect("it overflows");
        let mut event = [0; 64];
        let mut read = || std::io::Read::read(&mut queue, &mut event).map(|n| event[..n].to_vec());
        let words = [(-1i32).to_ne_bytes(), libc::IN_Q_OVERFLOW.to_ne_bytes()];
        let seen = read().expect("it is not empty");
        assert_eq!(seen[..8], words.concat());
        assert_eq!(seen.len(), 16);
        assert!(read().is_err(), "it is empty");
        ckpt_sys::events::inotify_remove(&queue, watch).expect("it is still there");
    }
}
