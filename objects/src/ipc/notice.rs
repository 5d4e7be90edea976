//! Registrations for notification by a POSIX message queue, mq_notify(3).
//!
//! A queue has at most one, and shows its process and kind. With `SIGEV_THREAD` the kernel sends 32 bytes, the
//! cookie, to a netlink socket, which a thread of glibc reads; neither the cookie nor the socket is visible.
//! [`learn`] makes the kernel send it. With `SIGEV_SIGNAL` the value of the signal is not visible.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::mqueue::MessageQueue;
use crate::Snapshot;
use crate::bounds;
use crate::error::{Error, Obstacle};
use crate::files::{self, FdEntry};
use crate::index::DescriptionId;
use crate::plan::Builder;
use crate::process::{FromOutside, Process};
use crate::sockets::netlink::NetlinkSocket;
use crate::source::{Collector, Source};

mod learn;

pub use learn::learn;

/// `NOTIFY_COOKIE_LEN`, linux/mqueue.h.
pub const COOKIE: usize = 32;

/// A registration of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    /// A descriptor of the queue.
    #[serde(deserialize_with = "bounds::fd")]
    pub queue: i32,
    /// The kind of notification.
    pub by: By,
}

/// Kinds of notification.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum By {
    /// `SIGEV_NONE`: none, but no other process can register.
    Nothing,
    /// `SIGEV_THREAD`.
    Cookie {
        /// A descriptor of the netlink socket.
        #[serde(deserialize_with = "bounds::fd")]
        socket: i32,
        /// The cookie. The kernel sets its last byte.
        cookie: ByteBuf,
    },
}

/// `struct sigevent`.
pub(super) fn event(kind: i32, number: i32, value: u64) -> [u8; 64] {
    let mut event = [0; 64];
    event[..8].copy_from_slice(&value.to_le_bytes());
    event[8..12].copy_from_slice(&number.to_le_bytes());
    event[12..16].copy_from_slice(&kind.to_le_bytes());
    event
}

const WITHOUT: &str =
    "let the program remove the registration (mq_notify with NULL), or poll the queue";

/// The registrations of the job's processes; cookies are empty.
pub fn survey(sources: &[&Source], outside: &mut [FromOutside], collector: &mut Collector) {
    let descriptions = std::mem::take(&mut collector.descriptions);
    let survey = Survey {
        sources,
        descriptions: &descriptions,
        fds: outside.iter().map(|o| o.fds.clone()).collect(),
    };
    let mut used = vec![0; descriptions.len()];
    for (queue, _) in super::mqueue::queues(&descriptions) {
        let owner = sources.iter().position(|s| s.pid.raw() == queue.notified);
        let Some(owner) = owner.filter(|_| survey.refers(queue)) else {
            continue;
        };
        match survey.notice(queue, owner, collector) {
            Ok((notice, socket)) => {
                socket
                    .into_iter()
                    .for_each(|socket: DescriptionId| used[socket.0] += 1);
                outside[owner].notices.push(notice);
            }
            Err(obstacle) => collector.refuse(*obstacle),
        }
    }
    if let Some(obstacle) = others(&descriptions, &used, collector.frozen()) {
        collector.refuse(obstacle);
    }
    collector.descriptions = descriptions;
}

struct Survey<'a> {
    sources: &'a [&'a Source],
    descriptions: &'a [files::Description],
    /// Of each process.
    fds: Vec<Vec<FdEntry>>,
}

