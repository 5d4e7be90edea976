//! Semaphore adjustments of a process (`SEM_UNDO`, semop(2)).
//!
//! They are not visible anywhere. But the kernel checks that an operation keeps an adjustment in the range of -32768
//! to 32767, and returns ERANGE before it waits or changes anything. So the process is made to call semop with a list
//! that cannot succeed, since its last operation would have to wait (EAGAIN): ERANGE then shows how far the
//! adjustment is from the limit. The kernel evaluates such a list under the set's lock (`perform_atomic_semop`,
//! ipc/sem.c), so intermediate values are never visible, and the only remaining effect is an empty undo list.

use std::cmp::Ordering;

use ckpt_sys::sysv;
use ckpt_tracer::Tid;
use ckpt_tracer::kcmp::{KcmpType, kcmp};
use ckpt_tracer::remote::{Call, RemoteCalls};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::sysv_sem::{HIGHEST, Set};
use super::table::Type;

use super::Claim;
use crate::Snapshot;
use crate::error::{Error, Obstacle, Result};
use crate::index::SetId;

/// An adjustment of a semaphore at the end of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adjustment {
    /// Index in the snapshot's sets.
    pub set: SetId,
    /// Number of the semaphore in the set.
    pub semaphore: u16,
    /// The adjustment, never 0.
    pub by: i16,
}

/// `struct sembuf`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    number: u16,
    by: i16,
    undo: bool,
}

impl Operation {
    fn new(number: u16, by: i32, undo: bool) -> Self {
        Self {
            number,
            by: by as i16,
            undo,
        }
    }

    /// In the kernel's layout; nonblocking.
    pub fn to_bytes(&self) -> [u8; 6] {
        const SEM_UNDO: i32 = 0x1000;
        let flags = libc::IPC_NOWAIT | if self.undo { SEM_UNDO } else { 0 };
        let mut bytes = [0; 6];
        bytes[..2].copy_from_slice(&self.number.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.by.to_le_bytes());
        bytes[4..].copy_from_slice(&(flags as i16).to_le_bytes());
        bytes
    }
}

/// The most operations that one semop takes (`SEMOPM`, kernel.sem).
pub fn most_operations() -> usize {
    let text = std::fs::read_to_string("/proc/sys/kernel/sem").unwrap_or_default();
    let most = text.split_whitespace().nth(2).and_then(|n| n.parse().ok());
    most.unwrap_or(32).clamp(2, 256)
}

/// Pairs of operations that leave a semaphore of that value unchanged and adjust the process by `by` in all; at least
/// one pair.
pub fn adjust(number: u16, value: u16, by: i16) -> Vec<[Operation; 2]> {
    // A larger step could exceed the range in either direction.
    const MOST: i32 = HIGHEST as i32 / 2;
    let mut pairs = Vec::new();
    let mut left = i32::from(by);
    while left != 0 || pairs.is_empty() {
        // An operation adjusts by its inverse.
        let step = left.clamp(-MOST, MOST);
        let (undone, inverse) = match step {
            0 => (
                Operation::new(number, 1, false),
                Operation::new(number, -1, false),
            ),
            _ => (
                Operation::new(number, -step, true),
                Operation::new(number, step, false),
            ),
        };
        let up_first = i32::from(value) <= MOST;
        pairs.push(match (undone.by > 0) == up_first {
            true => [undone, inverse],
            false => [inverse, undone],
        });
        left -= step;
    }
    pairs
}

/// The total adjustment at the end of all of the job's processes.
pub fn total(snapshot: &Snapshot, set: SetId, number: usize) -> i64 {
    let all = snapshot
        .processes
        .iter()
        .flat_map(|p| &p.semaphore_adjustments);
    let of_this = all.filter(|a| a.set == set && usize::from(a.semaphore) == number);
    of_this.map(|a| i64::from(a.by)).sum()
}

/// The direction of a probed adjustment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Above,
    Below,
}

