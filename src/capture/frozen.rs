//! The freeze, and the capture of a frozen job.

use ckpt_tracer::kcmp;
use ckpt_tracer::proc::status::{read_status, read_task};
use ckpt_tracer::proc::{ProcRoot, tasks};
use ckpt_tracer::remote::withdraw_dispatch;
use ckpt_tracer::{Pid, Tid};

use super::captured::{Pages, State};
use super::seen::{assemble, from_parent};
use super::{Request, borrow, check};
use crate::error::{Error, Obstacle, Result};
use crate::host;
use crate::objects::cgroup::freezer::Thawed;
use crate::objects::files::late;
use crate::objects::ipc::{self, notice};
use crate::objects::job::{FrozenJob, Member};
use crate::objects::landlock::{self, Bystanders};
use crate::objects::outsiders::process_name;
use crate::objects::process::{self, FromOutside, InJob, Process, Statuses};
use crate::objects::process_tree;
use crate::objects::seccomp::surroundings::Surroundings;
use crate::objects::source::{Collector, Patience};
use crate::objects::{aio, zombie};

/// A job whose tasks are all stopped; nothing is captured yet.
pub(super) struct Frozen<'r> {
    request: &'r Request<'r>,
    job: FrozenJob,
}

impl<'r> Frozen<'r> {
    /// Freezes the job.
    ///
    /// # Errors
    /// Those of the freeze; the job continues.
    pub(super) fn freeze(request: &'r Request<'r>) -> Result<Self> {
        let groups = request.frozen_groups.as_ref().map(Thawed::begin);
        let groups = groups.transpose()?;
        let mut job = FrozenJob::freeze(&request.roots())?;
        groups.iter().try_for_each(Thawed::complete)?;
        job.groups = groups;
        Ok(Self { request, job })
    }

    /// Captures everything but pages.
    ///
    /// # Errors
    /// [`Error::Refused`] for obstacles; the job continues.
    pub(super) fn capture(self, patience: Patience) -> Result<State> {
        let Self { request, mut job } = self;
        let mut collector = Collector::default();
        let statuses = filters_in_force(&job, &mut collector)?;
        // If the job was changing, this was not checked before.
        for Member { frozen, source } in &job.processes {
            let tids: Vec<Tid> = frozen.tasks().iter().map(|task| task.tid()).collect();
            check::lives_elsewhere(source, &tids, &mut collector)?;
        }
        if !collector.findings.is_clear() {
            return Err(Error::Refused(collector.findings.obstacles));
        }
        for Member { frozen, source } in &job.processes {
            // For all processes, before any memory is read: processes may share it.
            withdraw_dispatch(frozen.tasks(), &source.mem)?;
        }
        let (mut collector, mut outside) = look(&mut job, request, patience)?;
        // A request that was still writing may have changed files and memory already read.
        if aio::settle(&mut job, &outside, &collector)? {
            (collector, outside) = look(&mut job, request, patience)?;
        }
        notice::learn(&mut job, &mut outside, &collector)?;
        let stops = job.processes.iter().map(|process| {
            let source = &process.source;
            let stopped = process.frozen.stopped_by().is_some();
            (source.pid.raw(), source.status.ppid, stopped)
        });
        let stops: Vec<_> = stops.collect();
        let children = |parent: Pid, stopped: bool| -> Vec<i32> {
            let those = stops
                .iter()
                .filter(|(_, of, is)| (*of, *is) == (parent, stopped));
            those.map(|(pid, ..)| *pid).collect()
        };
        let bystanders = Bystanders::of(statuses.values());
        let mut processes: Vec<Process> = Vec::with_capacity(outside.len());
        let mut pages = Vec::with_capacity(outside.len());
        for (Member { frozen, source }, outside) in job.processes.iter_mut().zip(outside) {
            let (parent, shares, space) = from_parent(source, &processes, &mut collector);
            let in_job = InJob {
                space,
                parent,
                shares,
                stopped_children: &children(source.pid, true),
                running_children: &children(source.pid, false),
                ipc: &collector.ipc,
                statuses: &statuses,
                bystanders: &bystanders,
            };
            let (process, vmas, scanner) = process::capture(frozen, source, outside, &in_job)?;
            processes.push(process);
            pages.push(Pages { vmas, scanner });
        }
        let zombies = job.ended.iter().map(|pid| zombie::capture(*pid));
        let zombies = zombies.collect::<Result<_>>()?;
        let host = host::describe(&processes[0], &job.sources())?;
        let next_space = collector.new_space();
        let mut snapshot = assemble(host, processes, zombies, &mut collector);
        snapshot.namespaces = request.namespaces.clone();
        snapshot.show_groups(&request.groups);
        let Collector {
            contents,
            save_files,
            findings,
            ..
        } = collector;
        let mut warnings = findings.notes;
        warnings.extend(snapshot.processes.iter().filter_map(landlock::warning));
        warnings.extend(save_files.unmatched().iter().map(unmatched));
        if snapshot.processes[0].pid == 1 {
            let of_the_job = |pid: &Pid| {
                stops.iter().any(|(of, ..)| *of == pid.raw()) || job.ended.contains(pid)
            };
            let others = brought_in().into_iter().filter(|pid| !of_the_job(pid));
            warnings.extend(others.map(not_of_the_job));
        }
        // What could not be restored is refused now, not at the restore.
        process_tree::decide(&snapshot).map_err(Error::Refused)?;
        let out_of_reach = late::out_of_reach(&snapshot);
        if !out_of_reach.is_empty() {
            return Err(Error::Refused(out_of_reach));
        }
        Ok(State {
            job,
            snapshot,
            pages,
            contents,
            next_space,
            warnings,
        })
    }
}

