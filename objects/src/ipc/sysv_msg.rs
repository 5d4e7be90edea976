//! System V message queues.

use ckpt_sys::sysv;
use ckpt_tracer::capabilities::Use;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::table::{self, Row, Type};
use super::{Claim, Found, Job, Object};
use crate::Snapshot;
use crate::bounds;
use crate::error::{Error, Obstacle, Result};
use crate::plan::Builder;
use crate::process::Process;
use crate::source::Collector;

/// One queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queue {
    /// Id, key, owner.
    pub object: Object,
    /// How it is known to be the job's.
    pub claim: Claim,
    /// The most bytes that it takes (`msg_qbytes`).
    #[serde(deserialize_with = "bounds::bytes")]
    pub capacity: u64,
    /// Its messages, the first one first.
    pub messages: Vec<Message>,
    /// Who sent last.
    #[serde(deserialize_with = "bounds::pid")]
    pub sender: i32,
    /// Who received last.
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

/// Enters the queues of the job.
pub(super) fn survey(job: &Job, rows: &[Row], collector: &mut Collector) {
    for row in rows {
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
            Err(errno) if claim == Claim::Used => collector.obstacles.push(Obstacle::new(
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

/// Capacity and messages, which stay where they are.
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

impl Queue {
    fn title(&self) -> String {
        self.object.title(Type::Msg)
    }

    /// Whether a queue that is still there has to be filled anew; refused unless nobody but the
    /// job can have made the difference.
    fn differs(&self, row: &Row, snapshot: &Snapshot) -> Result<bool, Obstacle> {
        let refuse = |reason: String| {
            let remedy = format!(
                "remove it if nobody else needs it (ipcrm -q {}), or restore in an IPC namespace \
                 of its own: unshare --ipc restore IMAGE",
                self.object.id
            );
            Obstacle::new(self.title(), reason, remedy)
        };
        let (_, now) = look(row)
            .map_err(|errno| refuse(format!("cannot be read any more: {}", errno.desc())))?;
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
            false => Err(refuse(format!(
                "does not hold the {} messages any more that it held at the checkpoint, and not \
                 only the job uses it",
                self.messages.len()
            ))),
        }
    }

    /// Whether it may be filled or created here.
    pub(super) fn in_the_way(
        &self,
        rows: &[Row],
        here: bool,
        snapshot: &Snapshot,
    ) -> Result<(), Obstacle> {
        let differs = |row: &Row| self.differs(row, snapshot).map(drop);
        super::one_in_the_way(self.claim, &self.object, (Type::Msg, rows, here), differs)
    }

    /// Creates it or fills what is there anew.
    pub(super) fn prepare(
        &self,
        rows: &[Row],
        here: bool,
        snapshot: &Snapshot,
        warnings: &mut Vec<String>,
    ) -> Result<Option<Ready>> {
        if self.claim == Claim::Possible {
            let wanted = super::wants_possible(&self.object, Type::Msg, rows, here, warnings);
            return if wanted {
                self.create(warnings)
            } else {
                Ok(None)
            };
        }
        let found = self.object.find(Type::Msg, rows, here);
        let Found::Same(row) = found.map_err(Error::refuse)? else {
            return self.create(warnings);
        };
        if self.differs(row, snapshot).map_err(Error::refuse)? {
            let most = (row.get("cbytes") as usize).max(1);
            let empty = || -> Result<(), Errno> {
                while sysv::msg_receive(self.object.id, most)?.is_some() {}
                Ok(())
            };
            empty().map_err(|e| super::failed(&self.object, Type::Msg, "emptied", e))?;
            self.fill()?;
        }
        Ok(None)
    }

    fn fill(&self) -> Result<()> {
        for message in &self.messages {
            let sent = sysv::msg_send(self.object.id, message.kind, &message.text);
            sent.map_err(|e| super::failed(&self.object, Type::Msg, "filled", e))?;
        }
        Ok(())
    }

    fn create(&self, warnings: &mut Vec<String>) -> Result<Option<Ready>> {
        let failed = |what, errno| super::failed(&self.object, Type::Msg, what, errno);
        let flags = libc::IPC_CREAT | libc::IPC_EXCL | 0o600;
        let object = self.object;
        let create = || sysv::msgget(object.key, flags);
        super::create(&object, Type::Msg, create, sysv::msg_remove)?;
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
        Ok(Some(ready))
    }
}

/// A queue that was created.
pub(super) struct Ready {
    object: Object,
    created: bool,
    capacity: u64,
}

impl Ready {
    pub(super) fn keep(mut self) {
        // The time of the last change is then one of the job's life.
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

/// A process becomes again the one that sent or received last, by which the queue is known as the
/// job's, and the first one in the place of zombies: it sends itself a message of a type that no other has. Not where the kernel knows it still
/// as that, since others could be waiting for messages there; and a full queue is left alone.
pub fn rebuild(process: &Process, snapshot: &Snapshot, plan: &mut Builder) {
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
