//! Open file descriptions and the descriptors that refer to them; one file a kind.

use std::os::fd::AsRawFd;

use ckpt_tracer::proc::fdinfo::FdDetail;
use ckpt_tracer::proc::fdlink::FdLink;
use ckpt_tracer::proc::tasks::list_tasks;
use ckpt_tracer::{Pid, Tid};
use serde::{Deserialize, Serialize};

use super::Snapshot;
use super::ipc::mqueue;
use super::sockets::{self, unix};
use crate::capture::source::{Collector, Source};
use crate::error::Obstacle;
use crate::restore::plan::{Builder, Inherited};
use crate::restore::terminals::Terminals;

pub mod changed;
pub mod device;
pub mod epoll;
pub mod eventfd;
pub mod fifo;
pub mod inotify;
pub mod memfd;
pub mod outside;
pub mod pidfd;
pub mod pipe;
pub mod regular;
pub mod signalfd;
mod survey;
pub mod sys;
pub mod terminal;
pub mod timerfd;
pub mod unread;

pub use survey::{Look, Seen, Survey};

type Result<T, E = crate::Error> = std::result::Result<T, E>;

/// One descriptor of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdEntry {
    /// The number.
    pub fd: i32,
    /// Index in the snapshot's descriptions.
    pub description: usize,
    /// `FD_CLOEXEC`.
    pub close_on_exec: bool,
}

/// An open file description (`struct file`): what dup and fork share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Description {
    /// What kind of file, and its state.
    pub kind: Kind,
    /// Access mode and status flags, `F_GETFL` and `O_CLOEXEC` excluded.
    pub flags: u32,
    /// Who gets SIGIO.
    pub owner: Option<Owner>,
}

/// `F_SETOWN_EX` and `F_SETSIG`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// `F_OWNER_TID`, `F_OWNER_PID` or `F_OWNER_PGRP`.
    pub kind: i32,
    /// Whose.
    pub id: i32,
    /// `F_GETSIG`; 0 is SIGIO.
    pub signal: i32,
}

/// Kinds of open files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Kind {
    /// A regular file, directory or `O_PATH` handle.
    Regular(regular::Regular),
    /// A character device without state.
    Device(device::Device),
    /// One end of a pipe that is wholly inside the job.
    Pipe(pipe::PipeEnd),
    /// One end of a FIFO that nobody outside the job has open.
    Fifo(fifo::FifoEnd),
    /// eventfd(2).
    EventFd(eventfd::EventFd),
    /// signalfd(2).
    SignalFd(signalfd::SignalFd),
    /// timerfd_create(2).
    TimerFd(timerfd::TimerFd),
    /// epoll(7).
    Epoll(epoll::Epoll),
    /// memfd_create(2).
    MemFd(memfd::MemFd),
    /// inotify(7).
    Inotify(inotify::Inotify),
    /// A terminal, or the master of one.
    Terminal(terminal::End),
    /// pidfd_open(2).
    PidFd(pidfd::PidFd),
    /// A POSIX message queue, mq_overview(7).
    MessageQueue(mqueue::MessageQueue),
    /// A unix domain socket.
    UnixSocket(unix::UnixSocket),
    /// Something of the surroundings that the restored job gets anew: a pipe with its other end
    /// outside, or a socket.
    Outside(outside::Outside),
}

/// `MQUEUE_MAGIC`: the file system of POSIX message queues.
const MQUEUE: i64 = 0x1980_0202;

