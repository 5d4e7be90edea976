//! Executes the plans in the new processes, then sets the state of their threads and releases them.

use std::collections::VecDeque;
use std::rc::Rc;

use ckpt_image::Reader;
use ckpt_tracer::fault::{self, Step};
use ckpt_tracer::mem::ProcessMemory;
use ckpt_tracer::proc::maps::read_maps;
use ckpt_tracer::task::{Resume, Running, Stop, Stopped, Waited};
use ckpt_tracer::{Pid, Tid};

use super::executor::{Disturbed, Worker, failed_operation, place, unexpected, warnings_of};
use super::fill::Pages;
use super::handover::{self, Complete, TAKEN_OVER, adjust_from_outside};
use super::spawn::{self, NewProcesses};
use crate::error::{Error, Result};
use crate::objects::cgroup;
use crate::objects::core_scheduling;
use crate::objects::memory::SharedAt;
use crate::objects::plan::PidMethod;
use crate::objects::plan::{Part, Stage};
use crate::objects::process_tree::Origin;
use crate::restore::plan::{Job, Planned};

/// A new process.
struct Live {
    index: usize,
    worker: Worker,
}

/// Drives the new processes.
struct Driver<'a> {
    job: &'a Job<'a>,
    pages: Pages<'a>,
    created: &'a mut NewProcesses,
    live: Vec<Live>,
    /// Created and not yet begun: index in the snapshot, and the parent's shared memory.
    waiting: VecDeque<(usize, Stopped, Option<SharedAt>)>,
    /// Phantoms, in the order of their creation.
    phantoms: Vec<Worker>,
}

/// Rebuilds the job, whose root is at its exec stop: all processes pass one stage after the other, and are complete.
/// Also returns differences, one sentence each.
pub(in crate::restore) fn build(
    job: &Job<'_>,
    image: &Reader,
    created: &mut NewProcesses,
    root: Stopped,
) -> Result<(Vec<Complete>, Vec<String>)> {
    fault::hit(Step::RestoreSpawned)?;
    let progress = job.request.progress;
    progress.begin(image.pages() * u64::from(image.header().page_size));
    let mut driver = Driver {
        job,
        // A thread of ours would take an id for which the job is waiting.
        pages: Pages::of(image, progress).alone(job.host.pid_method == PidMethod::UseUp),
        created,
        live: Vec::with_capacity(job.snapshot.processes.len()),
        waiting: VecDeque::from([(0, root, None)]),
        phantoms: Vec::new(),
    };
    while let Some((index, leader, shared_at)) = driver.waiting.pop_front() {
        let worker = driver.begin(index, leader, shared_at)?;
        driver.live.push(Live { index, worker });
    }
    progress.end();
    fault::hit(Step::RestoreFilled)?;
    driver.join_groups()?;
    let mut lives = std::mem::take(&mut driver.live);
    // Children before their parents: what a process shares with its parent is completed in the parent, which may also
    // have to wait for the child's stop.
    lives.sort_by_key(|live| std::cmp::Reverse(live.index));
    for live in &mut lives {
        live.worker.run_to_threads()?;
        fault::hit(Step::RestoreThreads)?;
    }
    for live in &mut lives {
        live.worker.run_to_done()?;
    }
    let mut warnings = Vec::new();
    let mut complete = Vec::with_capacity(lives.len());
    for Live { index, worker } in lives {
        let process = &job.snapshot.processes[index];
        if !process.shares.memory {
            warnings.extend(warnings_of(&worker.planned.plan, &worker.mem)?);
        }
        warnings.extend(adjust_from_outside(process, Pid(process.pid)));
        warnings.extend(cgroup::enter(process, job.snapshot, &job.request.cgroups));
        let done = handover::complete(worker, process, job)?;
        warnings.extend(done.warnings.iter().cloned());
        complete.push(done);
    }
    warnings.extend(core_scheduling::rebuild(job.snapshot));
    warnings.sort();
    warnings.dedup();
    Ok((complete, warnings))
}

