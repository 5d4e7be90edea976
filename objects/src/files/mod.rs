//! Open file descriptions and the descriptors that refer to them; one file for each kind.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use ckpt_tracer::proc::fdlink::FdLink;
use ckpt_tracer::proc::tasks::list_tasks;
use ckpt_tracer::{Pid, Tid};
use serde::{Deserialize, Serialize};

use super::ipc::mqueue;
use super::sockets::{self, inet, netlink, unix};
use super::uring;
use crate::bounds;
use crate::error::Obstacle;
use crate::index::DescriptionId;
use crate::source::{Collector, Source};

pub mod attributes;
pub mod changed;
pub mod device;
pub mod epoll;
pub mod eventfd;
pub mod fanotify;
pub mod fifo;
mod flight;
pub mod inotify;
pub mod kind;
pub mod late;
pub mod left;
pub mod lock;
pub mod memfd;
pub mod outside;
pub mod pidfd;
pub mod pieces;
pub mod pipe;
pub mod procfs;
mod rebuild;
pub mod regular;
pub mod removed;
pub mod saved;
pub mod signalfd;
mod survey;
pub mod terminal;
pub mod timerfd;
#[cfg(test)]
mod toy;
pub mod unread;

use flight::Flight;
use kind::{Sight, kinds};
use left::Choice;
use outside::Outside;
pub use rebuild::{
    Staging, complete_descriptions, named, number, open_descriptions, place, rebuild_owners,
    reopen_flags, seal,
};
pub use survey::{Look, Seen, Survey, WITHHELD_REMEDY};

type Result<T, E = crate::Error> = std::result::Result<T, E>;

// The order in which kinds are tried: among files with a name, the more special kinds come first.
kinds! {
    /// A terminal, or the master of one.
    Terminal(terminal::End),
    /// eventfd(2).
    EventFd(eventfd::EventFd),
    /// signalfd(2).
    SignalFd(signalfd::SignalFd),
    /// timerfd_create(2).
    TimerFd(timerfd::TimerFd),
    /// epoll(7).
    Epoll(epoll::Epoll),
    /// inotify(7).
    Inotify(inotify::Inotify),
    /// A group of fanotify(7).
    Fanotify(fanotify::Fanotify),
    /// memfd_create(2).
    MemFd(memfd::MemFd),
    /// An end of a pipe whose ends are all inside the job.
    Pipe(pipe::PipeEnd),
    /// An internet socket with its other end in the job.
    Inet(inet::InetSocket),
    /// An object outside the job that the restored job gets anew: a pipe with its other end outside, or a socket.
    Outside(outside::Outside),
    /// A unix domain socket.
    UnixSocket(unix::UnixSocket),
    /// A netlink socket, netlink(7).
    Netlink(netlink::NetlinkSocket),
    /// pidfd_open(2).
    PidFd(pidfd::PidFd),
    /// A POSIX message queue, mq_overview(7).
    MessageQueue(mqueue::MessageQueue),
    /// A file of `/proc` that belongs to a process.
    ProcFile(procfs::ProcFile),
    /// A regular file, directory or `O_PATH` handle.
    Regular(regular::Regular),
    /// A character device without state.
    Device(device::Device),
    /// An end of a FIFO that no process outside the job has open.
    Fifo(fifo::FifoEnd),
    /// A description that the user drops or replaces.
    Left(left::Left),
    /// For tests only.
    #[cfg(test)]
    Toy(toy::Toy),
}

/// One descriptor of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdEntry {
    /// The number.
    #[serde(deserialize_with = "bounds::fd")]
    pub fd: i32,
    /// Index in the snapshot's descriptions.
    pub description: DescriptionId,
    /// `FD_CLOEXEC`.
    pub close_on_exec: bool,
}

/// An open file description (`struct file`), shared by dup and fork.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Description {
    /// Its kind, and the state of that kind.
    pub kind: Kind,
    /// Access mode and status flags, `F_GETFL` and `O_CLOEXEC` excluded.
    pub flags: u32,
    /// The receiver of SIGIO.
    pub owner: Option<Owner>,
    /// User and group of the creator of a pipe or socket, as in fstat(2). A process that has changed its user may
    /// open its standard output anew through `/proc/self/fd` only if they are right.
    #[serde(default)]
    pub made_by: Option<(u32, u32)>,
    /// Locks and leases held through it, see [`Description::locks`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub locks: Vec<lock::Lock>,
}