/// Captures the open file descriptions of the job, and each process's descriptors; nothing is
/// executed in the processes. Answers one list a process, in the order of `sources`.
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
    let first = collector.descriptions.len();
    let open = survey.looks.iter().map(|look| sockets::survey::Open {
        copy: &look.copy,
        object: look.object(sources[look.process]),
        directory: sources[look.process].dir.join("cwd"),
    });
    let mut found = sockets::survey::survey(&open.collect::<Vec<_>>(), collector.frozen)?;
    // What is only in flight between sockets has no number in any process but ours.
    let ourselves = Source::open(Pid(std::process::id() as i32))?;
    let seen_in_job = survey.looks.len();
    for copy in &found.in_flight {
        let look = Look::at(&ourselves, sources.len(), copy.as_raw_fd())?;
        survey.looks.push(look);
    }
    let mut sources = sources.to_vec();
    sources.push(&ourselves);
    let pipes = pipe::Ends::of(&survey.looks);
    for (number, look) in survey.looks.iter().enumerate() {
        let outside = |obstacle: Obstacle| match survey.is_standard(number) {
            true => Ok(outside::capture(look, outside::Surroundings::Socket)),
            false => Err(Box::new(obstacle)),
        };
        let kind = match found.kind(number, first, outside) {
            Some(kind) => kind,
            None => kind(sources[look.process], look, &pipes, terminals, collector),
        };
        let kind = match number < seen_in_job {
            true => kind,
            false => sockets::may_be_in_flight(kind),
        };
        match kind {
            Ok(kind) => collector.descriptions.push(Description {
                kind,
                flags: look.info.flags,
                owner: look.owner(),
            }),
            Err(obstacle) => collector.obstacles.push(*obstacle),
        }
    }
    collector.descriptions.extend(found.ghosts());
    if collector.obstacles.is_empty() {
        epoll::capture_entries(&sources, &survey.looks, first, collector)?;
    }
    let entries = survey.seen.iter().map(|seen| {
        let entry = |s: &Seen| FdEntry {
            fd: s.fd,
            description: first + s.look,
            close_on_exec: s.close_on_exec,
        };
        seen.iter().map(entry).collect()
    });
    Ok(entries.collect())
}

fn kind(
    source: &Source,
    look: &Look,
    pipes: &pipe::Ends,
    terminals: &terminal::Ends,
    collector: &mut Collector,
) -> Result<Kind, Box<Obstacle>> {
    let unsupported = |what: &str, remedy: &str| {
        Box::new(Obstacle::new(
            look.object(source),
            format!("is {what} ({}), which is not supported", look.name()),
            remedy,
        ))
    };
    if let Some(end) = terminals.get(look) {
        return terminal::capture(source, look, end, collector);
    }
    match (&look.link, &look.info.detail) {
        (FdLink::AnonInode(_), FdDetail::EventFd { count, semaphore }) => {
            Ok(Kind::EventFd(eventfd::EventFd {
                count: *count,
                semaphore: *semaphore,
            }))
        }
        (FdLink::AnonInode(_), FdDetail::SignalFd { mask }) => {
            Ok(Kind::SignalFd(signalfd::SignalFd { mask: *mask }))
        }
        (FdLink::AnonInode(_), FdDetail::TimerFd(timer)) => {
            Ok(Kind::TimerFd(timerfd::TimerFd::of(timer)))
        }
        (FdLink::AnonInode(name), FdDetail::Epoll { .. }) if name == "eventpoll" => {
            Ok(Kind::Epoll(epoll::Epoll {
                entries: Vec::new(),
            }))
        }
        (FdLink::AnonInode(name), _) if name == "eventpoll" => Ok(Kind::Epoll(epoll::Epoll {
            entries: Vec::new(),
        })),
        (FdLink::AnonInode(_), FdDetail::Inotify { watches }) => {
            inotify::capture(source, look, watches).map(Kind::Inotify)
        }
        (FdLink::AnonInode(name), _) if name == "inotify" => Ok(Kind::Inotify(inotify::Inotify {
            watches: Vec::new(),
        })),
        (FdLink::AnonInode(name), _) => Err(unsupported(
            &format!("an {name} descriptor"),
            "close it before the checkpoint",
        )),
        (FdLink::Memfd(name), _) => memfd::capture(source, look, name, collector).map(Kind::MemFd),
        (FdLink::Pipe(_), _) => Ok(pipe::capture(source, look, pipes, collector.frozen)?),
        (FdLink::Socket(_), _) if look.fd <= 2 => {
            Ok(outside::capture(look, outside::Surroundings::Socket))
        }
        (FdLink::Socket(_), _) => Err(unsupported(
            &sockets::family(&look.copy),
            "close it before the checkpoint",
        )),
        (FdLink::File { path, .. }, _)
            if look.file_type() == libc::S_IFREG
                && look.info.flags as i32 & libc::O_PATH == 0
                && sys::fstatfs(&look.copy).is_some_and(|(t, _)| t == MQUEUE) =>
        {
            mqueue::capture(source, look, path).map(Kind::MessageQueue)
        }
        (FdLink::File { path, deleted }, _) => match look.file_type() {
            libc::S_IFREG | libc::S_IFDIR | libc::S_IFLNK => {
                regular::capture(source, look, path, *deleted, collector).map(Kind::Regular)
            }
            _ if look.info.flags as i32 & libc::O_PATH != 0 => {
                regular::capture(source, look, path, *deleted, collector).map(Kind::Regular)
            }
            libc::S_IFCHR if device::is_stateless(look) => Ok(device::capture(look, path)),
            libc::S_IFCHR => Err(unsupported("a device", "close it before the checkpoint")),
            libc::S_IFIFO => fifo::capture(source, look, path, *deleted, pipes),
            libc::S_IFBLK => Err(unsupported(
                "a block device",
                "close it before the checkpoint",
            )),
            _ => Err(unsupported(
                "a file of an unknown type",
                "close it before the checkpoint",
            )),
        },
        (FdLink::PidFd, _) => {
            let is_ours = |task| collector.tasks.contains(&task);
            pidfd::capture(source, look, is_ours).map(Kind::PidFd)
        }
        (FdLink::Namespace(..) | FdLink::Other(_), _) => Err(unsupported(
            "a file of an unknown kind",
            "close it before the checkpoint",
        )),
    }
}

