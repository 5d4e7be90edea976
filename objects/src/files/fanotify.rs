//! fanotify(7): notification groups. A permission group is refused: other processes would wait meanwhile for an
//! answer that does not come.
//!
//! Unread events cannot be peeked at, and are not restored.

use std::path::PathBuf;

use ckpt_tracer::proc::fdinfo::{FanotifyGroup, FdDetail, InotifyWatch, MarkOn};
use ckpt_tracer::proc::fdlink::FdLink;
use ckpt_tracer::proc::mounts::read_mounts;
use serde::{Deserialize, Serialize};

use super::inotify::search::Search;
use super::kind::{Captured, OpenFile, Opened, Place, Sight, Substitutes};
use super::{Look, Staging, left, place};
use crate::Snapshot;
use crate::access::MISSING;
use crate::error::{Error, Obstacle};
use crate::need::Need;
use crate::plan::Builder;
use crate::source::{Collector, Source};
use crate::text::Shown;

/// A group and its marks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fanotify {
    /// `FAN_*` of fanotify_init(2).
    pub flags: u32,
    /// `O_*` of the descriptors in events.
    pub event_flags: u32,
    /// Its marks.
    pub marks: Vec<Mark>,
}

/// A mark.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The path: of the file, or on the marked mount or file system.
    pub path: PathBuf,
    /// `FAN_MARK_INODE`, `FAN_MARK_MOUNT` or `FAN_MARK_FILESYSTEM`.
    pub kind: u32,
    /// `FAN_MARK_*` that stay with it.
    pub flags: u32,
    /// Reported events.
    pub mask: u64,
    /// Ignored events.
    pub ignored: u64,
}

/// `FAN_CLASS_CONTENT | FAN_CLASS_PRE_CONTENT`, linux/fanotify.h.
const ASKED: u32 = 0x4 | 0x8;
const MARK_ADD: u32 = 0x1;
const MARK_MOUNT: u32 = 0x10;
const MARK_FILESYSTEM: u32 = 0x100;
const MARK_IGNORED_MASK: u32 = 0x20;
const MARK_IGNORED_SURV_MODIFY: u32 = 0x40;
const MARK_EVICTABLE: u32 = 0x200;
const MARK_IGNORE: u32 = 0x400;

/// Captures a group.
fn capture(
    source: &Source,
    look: &Look,
    group: &FanotifyGroup,
    collector: &mut Collector,
) -> Result<Fanotify, Box<Obstacle>> {
    if group.flags & ASKED != 0 {
        let what = "a fanotify group with permission events";
        return Err(Box::new(left::droppable(look, source, what)));
    }
    if ckpt_sys::files::unread(&look.copy) > 0 {
        let what = "is a fanotify group with events that the program has not read";
        collector.not_read_yet(
            look.object(source),
            what,
            "they are not in the image, and a restored program does not get them",
        )?;
    }
    let mut marks = Vec::with_capacity(group.marks.len());
    for mark in &group.marks {
        let (kind, path) = match &mark.on {
            MarkOn::File(file) => (0, named(source, file)),
            MarkOn::Mount(id) => {
                let mounts = read_mounts(source.dir.clone()).ok();
                let mount = mounts.and_then(|table| table.mount_of(*id).cloned());
                (MARK_MOUNT, mount.map(|mount| mount.mount_point))
            }
            MarkOn::FileSystem(device) => {
                let mounts = read_mounts(source.dir.clone()).ok();
                let mount =
                    mounts.and_then(|table| table.all().iter().find(|m| m.dev == *device).cloned());
                (MARK_FILESYSTEM, mount.map(|mount| mount.mount_point))
            }
            MarkOn::Other => (0, None),
        };
        let path = path.ok_or_else(|| Box::new(no_name(source, look, &mark.on)))?;
        marks.push(Mark {
            path,
            kind,
            flags: mark.flags,
            mask: mark.mask,
            ignored: mark.ignored,
        });
    }
    Ok(Fanotify {
        flags: group.flags,
        event_flags: group.event_flags,
        marks,
    })
}

fn named(source: &Source, file: &InotifyWatch) -> Option<PathBuf> {
    Search::of(source).all(&[file]).pop().flatten()
}

