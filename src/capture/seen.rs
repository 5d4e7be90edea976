//! The snapshot of a running job, as far as it is visible from outside: planning its restore finds obstacles before
//! the checkpoint.

use std::fs::File;
use std::path::Path;

use ckpt_image::{Header, Writer, WriterOptions};
use ckpt_tracer::Pid;
use ckpt_tracer::proc::status::read_task;
use ckpt_tracer::proc::tasks;

use super::prove::Prove;
use crate::error::{Error, Obstacle, Result};
use crate::host;
use crate::objects::cgroup::settings;
use crate::objects::findings::Findings;
use crate::objects::landlock::{self, Bystanders};
use crate::objects::namespaces::Namespaces;
use crate::objects::process::{self, FromOutside, InJob, Process, Shares, Statuses};
use crate::objects::processor::Processor;
use crate::objects::source::{Collector, Source};
use crate::objects::zombie::{self, Zombie};
use crate::objects::{Host, Snapshot, SpaceId, memory_policy};
use crate::snapshot;

/// Context of the plan: parts of the job's state that are visible only outside its namespaces.
pub struct Planned<'a> {
    /// Checks the snapshot.
    pub prover: &'a dyn Prove,
    /// The job's own namespaces.
    pub namespaces: &'a Namespaces,
    /// Its supplementary groups as seen from outside.
    pub groups: &'a [u32],
}

impl Planned<'_> {
    /// Plans the restore of a job in its present state; `ended` are its zombies.
    ///
    /// # Errors
    /// When it changed meanwhile.
    pub fn look(
        &self,
        sources: &[&Source],
        outside: Vec<FromOutside>,
        ended: &[Pid],
        collector: &mut Collector,
    ) -> Result<Findings> {
        let (mut snapshot, statuses) = of_running(sources, outside, ended, collector)?;
        snapshot.namespaces = self.namespaces.clone();
        snapshot.show_groups(self.groups);
        let header = host::image_header(sources[0])?;
        let image = without_pages(&snapshot, &header)?;
        let found = self.prover.obstacles(&image, Path::new("(the job)"));
        let found = found.map_err(|error| match error {
            Error::Reported(_) | Error::Killed(_) | Error::Bug(_) => {
                Error::object("its restore", "planned", error)
            }
            other => other,
        })?;
        let (told, obstacles): (Vec<_>, Vec<_>) = found.into_iter().partition(|o| o.by_option);
        let mut notes: Vec<String> = told.iter().map(note).collect();
        notes.extend(landlock::hints(&snapshot.processes, &statuses));
        Ok(Findings { obstacles, notes })
    }
}

/// The note on an obstacle that an option of `restore` resolves.
pub(super) fn note(obstacle: &Obstacle) -> String {
    format!("at the restore: {obstacle}")
}

fn of_running(
    sources: &[&Source],
    outside: Vec<FromOutside>,
    ended: &[Pid],
    collector: &mut Collector,
) -> Result<(Snapshot, Statuses)> {
    let mut statuses = Statuses::new();
    let bystanders = Bystanders::default();
    let mut processes: Vec<Process> = Vec::with_capacity(sources.len());
    for (source, outside) in sources.iter().zip(outside) {
        let tids = tasks::list_tasks(source.pid)?;
        for tid in &tids {
            if let Ok(status) = read_task(source.pid, *tid) {
                statuses.insert(*tid, status);
            }
        }
        let (parent, shares, space) = from_parent(source, &processes, collector);
        let in_job = InJob {
            space,
            parent,
            shares,
            stopped_children: &[],
            running_children: &[],
            ipc: &collector.ipc,
            statuses: &statuses,
            bystanders: &bystanders,
        };
        let (process, ..) = process::seen(source, outside, &in_job, &tids)?;
        if process.threads.is_empty() {
            let tid = source.pid.leader();
            return Err(ckpt_tracer::Error::Died { tid }.into());
        }
        processes.push(process);
    }
    let zombies = ended.iter().filter_map(|pid| zombie::capture(*pid).ok());
    let zombies = zombies.collect();
    let mut host = host::describe(&processes[0], sources)?;
    // Without a thread's extended state it is not known otherwise.
    host.xcr0 = Processor::enabled_here();
    Ok((assemble(host, processes, zombies, collector), statuses))
}

/// For each process its parent, if that is in the job, what the two share, and the space of its memory. Parents come
/// first.
pub(super) fn from_parent<'p>(
    source: &Source,
    processes: &'p [Process],
    collector: &mut Collector,
) -> (Option<&'p Process>, Shares, SpaceId) {
    let shares = collector.shares(source.pid);
    let parent = processes.iter().find(|p| p.pid == source.status.ppid.raw());
    let space = match parent.filter(|_| shares.memory) {
        Some(parent) => parent.memory.space,
        None => collector.new_space(),
    };
    (parent, shares, space)
}

/// The snapshot of all collected state.
pub(super) fn assemble(
    host: Host,
    processes: Vec<Process>,
    zombies: Vec<Zombie>,
    collector: &mut Collector,
) -> Snapshot {
    let cgroups = settings::hierarchies(&processes);
    let mut snapshot = Snapshot {
        host,
        cgroups,
        processes,
        zombies,
        descriptions: std::mem::take(&mut collector.descriptions),
        terminals: std::mem::take(&mut collector.terminals),
        mapped_files: std::mem::take(&mut collector.mapped_files),
        removed: std::mem::take(&mut collector.removed),
        shared_memory: std::mem::take(&mut collector.shared_memory),
        ipc: std::mem::take(&mut collector.ipc),
        namespaces: Namespaces::default(),
        bundle: Vec::new(),
    };
    memory_policy::attribute(&mut snapshot);
    snapshot
}

/// An image of a snapshot without pages, which planning does not read.
pub(super) fn without_pages(snapshot: &Snapshot, header: &Header) -> Result<File> {
    let failed = Error::file("write", "the image in memory");
    let file = ckpt_sys::files::memfd(c"ckpt-check", 0);
    let file = File::from(file.map_err(std::io::Error::from).map_err(&failed)?);
    let mut writer = Writer::new(file, header, WriterOptions::default())?;
    snapshot::write(&mut writer, snapshot)?;
    Ok(writer.finish()?.0)
}
