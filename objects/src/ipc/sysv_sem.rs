//! System V semaphore sets.
//!
//! A process's adjustments (`SEM_UNDO`) are in [`undo`](mod@super::undo).

use ckpt_image::Reader;
use ckpt_sys::sysv;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::sysv::{self as object, IpcObject, Sight, Site};
use super::table::{Row, Type};
use super::undo::{self, Adjustment};
use super::{Claim, Ipc, Object};
use crate::Snapshot;
use crate::bounds;
use crate::error::{Error, Obstacle, Result};
use crate::index::SetId;
use crate::plan::Builder;
use crate::process::Process;
use crate::references::{Faults, require};
use crate::source::Collector;

/// `SEMVMX`: the highest value.
pub const HIGHEST: u16 = 32767;

/// One set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Set {
    /// Id, key, owner.
    pub object: Object,
    /// Why it is attributed to the job.
    pub claim: Claim,
    /// Values, in order.
    pub values: Vec<u16>,
    /// Pid of the last operation on each (`GETPID`).
    #[serde(deserialize_with = "bounds::pid")]
    pub operators: Vec<i32>,
}

fn look(row: &Row) -> Result<(Vec<u16>, Vec<i32>), Errno> {
    let (id, count) = (row.id(), row.get("nsems") as usize);
    let values = sysv::sem_values(id, count)?;
    let operators = (0..count).map(|number| sysv::sem_get(id, number, libc::GETPID));
    Ok((values, operators.collect::<Result<_, _>>()?))
}

/// `SEMMSL` is configurable, but semaphore numbers have 16 bits.
const MOST: usize = 1 << 16;

impl IpcObject for Set {
    const TYPE: Type = Type::Sem;

    fn all(ipc: &mut Ipc) -> &mut Vec<Self> {
        &mut ipc.semaphores
    }

    fn each(ipc: &Ipc) -> &[Self] {
        &ipc.semaphores
    }

    fn object(&self) -> &Object {
        &self.object
    }

    fn claim(&self) -> Claim {
        self.claim
    }