/// A list that cannot succeed: it returns ERANGE if the adjustment's distance from 0 on that side is more than
/// `HIGHEST - x`, otherwise EAGAIN.
fn question(number: u16, value: u16, side: Side, x: i32) -> Vec<Operation> {
    let value = i32::from(value);
    let highest = i32::from(HIGHEST);
    let mut list = Vec::with_capacity(5);
    match side {
        Side::Above => {
            list.push((highest - value, false));
            list.push((-x, true));
        }
        Side::Below => {
            list.push((-value, false));
            // The range extends one further on this side.
            list.push((1, true));
            list.push((-1, false));
            list.push((x, true));
        }
    }
    list.retain(|(by, _)| *by != 0);
    list.push((-highest - 1, false));
    list.into_iter()
        .map(|(by, undo)| Operation::new(number, by, undo))
        .collect()
}

/// A semaphore being probed.
struct Search {
    number: u16,
    value: u16,
    side: Side,
    /// ERANGE is returned for `high`, and not for `low`.
    low: i32,
    high: i32,
}

/// Semaphores probed together: their lists fit into the scratch memory.
const TOGETHER: usize = 64;
/// Room for one list, in bytes.
const LIST: usize = 32;

/// The adjustments of a frozen process, in which the calls are made.
pub fn capture(
    calls: &mut RemoteCalls<'_>,
    sets: &[Set],
    threads: &[Tid],
) -> Result<Vec<Adjustment>> {
    let mut found = Vec::new();
    let used = |set: &&Set| set.claim == Claim::Used;
    if let Some(set) = sets.iter().find(used) {
        let leader = calls.pid().leader();
        let own = |tid: &&Tid| kcmp(leader, **tid, KcmpType::Sysvsem).is_ok_and(Ordering::is_ne);
        if let Some(tid) = threads.iter().find(own) {
            return Err(Error::refuse(Obstacle::without_remedy(
                set.object.title(Type::Sem),
                format!(
                    "may have adjustments (SEM_UNDO) of thread {tid} alone, which was created without \
                     CLONE_SYSVSEM; that is not supported"
                ),
            )));
        }
    }
    for (id, set) in SetId::each(sets).filter(|(_, set)| used(set)) {
        for first in (0..set.values.len()).step_by(TOGETHER) {
            let some = first..set.values.len().min(first + TOGETHER);
            let Some(values) = ask_about(calls, set, some)? else {
                break;
            };
            found.extend(values.into_iter().map(|(semaphore, by)| Adjustment {
                set: id,
                semaphore,
                by,
            }));
        }
    }
    Ok(found)
}

/// The nonzero adjustments; `None` if the process may not change the set, so that it has none.
fn ask_about(
    calls: &mut RemoteCalls<'_>,
    set: &Set,
    some: std::ops::Range<usize>,
) -> Result<Option<Vec<(u16, i16)>>> {
    let highest = i32::from(HIGHEST);
    let both = some.flat_map(|n| [(n, Side::Above), (n, Side::Below)]);
    let mut open: Vec<Search> = both
        .map(|(n, side)| Search {
            number: n as u16,
            value: set.values[n],
            side,
            // Without a shift, nothing but -32768 can be out of range.
            low: if side == Side::Below { -1 } else { 0 },
            high: highest,
        })
        .collect();
    let Some(answers) = ask(calls, set, &open, |s| s.high)? else {
        return Ok(None);
    };
    let mut answers = answers.into_iter();
    open.retain(|_| answers.next() == Some(true));
    if open.is_empty() {
        return Ok(Some(Vec::new()));
    }
    while open.iter().any(|s| s.high - s.low > 1) {
        let middle = |s: &Search| (s.low + s.high) / 2;
        let answers = ask(calls, set, &open, middle)?.unwrap_or_default();
        for (search, out_of_range) in open.iter_mut().zip(answers) {
            match out_of_range {
                true => search.high = middle(search).max(search.low + 1),
                false => search.low = middle(search),
            }
        }
    }
    // A process outside the job may have operated on the set in between.
    let sure = ask(calls, set, &open, |s| s.high)?.unwrap_or_default();
    let unsure = ask(calls, set, &open, |s| s.low)?.unwrap_or_default();
    let now = sysv::sem_values(set.object.id, set.values.len());
    if now.as_ref() != Ok(&set.values) || sure.contains(&false) || unsure.contains(&true) {
        let obstacle = Obstacle::new(
            set.object.title(Type::Sem),
            "was used from outside the job during the checkpoint, so that the job's adjustments (SEM_UNDO) \
             cannot be determined",
            "try again",
        );
        return Err(Error::refuse(obstacle.passing()));
    }
    Ok(Some(open.iter().map(Search::result).collect()))
}