/// Numbers of the descriptors while they are placed: description `i` is open as `stage + i`
/// until every descriptor of every process has been made from it. The root opens them all; the
/// other processes have them from their creators.
#[derive(Clone, Copy, Debug)]
pub struct Staging {
    base: i32,
    descriptions: i32,
    files: i32,
    terminals: i32,
}

impl Staging {
    /// Above every number that a process of the job uses.
    pub fn above(snapshot: &Snapshot) -> Self {
        let fds = snapshot.processes.iter().flat_map(|p| &p.fds).map(|e| e.fd);
        let watched = snapshot.descriptions.iter().flat_map(|d| match &d.kind {
            Kind::Epoll(e) => e.entries.as_slice(),
            _ => &[],
        });
        let highest = fds.chain(watched.map(|e| e.fd)).max().unwrap_or(2).max(2);
        // 0 to 3 are where calls that create descriptors put them.
        Self {
            base: highest + 8,
            descriptions: snapshot.descriptions.len() as i32,
            files: snapshot.mapped_files.len() as i32,
            terminals: snapshot.terminals.len() as i32,
        }
    }

    /// The number of a description.
    pub fn of(self, description: usize) -> i32 {
        self.base + description as i32
    }

    /// The number of a mapped file with contents from the image, opened for reading or for
    /// both.
    pub fn mapped_file(self, file: usize, writable: bool) -> i32 {
        self.base + self.descriptions + 2 * file as i32 + i32::from(writable)
    }

    /// The number of an executable, a mapped file.
    pub fn executable(self, file: usize) -> i32 {
        self.base + self.descriptions + 2 * self.files + file as i32
    }

    /// The number of a terminal that controls a session of the job.
    pub fn terminal(self, terminal: usize) -> i32 {
        self.base + self.descriptions + 3 * self.files + terminal as i32
    }

    /// Further numbers, for what the plan needs only while it runs.
    pub fn spare(self, number: usize) -> i32 {
        self.base + self.descriptions + 3 * self.files + self.terminals + number as i32
    }