impl Survey<'_> {
    fn is(&self, entry: &FdEntry, queue: &MessageQueue) -> bool {
        let description = entry.description.find(self.descriptions);
        let opened = description.and_then(|d| d.kind.get::<MessageQueue>());
        opened.is_some_and(|opened| opened.inode == queue.inode)
    }

    /// Whether the job will have it open after a restore.
    fn refers(&self, queue: &MessageQueue) -> bool {
        self.fds.iter().flatten().any(|entry| self.is(entry, queue))
    }

    fn netlink(&self, description: DescriptionId) -> Option<&NetlinkSocket> {
        description.find(self.descriptions)?.kind.get()
    }

    /// The registration of a process, and the description of its socket.
    fn notice(
        &self,
        queue: &MessageQueue,
        owner: usize,
        collector: &Collector,
    ) -> Result<(Notice, Option<DescriptionId>), Box<Obstacle>> {
        let source = self.sources[owner];
        let refuse = |how: &str, why: String| {
            let reason = format!(
                "notifies {} of its next message (mq_notify with {how}), {why}",
                source.title()
            );
            Err(Box::new(Obstacle::new(queue.title(), reason, WITHOUT)))
        };
        if queue.notify == libc::SIGEV_SIGNAL {
            let why = "whose signal carries a value that the kernel does not show".to_owned();
            return refuse("SIGEV_SIGNAL", why);
        }
        let how = match queue.notify {
            libc::SIGEV_THREAD => "SIGEV_THREAD",
            _ => "SIGEV_NONE",
        };
        let fds = &self.fds[owner];
        let Some(entry) = fds.iter().find(|entry| self.is(entry, queue)) else {
            return refuse(how, "and does not have it open any more".into());
        };
        // Only a close by the registered process unregisters, for a shared table only by the last one to close: the
        // registration may outlive the job (`mqueue_flush_file`, ipc/mqueue.c).
        let shares = |s: &&&Source| {
            let with_parent = collector.shares(s.pid).files;
            with_parent && (s.pid == source.pid || s.status.ppid == source.pid)
        };
        if self.sources.iter().any(|s| shares(&s)) {
            let why = "and shares its descriptors with another process, which is not supported";
            return refuse(how, why.into());
        }
        if queue.notify != libc::SIGEV_THREAD {
            let (queue, by) = (entry.fd, By::Nothing);
            return Ok((Notice { queue, by }, None));
        }
        // Suspended filters are in force again when we are killed, in the middle of a batch.
        if source.status.seccomp == Some(2) {
            return refuse(
                how,
                "and has seccomp filters, which is not supported".into(),
            );
        }
        // A message from outside changes the contents of a socket meanwhile.
        let passing =
            |refused: Result<_, Box<Obstacle>>| refused.map_err(|o| Box::new(o.passing()));
        let charged = |entry: &&FdEntry| {
            let socket = self.netlink(entry.description);
            socket.is_some_and(|socket| socket.charged > 0)
        };
        let mut sockets = fds.iter().filter(charged);
        let Some(socket) = sockets.next() else {
            let why = "and does not have its netlink socket open any more".into();
            return passing(refuse(how, why));
        };
        if sockets.any(|other| other.description != socket.description) {
            let why = "and has several netlink sockets that may be the registered one, which the kernel \
                       does not show";
            return refuse(how, why.into());
        }
        let by = By::Cookie {
            socket: socket.fd,
            cookie: ByteBuf::new(),
        };
        let queue = entry.fd;
        Ok((Notice { queue, by }, Some(socket.description)))
    }
}

/// Whether sockets hold cookies of registrations other than those found, `used` times each. For a running job changes
/// are ignored.
fn others(descriptions: &[files::Description], used: &[u32], frozen: bool) -> Option<Obstacle> {
    if !frozen || used.iter().all(|n| *n == 0) {
        return None;
    }
    let told = |reason: String| {
        Obstacle::new(
            "a netlink socket that POSIX message queues send notifications to (mq_notify with SIGEV_THREAD)",
            reason,
            WITHOUT,
        )
    };
    let each = match learn::charge() {
        Ok(each) => each,
        Err(errno) => {
            let why = errno.desc();
            return Some(told(format!(
                "cannot be compared with one of ckpt's own with a queue of its own: {why}"
            )));
        }
    };
    let all = descriptions.iter().zip(used);
    let mut all = all.filter_map(|(description, used)| {
        let socket = description.kind.get::<NetlinkSocket>()?;
        Some((socket.charged, each * used))
    });
    all.any(|(charged, known)| known > 0 && charged != known)
        .then(|| {
            let reason = "holds other cookies than those of the queues that the job has open";
            told(reason.into()).passing()
        })
}

/// Registers the process again. Closing any descriptor of a queue unregisters, so this comes when nothing more is
/// closed.
pub fn rebuild(process: &Process, snapshot: &Snapshot, plan: &mut Builder) {
    for notice in &process.notices {
        let entry = process.fds.iter().find(|entry| entry.fd == notice.queue);
        let description = entry.and_then(|entry| entry.description.find(&snapshot.descriptions));
        let queue = description.and_then(|d| d.kind.get::<MessageQueue>());
        // The user dropped or replaced it.
        let Some(queue) = queue else {
            continue;
        };
        let event = match &notice.by {
            By::Nothing => event(libc::SIGEV_NONE, 0, 0),
            By::Cookie { socket, cookie } => {
                let mut bytes = cookie.to_vec();
                bytes.resize(COOKIE, 0);
                event(libc::SIGEV_THREAD, *socket, plan.data(&bytes))
            }
        };
        let event = plan.data(&event);
        let args = [notice.queue as u64, event];
        plan.syscall(libc::SYS_mq_notify, &args, || {
            format!("the notification of {} (mq_notify)", queue.title())
        });
    }
}

fn failed(queue: i32, source: &Source, what: &str, reason: &str) -> Error {
    let of = source.title();
    let object = format!("the notification of a POSIX message queue (fd {queue} of {of})");
    Error::object(object, what, reason)
}
