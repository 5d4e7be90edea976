//! POSIX message queues: open descriptions of files in the IPC namespace.
//!
//! Reading a message consumes it, so messages are never in an image: a queue with a name survives, with its messages,
//! and is opened again.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ckpt_tracer::Pid;
use ckpt_tracer::proc::fdlink::FdLink;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::sysv;
use crate::Snapshot;
use crate::bounds;
use crate::error::{Error, Obstacle, Result};
use crate::files::kind::{Captured, OpenFile, Place, Sight, Substitutes};
use crate::files::{self, Look};
use crate::index::DescriptionId;
use crate::need::Need;
use crate::options::{FilesPolicy, Options};
use crate::outsiders::process_name;
use crate::plan::Builder;
use crate::process::Process;
use crate::source::{Collector, Source};

/// A queue, as seen through a description. Descriptions of one queue share `inode`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MessageQueue {
    /// Its name, without the leading slash.
    #[serde(with = "serde_bytes")]
    pub name: Vec<u8>,
    /// Inode number.
    pub inode: u64,
    /// Its name was removed (`mq_unlink`).
    pub unlinked: bool,
    /// Permission bits.
    #[serde(deserialize_with = "bounds::mode")]
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// `mq_maxmsg`.
    #[serde(deserialize_with = "bounds::messages")]
    pub most: i64,
    /// `mq_msgsize`, bytes.
    #[serde(deserialize_with = "bounds::message")]
    pub size: i64,
    /// `mq_curmsgs`.
    #[serde(deserialize_with = "bounds::messages")]
    pub held: i64,
    /// Bytes of its messages.
    #[serde(deserialize_with = "bounds::bytes")]
    pub bytes: u64,
    /// The process registered for notification (`mq_notify`), 0 for none.
    #[serde(deserialize_with = "bounds::pid")]
    pub notified: i32,
    /// The kind of notification (`SIGEV_SIGNAL`, which is 0, `SIGEV_NONE`, `SIGEV_THREAD`).
    #[serde(default)]
    pub notify: i32,
}

/// Captures a queue through one of its descriptors.
fn capture(source: &Source, look: &Look, path: &Path) -> Result<MessageQueue, Box<Obstacle>> {
    let refuse =
        |reason: String, remedy: &str| Box::new(Obstacle::new(look.object(source), reason, remedy));
    let unreadable = |e: std::io::Error| {
        refuse(
            format!("is a POSIX message queue that cannot be examined: {e}"),
            "run ckpt as root",
        )
    };
    let attributes =
        ckpt_sys::mqueue::queue_attributes(&look.copy).map_err(|e| unreadable(e.into()))?;
    // Opened anew: a write-only descriptor shows nothing.
    let mut text = String::new();
    File::open(source.dir.path().join(format!("fd/{}", look.fd)))
        .and_then(|mut file| file.read_to_string(&mut text))
        .map_err(unreadable)?;
    let unlinked = look.stat.st_nlink == 0;
    if unlinked && attributes.held > 0 {
        return Err(refuse(
            format!(
                "is a POSIX message queue without a name that holds {} unread messages, which only \
                 reading could save",
                attributes.held
            ),
            "let the program read them, or let it keep the name (mq_unlink) until it ends",
        ));
    }
    Ok(MessageQueue {
        name: path.file_name().unwrap_or_default().as_bytes().to_vec(),
        inode: look.stat.st_ino,
        unlinked,
        mode: look.stat.st_mode & 0o777,
        uid: look.stat.st_uid,
        gid: look.stat.st_gid,
        most: attributes.most,
        size: attributes.size,
        held: attributes.held,
        bytes: field(&text, "QSIZE"),
        notified: notified(&text),
        notify: field(&text, "NOTIFY") as i32,
    })
}