    /// The first number used; none of the job's is as high.
    pub fn first(self) -> i32 {
        self.base
    }
}

/// Flags that open(2) takes again; creation flags do not belong to an open description.
fn reopen_flags(flags: u32) -> u32 {
    let not = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_ASYNC | libc::O_CLOEXEC;
    // O_TMPFILE has the bit of O_DIRECTORY in it.
    let tmpfile = flags as i32 & libc::O_TMPFILE == libc::O_TMPFILE;
    let tmpfile = if tmpfile { libc::O_TMPFILE } else { 0 };
    (flags & !(not | tmpfile) as u32) | libc::O_NOCTTY as u32
}

/// Opens every description at its staging number. Called with no other descriptor open.
pub fn open_descriptions(
    snapshot: &Snapshot,
    request: &crate::restore::Request<'_>,
    terminals: &Terminals,
    staging: Staging,
    plan: &mut Builder,
) -> Result<(), Vec<Obstacle>> {
    let mut obstacles: Vec<Obstacle> = unknown_numbers(snapshot, request).collect();
    let written = changed::Written::by(snapshot);
    for (index, description) in snapshot.descriptions.iter().enumerate() {
        let at = staging.of(index);
        let flags = description.flags;
        if let Kind::UnixSocket(socket) = &description.kind {
            if let Some(path) = named(index, snapshot, request) {
                obstacles.push(socket.not_replaceable(path));
            }
            if let Err(more) = sockets::rebuild::open(index, snapshot, staging, plan) {
                obstacles.extend(more);
            }
            continue;
        }
        if let Some(path) = named(index, snapshot, request) {
            plan.inherit(at, Inherited::Named(path.clone(), flags));
            continue;
        }
        match &description.kind {
            Kind::Regular(r) => {
                if let Err(o) = r.rebuild(index, flags, at, (&written, request.files), plan) {
                    obstacles.push(*o);
                }
            }
            Kind::Device(d) => d.rebuild(reopen_flags(flags), at, plan),
            // Made with the first of its ends.
            Kind::Pipe(p) => pipe::rebuild(p, index, snapshot, request, staging, plan),
            Kind::Fifo(f) => {
                if let Err(o) = fifo::rebuild(f, index, snapshot, request, staging, plan) {
                    obstacles.push(*o);
                }
            }
            Kind::EventFd(e) => e.rebuild(flags, at, plan),
            Kind::SignalFd(s) => s.rebuild(flags, at, plan),
            Kind::TimerFd(t) => t.rebuild(flags, at, &snapshot.host, plan),
            Kind::Epoll(_) => {
                plan.expect(libc::SYS_epoll_create1, &[0], 0, || "an epoll set".into());
                place(0, at, plan, || "an epoll set".into());
            }
            Kind::MemFd(_) => plan.inherit(at, Inherited::MemFd(index)),
            Kind::Inotify(i) => i.rebuild(flags, at, plan),
            Kind::Terminal(end) => match terminals.rebuild(end, index, flags, snapshot) {
                Ok(what) => plan.inherit(at, what),
                Err(o) => obstacles.push(*o),
            },
            Kind::PidFd(p) => p.rebuild(index, flags, at, snapshot, plan),
            Kind::MessageQueue(q) => q.rebuild(flags, at, snapshot, plan),
            Kind::UnixSocket(_) => {}
            Kind::Outside(o) => match o.rebuild(index, snapshot) {
                Ok(what) => plan.inherit(at, what),
                Err(o) => obstacles.push(*o),
            },
        }
    }
    if obstacles.is_empty() {
        Ok(())
    } else {
        Err(obstacles)
    }
}

/// What `--fd N=PATH` says for a description, by any of its numbers.
pub(crate) fn named<'a>(
    description: usize,
    snapshot: &Snapshot,
    request: &'a crate::restore::Request<'_>,
) -> Option<&'a std::path::PathBuf> {
    let fds = || snapshot.processes.iter().flat_map(|p| &p.fds);
    request
        .fds
        .iter()
        .find(|(fd, _)| fds().any(|e| e.fd == **fd && e.description == description))
        .map(|(_, path)| path)
}

