//! Executes the plans in the new processes, then makes their threads what they were and lets go.

use std::collections::VecDeque;

use ckpt_image::Reader;
use ckpt_tracer::fault::{self, Step};
use ckpt_tracer::mem::ProcessMemory;
use ckpt_tracer::proc::maps::read_maps;
use ckpt_tracer::task::{Resume, Running, Stop, Stopped, Waited};
use ckpt_tracer::{Pid, Tid};

use super::executor::{failed_operation, place, run_to, run_to_done, run_to_trap, warnings_of};
use super::fill::Pages;
use super::handover::{self, TAKEN_OVER, adjust_from_outside, release};
use super::plan::Stage;
use super::planner::{Job, Planned};
use super::spawn::{self, Brood};
use crate::error::{Error, Result};
use crate::objects::files::changed::Cut;
use crate::objects::memory::SharedAt;

/// A new process on its way.
struct Live {
    index: usize,
    leader: Stopped,
    mem: ProcessMemory,
    planned: Planned,
}

/// Those on their way.
struct Driver<'a> {
    job: &'a Job<'a>,
    pages: Pages<'a>,
    brood: &'a mut Brood,
    live: Vec<Live>,
    /// Created and not yet begun: index in the snapshot, and what shared memory its parent has.
    waiting: VecDeque<(usize, Stopped, Option<SharedAt>)>,
    /// Phantoms, in the order of their creation.
    phantoms: Vec<(Stopped, ProcessMemory)>,
}

/// Rebuilds the job, whose root stands at its exec stop: all processes are brought to one line
/// after the other, and let go together, after `before_release`.
pub fn rebuild(
    job: &Job<'_>,
    image: &Reader,
    cuts: &[Cut],
    brood: &mut Brood,
    root: Stopped,
    before_release: &mut dyn FnMut() -> Result<()>,
) -> Result<Vec<String>> {
    fault::hit(Step::RestoreSpawned)?;
    let progress = job.request.progress;
    progress.begin(image.pages() * u64::from(image.header().page_size));
    let mut driver = Driver {
        job,
        pages: Pages::of(image, progress),
        brood,
        live: Vec::with_capacity(job.snapshot.processes.len()),
        waiting: VecDeque::from([(0, root, None)]),
        phantoms: Vec::new(),
    };
    while let Some((index, leader, shared_at)) = driver.waiting.pop_front() {
        let live = driver.begin(index, leader, shared_at)?;
        driver.live.push(live);
    }
    progress.end();
    fault::hit(Step::RestoreFilled)?;
    driver.join_groups()?;
    let mut lives = std::mem::take(&mut driver.live);
    for live in &mut lives {
        live.run_to_its_end()?;
    }
    let mut warnings = Vec::new();
    let mut complete = Vec::with_capacity(lives.len());
    // Children before their parents, who may have to take note of their stops.
    for live in lives.into_iter().rev() {
        warnings.extend(warnings_of(&live.planned.plan, &live.mem)?);
        let process = &job.snapshot.processes[live.index];
        warnings.extend(adjust_from_outside(process, Pid(process.pid)));
        let Live {
            leader,
            mem,
            planned,
            ..
        } = live;
        complete.push(handover::complete(
            leader,
            &mem,
            &planned.plan,
            process,
            job,
        )?);
    }
    warnings.sort();
    warnings.dedup();
    before_release()?;
    release(complete, cuts)?;
    Ok(warnings)
}

impl Driver<'_> {
    /// Places the restorer and runs it until the process is filled and its children exist.
    fn begin(
        &mut self,
        index: usize,
        mut leader: Stopped,
        shared_at: Option<SharedAt>,
    ) -> Result<Live> {
        let pid = Pid(self.job.snapshot.processes[index].pid);
        let present = read_maps(pid)?;
        let planned = self.job.plan(index, &present, shared_at.as_ref());
        let planned = planned.map_err(Error::Refused)?;
        let mem = ProcessMemory::open(pid)?;
        leader.note_only(true);
        place(&mut leader, &mem, &present, &planned.plan)?;
        let forked = shared_at.is_some();
        run_to(&mut leader, &mem, &planned.plan, Stage::Fill, &mut |_| {
            Ok(())
        })?;
        fault::hit(Step::RestoreMapped)?;
        let snapshot = self.job.snapshot;
        self.pages
            .fill(snapshot, index, forked, &planned.shared_at)?;
        let process = &snapshot.processes[index];
        self.job.vdso.fill(index, process, &mem)?;
        run_to(&mut leader, &mem, &planned.plan, Stage::Born, &mut |tid| {
            self.adopt(tid, &mem, &planned)
        })?;
        Ok(Live {
            index,
            leader,
            mem,
            planned,
        })
    }

    /// Takes over what `creator` has just created, a process that is traced from its beginning.
    fn adopt(&mut self, tid: Tid, mem: &ProcessMemory, planned: &Planned) -> Result<()> {
        self.brood.add(tid.raw());
        let mut task = Running::auto_attached(tid).wait_stopped()?;
        let snapshot = self.job.snapshot;
        let index = snapshot.processes.iter().position(|p| p.pid == tid.raw());
        match index {
            Some(index) if self.job.births[index].forked => {
                let places = Some(planned.shared_at.clone());
                self.waiting.push_back((index, task, places));
            }
            Some(index) => {
                while task.stop() != Stop::Exec {
                    task = task.resume(Resume::Cont, 0)?.wait_stopped()?;
                    if matches!(task.stop(), Stop::Signal(libc::SIGTRAP)) {
                        return Err(failed_operation(&planned.plan, mem));
                    }
                }
                spawn::leave_exec(&mut task)?;
                self.waiting.push_back((index, task, None));
            }
            None => {
                run_to_trap(&mut task, &planned.plan, mem, &mut |tid| {
                    self.adopt(tid, mem, planned)
                })?;
                let mem = ProcessMemory::open(mem.pid())?;
                self.phantoms.push((task, mem));
            }
        }
        Ok(())
    }

    /// Every process joins its group; then phantoms have done their part, and end.
    fn join_groups(&mut self) -> Result<()> {
        let mut phantoms = std::mem::take(&mut self.phantoms);
        let unexpected = &mut |tid| {
            Err(Error::Restore(format!(
                "process {tid} was created at a time that was not planned; this is a bug of ckpt"
            )))
        };
        for live in &mut self.live {
            run_to(
                &mut live.leader,
                &live.mem,
                &live.planned.plan,
                Stage::Joined,
                unexpected,
            )?;
            live.leader.set_options(TAKEN_OVER)?;
        }
        // Their plans are those of their creators, all of which are the same to an error's text.
        let plan = &self.live[0].planned.plan;
        for (task, mem) in &mut phantoms {
            run_to_trap(task, plan, mem, unexpected)?;
        }
        for (task, _) in phantoms {
            end(task)?;
        }
        Ok(())
    }
}

/// Lets a phantom end as it is to end.
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

impl Live {
    fn run_to_its_end(&mut self) -> Result<()> {
        let unexpected = &mut |tid| {
            Err(Error::Restore(format!(
                "process {tid} was created at a time that was not planned; this is a bug of ckpt"
            )))
        };
        let plan = &self.planned.plan;
        run_to(
            &mut self.leader,
            &self.mem,
            plan,
            Stage::Threads,
            unexpected,
        )?;
        fault::hit(Step::RestoreThreads)?;
        run_to_done(&mut self.leader, &self.mem, plan)
    }
}
