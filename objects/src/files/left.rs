//! Descriptors that the user drops or replaces: `--drop-fd` and `--replace-fd`. They are for descriptors that a
//! program has inherited and does not use, and for those that cannot be captured. The job itself is not changed.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use ckpt_tracer::proc::fdlink::FdLink;
use serde::{Deserialize, Serialize};

use super::kind::{Captured, OpenFile, Opened, Place, Sight};
use super::{Kind, Look, Survey};
use crate::Snapshot;
use crate::bounds;
use crate::error::Obstacle;
use crate::files::outside::{Outside, Surroundings};
use crate::index::DescriptionId;
use crate::ipc::notice::{By, Notice};
use crate::need::Need;
use crate::plan::{Builder, Inherited};
use crate::sockets;
use crate::source::{Collector, Source};
use crate::text::Shown;

/// An open file description that is not in the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// The descriptor through which it was first found.
    #[serde(deserialize_with = "bounds::fd")]
    pub fd: i32,
    /// Its description for display.
    pub name: String,
    /// Its replacement; `None` drops its descriptors.
    #[serde(default, with = "crate::raw_path")]
    pub instead: Option<PathBuf>,
}

impl OpenFile for Left {
    /// The options decide what is left out.
    fn capture(_: &Sight, _: &mut Collector) -> Captured {
        None
    }

    fn class(&self) -> &'static str {
        "replaced"
    }

    fn label(&self) -> String {
        self.name.clone()
    }

    fn shown(&self) -> String {
        self.instead
            .as_deref()
            .map_or_else(String::new, Shown::shown)
    }

    fn needs(&self, _: u32, _: &Snapshot) -> Vec<Need> {
        let detail = format!("in the place of {}", self.name);
        let instead = self.instead.iter();
        instead
            .map(|path| Need::new("replacement", path.shown(), &detail))
            .collect()
    }

    fn opened(&self) -> Opened {
        match self.instead {
            Some(_) => Opened::Plain,
            None => Opened::Absent,
        }
    }

    fn open(&self, place: &Place, plan: &mut Builder) -> Result<(), Vec<Obstacle>> {
        if let Some(path) = &self.instead {
            plan.inherit(place.at, Inherited::Named(path.clone(), place.flags));
        }
        Ok(())
    }
}

impl Left {
    /// Whether the restored job has no descriptor for it.
    pub fn is_absent(kind: &Kind) -> bool {
        kind.get::<Self>()
            .is_some_and(|left| left.instead.is_none())
    }

    /// The note about a description that is left out; a dropped number has its own note.
    pub(super) fn note(&self, look: &Look, source: &Source, choices: &Choices) -> Option<String> {
        let object = look.object(source);
        match &self.instead {
            Some(path) => Some(format!(
                "{object} ({}) is not in the image (--replace-fd): the restored job has {} in its place",
                self.name,
                path.shown()
            )),
            None if choices.drops_number(self.fd) => None,
            None => Some(dropped_note(&object, &self.name)),
        }
    }
}

/// The operand of `--drop-fd`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chosen {
    /// The descriptor of that number, in every process of the job.
    Number(i32),
    /// Descriptors of that kind that cannot be captured, except 0 to 2.
    Class(Class),
}

/// Kinds of `--drop-fd`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Sockets of every family.
    Socket,
    /// IPv4 and IPv6.
    Inet,
    /// Unix domain sockets.
    Unix,
    /// Netlink sockets.
    Netlink,
    /// Pipes and FIFOs.
    Pipe,
    /// Devices.
    Device,
    /// Anonymous inodes (io_uring, BPF, perf, userfaultfd …).
    AnonInode,
}

const CLASSES: [(&str, Class); 7] = [
    ("socket", Class::Socket),
    ("inet", Class::Inet),
    ("unix", Class::Unix),
    ("netlink", Class::Netlink),
    ("pipe", Class::Pipe),
    ("device", Class::Device),
    ("anon_inode", Class::AnonInode),
];

