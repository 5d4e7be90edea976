//! The relations that decide which process creates which, from an image or from running processes.

use std::collections::HashMap;

use ckpt_tracer::proc::tasks;

use crate::error::Result;
use crate::index::{FileId, SharedId};
use crate::memory::{Backing, Mapping};
use crate::process::{FromOutside, Process, Shares};
use crate::source::{Collector, Source};

/// A process and its relations.
#[derive(Clone, Debug)]
pub struct Kin {
    /// Its id.
    pub pid: i32,
    /// Its parent.
    pub parent: i32,
    /// Its process group.
    pub group: i32,
    /// Its session.
    pub session: i32,
    /// The highest id of its threads.
    pub highest: i32,
    /// What it shares with its parent.
    pub shares: Shares,
    /// It was forked by its parent, and neither has executed a program since.
    pub forked: bool,
    /// Shared anonymous memory: index, and address of the mapping.
    pub memory: Vec<(SharedId, u64)>,
}

impl Kin {
    /// Of a process in an image.
    pub fn of(process: &Process) -> Self {
        let threads = process.threads.iter().map(|t| t.tid);
        Self {
            pid: process.pid,
            parent: process.parent,
            group: process.group,
            session: process.session,
            highest: threads.max().unwrap_or(process.pid),
            shares: process.shares,
            forked: process.forked,
            memory: memory(&process.memory.mappings),
        }
    }
}

fn memory(mappings: &[Mapping]) -> Vec<(SharedId, u64)> {
    let shared = mappings.iter().filter_map(|m| match m.backing {
        Backing::SharedMemory { object, .. } => Some((object, m.start)),
        _ => None,
    });
    shared.collect()
}

/// What changes at an execve(2).
#[derive(PartialEq, Eq)]
struct Program {
    executable: FileId,
    auxv: Vec<u8>,
    start_stack: u64,
    start_code: u64,
}

impl Program {
    fn of(process: &Process) -> Self {
        Self {
            executable: process.memory.executable,
            auxv: process.memory.auxv.clone(),
            start_stack: process.memory.layout.start_stack,
            start_code: process.memory.layout.start_code,
        }
    }
}

/// Whether a process was forked by that parent, and neither has executed a program since.
pub fn is_fork_of(process: &Process, parent: &Process) -> bool {
    process.parent == parent.pid
        && !process.shares.memory
        && Program::of(process) == Program::of(parent)
}

/// Of running processes, in the order of `sources`.
///
/// # Errors
/// When one of them has ended.
pub fn of_all(
    sources: &[&Source],
    outside: &[FromOutside],
    collector: &Collector,
) -> Result<Vec<Kin>> {
    let mut programs = HashMap::new();
    let mut all = Vec::with_capacity(sources.len());
    for (source, outside) in sources.iter().zip(outside) {
        let program = Program {
            executable: outside.memory.executable,
            auxv: tasks::auxv(source.dir.clone())?,
            start_stack: source.stat.start_stack,
            start_code: source.stat.start_code,
        };
        let (pid, parent) = (source.pid.raw(), source.status.ppid.raw());
        let shares = collector.shares(source.pid);
        let tids = tasks::list_tasks(source.pid)?;
        all.push(Kin {
            pid,
            parent,
            group: source.stat.pgrp,
            session: source.stat.session,
            highest: tids.iter().map(|tid| tid.raw()).max().unwrap_or(pid),
            shares,
            forked: !shares.memory && programs.get(&parent) == Some(&program),
            memory: memory(&outside.memory.mappings),
        });
        programs.insert(pid, program);
    }
    Ok(all)
}
