//! System V message queues.

use ckpt_image::Reader;
use ckpt_sys::sysv;
use ckpt_tracer::capabilities::Use;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::sysv::{self as object, IpcObject, Sight, Site};
use super::table::{self, Row, Type};
use super::{Claim, Ipc, Object};
use crate::Snapshot;
use crate::bounds;
use crate::error::{Error, Obstacle, Result};
use crate::plan::Builder;
use crate::process::Process;
use crate::references::{Faults, require};
use crate::source::Collector;

/// One queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queue {
    /// Id, key, owner.
    pub object: Object,
    /// Why it is attributed to the job.
    pub claim: Claim,
    /// Its capacity in bytes (`msg_qbytes`).
    #[serde(deserialize_with = "bounds::bytes")]
    pub capacity: u64,
    /// Its messages in order.
    pub messages: Vec<Message>,
    /// Last sender (`msg_lspid`).
    #[serde(deserialize_with = "bounds::pid")]
    pub sender: i32,
    /// Last receiver (`msg_lrpid`).
    #[serde(deserialize_with = "bounds::pid")]
    pub receiver: i32,
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Its type, more than 0.
    pub kind: i64,
    /// Its text.
    #[serde(with = "serde_bytes")]
    pub text: Vec<u8>,
}

/// Capacity and messages, without consuming them.
fn look(row: &Row) -> Result<(u64, Vec<Message>), Errno> {
    let id = row.id();
    let capacity = sysv::msg_capacity(id)?;
    let held = row.get("qnum") as usize;
    if held == 0 {
        return Ok((capacity, Vec::new()));
    }
    // The kernel copies a message as a whole or not at all; none is longer than the queue.
    let most = (row.get("cbytes") as usize).max(1);
    let mut messages = Vec::with_capacity(held.min(4096));
    while let Some((kind, text)) = sysv::msg_copy(id, messages.len(), most)? {
        messages.push(Message { kind, text });
    }
    Ok((capacity, messages))
}

impl IpcObject for Queue {
    const TYPE: Type = Type::Msg;

    fn all(ipc: &mut Ipc) -> &mut Vec<Self> {
        &mut ipc.queues
    }

    fn each(ipc: &Ipc) -> &[Self] {
        &ipc.queues
    }

    fn object(&self) -> &Object {
        &self.object
    }

    fn claim(&self) -> Claim {
        self.claim
    }

    /// Adds the queues of the job.
    fn capture(sight: &Sight, collector: &mut Collector) {
        let job = sight.job;
        for row in sight.rows {
            let (sender, receiver) = (row.get("lspid") as i32, row.get("lrpid") as i32);
            let used = job.pids.contains(&sender)
                || job.pids.contains(&receiver)
                || job.waits(row.id(), &[libc::SYS_msgsnd, libc::SYS_msgrcv]);
            let Some(claim) = job.claim(row, used) else {
                continue;
            };
            match look(row) {
                Ok((capacity, messages)) => collector.ipc.queues.push(Queue {
                    object: Object::of(row),
                    claim,
                    capacity,
                    messages,
                    sender,
                    receiver,
                }),
                Err(errno) if claim == Claim::Used => collector.findings.obstacles.push(Obstacle::new(
                    Object::of(row).title(Type::Msg),
                    match errno {
                        Errno::ENOSYS => "is in use by the job, and this kernel does not show its \
                                          messages (CONFIG_CHECKPOINT_RESTORE)"
                            .into(),
                        errno => format!("is in use by the job and cannot be read: {}", errno.desc()),
                    },
                    "run ckpt as root, or let the job empty and remove it before the checkpoint",
                )),
                Err(_) => {}
            }
        }
    }

    fn check(&self, faults: &mut Faults) {
        require!(
            faults,
            self.messages.iter().all(|message| message.kind > 0),
            "message queue {} has a message of an impossible type",
            self.object.id
        );
    }

    /// The restore itself made the last operations.
    fn make_comparable(&mut self) {
        self.claim = Claim::Used;
        (self.sender, self.receiver) = (0, 0);
    }

    fn in_the_way(&self, _: usize, site: &Site) -> Result<(), Obstacle> {
        let differs = |row: &Row| self.differs(row, site.snapshot).map(drop);
        site.one_in_the_way(self, differs)
    }

