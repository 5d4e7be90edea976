//! The record of a process that runs.

use std::path::PathBuf;

use ckpt_tracer::Tid;
use ckpt_tracer::proc::maps::Vma;
use ckpt_tracer::proc::pagemap::PagemapScanner;
use ckpt_tracer::proc::stat::read_stat;
use ckpt_tracer::proc::status::read_status;
use ckpt_tracer::proc::tasks;
use ckpt_tracer::proc::timers::read_timers;

use super::kin;
use super::{FromOutside, InJob, Process, without_deleted};
use crate::address_space::{self, AddressSpace};
use crate::dynamic_state::DynamicState;
use crate::error::Result;
use crate::source::Source;
use crate::timers::{self, IntervalTimers};
use crate::{cgroup, limits, session, thread};

/// The record of a process with these threads, as far as it is visible without executing anything in it; the rest has
/// common values. Threads that have ended are left out.
pub fn seen(
    source: &Source,
    outside: FromOutside,
    job: &InJob<'_>,
    tids: &[Tid],
) -> Result<(Process, Vec<Vma>, PagemapScanner)> {
    let FromOutside {
        vmas,
        memory,
        fds,
        removed,
        terminal,
        record_locks,
        notices,
        scanner,
    } = outside;
    let dir = source.dir.clone();
    let pid = source.pid;
    let parent = |shared: bool| job.parent.filter(|_| shared);
    let memory = match parent(job.shares.memory) {
        Some(parent) => parent.memory.clone(),
        None => {
            let stat = read_stat(dir.clone())?;
            AddressSpace {
                space: job.space,
                layout: address_space::layout(&stat, stat.start_brk),
                auxv: tasks::auxv(dir.clone())?,
                executable: memory.executable,
                mappings: memory.mappings,
                inherited: Vec::new(),
                lock_future: 0,
                thp_disabled: false,
                switches: Vec::new(),
                segments: Vec::new(),
                dumpable: 1,
                membarrier: 0,
            }
        }
    };
    let threads = tids
        .iter()
        .filter_map(|tid| Some(thread::seen(pid, *tid, job.statuses.get(tid)?)));
    let link = |name: &str| -> Result<PathBuf> {
        let link = std::fs::read_link(dir.join(name))
            .map_err(crate::Error::file("look at", dir.join(name)))?;
        let is_removed = match name {
            "cwd" => removed.cwd.is_some(),
            _ => removed.root.is_some(),
        };
        let named = is_removed.then(|| without_deleted(&link)).flatten();
        Ok(named.unwrap_or(link))
    };
    let status = read_status(dir.clone())?;
    let mut process = Process {
        pid: pid.raw(),
        parent: status.ppid.raw(),
        forked: false,
        shares: job.shares,
        exit_signal: source.stat.exit_signal,
        group: source.stat.pgrp,
        session: source.stat.session,
        terminal,
        stopped: None,
        untold_stops: Vec::new(),
        untold_continues: Vec::new(),
        command_line: dir.read("cmdline")?,
        memory,
        threads: threads.collect(),
        actions: parent(job.shares.actions).map_or_else(Vec::new, |p| p.actions.clone()),
        pending: Vec::new(),
        interval_timers: IntervalTimers::default(),
        posix_timers: timers::seen(&read_timers(dir.clone())?),
        fds,
        record_locks,
        notices,
        removed,
        cwd: link("cwd")?,
        root: link("root")?,
        umask: status.umask.unwrap_or(0o022),
        limits: limits::capture(pid)?,
        personality: tasks::personality(dir.clone())?,
        child_subreaper: false,
        cgroups: cgroup::capture(dir.clone())?,
        dynamic_state: DynamicState::default(),
        oom_score_adj: tasks::oom_score_adj(dir.clone())?,
        autogroup_nice: session::autogroup_nice(&dir),
        login_uid: session::login_uid(&dir),
        coredump_filter: tasks::coredump_filter(dir)?,
        semaphore_adjustments: Vec::new(),
    };
    process.forked = job
        .parent
        .is_some_and(|parent| kin::is_fork_of(&process, parent));
    Ok((process, vmas, scanner))
}