impl Driver<'_> {
    /// Places the restorer and runs it until the process is filled and its children exist.
    fn begin(
        &mut self,
        index: usize,
        mut leader: Stopped,
        shared_at: Option<SharedAt>,
    ) -> Result<Worker> {
        let pid = Pid(self.job.snapshot.processes[index].pid);
        let present = read_maps(pid)?;
        let planned = self.job.plan(index, &present, shared_at.as_ref());
        let planned = Rc::new(planned.map_err(Error::Refused)?);
        let mem = ProcessMemory::open(pid)?;
        leader.note_only(true);
        place(&mut leader, &mem, &present, &planned.plan)?;
        let mut worker = Worker {
            task: leader,
            mem,
            part: planned.plan.main,
            planned,
            threads: Vec::new(),
            disturbed: Disturbed::default(),
        };
        worker.run_to(Stage::Fill, &mut unexpected)?;
        fault::hit(Step::RestoreMapped)?;
        let shared = &worker.planned.shared_at;
        self.pages
            .fill(self.job.snapshot, index, shared_at.is_some(), shared)?;
        let process = &self.job.snapshot.processes[index];
        self.job.vdso.fill(index, process, &worker.mem)?;
        let sharers = self.job.snapshot.processes.iter();
        for sharer in sharers.filter(|p| p.memory.space == process.memory.space) {
            self.job.refit.check_frames(sharer, pid)?;
        }
        self.run_to_born(&mut worker)?;
        Ok(worker)
    }

    /// Runs a process until its children exist.
    fn run_to_born(&mut self, worker: &mut Worker) -> Result<()> {
        let (planned, creator) = (worker.planned.clone(), worker.mem.pid());
        worker.run_to(Stage::Born, &mut |tid| self.adopt(tid, creator, &planned))
    }

    /// Takes over the process that `creator` has just created, which is traced from its beginning.
    fn adopt(&mut self, tid: Tid, creator: Pid, planned: &Rc<Planned>) -> Result<()> {
        self.created.add(tid.raw());
        let mut task = Running::auto_attached(tid).wait_stopped()?;
        let processes = &self.job.snapshot.processes;
        let Some(part) = planned.plan.part_of(tid.raw()) else {
            return match planned.plan.pid_method {
                PidMethod::SetTid => unexpected(tid),
                // Instead of one of the job's.
                _ => Err(Error::PidMissed { pid: tid.raw() }),
            };
        };
        let Some(index) = processes.iter().position(|p| p.pid == tid.raw()) else {
            let mut phantom = worker(task, creator, part, planned)?;
            phantom.run_to_trap(&mut |tid| self.adopt(tid, creator, planned))?;
            self.phantoms.push(phantom);
            return Ok(());
        };
        match self.job.creations[index].origin {
            Origin::Sharing => {
                let mut worker = worker(task, Pid(tid.raw()), part, planned)?;
                self.run_to_born(&mut worker)?;
                self.live.push(Live { index, worker });
            }
            Origin::Forked => {
                let places = Some(planned.shared_at.clone());
                self.waiting.push_back((index, task, places));
            }
            Origin::Executed => {
                while task.stop() != Stop::Exec {
                    task = task.resume(Resume::Cont, 0)?.wait_stopped()?;
                    if matches!(task.stop(), Stop::Signal(libc::SIGTRAP)) {
                        let mem = ProcessMemory::open(creator)?;
                        return Err(failed_operation(&planned.plan, part, &mem));
                    }
                }
                spawn::leave_exec(&mut task)?;
                self.waiting.push_back((index, task, None));
            }
        }
        Ok(())
    }

    /// Every process joins its group; then phantoms end.
    fn join_groups(&mut self) -> Result<()> {
        let mut phantoms = std::mem::take(&mut self.phantoms);
        for Live { index, worker } in &mut self.live {
            worker.run_to(Stage::Joined, &mut unexpected)?;
            match self.job.process(*index).is_under_seccomp() {
                true => handover::suspend_from_the_beginning(&worker.task)?,
                false => worker.task.set_options(TAKEN_OVER)?,
            }
        }
        for phantom in &mut phantoms {
            phantom.run_to_trap(&mut unexpected)?;
        }
        for phantom in phantoms {
            end(phantom.task)?;
        }
        Ok(())
    }
}

/// A process that executes its part of its creator's plan, in its creator's memory.
fn worker(task: Stopped, pid: Pid, part: Part, planned: &Rc<Planned>) -> Result<Worker> {
    Ok(Worker {
        task,
        mem: ProcessMemory::open(pid)?,
        planned: planned.clone(),
        part,
        threads: Vec::new(),
        disturbed: Disturbed::default(),
    })
}

/// Lets a phantom end as required.
fn end(task: Stopped) -> Result<()> {
    let mut task = task.resume(Resume::Cont, 0)?;
    loop {
        match task.wait()? {
            Waited::Gone(_) => return Ok(()),
            Waited::Stopped(stopped) => {
                let signal = match stopped.stop() {
                    Stop::Signal(signal) => signal,
                    _ => 0,
                };
                task = stopped.resume(Resume::Cont, signal)?;
            }
        }
    }
}
