//! Reads the cookies of registrations with `SIGEV_THREAD`.
//!
//! When a process unregisters, the kernel sends the cookie to the netlink socket, marked as removed. So the process
//! is made to unregister, to receive the cookie, and to register again with any cookie, whose mark the kernel sets
//! when it sends it. This is one batch, which the task completes even if we are killed. All other tasks that share
//! the process's memory wait meanwhile, since one of them may be waiting for cookies.
//!
//! Messages from outside the job may arrive at any moment. One that arrives before unregistering is notified as
//! usual, by a cookie marked as such, which the batch receives. One that arrives in the microseconds before the new
//! registration is not notified. Both are detected afterwards and repaired: a temporary queue sends a cookie with the
//! right mark. The notification is lost if a message arrives and we are killed in these same microseconds.

use std::os::fd::AsRawFd;

use ckpt_tracer::RemoteAddr;
use ckpt_tracer::fault::{self, Step};
use ckpt_tracer::proc::fdinfo::read_fdinfo;
use ckpt_tracer::proc::maps::Vma;
use ckpt_tracer::remote::{Call, Cave, Hold, RemoteCalls, Scratch};
use ckpt_tracer::task::Stopped;
use nix::errno::Errno;
use serde_bytes::ByteBuf;

use super::{By, COOKIE, Notice, event, failed};
use crate::error::{Error, Obstacle, Result};
use crate::ipc::mqueue;
use crate::job::FrozenJob;
use crate::process::{self, FromOutside};
use crate::sockets::netlink;
use crate::source::{Collector, Source};

/// `NOTIFY_REMOVED`, the mark of a cookie after unregistering, in its last byte (linux/mqueue.h).
const REMOVED: u8 = 2;

/// Offsets in the scratch memory.
const EVENT: u64 = 0;
const RECEIVED: u64 = 64;
/// The queue's attributes before and after.
const BEFORE: u64 = 96;
const AFTER: u64 = 160;
/// For the temporary queue of a repair.
const ATTRIBUTES: u64 = 224;
const NAME: u64 = 288;
const NO_TIME: u64 = 352;
const LIST: u64 = 512;
const SCRATCH: u64 = 4096;
/// `mq_curmsgs` in `struct mq_attr`.
const HELD: u64 = 24;

/// Bytes that the cookie of one registration uses in the receive buffer of its socket.
pub(super) fn charge() -> Result<u32, Errno> {
    let name = format!("ckpt.notice.{}", std::process::id()).into_bytes();
    // A leftover of a killed process.
    ckpt_sys::mqueue::unlink_queue(&name);
    let queue = ckpt_sys::mqueue::create_queue(&name, 1, 1)?;
    ckpt_sys::mqueue::unlink_queue(&name);
    let socket = netlink::new()?;
    let cookie = [0u8; COOKIE];
    let event = event(
        libc::SIGEV_THREAD,
        socket.as_raw_fd(),
        cookie.as_ptr() as u64,
    );
    ckpt_sys::mqueue::notify(&queue, &event)?;
    netlink::charged(&socket)
}

/// Fills in the cookies of a frozen job.
///
/// # Errors
/// [`Error::Refused`], transient, if a message arrived just then.
pub fn learn(
    job: &mut FrozenJob,
    outside: &mut [FromOutside],
    collector: &Collector,
) -> Result<()> {
    let has_cookies = |outside: &FromOutside| outside.notices.iter().any(|n| n.by != By::Nothing);
    let (mut frozen, sources) = job.split();
    for index in 0..sources.len() {
        if !has_cookies(&outside[index]) {
            continue;
        }
        let source = sources[index];
        let mut notices = std::mem::take(&mut outside[index].notices);
        let vmas = &outside[index].vmas;
        let cave = Cave::dig(&source.mem, vmas, frozen[index].tasks())?;
        let cave = cave.with_doorbell(frozen[index].tasks());
        let tasks = process::tasks_with_memory_of(index, &mut frozen, &sources, collector);
        learn_all(&mut notices, tasks, &cave, source, vmas)?;
        cave.fill_in()?;
        outside[index].notices = notices;
    }
    Ok(())
}

