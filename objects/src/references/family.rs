//! Checks of the process tree.

use std::collections::{HashMap, HashSet};

use super::{Faults, require};
use crate::Snapshot;
use crate::process::Process;

/// Parents precede their children, ids are unique, and pages inherited from a parent are in its memory.
pub(super) fn family(snapshot: &Snapshot, page: u32, faults: &mut Faults) {
    let mut place = HashMap::new();
    for (index, process) in snapshot.processes.iter().enumerate() {
        place.entry(process.pid).or_insert(index);
    }
    for (index, process) in snapshot.processes.iter().enumerate() {
        let pid = process.pid;
        let parent = place.get(&process.parent).copied();
        require!(
            faults,
            parent.is_none_or(|parent| parent < index),
            "process {pid} comes before its parent {}",
            process.parent
        );
        require!(
            faults,
            parent.is_some() || (!process.forked && process.memory.inherited.is_empty()),
            "process {pid} has pages from a parent that is not there"
        );
        require!(
            faults,
            index == 0 || process.parent > 0,
            "process {pid} has no parent"
        );
        let parent = parent.and_then(|parent| snapshot.processes.get(parent));
        sharing(process, parent, faults);
        inherited(process, page.into(), faults);
        stops(process, &place, faults);
    }
    zombies(snapshot, &place, faults);
}

/// An object shared with the parent has one record.
fn sharing(process: &Process, parent: Option<&Process>, faults: &mut Faults) {
    let (pid, shares) = (process.pid, process.shares);
    let same = |shared: bool, is: fn(&Process, &Process) -> bool| {
        !shared || parent.is_some_and(|parent| is(process, parent))
    };
    require!(
        faults,
        same(shares.memory, |p, q| p.memory == q.memory) && !(shares.memory && process.forked),
        "process {pid} does not have the memory that it shares with its parent"
    );
    require!(
        faults,
        same(shares.actions, |p, q| p.actions == q.actions) && (shares.memory || !shares.actions),
        "process {pid} does not have the signal actions that it shares with its parent"
    );
    require!(
        faults,
        same(shares.adjustments, |p, _| p
            .semaphore_adjustments
            .is_empty()),
        "process {pid} has adjustments of semaphores apart from those that it shares with its parent"
    );
    require!(
        faults,
        (0..=super::LAST_SIGNAL as i32).contains(&process.exit_signal),
        "process {pid} has the exit signal {}, which does not exist",
        process.exit_signal
    );
}

fn inherited(process: &Process, page: u64, faults: &mut Faults) {
    let mappings = &process.memory.mappings;
    let mut last = 0;
    for &(start, end) in &process.memory.inherited {
        let at = mappings.partition_point(|m| m.end <= start);
        let mut covered = start;
        for m in &mappings[at..] {
            if m.start > covered || covered >= end {
                break;
            }
            covered = covered.max(m.end);
        }
        require!(
            faults,
            start >= last && start < end && start % page == 0 && end % page == 0 && covered >= end,
            "process {} has pages from its parent at {start:#x} where it has no memory",
            process.pid
        );
        last = end;
    }
}

fn stops(process: &Process, place: &HashMap<i32, usize>, faults: &mut Faults) {
    let stops = libc::SIGSTOP..=libc::SIGTTOU;
    require!(
        faults,
        process.stopped.is_none_or(|signal| stops.contains(&signal)),
        "process {} was stopped by a signal that is not a stop signal",
        process.pid
    );
    let there = |pids: &[i32]| {
        let mut once = HashSet::new();
        pids.iter()
            .all(|pid| place.contains_key(pid) && once.insert(*pid))
    };
    require!(
        faults,
        there(&process.untold_stops) && there(&process.untold_continues),
        "process {} has an unread stop or continuation of a process that does not exist",
        process.pid
    );
}

fn zombies(snapshot: &Snapshot, place: &HashMap<i32, usize>, faults: &mut Faults) {
    let threads = snapshot.processes.iter().flat_map(|p| &p.threads);
    let mut ids: HashSet<i32> = threads.map(|t| t.tid).collect();
    for zombie in &snapshot.zombies {
        let pid = zombie.pid;
        require!(
            faults,
            pid > 0 && zombie.group >= 0 && zombie.session >= 0 && ids.insert(pid),
            "the id of process {pid}, which has ended, is impossible or another one's"
        );
        require!(
            faults,
            place.contains_key(&zombie.parent),
            "the parent of process {pid}, which has ended, is not there"
        );
        require!(
            faults,
            (0..=0xffff).contains(&zombie.status)
                && (0..=super::LAST_SIGNAL as i32).contains(&zombie.exit_signal)
                && (zombie.status & 0x7f == 0 || zombie.status & 0x7f < 65)
                && zombie.name.len() <= super::NAME_BYTES
                && !zombie.name.contains(&0),
            "process {pid}, which has ended, has an impossible wait status"
        );
    }
}
