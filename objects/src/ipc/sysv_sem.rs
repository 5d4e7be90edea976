//! System V semaphore sets.
//!
//! A process's adjustments (`SEM_UNDO`) stand in [`undo`](mod@super::undo).

use ckpt_sys::sysv;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::table::{Row, Type};
use super::undo::{self, Adjustment};
use super::{Claim, Found, Job, Object};
use crate::Snapshot;
use crate::bounds;
use crate::error::{Error, Obstacle, Result};
use crate::plan::Builder;
use crate::process::Process;
use crate::source::Collector;

/// `SEMVMX`: the highest value.
pub const HIGHEST: u16 = 32767;

/// One set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Set {
    /// Id, key, owner.
    pub object: Object,
    /// How it is known to be the job's.
    pub claim: Claim,
    /// Values, in order.
    pub values: Vec<u16>,
    /// Who operated on each one last (`GETPID`).
    #[serde(deserialize_with = "bounds::pid")]
    pub operators: Vec<i32>,
}

/// Enters the sets of the job.
pub(super) fn survey(job: &Job, rows: &[Row], collector: &mut Collector) {
    for row in rows {
        let waits = job.waits(row.id(), &[libc::SYS_semop, libc::SYS_semtimedop]);
        let (values, operators) = match look(row) {
            Ok(seen) => seen,
            Err(errno) if waits => {
                collector.obstacles.push(Obstacle::new(
                    Object::of(row).title(Type::Sem),
                    format!("is in use by the job and cannot be read: {}", errno.desc()),
                    "run ckpt as root",
                ));
                continue;
            }
            // Gone meanwhile, or none of ours.
            Err(_) => continue,
        };
        let operated = operators.iter().any(|pid| job.pids.contains(pid));
        let Some(claim) = job.claim(row, operated || waits) else {
            continue;
        };
        collector.ipc.semaphores.push(Set {
            object: Object::of(row),
            claim,
            values,
            operators,
        });
    }
}

fn look(row: &Row) -> Result<(Vec<u16>, Vec<i32>), Errno> {
    let (id, count) = (row.id(), row.get("nsems") as usize);
    let values = sysv::sem_values(id, count)?;
    let operators = (0..count).map(|number| sysv::sem_get(id, number, libc::GETPID));
    Ok((values, operators.collect::<Result<_, _>>()?))
}

impl Set {
    fn title(&self) -> String {
        self.object.title(Type::Sem)
    }

    /// The changes that bring a set that is still there back to its values; refused unless nobody
    /// but the job can have made the difference.
    fn changes(
        &self,
        index: usize,
        row: &Row,
        snapshot: &Snapshot,
    ) -> Result<Vec<(u16, i16)>, Obstacle> {
        let refuse = |reason: String| {
            let remedy = format!(
                "remove it if nobody else needs it (ipcrm -s {}), or restore in an IPC namespace \
                 of its own: unshare --ipc restore IMAGE",
                self.object.id
            );
            Obstacle::new(self.title(), reason, remedy)
        };
        if row.get("nsems") as usize != self.values.len() {
            let reason = "does not exist any more, and another object has its id";
            return Err(refuse(reason.into()));
        }
        let (now, operators) = look(row)
            .map_err(|errno| refuse(format!("cannot be read any more: {}", errno.desc())))?;
        let ours = |pid: i32| snapshot.knows(pid);
        let mut changes = Vec::new();
        for (number, (was, is)) in self.values.iter().zip(&now).enumerate() {
            if was == is {
                continue;
            }
            // What the end of the job's processes made of it.
            let adjusted = undo::total(snapshot, index, number) + i64::from(*was);
            let undone = i64::from(*is) == adjusted.clamp(0, HIGHEST.into());
            let before = self.operators[number];
            let alone = ours(operators[number]) && (undone || before == 0 || ours(before));
            let waiting = |command| sysv::sem_get(self.object.id, number, command) != Ok(0);
            if !alone || waiting(libc::GETNCNT) || waiting(libc::GETZCNT) {
                return Err(refuse(format!(
                    "had {was} as semaphore {number} at the checkpoint and has {is} now, and not \
                     only the job uses it"
                )));
            }
            let change = *was as i32 - i32::from(*is);
            changes.push((number as u16, change as i16));
        }
        Ok(changes)
    }

    /// Whether it may be put back or created here.
    pub(super) fn in_the_way(
        &self,
        index: usize,
        rows: &[Row],
        here: bool,
        snapshot: &Snapshot,
    ) -> Result<(), Obstacle> {
        let changes = |row: &Row| self.changes(index, row, snapshot).map(drop);
        super::one_in_the_way(self.claim, &self.object, (Type::Sem, rows, here), changes)
    }