impl Search {
    fn result(&self) -> (u16, i16) {
        let distance = i32::from(HIGHEST) + 1 - self.high;
        let by = match self.side {
            Side::Above => distance,
            Side::Below => -distance,
        };
        (self.number, by as i16)
    }
}

/// Probes each semaphore once; true for ERANGE.
fn ask(
    calls: &mut RemoteCalls<'_>,
    set: &Set,
    searches: &[Search],
    x: impl Fn(&Search) -> i32,
) -> Result<Option<Vec<bool>>> {
    let mut bytes = Vec::with_capacity(searches.len() * LIST);
    let mut list = Vec::with_capacity(searches.len());
    for search in searches {
        let question = question(search.number, search.value, search.side, x(search));
        let at = calls.scratch() + bytes.len() as u64;
        let args = [set.object.id as u64, at.raw(), question.len() as u64];
        list.push(Call::new("semop", libc::SYS_semop, &args));
        bytes.extend(question.iter().flat_map(Operation::to_bytes));
        bytes.resize(list.len() * LIST, 0);
    }
    calls.write_scratch(0, &bytes)?;
    let answers = calls.batch(bytes.len() as u64, &list)?;
    let mut out_of_range = Vec::with_capacity(answers.len());
    for answer in answers {
        match Errno::from_raw(-answer as i32) {
            Errno::ERANGE => out_of_range.push(true),
            Errno::EAGAIN => out_of_range.push(false),
            // Removed meanwhile, or without write permission.
            Errno::EACCES | Errno::EIDRM | Errno::EINVAL => return Ok(None),
            errno => {
                return Err(Error::refuse(Obstacle::without_remedy(
                    set.object.title(Type::Sem),
                    format!(
                        "does not show whether the end of the job adjusts it (SEM_UNDO): {}",
                        errno.desc()
                    ),
                )));
            }
        }
    }
    Ok(Some(out_of_range))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel's behaviour for a list: value and adjustment afterwards, or the error.
    fn kernel(list: &[Operation], value: u16, adjusted: i32) -> Result<(i32, i32), Errno> {
        let (mut value, mut adjusted) = (i32::from(value), adjusted);
        for operation in list {
            value += i32::from(operation.by);
            match value {
                ..0 => return Err(Errno::EAGAIN),
                32768.. => return Err(Errno::ERANGE),
                _ => {}
            }
            if operation.undo {
                adjusted -= i32::from(operation.by);
                if !(-32768..=32767).contains(&adjusted) {
                    return Err(Errno::ERANGE);
                }
            }
        }
        Ok((value, adjusted))
    }

    #[test]
    fn adjusting_leaves_the_value() {
        for value in [0, 1, 7, 16383, 16384, 32766, 32767] {
            for by in [0, 1, -1, 5, -5, 16384, -16384, 32767, -32767, -32768] {
                let list: Vec<_> = adjust(3, value, by).into_iter().flatten().collect();
                assert!(!list.is_empty());
                let after = kernel(&list, value, 0);
                assert_eq!(after, Ok((value.into(), by.into())), "{value} {by}");
            }
        }
    }

    #[test]
    fn questions_find_every_adjustment() {
        for value in [0, 9, 32767] {
            for adjusted in [-32768, -32767, -7, -1, 0, 1, 2, 9, 32766, 32767] {
                for side in [Side::Above, Side::Below] {
                    let ask =
                        |x| kernel(&question(0, value, side, x), value, adjusted).unwrap_err();
                    let beyond = (0..=32767).find(|x| ask(*x) == Errno::ERANGE);
                    let expected = match side {
                        Side::Above => adjusted,
                        Side::Below => -adjusted,
                    };
                    let distance = beyond.map_or(0, |x| 32768 - x);
                    assert_eq!(distance, expected.max(0), "{value} {adjusted} {side:?}");
                }
            }
        }
    }
}
