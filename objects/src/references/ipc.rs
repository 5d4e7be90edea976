//! Objects of the IPC namespace.

use crate::Snapshot;
use crate::process::Process;

use super::{Faults, require};

/// Checks of a process's semaphore adjustments.
pub(super) fn adjustments(snapshot: &Snapshot, process: &Process, faults: &mut Faults) {
    for adjustment in &process.semaphore_adjustments {
        let set = adjustment.set.find(&snapshot.ipc.semaphores);
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
