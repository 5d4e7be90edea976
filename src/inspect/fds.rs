//! The open files of each process.

use std::collections::HashMap;
use std::fmt;

use serde::{Serialize, Serializer};

use crate::objects::Snapshot;
use crate::objects::files::Description;
use crate::objects::files::kind::OpenFile;
use crate::objects::index::DescriptionId;

/// A descriptor as `ckpt inspect --fds` shows it; the JSON keys are fixed.
#[derive(Clone, Debug, Serialize)]
pub struct FdView {
    /// Its process.
    pub pid: i32,
    /// Its number.
    pub fd: i32,
    /// Kind of file: `regular`, `device`, `pipe`, `fifo`, `eventfd`, `signalfd`, `timerfd`, `epoll`, `memfd`,
    /// `inotify`, `fanotify`, `pidfd`, `mqueue`, `unix` (a unix domain socket), `tcp`, `udp`, `icmp`, `terminal`, `pty` (the master of a
    /// terminal), `outside` (a pipe or socket whose other end is outside the job), `replaced` (by `--replace-fd`) or
    /// `unknown`.
    pub kind: &'static str,
    /// Its path, or a description.
    pub path: String,
    /// Offset in bytes, if the kind has one.
    pub offset: Option<u64>,
    /// Size of the file in bytes, if the image stores its contents: a deleted file, a memfd, POSIX shared memory, or
    /// a match of `--save-files`.
    pub saved_bytes: Option<u64>,
    /// Access mode and status flags, such as `O_RDWR|O_APPEND`, and `O_CLOEXEC` of the descriptor.
    pub flags: String,
    /// Other descriptors of the same open file description, as `PID:FD`; at most 16 of them.
    pub shared_with: Vec<Sharer>,
    /// Their number.
    pub shared_with_count: usize,
}

/// A descriptor of the same open file description; displayed as `PID:FD`, also in JSON.
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

/// Most sharers that are listed, so that the table grows with the number of descriptors only.
const SHARERS_SHOWN: usize = 16;

/// All descriptors of a snapshot.
pub fn fds(snapshot: &Snapshot) -> Vec<FdView> {
    let mut users: HashMap<DescriptionId, Vec<(i32, i32)>> = HashMap::new();
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
            let description = entry.description.find(&snapshot.descriptions);
            let file = description.map(|description| description.kind.file());
            let sharers = users.get(&entry.description).map_or(&[][..], Vec::as_slice);
            let others = sharers
                .iter()
                .filter(|other| **other != (process.pid, entry.fd));
            views.push(FdView {
                pid: process.pid,
                fd: entry.fd,
                kind: file.map_or("unknown", OpenFile::class),
                path: file.map_or_else(String::new, OpenFile::shown),
                offset: file.and_then(OpenFile::offset),
                saved_bytes: file.and_then(OpenFile::contents).map(|(_, size)| size),
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