/// `F_SETOWN_EX` and `F_SETSIG`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// `F_OWNER_TID`, `F_OWNER_PID` or `F_OWNER_PGRP`.
    #[serde(deserialize_with = "bounds::choice")]
    pub kind: i32,
    /// Its id.
    #[serde(deserialize_with = "bounds::pid")]
    pub id: i32,
    /// `F_GETSIG`; 0 is SIGIO.
    #[serde(deserialize_with = "bounds::signal")]
    pub signal: i32,
}

/// Captures the open file descriptions of the job and each process's descriptors, without executing anything in the
/// processes. Returns one list for each process, in the order of `sources`.
pub fn capture(
    sources: &[&Source],
    survey: &mut Survey,
    terminals: &terminal::Ends,
    collector: &mut Collector,
) -> Result<Vec<Vec<FdEntry>>> {
    for source in sources {
        let tasks = list_tasks(source.dir.clone()).unwrap_or_default();
        collector.tasks.extend(tasks.into_iter().map(Tid::raw));
    }
    collector.first = sources.first().map(|source| source.pid.raw());
    let held = lock::Held::of(&survey.looks);
    collector.held = held.map_err(crate::Error::file(
        "copy",
        "a descriptor with a lease or a watch",
    ))?;
    let first = collector.descriptions.len();
    let open = survey.looks.iter().map(|look| sockets::survey::Open {
        copy: &look.copy,
        object: look.object(sources[look.process]),
        directory: sources[look.process].dir.join("cwd"),
    });
    let mut found = sockets::survey::survey(&open.collect::<Vec<_>>(), collector.frozen())?;
    // A description that is only in flight between sockets has a number only in our process.
    let ourselves = Source::open(Pid::own())?;
    let seen_in_job = survey.looks.len();
    for copy in &found.in_flight {
        let fd = copy.as_raw_fd();
        let own = copy
            .try_clone()
            .map_err(crate::Error::file("copy", "a descriptor in flight"))?;
        let look = Look::with(own, &ourselves, sources.len(), fd)?;
        survey.looks.push(look);
    }
    let mut sources = sources.to_vec();
    sources.push(&ourselves);
    collector.inet = inet::survey(&survey.looks, &sources, collector)?;
    let pipes = pipe::Ends::of(&survey.looks);
    let numbers = survey.numbers();
    for (number, look) in survey.looks.iter().enumerate() {
        let numbers = &numbers[number];
        let choice = collector.choices.of(look, numbers);
        let left = |instead: Option<PathBuf>| {
            Kind::from(left::Left {
                fd: look.fd,
                name: look.told(),
                instead,
            })
        };
        let outside = |obstacle: Obstacle| match &choice {
            Choice::Replace(path) => Ok(left(Some(path.clone()))),
            Choice::Drop => Ok(left(None)),
            Choice::Keep if numbers.iter().any(|fd| *fd <= 2) => {
                Ok(outside::capture(look, outside::Surroundings::Socket))
            }
            Choice::Keep => Err(Box::new(obstacle)),
        };
        let kind = match (found.kind(number, first, outside), &choice) {
            (Some(Ok(kind)), Choice::Replace(path)) => match kind.file().not_replaceable(path) {
                Some(obstacle) => Err(Box::new(obstacle)),
                None => Ok(kind),
            },
            (Some(kind), _) => kind,
            (None, Choice::Replace(path)) => Ok(left(Some(path.clone()))),
            (None, _) => {
                let sight = Sight {
                    source: sources[look.process],
                    look,
                    job: (&survey.looks, first),
                    pipes: &pipes,
                    terminals,
                };
                let kind = Kind::capture(&sight, collector)
                    .unwrap_or_else(|| Err(Box::new(unsupported(look, sight.source))));
                let leads_outside = match &kind {
                    Ok(kind) => kind.get::<Outside>().is_some(),
                    Err(_) => true,
                };
                match choice {
                    Choice::Drop if leads_outside => Ok(left(None)),
                    _ => kind,
                }
            }
        };
        if let Some(left) = kind.as_ref().ok().and_then(Kind::get::<left::Left>) {
            let note = left.note(look, sources[look.process], &collector.choices);
            collector.findings.notes.extend(note);
        }
        let kind = match number < seen_in_job {
            true => kind,
            false => sockets::may_be_in_flight(kind, sources.first().map(|s| s.pid.raw())),
        };
        let source = sources[look.process];
        let locks = |kind| lock::capture(source, look, &kind).map(|locks| (kind, locks));
        match kind.and_then(locks) {
            Ok((kind, locks)) => collector.descriptions.push(Description {
                kind,
                flags: look.info.flags,
                owner: look.owner(),
                made_by: look.made_by(),
                locks,
            }),
            Err(obstacle) => {
                collector.refuse(*obstacle);
                // Others are referred to by their index.
                collector.descriptions.push(Description {
                    kind: left(None),
                    flags: look.info.flags,
                    owner: None,
                    made_by: None,
                    locks: Vec::new(),
                });
            }
        }
    }
    collector.descriptions.extend(found.ghosts());
    if collector.findings.obstacles.is_empty() {
        epoll::capture_entries(&sources, &survey.looks, first, collector)?;
        let flight = Flight {
            descriptions: &collector.descriptions,
            carried_only: first + seen_in_job,
            root: sources[0].pid.raw(),
        };
        let in_the_way = flight.obstacles();
        collector.findings.obstacles.extend(in_the_way);
    }
    let notes = collector.choices.take_from(survey, &sources);
    collector.findings.notes.extend(notes);
    let absent = |s: &Seen| {
        let description = collector.descriptions.get(first + s.look);
        description.is_some_and(|d| left::Left::is_absent(&d.kind))
    };
    survey
        .seen
        .iter_mut()
        .for_each(|seen| seen.retain(|s| !absent(s)));
    let entries = survey.seen.iter().map(|seen| {
        let entry = |s: &Seen| FdEntry {
            fd: s.fd,
            description: DescriptionId(first + s.look),
            close_on_exec: s.close_on_exec,
        };
        seen.iter().map(entry).collect()
    });
    Ok(entries.collect())
}

