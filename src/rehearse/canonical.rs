//! Removes the intended differences of a rehearsal from a snapshot before it is compared; each function covers one
//! reason (docs/limits.md).

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use crate::objects::files::lock;
use crate::objects::files::outside::Outside;
use crate::objects::index::SetId;
use crate::objects::ipc::{self, Ipc};
use crate::objects::memory::{Backing, Mapping};
use crate::objects::process::Process;
use crate::objects::{Host, Snapshot, timers};

/// Properties of the job that decide which differences are intended.
pub(super) struct Known {
    /// Processes that have timers.
    timers: HashSet<i32>,
    /// System V objects that certainly belong to the job, for each kind.
    objects: Vec<Vec<i32>>,
    /// Descriptions whose other end is outside the job.
    outside: HashSet<usize>,
    /// Ids in the job that may be the owner of a file (fcntl(2), F_SETOWN_EX).
    owners: HashSet<i32>,
}

impl Known {
    /// Of a job.
    pub(super) fn of(job: &Snapshot) -> Self {
        let has_timers = |p: &&Process| {
            let interval = p.interval_timers.0.iter().any(|t| t[2] != 0 || t[3] != 0);
            interval || !p.posix_timers.is_empty()
        };
        let outside = job.descriptions.iter().enumerate();
        let outside = outside.filter(|(_, d)| d.kind.get::<Outside>().is_some());
        let owners = job.processes.iter().flat_map(|p| {
            let tids = p.threads.iter().map(|t| t.tid);
            tids.chain([p.pid, p.group])
        });
        Self {
            outside: outside.map(|(index, _)| index).collect(),
            owners: owners.collect(),
            timers: job
                .processes
                .iter()
                .filter(has_timers)
                .map(|p| p.pid)
                .collect(),
            objects: ipc::used(&job.ipc),
        }
    }
}

/// Removes all of them.
pub(super) fn canonical(snapshot: &mut Snapshot, known: &Known) {
    components_in_use(snapshot);
    when_and_where_it_was_taken(snapshot);
    the_stop(snapshot);
    surroundings(snapshot);
    other_ends(snapshot, known);
    lock::name_takers(snapshot);
    places(snapshot);
    inodes(snapshot);
    terminals(snapshot);
    open_files(snapshot);
    nameless_files(snapshot);
    contents_stored_beside(snapshot);
    objects_of_others(&mut snapshot.ipc, &mut snapshot.processes, known);
    orders_of_the_kernel(snapshot);
    time_goes_on(snapshot, known);
    calls_are_made_again(snapshot);
    memory(snapshot);
}

/// Whether a state component with its initial value counts as in use is up to the processor (`XINUSE`, Intel SDM
/// volume 1, 13.6).
fn components_in_use(snapshot: &mut Snapshot) {
    /// Offsets of the SSE state and the header in an XSAVE area.
    const SSE: Range<usize> = 160..416;
    const HEADER: Range<usize> = 512..520;
    let components = snapshot.host.processor.components.iter();
    let mut parts: Vec<(u32, Range<usize>)> = components
        .map(|c| (c.number, c.offset as usize..(c.offset + c.size) as usize))
        .collect();
    parts.push((1, SSE));
    for thread in snapshot.processes.iter_mut().flat_map(|p| &mut p.threads) {
        let header = thread.xstate.get(HEADER).and_then(|h| h.first_chunk());
        let Some(mut in_use) = header.map(|bytes| u64::from_le_bytes(*bytes)) else {
            continue;
        };
        for (number, part) in &parts {
            let area = thread.xstate.get(part.clone());
            if area.is_some_and(|area| area.iter().all(|byte| *byte == 0)) {
                in_use &= !(1u64 << number);
            }
        }
        // The x87 state always exists.
        thread.xstate[HEADER].copy_from_slice(&(in_use | 1).to_le_bytes());
    }
}

fn when_and_where_it_was_taken(snapshot: &mut Snapshot) {
    snapshot.host = Host::default();
    snapshot.namespaces = Default::default();
    snapshot.ipc.place = Default::default();
}

