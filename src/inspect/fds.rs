//! What each process has open.

use std::collections::HashMap;
use std::fmt;

use serde::{Serialize, Serializer};

use crate::objects::Snapshot;
use crate::objects::files::terminal::Side;
use crate::objects::files::{Description, Kind};

/// A descriptor as `ckpt inspect --fds` shows it; the JSON keys stay as they are.
#[derive(Clone, Debug, Serialize)]
pub struct FdView {
    /// Its process.
    pub pid: i32,
    /// Its number.
    pub fd: i32,
    /// Kind of file: `regular`, `device`, `pipe`, `fifo`, `eventfd`, `signalfd`, `timerfd`, `epoll`,
    /// `memfd`, `inotify`, `fanotify`, `pidfd`, `mqueue`, `unix` (a unix domain socket), `terminal`, `pty` (the master of a terminal), `outside` (a pipe or socket whose far end is
    /// outside the job), `replaced` (by `--replace-fd`) or `unknown`.
    pub kind: &'static str,
    /// Its path, or what stands for one.
    pub path: String,
    /// Offset in bytes, where the kind has one.
    pub offset: Option<u64>,
    /// Size in bytes of the file, if the image has its contents: a deleted file, a memfd, POSIX shared memory, or one of
    /// `--save-files`.
    pub saved_bytes: Option<u64>,
    /// Access mode and status flags, such as `O_RDWR|O_APPEND`, and `O_CLOEXEC` of the descriptor.
    pub flags: String,
    /// Other descriptors of the same open file description, as `PID:FD`; at most 16 of them.
    pub shared_with: Vec<Sharer>,
    /// How many there are.
    pub shared_with_count: usize,
}

/// A descriptor of the same open file description; text and JSON say `PID:FD`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sharer {
    /// Its process.
    pub pid: i32,
    /// Its number.
    pub fd: i32,
}

impl fmt::Display for Sharer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.pid, self.fd)
    }
}

impl Serialize for Sharer {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// More sharers are counted and not named, so that the table grows with the number of descriptors only.
const SHARERS_SHOWN: usize = 16;

/// All descriptors of a snapshot.
pub fn fds(snapshot: &Snapshot) -> Vec<FdView> {
    let mut users: HashMap<usize, Vec<(i32, i32)>> = HashMap::new();
    for process in &snapshot.processes {
        for entry in &process.fds {
            users
                .entry(entry.description)
                .or_default()
                .push((process.pid, entry.fd));
        }
    }
    let mut views = Vec::new();
    for process in &snapshot.processes {
        for entry in &process.fds {
            let description = snapshot.descriptions.get(entry.description);
            let kind = description.map(|description| &description.kind);
            let sharers = users.get(&entry.description).map_or(&[][..], Vec::as_slice);
            let others = sharers
                .iter()
                .filter(|other| **other != (process.pid, entry.fd));
            views.push(FdView {
                pid: process.pid,
                fd: entry.fd,
                kind: kind.map_or("unknown", kind_name),
                path: kind.map_or_else(String::new, name),
                offset: kind.and_then(offset),
                saved_bytes: kind.and_then(saved_bytes),
                flags: flags(description, entry.close_on_exec),
                shared_with: others
                    .take(SHARERS_SHOWN)
                    .map(|&(pid, fd)| Sharer { pid, fd })
                    .collect(),
                shared_with_count: sharers.len().saturating_sub(1),
            });
        }
    }
    views
}

fn kind_name(kind: &Kind) -> &'static str {
    match kind {
        Kind::Regular(_) => "regular",
        Kind::Device(_) => "device",
        Kind::Pipe(_) => "pipe",
        Kind::Fifo(_) => "fifo",
        Kind::EventFd(_) => "eventfd",
        Kind::SignalFd(_) => "signalfd",
        Kind::TimerFd(_) => "timerfd",
        Kind::Epoll(_) => "epoll",
        Kind::MemFd(_) => "memfd",
        Kind::Inotify(_) => "inotify",
        Kind::Fanotify(_) => "fanotify",
        Kind::Terminal(end) if end.side == Side::Master => "pty",
        Kind::Terminal(_) => "terminal",
        Kind::PidFd(_) => "pidfd",
        Kind::ProcFile(_) => "proc",
        Kind::MessageQueue(_) => "mqueue",
        Kind::UnixSocket(_) => "unix",
        Kind::Netlink(_) => "netlink",
        Kind::Outside(_) => "outside",
        Kind::Left(_) => "replaced",
        #[allow(unreachable_patterns)]
        _ => "unknown",
    }
}

/// What an open file is called.
pub(super) fn name(kind: &Kind) -> String {
    match kind {
        Kind::Regular(file) => crate::text::of_path(&file.path),
        Kind::Device(device) => crate::text::of_path(&device.path),
        Kind::ProcFile(file) => crate::text::of_path(&file.path),
        Kind::Pipe(pipe) => format!("pipe:[{}]", pipe.inode),
        Kind::Fifo(fifo) => crate::text::of_path(&fifo.path),
        Kind::MemFd(memfd) => format!("memfd:{}", crate::text::of(&memfd.name)),
        Kind::Terminal(end) => end.name.clone(),
        Kind::UnixSocket(socket) => socket.label(),
        Kind::Netlink(socket) => socket.label(),
        Kind::Outside(outside) => outside.name.clone(),
        Kind::Left(left) => left
            .instead
            .as_ref()
            .map_or_else(String::new, crate::text::of_path),
        Kind::MessageQueue(queue) => format!("/{}", crate::text::of(&queue.name)),
        Kind::EventFd(event) => format!("eventfd:{}", event.count),
        Kind::Epoll(epoll) => format!("epoll:{} entries", epoll.entries.len()),
        Kind::Fanotify(group) => format!("fanotify:{} marks", group.marks.len()),
        Kind::Inotify(inotify) => format!("inotify:{} watches", inotify.watches.len()),
        Kind::PidFd(pidfd) => match pidfd.task {
            Some(task) => format!("pidfd:{task}"),
            None => "pidfd of an ended process".into(),
        },
        other => kind_name(other).into(),
    }
}

fn offset(kind: &Kind) -> Option<u64> {
    match kind {
        Kind::Regular(file) => Some(file.offset),
        Kind::ProcFile(file) => Some(file.offset),
        Kind::MemFd(memfd) => Some(memfd.offset),
        _ => None,
    }
}

fn saved_bytes(kind: &Kind) -> Option<u64> {
    match kind {
        Kind::Regular(file) => {
            let saved = file.contents.is_some() || file.saved.is_some();
            saved.then_some(file.identity.size)
        }
        Kind::MemFd(memfd) => Some(memfd.size),
        _ => None,
    }
}

fn flags(description: Option<&Description>, close_on_exec: bool) -> String {
    let mut text = match description {
        Some(description) => super::calls::open_flags(description.flags.into()),
        None => String::new(),
    };
    if close_on_exec {
        text += if text.is_empty() {
            "O_CLOEXEC"
        } else {
            "|O_CLOEXEC"
        };
    }
    text
}
