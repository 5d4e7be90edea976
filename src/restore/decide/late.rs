//! Mappings that are made last. A process close to its limit of mappings (`vm.max_map_count`) has no room for the
//! restorer's. So some empty ones are left out of its plan, and mapped after the restorer has gone.

use std::borrow::Cow;
use std::collections::HashMap;

use ckpt_image::Reader;
use ckpt_tracer::remote::RemoteCalls;

use crate::error::{Obstacle, Result};
use crate::objects::Snapshot;
use crate::objects::holes;
use crate::objects::index::SharedId;
use crate::objects::memory::{Backing, Mapping, MappingFlags, join};
use crate::objects::process::Process;
use crate::objects::process_tree::{Creations, Origin};

/// The mappings of the restorer, and the reserve that mremap(2) requires (`mremap_to`, mm/mremap.c).
const ROOM: u64 = 16;
/// `READ_IMPLIES_EXEC`, personality(2).
const READ_IMPLIES_EXEC: u32 = 0x40_0000;

/// By pid, its late mappings; ascending.
#[derive(Default)]
pub(in crate::restore) struct Late(HashMap<i32, Vec<Mapping>>);

impl Late {
    /// Decides for all processes; `limit` is `vm.max_map_count`.
    pub(in crate::restore) fn decide(
        snapshot: &Snapshot,
        image: &Reader,
        creations: &[Creations],
        limit: u64,
    ) -> std::result::Result<Self, Vec<Obstacle>> {
        let mut late = HashMap::new();
        let mut obstacles = Vec::new();
        for (index, process) in snapshot.processes.iter().enumerate() {
            let count = process.memory.mappings.len() as u64;
            let too_many = (count + staged(process) + ROOM).saturating_sub(limit);
            if too_many == 0 || process.shares.memory {
                continue;
            }
            // Mappings that forks share are made from the beginning.
            let mut family = creations[index].processes().into_iter().chain([index]);
            let alone = family.all(|i| i == index || creations[i].origin == Origin::Executed)
                && creations[index].origin == Origin::Executed;
            let mut empty: Vec<Mapping> = Vec::new();
            if alone {
                let held = pages_of(process, image);
                let fits = |m: &&Mapping| may_come_late(m, process, &held);
                let mappings = process.memory.mappings.iter().filter(fits);
                empty = mappings.take(too_many as usize).cloned().collect();
            }
            match empty.len() as u64 == too_many {
                true => drop(late.insert(process.pid, empty)),
                false => obstacles.push(Obstacle::new(
                    format!("process {}", process.pid),
                    format!(
                        "has {count} mappings, and a restore needs room for {} more below \
                         vm.max_map_count, which is {limit}",
                        staged(process) + ROOM
                    ),
                    holes::raise(count + staged(process) + ROOM),
                )),
            }
        }
        match obstacles.is_empty() {
            true => Ok(Self(late)),
            false => Err(obstacles),
        }
    }

    /// The mappings in the plan of a process.
    pub(in crate::restore) fn others<'a>(&self, process: &'a Process) -> Cow<'a, [Mapping]> {
        let all = &process.memory.mappings;
        let Some(late) = self.0.get(&process.pid) else {
            return Cow::Borrowed(all);
        };
        let is_late = |m: &&Mapping| late.binary_search_by_key(&m.start, |l| l.start).is_ok();
        all.iter().filter(|m| !is_late(m)).cloned().collect()
    }

    /// Makes the late mappings of a process.
    pub(in crate::restore) fn map(
        &self,
        process: &Process,
        calls: &mut RemoteCalls<'_>,
    ) -> Result<()> {
        let late = self.0.get(&process.pid).into_iter().flatten();
        for mapping in late {
            mapping.map_empty(calls)?;
        }
        Ok(())
    }
}

/// Number of shared memory objects that are mapped as a whole temporarily.
fn staged(process: &Process) -> u64 {
    let objects = process
        .memory
        .mappings
        .iter()
        .filter_map(|m| match m.backing {
            Backing::SharedMemory { object, .. } => Some(object),
            _ => None,
        });
    let mut objects: Vec<SharedId> = objects.collect();
    objects.sort_unstable();
    objects.dedup();
    objects.len() as u64
}

/// The pages of its memory in the image.
fn pages_of(process: &Process, image: &Reader) -> Vec<(u64, u64)> {
    let page_size = image.header().page_size;
    let runs = (0..image.chunks().len()).flat_map(|chunk| image.runs(chunk));
    let own = runs.filter(|run| run.space == process.memory.space.0);
    let own = own.map(|run| (run.start, run.end(page_size)));
    join(
        own.chain(process.memory.inherited.iter().copied())
            .collect(),
    )
}

/// Whether a mapping is empty and needs only mmap(2): attributes of the process set meanwhile do not change it.
fn may_come_late(m: &Mapping, process: &Process, held: &[(u64, u64)]) -> bool {
    let next = held.partition_point(|(_, end)| *end <= m.start);
    let is_empty = held.get(next).is_none_or(|(start, _)| m.end <= *start);
    let plain = MappingFlags::ACCOUNTED
        | MappingFlags::NO_RESERVE
        | MappingFlags::HUGE
        | MappingFlags::NO_HUGE;
    is_empty
        && m.backing == Backing::Anonymous
        && plain.contains(m.flags)
        && m.prot & libc::PROT_EXEC as u32 == 0
        && m.protection_key == 0
        && m.name.is_none()
        && m.policy.is_none()
        && m.guards.is_empty()
        && process.memory.lock_future == 0
        && process.personality & READ_IMPLIES_EXEC == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::fixture;

    #[test]
    fn empty_mappings_make_room_for_the_restorer() {
        let image = fixture::good_image();
        let mut snapshot = fixture::snapshot();
        for mapping in &mut snapshot.processes[0].memory.mappings {
            mapping.name = Some(b"name".to_vec());
        }
        let creations = crate::objects::process_tree::decide(&snapshot).expect("it is one process");
        let decide = |snapshot: &Snapshot, limit| Late::decide(snapshot, &image, &creations, limit);
        let others = |late: Late, snapshot: &Snapshot| {
            let others = late.others(&snapshot.processes[0]).into_owned();
            others.iter().map(|m| m.start).collect::<Vec<_>>()
        };
        let count = snapshot.processes[0].memory.mappings.len() as u64;
        let enough = decide(&snapshot, count + ROOM).expect("there is room");
        assert_eq!(others(enough, &snapshot).len() as u64, count);
        // None qualifies, and one is needed.
        let Err(refused) = decide(&snapshot, count + ROOM - 1) else {
            panic!("there is no room");
        };
        assert!(
            refused[0].reason.contains("needs room for 16 more"),
            "{refused:?}"
        );
        let empty = fixture::mapping(0x7000_0000, 4, Backing::Anonymous);
        let named = Mapping {
            name: Some(b"name".to_vec()),
            ..fixture::mapping(0x6000_0000, 4, Backing::Anonymous)
        };
        snapshot.processes[0].memory.mappings.extend([named, empty]);
        let late = decide(&snapshot, count + 1 + ROOM).expect("one is left out");
        let with_plan = others(late, &snapshot);
        assert_eq!(with_plan.len() as u64, count + 1);
        assert_eq!(with_plan.last(), Some(&0x6000_0000));
        assert!(decide(&snapshot, count + ROOM).is_err());
    }
}
