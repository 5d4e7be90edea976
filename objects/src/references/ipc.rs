//! Objects of the IPC namespace.

use crate::Snapshot;
use crate::ipc::sysv_sem::HIGHEST;
use crate::process::Process;

use super::{Faults, require};

/// No segment is larger: user space of five-level page tables.
const LARGEST: u64 = 1 << 56;
/// `SEMMSL` may be raised, but the numbers of semaphores have 16 bits.
const MOST_SEMAPHORES: usize = 1 << 16;

/// What objects say of themselves.
pub(super) fn objects(snapshot: &Snapshot, faults: &mut Faults) {
    for segment in &snapshot.ipc.segments {
        let (id, page) = (segment.object.id, segment.huge_page_size);
        require!(
            faults,
            (1..=LARGEST).contains(&segment.size) && (page == 0 || page.is_power_of_two()),
            "segment {id} has the impossible size {} with pages of {page} bytes",
            segment.size
        );
    }
    for set in &snapshot.ipc.semaphores {
        let id = set.object.id;
        require!(
            faults,
            (1..=MOST_SEMAPHORES).contains(&set.values.len())
                && set.operators.len() == set.values.len(),
            "semaphore set {id} has {} values of {} semaphores",
            set.values.len(),
            set.operators.len()
        );
        require!(
            faults,
            set.values.iter().all(|value| *value <= HIGHEST),
            "semaphore set {id} has a value above {HIGHEST}"
        );
    }
    for queue in &snapshot.ipc.queues {
        require!(
            faults,
            queue.messages.iter().all(|message| message.kind > 0),
            "message queue {} has a message of an impossible type",
            queue.object.id
        );
    }
}

/// What a process owes to semaphores.
pub(super) fn adjustments(snapshot: &Snapshot, process: &Process, faults: &mut Faults) {
    for adjustment in &process.semaphore_adjustments {
        let set = snapshot.ipc.semaphores.get(adjustment.set);
        require!(
            faults,
            set.is_some_and(|set| usize::from(adjustment.semaphore) < set.values.len()),
            "process {} adjusts semaphore {} of set {}, which does not exist",
            process.pid,
            adjustment.semaphore,
            adjustment.set
        );
    }
}