impl FromStr for Chosen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some((_, class)) = CLASSES.iter().find(|(name, _)| *name == text) {
            return Ok(Chosen::Class(*class));
        }
        match text.parse() {
            Ok(number) if number >= 0 => Ok(Chosen::Number(number)),
            _ => Err(format!(
                "neither the number of a descriptor nor one of the kinds {}",
                CLASSES.map(|(name, _)| name).join(", ")
            )),
        }
    }
}

impl fmt::Display for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Chosen::Number(number) => write!(f, "{number}"),
            Chosen::Class(class) => {
                let name = CLASSES.iter().find(|(_, of)| of == class);
                f.write_str(name.map_or("", |(name, _)| name))
            }
        }
    }
}

impl Class {
    fn has(self, look: &Look) -> bool {
        let domain = || match look.link {
            FdLink::Socket(_) => sockets::domain(&look.copy),
            _ => None,
        };
        match self {
            Class::Socket => matches!(look.link, FdLink::Socket(_)),
            Class::Inet => matches!(domain(), Some(libc::AF_INET | libc::AF_INET6)),
            Class::Unix => domain() == Some(libc::AF_UNIX),
            Class::Netlink => domain() == Some(libc::AF_NETLINK),
            Class::Pipe => look.file_type() == libc::S_IFIFO,
            Class::Device => [libc::S_IFCHR, libc::S_IFBLK].contains(&look.file_type()),
            Class::AnonInode => matches!(look.link, FdLink::AnonInode(_)),
        }
    }
}

/// The operands of `--drop-fd` and `--replace-fd`.
#[derive(Clone, Debug, Default)]
pub struct Choices {
    /// `--drop-fd`.
    pub drop: Vec<Chosen>,
    /// `--replace-fd N=PATH`.
    pub replace: BTreeMap<i32, PathBuf>,
}

/// What to do with an open file description.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Choice {
    Keep,
    /// Drop it if it cannot be captured.
    Drop,
    Replace(PathBuf),
}

impl Choices {
    /// Whether the descriptor of that number is dropped in every process of the job.
    pub fn drops_number(&self, fd: i32) -> bool {
        self.drop.contains(&Chosen::Number(fd))
    }

    /// What to do with the description that is open under these numbers.
    pub(super) fn of(&self, look: &Look, numbers: &[i32]) -> Choice {
        if let Some(path) = numbers.iter().find_map(|fd| self.replace.get(fd)) {
            return Choice::Replace(path.clone());
        }
        if numbers.is_empty() {
            return Choice::Keep;
        }
        let standard = numbers.iter().any(|fd| *fd <= 2);
        let class = |chosen: &Chosen| matches!(chosen, Chosen::Class(class) if class.has(look));
        let numbered = numbers.iter().all(|fd| self.drops_number(*fd));
        match numbered || !standard && self.drop.iter().any(class) {
            true => Choice::Drop,
            false => Choice::Keep,
        }
    }

    /// Removes the dropped numbers from a survey. Returns notes on what was left out, and on operands that matched
    /// nothing.
    pub(super) fn take_from(&self, survey: &mut Survey, sources: &[&Source]) -> Vec<String> {
        let has = |fd: i32| survey.seen.iter().flatten().any(|seen| seen.fd == fd);
        let numbers = self.drop.iter().filter_map(|chosen| match chosen {
            Chosen::Number(fd) => Some(("--drop-fd", *fd)),
            Chosen::Class(_) => None,
        });
        let numbers = numbers.chain(self.replace.keys().map(|fd| ("--replace-fd", *fd)));
        let unknown = numbers.filter(|(_, fd)| !has(*fd));
        let mut notes: Vec<String> = unknown
            .map(|(option, fd)| {
                format!("{option} {fd} names a descriptor that the job does not have")
            })
            .collect();
        for (source, seen) in sources.iter().zip(&mut survey.seen) {
            let dropped = seen.iter().filter(|seen| self.drops_number(seen.fd));
            notes.extend(dropped.map(|seen| {
                let look = &survey.looks[seen.look];
                dropped_note(
                    &format!("fd {} of {}", seen.fd, source.title()),
                    &look.told(),
                )
            }));
            seen.retain(|seen| !self.drops_number(seen.fd));
        }
        notes
    }
}