fn no_name(source: &Source, look: &Look, on: &MarkOn) -> Obstacle {
    let what = match on {
        MarkOn::File(file) => format!("inode {} of device {:?}", file.ino, file.sdev),
        MarkOn::Mount(id) => format!("the mount {id}"),
        MarkOn::FileSystem(device) => format!("the file system of device {device:?}"),
        MarkOn::Other => "what this version does not know".to_owned(),
    };
    Obstacle::new(
        look.object(source),
        format!("is a fanotify group with a mark on {what}, for which no name was found"),
        format!(
            "let the program remove that mark, or leave the group out of the restored job with --drop-fd {}",
            look.fd
        ),
    )
}

impl OpenFile for Fanotify {
    fn capture(sight: &Sight, collector: &mut Collector) -> Captured {
        match (&sight.look.link, &sight.look.info.detail) {
            (FdLink::AnonInode(_), FdDetail::Fanotify(group)) => {
                let captured = capture(sight.source, sight.look, group, collector);
                Some(captured.map(Into::into))
            }
            _ => None,
        }
    }

    fn anon_inode() -> Option<&'static str> {
        Some("fanotify")
    }

    fn class(&self) -> &'static str {
        "fanotify"
    }

    fn shown(&self) -> String {
        format!("fanotify:{} marks", self.marks.len())
    }

    fn needs(&self, _: u32, _: &Snapshot) -> Vec<Need> {
        let needed = |mark: &Mark| Need::new("watched file", mark.path.shown(), "for fanotify");
        self.marks.iter().map(needed).collect()
    }

    fn each_path(&mut self, f: &mut dyn FnMut(&mut PathBuf)) {
        self.marks.iter_mut().for_each(|mark| f(&mut mark.path));
    }

    fn substitute(&mut self, _: &mut u32, by: &mut dyn Substitutes) -> Result<(), Error> {
        Err(by.refusal(
            "a fanotify group of the job".to_owned(),
            "would get events of what its copy does and cannot be rehearsed",
        ))
    }

    /// `FAN_NONBLOCK` stays among the flags of the group when F_SETFL clears `O_NONBLOCK`.
    fn opened(&self) -> Opened {
        Opened::Unknown
    }

    /// Makes the group.
    fn open(&self, at: &Place, plan: &mut Builder) -> Result<(), Vec<Obstacle>> {
        let missing: Vec<Obstacle> = self.missing().collect();
        let object = || "a fanotify group".to_owned();
        let args = [self.flags.into(), self.event_flags.into()];
        plan.expect(libc::SYS_fanotify_init, &args, 0, object);
        place(0, at.at, plan, object);
        match missing.is_empty() {
            true => Ok(()),
            false => Err(missing),
        }
    }

    /// Sets the marks.
    fn complete(&self, at: i32, _: Staging, _: &Snapshot, plan: &mut Builder) {
        for mark in &self.marks {
            let path = plan.path(&mark.path);
            let stays = mark.kind | mark.flags & MARK_EVICTABLE;
            let ignore = match mark.flags & MARK_IGNORE {
                0 => MARK_IGNORED_MASK,
                _ => MARK_IGNORE,
            };
            let ignore = ignore | mark.flags & MARK_IGNORED_SURV_MODIFY;
            for (mask, flags) in [(mark.mask, stays), (mark.ignored, stays | ignore)] {
                if mask == 0 {
                    continue;
                }
                let flags = u64::from(MARK_ADD | flags);
                let here = libc::AT_FDCWD as u64;
                let args = [at as u64, flags, mask, here, path];
                plan.syscall(libc::SYS_fanotify_mark, &args, || {
                    format!("the fanotify mark on {}", mark.path.shown())
                });
            }
        }
    }
}

impl Fanotify {
    /// Marks on paths that do not exist any more.
    fn missing(&self) -> impl Iterator<Item = Obstacle> {
        self.marks.iter().filter_map(|mark| {
            let error = std::fs::symlink_metadata(&mark.path).err()?;
            let object = format!("the fanotify mark on {}", mark.path.shown());
            let reason = format!("cannot be set: {error}");
            Some(Obstacle::new(object, reason, MISSING))
        })
    }
}