fn learn_all(
    notices: &mut [Notice],
    mut tasks: Vec<&mut Stopped>,
    cave: &Cave<'_>,
    source: &Source,
    vmas: &[Vma],
) -> Result<()> {
    if tasks.is_empty() {
        let tid = source.pid.leader();
        return Err(ckpt_tracer::Error::Died { tid }.into());
    }
    let first = tasks.remove(0);
    let len = SCRATCH + Hold::room(tasks.len());
    let at = crate::holes::find(vmas.iter().map(|v| (v.start, v.end)), len);
    let at = at.ok_or_else(|| {
        Error::refuse(Obstacle::without_remedy(
            source.title(),
            "has no free room in its address space for remote calls",
        ))
    })?;
    let memory = Scratch::in_hole(RemoteAddr(at), SCRATCH);
    let mut learner = Learner {
        calls: RemoteCalls::begin(first, cave, memory)?,
        hold: Hold::new(tasks, RemoteAddr(at + SCRATCH)),
        source,
    };
    learner.hold.map(&mut learner.calls)?;
    let mut learned = Ok(());
    for notice in notices {
        if let By::Cookie { socket, cookie } = &mut notice.by {
            learned = learned.and_then(|()| {
                *cookie = learner.learn(notice.queue, *socket)?;
                Ok(())
            });
        }
    }
    learner.hold.unmap(&mut learner.calls)?;
    learner.calls.finish()?;
    learned
}

/// Makes the batches.
struct Learner<'a, 's> {
    calls: RemoteCalls<'a>,
    hold: Hold<'a>,
    source: &'s Source,
}

impl Learner<'_, '_> {
    fn learn(&mut self, queue: i32, socket: i32) -> Result<ByteBuf> {
        // With O_ASYNC, receiving the returned cookie would raise a signal in the owner.
        let flags = read_fdinfo(self.source.dir.clone(), socket)?.flags;
        let is_async = flags & libc::O_ASYNC as u32 != 0;
        let set_flags = |flags: u32| {
            let args = [socket as u64, libc::F_SETFL as u64, flags.into()];
            Call::new("fcntl", libc::SYS_fcntl, &args)
        };
        let at = |offset: u64| self.calls.scratch().raw() + offset;
        let thread = event(libc::SIGEV_THREAD, socket, at(RECEIVED));
        self.calls.write_scratch(EVENT, &thread)?;
        let number = queue as u64;
        let look = |to: u64| {
            let args = [number, 0, at(to)];
            Call::new("mq_getsetattr", libc::SYS_mq_getsetattr, &args)
        };
        let notify = |event: u64| Call::new("mq_notify", libc::SYS_mq_notify, &[number, event]);
        let receive = receive(socket, at(RECEIVED));
        let receive = Call::new("recvfrom", libc::SYS_recvfrom, &receive);
        let mut first = vec![look(BEFORE), notify(0)];
        let mut second = vec![receive, notify(at(EVENT)), look(AFTER)];
        if is_async {
            first.insert(1, set_flags(flags & !(libc::O_ASYNC as u32)));
            second.push(set_flags(flags));
        }
        let asked = first.len();
        let answers =
            self.calls
                .batch_holding(LIST, &[&first, &second], &mut self.hold, &mut || {
                    fault::hit(Step::Unregistered)
                })?;
        let [received, registered, ..] = answers[asked.min(answers.len())..] else {
            return Err(failed(
                queue,
                self.source,
                "asked for",
                "calls were left out",
            ));
        };
        let errno = |answer: i64| Errno::from_raw(-answer as i32).desc();
        if received != COOKIE as i64 {
            return Err(failed(queue, self.source, "received", errno(received)));
        }
        if registered != 0 {
            let reason = errno(registered);
            return Err(failed(queue, self.source, "registered again", reason));
        }
        let cookie: [u8; COOKIE] = self.calls.read_scratch(RECEIVED)?;
        let came = self.held(BEFORE)? == 0 && self.held(AFTER)? > 0;
        if cookie[COOKIE - 1] == REMOVED && !(came && self.is_registered(queue)?) {
            // The kernel sets the mark.
            return Ok(ByteBuf::from(&cookie[..COOKIE - 1]));
        }
        self.make_good(queue, socket, cookie, came)?;
        let title = format!("fd {queue} of {}", self.source.title());
        let reason = "is a POSIX message queue that has just notified its process";
        let now = Obstacle::new(title, reason, "try again");
        Err(Error::refuse(now.passing()))
    }