    /// Creates it or puts back what is there.
    pub(super) fn prepare(
        &self,
        index: usize,
        rows: &[Row],
        here: bool,
        snapshot: &Snapshot,
        warnings: &mut Vec<String>,
    ) -> Result<Option<Ready>> {
        if self.claim == Claim::Possible {
            let wanted = super::wants_possible(&self.object, Type::Sem, rows, here, warnings);
            return if wanted { self.create() } else { Ok(None) };
        }
        let found = self.object.find(Type::Sem, rows, here);
        let Found::Same(row) = found.map_err(Error::refuse)? else {
            return self.create();
        };
        let changes = self.changes(index, row, snapshot).map_err(Error::refuse)?;
        let ready = Ready {
            object: self.object,
            created: false,
            changed: changes
                .iter()
                .map(|&(n, by)| (n, (self.values[n as usize] as i32 - i32::from(by)) as u16))
                .collect(),
            count: self.values.len(),
            kept: false,
        };
        for some in changes.chunks(undo::most_operations()) {
            let done = sysv::sem_operate(self.object.id, some);
            done.map_err(|e| super::failed(&self.object, Type::Sem, "put back", e))?;
        }
        Ok(Some(ready))
    }

    fn create(&self) -> Result<Option<Ready>> {
        let failed = |what, errno| super::failed(&self.object, Type::Sem, what, errno);
        let flags = libc::IPC_CREAT | libc::IPC_EXCL | 0o600;
        let (object, count) = (self.object, self.values.len());
        let create = || sysv::semget(object.key, count as i32, flags);
        super::create(&object, Type::Sem, create, sysv::sem_remove)?;
        let ready = Ready {
            object,
            created: true,
            changed: Vec::new(),
            count,
            kept: false,
        };
        // Not SETALL: nobody has operated on the others yet.
        let values = self.values.iter().enumerate().filter(|(_, v)| **v != 0);
        let values: Vec<_> = values.map(|(n, v)| (n as u16, *v as i16)).collect();
        for some in values.chunks(undo::most_operations()) {
            sysv::sem_operate(object.id, some).map_err(|e| failed("filled", e))?;
        }
        let owner = sysv::sem_set(object.id, object.access());
        owner.map_err(|e| failed("given to its owner", e))?;
        Ok(Some(ready))
    }
}

/// A set that is there with its values.
pub(super) struct Ready {
    object: Object,
    created: bool,
    /// Semaphores that were changed, and their values before.
    changed: Vec<(u16, u16)>,
    count: usize,
    kept: bool,
}

impl Ready {
    pub(super) fn keep(mut self) {
        if self.created {
            // The time of the last change is then one of the job's life.
            let _ = sysv::sem_set(self.object.id, self.object.access());
        }
        self.kept = true;
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if self.created {
            return sysv::sem_remove(self.object.id);
        }
        // The end of the new process may have undone some of it already.
        let Ok(now) = sysv::sem_values(self.object.id, self.count) else {
            return;
        };
        for &(number, before) in &self.changed {
            let by = i32::from(before) - i32::from(now[number as usize]);
            if by != 0 {
                let _ = sysv::sem_operate(self.object.id, &[(number, by as i16)]);
            }
        }
    }
}

/// A process gets its adjustments. The values stay: each operation comes with its inverse.
pub fn rebuild_adjustments(process: &Process, snapshot: &Snapshot, plan: &mut Builder) {
    operate(snapshot, plan, |index, number, _| {
        let all = process.semaphore_adjustments.iter();
        let of_this = |a: &&Adjustment| a.set == index && usize::from(a.semaphore) == number;
        let by = all.filter(of_this).map(|a| a.by).sum();
        (by != 0).then_some(by)
    });
}

/// A process becomes again the one that operated last on the semaphores that it was, by which the set is known as the
/// job's; the first one in the place of zombies. Done when all processes have their adjustments, which are operations.
pub fn rebuild_operators(process: &Process, snapshot: &Snapshot, plan: &mut Builder) {
    operate(snapshot, plan, |_, _, operator| {
        snapshot.acts_for(process, operator).then_some(0)
    });
}

/// Operations on the semaphores (set, number, who operated last) for which `by` answers how much the
/// process is adjusted.
fn operate(snapshot: &Snapshot, plan: &mut Builder, by: impl Fn(usize, usize, i32) -> Option<i16>) {
    for (index, set) in snapshot.ipc.semaphores.iter().enumerate() {
        if set.claim == Claim::Possible {
            continue;
        }
        let values = set.values.iter().zip(&set.operators).enumerate();
        let operations: Vec<_> = values
            .filter_map(|(number, (value, operator))| {
                let by = by(index, number, *operator)?;
                Some(undo::adjust(number as u16, *value, by))
            })
            .flatten()
            .collect();
        for some in operations.chunks(undo::most_operations() / 2) {
            let bytes: Vec<u8> = some
                .iter()
                .flatten()
                .flat_map(undo::Operation::to_bytes)
                .collect();
            let list = plan.data(&bytes);
            let args = [set.object.id as u64, list, 2 * some.len() as u64];
            plan.syscall(libc::SYS_semop, &args, || set.title());
        }
    }
}