/// A number from the contents of a queue's file (mq_overview(7)).
fn field(text: &str, key: &str) -> u64 {
    let mut words = text.split([':', ' ', '\n']).filter(|word| !word.is_empty());
    words.find(|word| *word == key);
    words.next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// The process registered for notification, from the contents of a queue's file.
pub(super) fn notified(text: &str) -> i32 {
    field(text, "NOTIFY_PID") as i32
}

/// Refuses what would be lost with an IPC namespace: messages, and queues that no process of the job has open.
pub(super) fn refuse_contents(descriptions: &[files::Description], obstacles: &mut Vec<Obstacle>) {
    let mut known = Vec::new();
    for (queue, _) in queues(descriptions) {
        known.push(queue.name.clone());
        if queue.held > 0 {
            obstacles.push(Obstacle::new(
                queue.title(),
                format!(
                    "holds {} unread messages, which only reading could save, and the job's IPC namespace \
                     goes with it",
                    queue.held
                ),
                "let the program read them",
            ));
        }
    }
    match ckpt_sys::mqueue::queue_names() {
        Ok(names) => obstacles.extend(names.into_iter().filter(|n| !known.contains(n)).map(
            |name| {
                Obstacle::new(
                    format!("the POSIX message queue /{}", crate::text::of(&name)),
                    "is in the job's IPC namespace, and no process of the job has it open",
                    "let one of them open it, or remove it (mq_unlink)",
                )
            },
        )),
        Err(errno) => obstacles.push(Obstacle::without_remedy(
            "the job's IPC namespace",
            format!(
                "may have POSIX message queues, which cannot be listed: {}",
                errno.desc()
            ),
        )),
    }
}

/// Every queue once, by the first of its descriptions.
pub(super) fn queues(
    descriptions: &[files::Description],
) -> impl Iterator<Item = (&MessageQueue, DescriptionId)> {
    let all = DescriptionId::each(descriptions);
    let all = all.filter_map(|(index, d)| Some((d.kind.get::<MessageQueue>()?, index)));
    let mut seen = Vec::new();
    all.filter(move |(queue, _)| {
        let new = !seen.contains(&queue.inode);
        seen.push(queue.inode);
        new
    })
}

/// A queue that exists now.
struct Present {
    inode: u64,
    held: i64,
    bytes: u64,
    notified: i32,
}

impl MessageQueue {
    /// Its name in messages.
    pub fn title(&self) -> String {
        format!("the POSIX message queue /{}", crate::text::of(&self.name))
    }

    /// The name under which the new process opens it.
    fn name_now(&self, snapshot: &Snapshot) -> Vec<u8> {
        match self.unlinked {
            true => format!("ckpt.{}.{}", snapshot.processes[0].pid, self.inode).into_bytes(),
            false => self.name.clone(),
        }
    }

    /// The queue that has its name now.
    fn present(&self) -> Result<Option<Present>, Errno> {
        let open = || {
            // With write permission only, the number of messages is visible and nothing more.
            let (queue, shows) = match ckpt_sys::mqueue::open_queue(&self.name, libc::O_RDONLY) {
                Err(Errno::EACCES) => (
                    ckpt_sys::mqueue::open_queue(&self.name, libc::O_WRONLY)?,
                    false,
                ),
                queue => (queue?, true),
            };
            let inode = ckpt_sys::files::fstat(&queue)?.st_ino;
            let held = ckpt_sys::mqueue::queue_attributes(&queue)?.held;
            let mut text = String::new();
            let bytes = match shows && File::from(queue).read_to_string(&mut text).is_ok() {
                true => field(&text, "QSIZE"),
                false => self.bytes,
            };
            Ok(Present {
                inode,
                held,
                bytes,
                notified: notified(&text),
            })
        };
        match open() {
            Ok(present) => Ok(Some(present)),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// Whether it may be opened or created here.
    fn in_the_way(
        &self,
        here: bool,
        snapshot: &Snapshot,
        options: &Options,
    ) -> Result<(), Obstacle> {
        if self.unlinked {
            return Ok(());
        }
        let present = self.present().map_err(|errno| {
            let reason = format!("cannot be opened any more: {}", errno.desc());
            Obstacle::new(self.title(), reason, "run restore as its owner or as root")
        })?;
        let Some(present) = present else {
            return match self.held {
                0 => Ok(()),
                held => Err(Obstacle::new(
                    self.title(),
                    format!("held {held} unread messages and does not exist any more"),
                    "create it anew, and fill it if you can, and restore with --files adopt",
                )),
            };
        };
        let is_told = |p: &Process| p.pid == self.notified && !p.notices.is_empty();
        if present.notified != 0
            && present.notified != self.notified
            && snapshot.processes.iter().any(is_told)
        {
            return Err(Obstacle::new(
                self.title(),
                format!(
                    "notifies {} of its next message (mq_notify), and notified process {} of the job",
                    process_name(Pid(present.notified)),
                    self.notified
                ),
                "let that one remove the registration, or end it",
            ));
        }
        let same = here && present.inode == self.inode;
        let reason = match () {
            () if options.files == FilesPolicy::Adopt => return Ok(()),
            () if !same => "is another one than at the checkpoint".to_owned(),
            () if (present.held, present.bytes) != (self.held, self.bytes) => format!(
                "held {} messages of {} bytes at the checkpoint and holds {} of {} now",
                self.held, self.bytes, present.held, present.bytes
            ),
            () => return Ok(()),
        };
        let remedy = "restore with --files adopt to take it as it is";
        Err(Obstacle::new(self.title(), reason, remedy))
    }

    fn create(&self, snapshot: &Snapshot) -> Result<Ready> {
        let name = self.name_now(snapshot);
        let failed = |what: &str, errno: Errno| Error::object(self.title(), what, errno.desc());
        if self.unlinked {
            // A leftover of a killed restore.
            ckpt_sys::mqueue::unlink_queue(&name);
        }
        let queue = ckpt_sys::mqueue::create_queue(&name, self.most, self.size);
        let queue = queue.map_err(|e| failed("created", e))?;
        let ready = Ready {
            name,
            unlinked: self.unlinked,
            kept: false,
        };
        self.give(&queue)
            .map_err(|e| failed("given to its owner", e))?;
        Ok(ready)
    }

    /// Creates a queue of that name with as many messages and bytes, all zero: for a rehearsal, in a new IPC
    /// namespace.
    ///
    /// # Errors
    /// When the namespace does not permit such a queue.
    fn make_like(&self) -> Result<()> {
        let failed = |errno: Errno| {
            let reason = errno.desc();
            Error::object(format!("a queue like {}", self.title()), "made", reason)
        };
        let queue = match ckpt_sys::mqueue::create_queue(&self.name, self.most, self.size) {
            // For another description of it.
            Err(Errno::EEXIST) => return Ok(()),
            queue => queue.map_err(failed)?,
        };
        let mut left = self.bytes;
        for _ in 0..self.held {
            let len = left.min(self.size as u64);
            left -= len;
            ckpt_sys::mqueue::send(&queue, &vec![0; len as usize]).map_err(failed)?;
        }
        self.give(&queue).map_err(failed)
    }

    fn give(&self, queue: &OwnedFd) -> Result<(), Errno> {
        use std::os::unix::fs::{PermissionsExt, fchown};
        let now = ckpt_sys::files::fstat(queue)?;
        let raw = |e: std::io::Error| Errno::from_raw(e.raw_os_error().unwrap_or(0));
        if (now.st_uid, now.st_gid) != (self.uid, self.gid) {
            fchown(queue, Some(self.uid), Some(self.gid)).map_err(raw)?;
        }
        let file = File::from(queue.try_clone().map_err(raw)?);
        file.set_permissions(PermissionsExt::from_mode(self.mode))
            .map_err(raw)
    }
}

/// `MQUEUE_MAGIC`: the file system of POSIX message queues.
const MQUEUE: i64 = 0x1980_0202;

impl OpenFile for MessageQueue {
    fn capture(sight: &Sight, _: &mut Collector) -> Captured {
        let look = sight.look;
        let FdLink::File { path, .. } = &look.link else {
            return None;
        };
        let is_queue = look.file_type() == libc::S_IFREG
            && !look.is_path()
            && ckpt_sys::files::fstatfs(&look.copy).is_some_and(|(kind, _)| kind == MQUEUE);
        is_queue.then(|| capture(sight.source, look, path).map(Into::into))
    }

    fn class(&self) -> &'static str {
        "mqueue"
    }

    fn label(&self) -> String {
        self.title()
    }

    fn shown(&self) -> String {
        format!("/{}", crate::text::of(&self.name))
    }

    fn needs(&self, _: u32, _: &Snapshot) -> Vec<Need> {
        vec![Need::new("IPC object", self.title(), "POSIX message queue")]
    }

    fn each_inode(&mut self, f: &mut dyn FnMut(&mut u64)) {
        f(&mut self.inode);
    }

    fn make_comparable(&mut self, _: &mut u32) {
        if self.unlinked {
            self.name.clear();
        }
    }

    fn substitute(&mut self, _: &mut u32, _: &mut dyn Substitutes) -> Result<()> {
        match self.held > 0 && !self.unlinked {
            true => self.make_like(),
            false => Ok(()),
        }
    }

    /// It exists: see [`Prepared`](super::Prepared).
    fn open(&self, place: &Place, plan: &mut Builder) -> Result<(), Vec<Obstacle>> {
        let mut name = self.name_now(place.snapshot);
        name.push(0);
        let name = plan.data(&name);
        // The kernel makes it close-on-exec, and F_GETFL would report the flag.
        let access = place.flags as i32 & libc::O_ACCMODE;
        let args = [name, access as u64, 0, 0];
        let open = |plan: &mut Builder| {
            plan.expect(libc::SYS_mq_open, &args, 0, || self.title());
        };
        // The name can only refer to a queue, and the job may have opened it before it dropped privileges.
        match plan.host().rights.clone() {
            Some(rights) => rights.as_ourselves(false, plan, open),
            None => open(plan),
        }
        files::place(0, place.at, plan, || self.title());
        Ok(())
    }
}

/// The obstacles to a restore here.
pub(super) fn in_the_way(snapshot: &Snapshot, here: bool, options: &Options) -> Vec<Obstacle> {
    wanted(snapshot, options)
        .filter_map(|queue| queue.in_the_way(here, snapshot, options).err())
        .collect()
}

/// Creates missing queues.
pub(super) fn prepare(snapshot: &Snapshot, options: &Options) -> Result<Vec<Box<dyn sysv::Ready>>> {
    wanted(snapshot, options)
        .filter(|queue| queue.unlinked || matches!(queue.present(), Ok(None)))
        .map(|queue| Ok(Box::new(queue.create(snapshot)?) as Box<dyn sysv::Ready>))
        .collect()
}

/// Queues that are not replaced by `--fd`.
fn wanted<'a>(
    snapshot: &'a Snapshot,
    options: &'a Options,
) -> impl Iterator<Item = &'a MessageQueue> {
    queues(&snapshot.descriptions)
        .filter(|(_, index)| files::named(*index, snapshot, options).is_none())
        .map(|(queue, _)| queue)
}

/// A queue that was created.
pub(super) struct Ready {
    name: Vec<u8>,
    unlinked: bool,
    kept: bool,
}

impl sysv::Ready for Ready {
    fn keep(mut self: Box<Self>) {
        self.kept = true;
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        if self.unlinked || !self.kept {
            ckpt_sys::mqueue::unlink_queue(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_a_queue_are_told_apart() {
        let text = "QSIZE:129        NOTIFY:2     SIGNO:10    NOTIFY_PID:8260  \n";
        assert_eq!(field(text, "QSIZE"), 129);
        assert_eq!(field(text, "NOTIFY"), 2);
        assert_eq!(field(text, "NOTIFY_PID"), 8260);
        assert_eq!(field("", "QSIZE"), 0);
    }
}