/// `--fd` for numbers that the job does not have.
fn unknown_numbers(
    snapshot: &Snapshot,
    request: &crate::restore::Request<'_>,
) -> impl Iterator<Item = Obstacle> {
    let has = |fd: &i32| {
        snapshot
            .processes
            .iter()
            .flat_map(|p| &p.fds)
            .any(|e| e.fd == *fd)
    };
    let unknown: Vec<i32> = request.fds.keys().copied().filter(|fd| !has(fd)).collect();
    unknown.into_iter().map(|fd| {
        Obstacle::new(
            format!("--fd {fd}"),
            "names a descriptor that the job does not have",
            "see its descriptors with: ckpt inspect IMAGE --fds",
        )
    })
}

/// Moves a descriptor from where the kernel put it to its staging number, where it outlives the
/// exec of other processes.
pub fn place(from: i32, to: i32, plan: &mut Builder, object: impl Fn() -> String) {
    let args = [from as u64, to as u64, 0];
    plan.expect(libc::SYS_dup3, &args, to as u64, &object);
    plan.syscall(libc::SYS_close, &[from as u64], &object);
}

/// With every description open: what refers to other descriptions, then flags and locks.
pub fn complete_descriptions(snapshot: &Snapshot, staging: Staging, plan: &mut Builder) {
    sockets::rebuild::finish(snapshot, staging, plan);
    for (index, description) in snapshot.descriptions.iter().enumerate() {
        let at = staging.of(index);
        if let Kind::Epoll(set) = &description.kind {
            let later = |d| pidfd::is_late(d, snapshot) || epoll::is_bound(d, snapshot);
            set.rebuild_entries(at, staging, later, plan);
        }
        rebuild_status(description, at, plan);
        if let Kind::Regular(r) = &description.kind {
            r.rebuild_locks(at, plan);
        }
    }
}

/// Seals files, once every process has mapped them.
pub fn seal(snapshot: &Snapshot, staging: Staging, plan: &mut Builder) {
    for (index, description) in snapshot.descriptions.iter().enumerate() {
        match &description.kind {
            Kind::MemFd(m) if m.seals_through(index, snapshot) => {
                m.rebuild_seals(staging.of(index), plan);
            }
            _ => {}
        }
    }
}

/// The process's own numbers, and its locks.
pub fn number(process: &super::process::Process, staging: Staging, plan: &mut Builder) {
    for entry in &process.fds {
        let cloexec = if entry.close_on_exec {
            libc::O_CLOEXEC
        } else {
            0
        };
        let args = [
            staging.of(entry.description) as u64,
            entry.fd as u64,
            cloexec as u64,
        ];
        plan.expect(libc::SYS_dup3, &args, entry.fd as u64, || {
            format!("fd {}", entry.fd)
        });
    }
    plan.syscall(
        libc::SYS_close_range,
        &[staging.first() as u64, u64::from(u32::MAX), 0],
        || "the descriptors used in between".into(),
    );
    // Closing any descriptor of a file drops the process's POSIX locks on it, so they come
    // when nothing more is closed.
    for (fd, lock) in &process.record_locks {
        lock.rebuild_posix(*fd, plan);
    }
}

/// Flags that F_SETFL sets.
const SETTABLE: u32 = (libc::O_APPEND | libc::O_NONBLOCK | libc::O_ASYNC) as u32;

/// Status flags that the way of opening has not set already.
fn rebuild_status(description: &Description, at: i32, plan: &mut Builder) {
    if description.flags as i32 & libc::O_PATH != 0 {
        return;
    }
    let wanted = description.flags & SETTABLE & !(libc::O_ASYNC as u32);
    let opened_with = match description.kind {
        Kind::Regular(_) | Kind::Device(_) => wanted,
        _ => 0,
    };
    if wanted != opened_with || matches!(description.kind, Kind::Outside(_) | Kind::Terminal(_)) {
        set_flags(description, at, wanted, plan);
    }
}