    /// Messages in the queue at that moment.
    fn held(&self, attributes: u64) -> Result<i64> {
        Ok(i64::from_le_bytes(
            self.calls.read_scratch(attributes + HELD)?,
        ))
    }

    fn is_registered(&self, queue: i32) -> Result<bool> {
        let path = self.source.dir.join(format!("fd/{queue}"));
        let text = std::fs::read_to_string(&path).map_err(Error::file("look at", path))?;
        Ok(mqueue::notified(&text) == self.source.pid.raw())
    }

    /// Repairs a registration after a message arrived while there was none, or just before; other queues may have
    /// sent cookies to the socket as well. Each cookie is sent where it belongs. The first one was received by the
    /// batch, and is registered; `came` says that the queue has received a message since.
    fn make_good(
        &mut self,
        queue: i32,
        socket: i32,
        first: [u8; COOKIE],
        came: bool,
    ) -> Result<()> {
        self.notify(queue, 0)?;
        let mut cookies = vec![first];
        while let Some(cookie) = self.receive(socket)? {
            cookies.push(cookie);
        }
        // The registered one is received again.
        let same = |cookie: &[u8; COOKIE]| cookie[..COOKIE - 1] == first[..COOKIE - 1];
        if cookies.len() > 1 && cookies.last().is_some_and(same) {
            cookies.pop();
        }
        for cookie in cookies {
            match cookie[COOKIE - 1] {
                REMOVED if !came => self.register(queue, socket, &cookie)?,
                _ => self.send(socket, &cookie)?,
            }
        }
        Ok(())
    }

    fn notify(&mut self, queue: i32, event: u64) -> Result<()> {
        let args = [queue as u64, event, 0, 0, 0, 0];
        self.calls.call("mq_notify", libc::SYS_mq_notify, args)?;
        Ok(())
    }

    fn register(&mut self, queue: i32, socket: i32, cookie: &[u8]) -> Result<()> {
        let at = self.calls.write_scratch(RECEIVED, cookie)?.raw();
        let event = event(libc::SIGEV_THREAD, socket, at);
        let event = self.calls.write_scratch(EVENT, &event)?.raw();
        self.notify(queue, event)
    }

    fn receive(&mut self, socket: i32) -> Result<Option<[u8; COOKIE]>> {
        let [a, b, c, d] = receive(socket, self.calls.scratch().raw() + RECEIVED);
        match self
            .calls
            .call("recvfrom", libc::SYS_recvfrom, [a, b, c, d, 0, 0])
        {
            Ok(_) => Ok(Some(self.calls.read_scratch(RECEIVED)?)),
            Err(ckpt_tracer::Error::Remote {
                errno: Errno::EAGAIN,
                ..
            }) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Makes the kernel send a cookie as for a message that has arrived.
    fn send(&mut self, socket: i32, cookie: &[u8]) -> Result<()> {
        let name = format!("ckpt.notice.{}\0", self.source.pid);
        let name = self.calls.write_scratch(NAME, name.as_bytes())?.raw();
        // For one message of one byte.
        let attributes = [0i64, 1, 1, 0].map(i64::to_le_bytes).concat();
        let attributes = self.calls.write_scratch(ATTRIBUTES, &attributes)?.raw();
        let no_time = self.calls.write_scratch(NO_TIME, &[0; 16])?.raw();
        let flags = (libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_CLOEXEC) as u64;
        let args = [name, flags, 0o600, attributes, 0, 0];
        let queue = self.calls.call("mq_open", libc::SYS_mq_open, args)?;
        self.calls
            .call("mq_unlink", libc::SYS_mq_unlink, [name, 0, 0, 0, 0, 0])?;
        self.register(queue as i32, socket, cookie)?;
        let args = [queue, name, 1, 0, no_time, 0];
        self.calls
            .call("mq_timedsend", libc::SYS_mq_timedsend, args)?;
        self.calls
            .call("close", libc::SYS_close, [queue, 0, 0, 0, 0, 0])?;
        Ok(())
    }
}

/// Operands of recvfrom(2).
fn receive(socket: i32, at: u64) -> [u64; 4] {
    [socket as u64, at, COOKIE as u64, libc::MSG_DONTWAIT as u64]
}