    /// Adds the sets of the job.
    fn capture(sight: &Sight, collector: &mut Collector) {
        let job = sight.job;
        for row in sight.rows {
            let waits = job.waits(row.id(), &[libc::SYS_semop, libc::SYS_semtimedop]);
            let (values, operators) = match look(row) {
                Ok(seen) => seen,
                Err(errno) if waits => {
                    collector.findings.obstacles.push(Obstacle::new(
                        Object::of(row).title(Type::Sem),
                        format!("is in use by the job and cannot be read: {}", errno.desc()),
                        "run ckpt as root",
                    ));
                    continue;
                }
                // Removed meanwhile, or not accessible.
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

    fn check(&self, faults: &mut Faults) {
        let (id, semaphores) = (self.object.id, self.values.len());
        require!(
            faults,
            (1..=MOST).contains(&semaphores) && self.operators.len() == semaphores,
            "semaphore set {id} has {semaphores} values of {} semaphores",
            self.operators.len()
        );
        require!(
            faults,
            self.values.iter().all(|value| *value <= HIGHEST),
            "semaphore set {id} has a value above {HIGHEST}"
        );
    }

    /// The restore itself made the last operations.
    fn make_comparable(&mut self) {
        self.claim = Claim::Used;
        self.operators.clear();
    }

    fn in_the_way(&self, index: usize, site: &Site) -> Result<(), Obstacle> {
        let changes = |row: &Row| self.changes(index, row, site.snapshot).map(drop);
        site.one_in_the_way(self, changes)
    }

    fn create(&self, _: &Reader, _: &mut Vec<String>) -> Result<Box<dyn object::Ready>> {
        let failed = |what, errno| object::failed(self, what, errno);
        let flags = libc::IPC_CREAT | libc::IPC_EXCL | 0o600;
        let (object, count) = (self.object, self.values.len());
        let create = || sysv::semget(object.key, count as i32, flags);
        object::create(self, create, sysv::sem_remove)?;
        let ready = Ready {
            object,
            created: true,
            changed: Vec::new(),
            count,
            kept: false,
        };
        // Not SETALL: the other semaphores must stay unused.
        let values = self.values.iter().enumerate().filter(|(_, v)| **v != 0);
        let values: Vec<_> = values.map(|(n, v)| (n as u16, *v as i16)).collect();
        for some in values.chunks(undo::most_operations()) {
            sysv::sem_operate(object.id, some).map_err(|e| failed("filled", e))?;
        }
        let owner = sysv::sem_set(object.id, object.access());
        owner.map_err(|e| failed("given to its owner", e))?;
        Ok(Box::new(ready))
    }

    fn put_back(
        &self,
        index: usize,
        row: &Row,
        site: &Site,
        _: &Reader,
    ) -> Result<Option<Box<dyn object::Ready>>> {
        let changes = self
            .changes(index, row, site.snapshot)
            .map_err(Error::refuse)?;
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
            done.map_err(|e| object::failed(self, "put back", e))?;
        }
        Ok(Some(Box::new(ready)))
    }

    /// Makes the adjustments of a process. The values stay: each operation is paired with its inverse.
    fn rebuild(process: &Process, snapshot: &Snapshot, plan: &mut Builder) {
        operate(snapshot, plan, |set, number, _| {
            let all = process.semaphore_adjustments.iter();
            let of_this = |a: &&Adjustment| a.set == set && usize::from(a.semaphore) == number;
            let by = all.filter(of_this).map(|a| a.by).sum();
            (by != 0).then_some(by)
        });
    }

    /// Makes a process the last to operate on its semaphores again, by which the set is attributed to the job; the
    /// first process does it for zombies. Done when all processes have their adjustments, which are operations.
    fn finish(process: &Process, snapshot: &Snapshot, plan: &mut Builder) {
        operate(snapshot, plan, |_, _, operator| {
            snapshot.acts_for(process, operator).then_some(0)
        });
    }
}

impl Set {
    /// The operations that restore the values of an existing set; refused unless only the job can have made the
    /// difference.
    fn changes(
        &self,
        index: usize,
        row: &Row,
        snapshot: &Snapshot,
    ) -> Result<Vec<(u16, i16)>, Obstacle> {
        if row.get("nsems") as usize != self.values.len() {
            let reason = "does not exist any more, and another object has its id";
            return Err(self.changed(reason.into()));
        }
        let (now, operators) = look(row)
            .map_err(|errno| self.changed(format!("cannot be read any more: {}", errno.desc())))?;
        let ours = |pid: i32| snapshot.knows(pid);
        let mut changes = Vec::new();
        for (number, (was, is)) in self.values.iter().zip(&now).enumerate() {
            if was == is {
                continue;
            }
            // The effect of the end of the job's processes.
            let adjusted = undo::total(snapshot, SetId(index), number) + i64::from(*was);
            let undone = i64::from(*is) == adjusted.clamp(0, HIGHEST.into());
            let before = self.operators[number];
            let alone = ours(operators[number]) && (undone || before == 0 || ours(before));
            let waiting = |command| sysv::sem_get(self.object.id, number, command) != Ok(0);
            if !alone || waiting(libc::GETNCNT) || waiting(libc::GETZCNT) {
                return Err(self.changed(format!(
                    "had {was} as semaphore {number} at the checkpoint and has {is} now, and not \
                     only the job uses it"
                )));
            }
            let change = *was as i32 - i32::from(*is);
            changes.push((number as u16, change as i16));
        }
        Ok(changes)
    }
}

/// A prepared set.
struct Ready {
    object: Object,
    created: bool,
    /// Changed semaphores, and their previous values.
    changed: Vec<(u16, u16)>,
    count: usize,
    kept: bool,
}

impl object::Ready for Ready {
    fn keep(mut self: Box<Self>) {
        if self.created {
            // Sets the time of the last change, which then is in the job's lifetime.
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

/// Operations on the semaphores (set, number, last pid) for which `by` returns the adjustment of the process.
fn operate(snapshot: &Snapshot, plan: &mut Builder, by: impl Fn(SetId, usize, i32) -> Option<i16>) {
    for (id, set) in SetId::each(&snapshot.ipc.semaphores) {
        if set.claim == Claim::Possible {
            continue;
        }
        let values = set.values.iter().zip(&set.operators).enumerate();
        let operations: Vec<_> = values
            .filter_map(|(number, (value, operator))| {
                let by = by(id, number, *operator)?;
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