    fn create(&self, _: &Reader, warnings: &mut Vec<String>) -> Result<Box<dyn object::Ready>> {
        let failed = |what, errno| object::failed(self, what, errno);
        let flags = libc::IPC_CREAT | libc::IPC_EXCL | 0o600;
        let object = self.object;
        let create = || sysv::msgget(object.key, flags);
        object::create(self, create, sysv::msg_remove)?;
        let mut ready = Ready {
            object,
            created: true,
            capacity: self.capacity,
        };
        let usual = sysv::msg_capacity(object.id).map_err(|e| failed("looked at", e))?;
        match sysv::msg_set(object.id, object.access(), self.capacity) {
            Err(Errno::EPERM) if self.capacity > usual => {
                warnings.push(format!(
                    "{} takes {usual} bytes and not {} as before; more than kernel.msgmnb needs {}",
                    self.title(),
                    self.capacity,
                    Use::LargeQueue
                ));
                ready.capacity = usual;
                let set = sysv::msg_set(object.id, object.access(), usual);
                set.map_err(|e| failed("given to its owner", e))?;
            }
            set => set.map_err(|e| failed("given to its owner", e))?,
        }
        self.fill()?;
        Ok(Box::new(ready))
    }

    fn put_back(
        &self,
        _: usize,
        row: &Row,
        site: &Site,
        _: &Reader,
    ) -> Result<Option<Box<dyn object::Ready>>> {
        if self.differs(row, site.snapshot).map_err(Error::refuse)? {
            let most = (row.get("cbytes") as usize).max(1);
            let empty = || -> Result<(), Errno> {
                while sysv::msg_receive(self.object.id, most)?.is_some() {}
                Ok(())
            };
            empty().map_err(|e| object::failed(self, "emptied", e))?;
            self.fill()?;
        }
        Ok(None)
    }

    fn rebuild(process: &Process, snapshot: &Snapshot, plan: &mut Builder) {
        send_to_itself(process, snapshot, plan);
    }
}

impl Queue {
    /// Whether an existing queue has to be filled anew; refused unless only the job can have made the difference.
    fn differs(&self, row: &Row, snapshot: &Snapshot) -> Result<bool, Obstacle> {
        let (_, now) = look(row)
            .map_err(|errno| self.changed(format!("cannot be read any more: {}", errno.desc())))?;
        if now == self.messages {
            return Ok(false);
        }
        let ours = |pid: i32| pid == 0 || snapshot.knows(pid);
        let users = [
            self.sender,
            self.receiver,
            row.get("lspid") as i32,
            row.get("lrpid") as i32,
        ];
        match users.into_iter().all(ours) {
            true => Ok(true),
            false => Err(self.changed(format!(
                "does not hold the {} messages any more that it held at the checkpoint, and not \
                 only the job uses it",
                self.messages.len()
            ))),
        }
    }

    fn fill(&self) -> Result<()> {
        for message in &self.messages {
            let sent = sysv::msg_send(self.object.id, message.kind, &message.text);
            sent.map_err(|e| object::failed(self, "filled", e))?;
        }
        Ok(())
    }
}

/// A queue that was created.
struct Ready {
    object: Object,
    created: bool,
    capacity: u64,
}

impl object::Ready for Ready {
    fn keep(mut self: Box<Self>) {
        // Sets the time of the last change, which then is in the job's lifetime.
        let _ = sysv::msg_set(self.object.id, self.object.access(), self.capacity);
        self.created = false;
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        if self.created {
            sysv::msg_remove(self.object.id);
        }
    }
}

/// Makes a process the last sender or receiver again, by which the queue is attributed to the job; the first process
/// does it for zombies. It sends itself a message of a type that no other message has. Skipped if the kernel still
/// has that pid, since other processes may wait for messages there, and for a full queue.
fn send_to_itself(process: &Process, snapshot: &Snapshot, plan: &mut Builder) {
    let rows = table::read(Type::Msg).unwrap_or_default();
    for queue in &snapshot.ipc.queues {
        let users = (queue.sender, queue.receiver);
        let known = rows.iter().any(|row| {
            let now = (row.get("lspid") as i32, row.get("lrpid") as i32);
            row.id() == queue.object.id && now == users
        });
        let was = [users.0, users.1].map(|user| snapshot.acts_for(process, user));
        if queue.claim == Claim::Possible || known || was == [false; 2] {
            continue;
        }
        let id = queue.object.id as u64;
        let kinds = queue.messages.iter().map(|m| m.kind);
        let kind = kinds.max().unwrap_or(0).saturating_add(1).max(1);
        let message = plan.data(&kind.to_le_bytes());
        let now = libc::IPC_NOWAIT as u64;
        plan.attempt(libc::SYS_msgsnd, &[id, message, 0, now], || queue.title());
        let args = [id, message, 0, kind as u64, now];
        plan.attempt(libc::SYS_msgrcv, &args, || queue.title());
    }
}
