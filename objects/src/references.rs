//! Checks that all references in a snapshot are valid, and that all pages in the image belong to a space.
//!
//! Digests show that an image is as it was written, not that its contents are valid. A restore relies on these
//! checks, so they accept any snapshot that decodes: they index nothing unchecked, and cost no more than sorting.

mod family;
mod files;
mod ipc;
mod memory;
mod sockets;

use std::collections::HashSet;
use std::fmt;

use ckpt_image::Reader;

use crate::Snapshot;
use crate::process::Process;
use crate::thread::Thread;

/// Further faults are counted but not described.
const MAX_FAULTS: usize = 100;
/// Linux has signals 1 to 64.
const LAST_SIGNAL: u32 = 64;
/// `TASK_COMM_LEN` without the NUL.
const NAME_BYTES: usize = 15;

/// All inconsistencies, one sentence each; empty for a valid image.
pub fn check(snapshot: &Snapshot, reader: &Reader) -> Vec<String> {
    let mut faults = Faults::default();
    header(snapshot, reader, &mut faults);
    processes(snapshot, &mut faults);
    family::family(snapshot, reader.header().page_size, &mut faults);
    files::descriptions(snapshot, &mut faults);
    crate::ipc::check(snapshot, &mut faults);
    sockets::sockets(snapshot, &mut faults);
    for process in &snapshot.processes {
        files::descriptors(snapshot, process, &mut faults);
        ipc::adjustments(snapshot, process, &mut faults);
        memory::mappings(snapshot, process, reader.header().page_size, &mut faults);
    }
    memory::spaces(snapshot, reader, &mut faults);
    faults.finish()
}

/// The faults found so far.
#[derive(Debug, Default)]
pub struct Faults {
    described: Vec<String>,
    more: usize,
}

impl Faults {
    /// One more, as a sentence.
    pub(crate) fn add(&mut self, fault: fmt::Arguments<'_>) {
        if self.described.len() < MAX_FAULTS {
            self.described.push(fault.to_string());
        } else {
            self.more += 1;
        }
    }

    fn finish(mut self) -> Vec<String> {
        if self.more > 0 {
            self.described
                .push(format!("and {} more faults", self.more));
        }
        self.described
    }
}

/// Adds a fault unless a condition holds.
macro_rules! require {
    ($faults:expr, $holds:expr, $($message:tt)+) => {
        if !$holds {
            $faults.add(format_args!($($message)+));
        }
    };
}
pub(crate) use require;

fn header(snapshot: &Snapshot, reader: &Reader, faults: &mut Faults) {
    // Its numbers of processes and threads are from before the freeze.
    let header = reader.header();
    match snapshot.processes.first() {
        None => faults.add(format_args!("the snapshot has no process")),
        Some(root) => require!(
            faults,
            i64::from(root.pid) == i64::from(header.pid),
            "the header says the job is process {}, the snapshot begins with {}",
            header.pid,
            root.pid
        ),
    }
}

fn processes(snapshot: &Snapshot, faults: &mut Faults) {
    // Ids of tasks are unique over all processes.
    let mut tids = HashSet::new();
    for process in &snapshot.processes {
        let pid = process.pid;
        require!(faults, pid > 0, "process {pid} has an impossible id");
        require!(
            faults,
            process.group >= 0 && process.session >= 0 && process.parent >= 0,
            "process {pid} has an impossible parent, group or session"
        );
        require!(
            faults,
            process
                .threads
                .first()
                .is_some_and(|leader| leader.tid == pid),
            "the first thread of process {pid} is not its leader"
        );
        for thread in &process.threads {
            let tid = thread.tid;
            require!(
                faults,
                tid > 0,
                "thread {tid} of process {pid} has an impossible id"
            );
            require!(
                faults,
                tids.insert(tid),
                "thread {tid} of process {pid} exists twice"
            );
            self::thread(thread, faults);
        }
        signals(process, faults);
        timers(process, faults);
        let mut limits = HashSet::new();
        for limit in &process.limits {
            require!(
                faults,
                limit.resource < 16 && limits.insert(limit.resource),
                "process {pid} has limit {} twice, or there is no such limit",
                limit.resource
            );
        }
    }
}

fn thread(thread: &Thread, faults: &mut Faults) {
    let tid = thread.tid;
    require!(
        faults,
        thread.name.len() <= NAME_BYTES && !thread.name.contains(&0),
        "the name of thread {tid} is none that a thread can have"
    );
    require!(
        faults,
        thread.pending.iter().all(|pending| pending.0.len() == 128),
        "a pending signal of thread {tid} is not a siginfo"
    );
    require!(
        faults,
        thread
            .seccomp
            .filters
            .iter()
            .all(|filter| filter.program.len() % 8 == 0),
        "a seccomp filter of thread {tid} is truncated"
    );
}

fn signals(process: &Process, faults: &mut Faults) {
    let pid = process.pid;
    let mut actions = HashSet::new();
    for action in &process.actions {
        require!(
            faults,
            (1..=LAST_SIGNAL).contains(&action.signal) && actions.insert(action.signal),
            "process {pid} has an action for signal {} twice, or there is no such signal",
            action.signal
        );
    }
    require!(
        faults,
        process.pending.iter().all(|pending| pending.0.len() == 128),
        "a pending signal of process {pid} is not a siginfo"
    );
}

fn timers(process: &Process, faults: &mut Faults) {
    let pid = process.pid;
    let mut last = -1;
    for timer in &process.posix_timers {
        let id = timer.id;
        require!(
            faults,
            id > last,
            "POSIX timer {id} of process {pid} is out of order"
        );
        last = last.max(id);
    }
}

#[cfg(test)]
mod tests;