fn set_flags(description: &Description, fd: i32, settable: u32, plan: &mut Builder) {
    let others = description.flags & (libc::O_DIRECT | libc::O_NOATIME) as u32;
    let args = [fd as u64, libc::F_SETFL as u64, (settable | others).into()];
    plan.syscall(libc::SYS_fcntl, &args, || {
        format!("the flags of an open file ({})", description.kind.label())
    });
}

/// Who gets SIGIO; done when every process and thread exists that may be the one, by the first
/// process that has the description.
pub fn rebuild_owners(index: usize, snapshot: &Snapshot, plan: &mut Builder) {
    let before = snapshot.processes[..index].iter().flat_map(|p| &p.fds);
    let mut done = vec![false; snapshot.descriptions.len()];
    before.for_each(|entry| done[entry.description] = true);
    for entry in &snapshot.processes[index].fds {
        let description = &snapshot.descriptions[entry.description];
        if std::mem::replace(&mut done[entry.description], true) {
            continue;
        }
        let fd = entry.fd as u64;
        let label = description.kind.label();
        if let Some(owner) = description.owner {
            owner.rebuild(fd, snapshot, &label, plan);
        }
        let asynchronous = description.flags as i32 & libc::O_ASYNC != 0;
        if asynchronous && description.flags as i32 & libc::O_PATH == 0 {
            set_flags(description, entry.fd, description.flags & SETTABLE, plan);
        }
    }
}

impl Owner {
    fn rebuild(&self, fd: u64, snapshot: &Snapshot, label: &str, plan: &mut Builder) {
        const F_SETOWN_EX: u64 = 15;
        const F_SETSIG: u64 = 10;
        const F_OWNER_TID: i32 = 0;
        const F_OWNER_PID: i32 = 1;
        let object = || format!("the owner of an open file ({label})");
        let inside = snapshot.processes.iter().any(|process| match self.kind {
            F_OWNER_TID => process.threads.iter().any(|t| t.tid == self.id),
            F_OWNER_PID => process.pid == self.id,
            _ => process.group == self.id,
        });
        if self.id != 0 && inside {
            let data = plan.data(&[self.kind, self.id].map(i32::to_le_bytes).concat());
            plan.syscall(libc::SYS_fcntl, &[fd, F_SETOWN_EX, data], object);
        } else if self.id != 0 {
            plan.warn(format!(
                "{label} sent its signals to {}, which is not part of the job, and now sends them \
                 to nobody",
                self.id
            ));
        }
        if self.signal != 0 {
            plan.syscall(libc::SYS_fcntl, &[fd, F_SETSIG, self.signal as u64], object);
        }
    }
}

impl Kind {
    /// What kind of file, for messages.
    pub fn label(&self) -> String {
        match self {
            Kind::Regular(r) => r.path.display().to_string(),
            Kind::Device(d) => d.path.display().to_string(),
            Kind::Pipe(p) => format!("pipe:[{}]", p.inode),
            Kind::Fifo(f) => f.path.display().to_string(),
            Kind::EventFd(_) => "eventfd".into(),
            Kind::SignalFd(_) => "signalfd".into(),
            Kind::TimerFd(_) => "timerfd".into(),
            Kind::Epoll(_) => "epoll".into(),
            Kind::MemFd(m) => format!("/memfd:{}", String::from_utf8_lossy(&m.name)),
            Kind::Inotify(_) => "inotify".into(),
            Kind::Terminal(t) => t.name.clone(),
            Kind::PidFd(_) => "pidfd".into(),
            Kind::MessageQueue(q) => q.title(),
            Kind::UnixSocket(s) => s.label(),
            Kind::Outside(o) => o.name.clone(),
        }
    }
}