/// The copy is stopped before its first instruction.
fn the_stop(snapshot: &mut Snapshot) {
    for process in &mut snapshot.processes {
        process.stopped = None;
        process.untold_stops.clear();
    }
}

/// The pipe that replaces an outside end was created by us, and SIGIO receivers outside the job are dropped, which a
/// restore warns of.
fn other_ends(snapshot: &mut Snapshot, known: &Known) {
    for (index, description) in snapshot.descriptions.iter_mut().enumerate() {
        if known.outside.contains(&index) {
            description.made_by = None;
        }
        if let Some(owner) = &mut description.owner
            && !known.owners.contains(&owner.id)
        {
            (owner.kind, owner.id) = (0, 0);
            if owner.signal == 0 {
                description.owner = None;
            }
        }
    }
}

/// An object without a name is created under a free name, which is removed again.
fn places(snapshot: &mut Snapshot) {
    for removed in &mut snapshot.removed {
        removed.path.clear();
        removed.attributes.accessed_ns = 0;
    }
    for process in &mut snapshot.processes {
        if process.removed.cwd.is_some() {
            process.cwd.clear();
        }
        if process.removed.root.is_some() {
            process.root.clear();
        }
    }
}

/// The parent, sessions, groups and control groups outside the job: they depend on where the restore runs.
fn surroundings(snapshot: &mut Snapshot) {
    let mut known: Vec<i32> = snapshot.processes.iter().map(|p| p.pid).collect();
    known.extend(snapshot.zombies.iter().map(|z| z.pid));
    for process in &mut snapshot.processes {
        let ids = [
            &mut process.parent,
            &mut process.session,
            &mut process.group,
        ];
        ids.into_iter()
            .filter(|id| !known.contains(id))
            .for_each(|id| *id = 0);
        process.cgroups.clear();
    }
    for zombie in &mut snapshot.zombies {
        let ids = [&mut zombie.session, &mut zombie.group];
        ids.into_iter()
            .filter(|id| !known.contains(id))
            .for_each(|id| *id = 0);
    }
    snapshot.cgroups.clear();
}

/// Inode numbers of newly created objects: only their equality is compared.
fn inodes(snapshot: &mut Snapshot) {
    let mut inodes: HashMap<u64, u64> = HashMap::new();
    let mut renamed = |inode: &mut u64| {
        let next = inodes.len() as u64;
        *inode = *inodes.entry(*inode).or_insert(next);
    };
    for description in &mut snapshot.descriptions {
        description.kind.file_mut().each_inode(&mut renamed);
    }
    for object in &mut snapshot.shared_memory {
        renamed(&mut object.inode);
    }
    for removed in &mut snapshot.removed {
        removed.device = (0, 0);
        renamed(&mut removed.inode);
    }
}

/// A pty has another number, and a terminal that is not the job's own is replaced.
fn terminals(snapshot: &mut Snapshot) {
    for terminal in &mut snapshot.terminals {
        terminal.name.clear();
        terminal.device = (0, 0);
        if terminal.pair.is_none() {
            terminal.state = None;
            terminal.foreground = None;
        }
    }
}

/// The intended differences of each kind of open file.
fn open_files(snapshot: &mut Snapshot) {
    for description in &mut snapshot.descriptions {
        let file = description.kind.file_mut();
        file.make_comparable(&mut description.flags);
    }
}

/// A nameless file is created anew. Reading it changes the access time.
fn nameless_files(snapshot: &mut Snapshot) {
    for file in &mut snapshot.mapped_files {
        file.attributes.iter_mut().for_each(|a| a.accessed_ns = 0);
        if file.contents.is_some() {
            (file.identity, file.path) = Default::default();
        }
    }
}

/// The copy is checkpointed without `--save-files` and `--bundle`.
fn contents_stored_beside(snapshot: &mut Snapshot) {
    snapshot.bundle.clear();
    for file in &mut snapshot.mapped_files {
        file.saved = None;
        file.identity.build_id = None;
    }
}