/// Suspends seccomp filters if permitted. Otherwise they must be ours, in every task as it is now: it may have added
/// filters since the first check.
fn filters_in_force(job: &FrozenJob, collector: &mut Collector) -> Result<Statuses> {
    let mut statuses = Statuses::new();
    for Member { frozen, source } in &job.processes {
        for task in frozen.tasks() {
            let status = read_task(source.pid, task.tid())?;
            if status.seccomp.unwrap_or(0) != 0 {
                let surroundings = collector.surroundings();
                if surroundings == Surroundings::Master {
                    task.suspend_seccomp()?;
                } else if let Some((reason, remedy)) = surroundings.in_the_way(&status) {
                    return Err(Error::refuse(Obstacle::new(source.title(), reason, remedy)));
                }
            }
            statuses.insert(task.tid(), status);
        }
    }
    Ok(statuses)
}

/// Captures everything visible from outside of a frozen job without obstacles.
fn look(
    job: &mut FrozenJob,
    request: &Request<'_>,
    patience: Patience,
) -> Result<(Collector, Vec<FromOutside>)> {
    let mut collector = Collector::default();
    collector.patience = patience;
    collector.save_files = request.save_files.clone();
    collector.choices = request.choices.clone();
    collector.alone_in_ipc = request.namespaces.ipc;
    collector.is_copy = request.is_copy;
    collector.ended = job.ended.iter().map(|pid| pid.raw()).collect();
    match kcmp::withheld() {
        None => check::shared_by_processes(&job.sources(), &mut collector)?,
        Some(call) => collector.copies = borrow::all(job, call)?,
    }
    let sources = job.sources();
    let outside = process::capture_from_outside(&sources, process::Depth::Full, &mut collector)?;
    let spaces = process::address_spaces(&sources, &outside, &collector);
    ipc::capture(&spaces, &mut collector)?;
    if !collector.findings.is_clear() {
        return Err(Error::Refused(collector.findings.obstacles));
    }
    Ok((collector, outside))
}

/// Processes of our pid namespace whose parents are outside, other than ourselves and those that entered with us:
/// processes created inside always have a parent inside.
fn brought_in() -> Vec<Pid> {
    let me = Pid::own();
    let alive =
        |pid: &Pid| read_status(*pid).is_ok_and(|s| s.ppid.raw() == 0 && !s.state.has_ended());
    let pids = tasks::list_processes(&ProcRoot::default()).unwrap_or_default();
    let pids = pids.into_iter();
    pids.filter(|pid| *pid != me && alive(pid)).collect()
}

fn not_of_the_job(pid: Pid) -> String {
    format!(
        "{} entered the job's pid namespace from outside: it is not in the image, and ends with the job",
        process_name(pid)
    )
}

fn unmatched(pattern: &String) -> String {
    format!(
        "--save-files {pattern} matches no file that the job has open or writes through a mapping"
    )
}