/// The note about a descriptor that is not in the image.
pub(super) fn dropped_note(object: &str, what: &str) -> String {
    format!("{object} ({what}) is not in the image (--drop-fd): the restored job does not have it")
}

/// The refusal of a description that may be dropped.
pub(crate) fn droppable(look: &Look, source: &Source, what: &str) -> Obstacle {
    Obstacle::new(
        look.object(source),
        format!("is {what} ({}), which is not supported", look.told()),
        format!(
            "close it before the checkpoint, or leave it out of the restored job with --drop-fd {}",
            look.fd
        ),
    )
}

/// Numbers of `restore --drop-fd` that no process of the image has.
pub fn unknown_numbers(snapshot: &Snapshot, drop: &[Chosen]) -> Vec<Obstacle> {
    let fds = || snapshot.processes.iter().flat_map(|p| &p.fds);
    let numbers = drop.iter().filter_map(|chosen| match chosen {
        Chosen::Number(fd) => Some(*fd),
        Chosen::Class(_) => None,
    });
    let unknown = numbers.filter(|fd| !fds().any(|entry| entry.fd == *fd));
    unknown.map(|fd| names_nothing("--drop-fd", fd)).collect()
}

/// The obstacle that an option of `restore` names a missing descriptor.
pub fn names_nothing(option: &str, fd: i32) -> Obstacle {
    Obstacle::new(
        format!("{option} {fd}"),
        "names a descriptor that the job does not have",
        "see its descriptors with: ckpt inspect IMAGE --fds",
    )
}

/// Removes descriptors from a snapshot (`restore --drop-fd`); the objects outside the job that they refer to need not
/// exist then.
pub fn drop_from(snapshot: &mut Snapshot, drop: &[Chosen]) {
    let descriptions = &snapshot.descriptions;
    let class = |kind: &Kind, chosen: &Chosen| match (kind.get::<Outside>(), chosen) {
        (Some(outside), Chosen::Class(class)) => match outside.what {
            Surroundings::Socket => *class == Class::Socket,
            Surroundings::Pipe => *class == Class::Pipe,
        },
        _ => false,
    };
    let mut dropped = HashSet::new();
    for process in &mut snapshot.processes {
        process.fds.retain(|entry| {
            let kind = entry.description.find(descriptions).map(|d| &d.kind);
            let goes = drop.iter().any(|chosen| match chosen {
                Chosen::Number(fd) => *fd == entry.fd,
                of => entry.fd > 2 && kind.is_some_and(|kind| class(kind, of)),
            });
            if goes {
                dropped.insert((entry.description, entry.fd));
            }
            !goes
        });
        let has: HashSet<i32> = process.fds.iter().map(|entry| entry.fd).collect();
        process.record_locks.retain(|(fd, _)| has.contains(fd));
        let is_there = |notice: &Notice| match &notice.by {
            By::Nothing => true,
            By::Cookie { socket, .. } => has.contains(socket),
        };
        process.notices.retain(is_there);
    }
    let mut wanted: HashSet<DescriptionId> = HashSet::new();
    for entry in snapshot.processes.iter().flat_map(|p| &p.fds) {
        wanted.insert(entry.description);
    }
    for description in &snapshot.descriptions {
        let file = description.kind.file();
        file.each_reference(&mut |other| {
            wanted.insert(other);
        });
    }
    for (index, fd) in dropped {
        let kind = &mut snapshot.descriptions[index].kind;
        if kind.file().is_of_surroundings() && !wanted.contains(&index) {
            let (name, instead) = (kind.label(), None);
            *kind = Left { fd, name, instead }.into();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_is_a_number_or_a_kind() {
        assert_eq!("7".parse(), Ok(Chosen::Number(7)));
        assert_eq!("inet".parse(), Ok(Chosen::Class(Class::Inet)));
        for bad in ["-1", "tcp", "", "99999999999"] {
            let error = bad.parse::<Chosen>().unwrap_err();
            assert!(error.contains("socket, inet, unix"), "{error}");
        }
        for (name, class) in CLASSES {
            assert_eq!(Chosen::Class(class).to_string(), name);
        }
    }
}