/// In an IPC namespace of its own, everything belongs to the copy; the restore made the last operations.
fn objects_of_others(ipc: &mut Ipc, processes: &mut [Process], known: &Known) {
    for adjustment in processes
        .iter_mut()
        .flat_map(|p| &mut p.semaphore_adjustments)
    {
        if let Some(set) = adjustment.set.find(&ipc.semaphores) {
            adjustment.set = SetId(set.object.id as usize);
        }
    }
    ipc::make_comparable(ipc, &known.objects);
}

/// Ids of AIO rings and cookies of core scheduling are assigned by the kernel.
fn orders_of_the_kernel(snapshot: &mut Snapshot) {
    let mut cookies = vec![0];
    for thread in snapshot.processes.iter_mut().flat_map(|p| &mut p.threads) {
        let known = cookies.iter().position(|c| *c == thread.core_cookie);
        let number = known.unwrap_or(cookies.len());
        if number == cookies.len() {
            cookies.push(thread.core_cookie);
        }
        thread.core_cookie = number as u64;
    }
    let mappings = snapshot
        .processes
        .iter_mut()
        .flat_map(|p| &mut p.memory.mappings);
    for mapping in mappings {
        if let Backing::AioRing(ring) = &mut mapping.backing {
            ring.id = 0;
        }
    }
}

/// The remaining time of a timer decreases. One that is due before a rehearsal ends may have fired, once or
/// repeatedly.
fn time_goes_on(snapshot: &mut Snapshot, known: &Known) {
    let armed = |remaining: i64, repeats: bool| i64::from(timers::goes_on(remaining, repeats));
    for process in &mut snapshot.processes {
        for timer in &mut process.interval_timers.0 {
            let [interval, interval_us, value, _] = *timer;
            let repeats = (interval, interval_us) != (0, 0);
            *timer = [interval, interval_us, armed(value, repeats), 0];
        }
        for timer in &mut process.posix_timers {
            timer.remaining = (armed(timer.remaining.0, timer.interval != (0, 0)), 0);
            timer.overrun = 0;
        }
        if known.timers.contains(&process.pid) {
            process.pending.retain(|pending| !pending.is_from_a_timer());
            for thread in &mut process.threads {
                thread.pending.retain(|pending| !pending.is_from_a_timer());
            }
        }
    }
}

/// A restored task has no restart block: a call that used one is restarted with its whole time, except a sleep
/// (docs/architecture.md).
fn calls_are_made_again(snapshot: &mut Snapshot) {
    const ERESTARTNOHAND: u64 = -514i64 as u64;
    const ERESTART_RESTARTBLOCK: u64 = -516i64 as u64;
    let threads = snapshot.processes.iter_mut().flat_map(|p| &mut p.threads);
    for thread in threads.filter(|t| t.regs.rax == ERESTART_RESTARTBLOCK) {
        thread.regs.rax = ERESTARTNOHAND;
    }
}

/// Which process of a tree stores a shared page, and which adjacent mappings the kernel merges: programs see neither.
fn memory(snapshot: &mut Snapshot) {
    for process in &mut snapshot.processes {
        process.memory.inherited.clear();
        let mut joined: Vec<Mapping> = Vec::new();
        for mapping in std::mem::take(&mut process.memory.mappings) {
            match joined.last_mut() {
                Some(last) if continues(last, &mapping) => {
                    last.end = mapping.end;
                    last.guards.extend(mapping.guards);
                }
                _ => joined.push(mapping),
            }
        }
        process.memory.mappings = joined;
    }
}

/// Whether the next mapping continues the last one with equal attributes.
fn continues(last: &Mapping, next: &Mapping) -> bool {
    let alike = Mapping {
        start: last.start,
        end: last.end,
        guards: last.guards.clone(),
        ..next.clone()
    };
    last.end == next.start && last.backing == Backing::Anonymous && *last == alike
}