/// Finds obstacles as far as they are visible without duplicates of the descriptors: kinds of files, but not their
/// contents. The rest is found when the job is frozen.
pub fn judge_by_sight(
    sources: &[&Source],
    survey: &Survey,
    collector: &mut Collector,
) -> Vec<Vec<FdEntry>> {
    for (look, numbers) in survey.looks.iter().zip(survey.numbers()) {
        if collector.choices.of(look, &numbers) != Choice::Keep {
            continue;
        }
        let what = match &look.link {
            FdLink::AnonInode(name) if name == uring::NAME => {
                collector.refuse(uring::obstacle(sources[look.process]));
                continue;
            }
            FdLink::AnonInode(name) if !Kind::has_anon_inode(name) => anonymous(name),
            FdLink::Other(_) => "a file of an unknown kind".to_owned(),
            FdLink::File { .. } if look.file_type() == libc::S_IFBLK && !look.is_path() => {
                "a block device".to_owned()
            }
            _ => continue,
        };
        collector.refuse(left::droppable(look, sources[look.process], &what));
    }
    vec![Vec::new(); sources.len()]
}

/// The refusal of an unsupported file, by its name.
fn unsupported(look: &Look, source: &Source) -> Obstacle {
    let what = match &look.link {
        FdLink::AnonInode(name) if name == uring::NAME => return uring::obstacle(source),
        FdLink::AnonInode(name) => anonymous(name),
        FdLink::Socket(_) => sockets::family(&look.copy),
        FdLink::File { path, .. }
            if path == Path::new("/secretmem") && regular::is_secret(look) =>
        {
            return Obstacle::new(
                look.object(source),
                "is secret memory (memfd_secret(2)), which only the process itself can read",
                "let the program close it before the checkpoint, or start it without secret memory",
            );
        }
        FdLink::File { .. } => match look.file_type() {
            libc::S_IFCHR => "a device".to_owned(),
            libc::S_IFBLK => "a block device".to_owned(),
            _ => "a file of an unknown type".to_owned(),
        },
        _ => "a file of an unknown kind".to_owned(),
    };
    left::droppable(look, source, &what)
}

/// The kernel's `anon_inode:[name]`, with an article.
fn anonymous(name: &str) -> String {
    let name = name.trim_matches(['[', ']']);
    match name.starts_with(['a', 'e', 'i', 'o']) {
        true => format!("an {name} descriptor"),
        false => format!("a {name} descriptor"),
    }
}
