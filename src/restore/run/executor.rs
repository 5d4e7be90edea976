//! Runs the restorer in a new process, from its start to a trap.

use std::rc::Rc;

use ckpt_tracer::blob::Blob;
use ckpt_tracer::mem::ProcessMemory;
use ckpt_tracer::proc::maps::Vma;
use ckpt_tracer::remote::{Cave, RemoteCalls, Scratch};
use ckpt_tracer::task::{Regs, Resume, Running, Stop, Stopped};
use ckpt_tracer::{RemoteAddr, Tid};
use nix::errno::Errno;

use super::next_pid;
use super::stop;
use crate::error::{Error, Result};
use crate::objects::plan::{Part, Plan, Stage};
use crate::restore::plan::Planned;

/// Writes restorer and plan into a hole of the process and sets the registers of its first thread.
pub(super) fn place(
    leader: &mut Stopped,
    mem: &ProcessMemory,
    present: &[Vma],
    plan: &Plan,
) -> Result<()> {
    let cave = Cave::dig(mem, present, [])?;
    let scratch = Scratch::in_hole(RemoteAddr(plan.base), plan.len);
    let mut calls = RemoteCalls::begin(leader, &cave, scratch)?;
    mem.write(RemoteAddr(plan.base), &plan.image)?;
    let code = Blob::load().image.len() as u64;
    let prot = (libc::PROT_READ | libc::PROT_EXEC) as u64;
    calls.call(
        "mprotect",
        libc::SYS_mprotect,
        [plan.base, code, prot, 0, 0, 0],
    )?;
    let mut regs: Regs = *calls.original_regs();
    regs.rip = plan.entry;
    regs.rsp = plan.stack;
    regs.rdi = plan.main.header;
    regs.orig_rax = u64::MAX;
    calls.leave_at(&regs, restorer_mask())?;
    cave.fill_in()?;
    Ok(())
}

/// Everything but SIGTRAP: a breakpoint that finds SIGTRAP blocked resets its action (`force_sig_info_to_task`,
/// kernel/signal.c).
fn restorer_mask() -> u64 {
    !(1 << (libc::SIGTRAP - 1))
}

/// A stopped process with the restorer in it.
pub(super) struct Worker {
    /// Its first thread.
    pub(super) task: Stopped,
    pub(super) mem: ProcessMemory,
    /// The plan in its memory.
    pub(super) planned: Rc<Planned>,
    /// The part of the plan that it executes.
    pub(super) part: Part,
    /// Threads that it has created and that are traced.
    pub(super) threads: Vec<Running>,
    /// Signals from outside meanwhile.
    pub(super) disturbed: Disturbed,
}

/// Stop signals from outside, which are deferred: the process stops when it is released.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Disturbed {
    /// It has to stop.
    pub(super) stop: bool,
    /// A thread took the signal before we saw it, so SIGCONT was sent.
    pub(super) continued: bool,
}

/// Takes over a process that a worker has just created.
pub(super) type Born<'a> = &'a mut dyn FnMut(Tid) -> Result<()>;

/// No process may be created any more.
pub(super) fn unexpected(tid: Tid) -> Result<()> {
    Err(Error::Bug(format!(
        "process {tid} was created at a time that was not planned"
    )))
}

impl Worker {
    /// Runs the restorer to a stage. Processes that it creates meanwhile are passed to `born`.
    pub(super) fn run_to(&mut self, stage: Stage, born: Born<'_>) -> Result<()> {
        let word = self.run_to_trap(born)?;
        match self.planned.plan.stage_at(self.part, word) {
            Some(at) if at == stage => Ok(()),
            _ => Err(Error::Bug(format!(
                "the restorer stopped at operation {word}, which is not {stage:?}"
            ))),
        }
    }

    /// Runs the restorer until its threads are parked. Those traced from their beginning continue at once.
    pub(super) fn run_to_threads(&mut self) -> Result<()> {
        let mut threads = Vec::new();
        let reached = self.run_to(Stage::Threads, &mut |tid| {
            let task = Running::auto_attached(tid).wait_stopped()?;
            threads.push(task.resume(Resume::Cont, 0)?);
            Ok(())
        });
        self.threads = threads;
        reached
    }

    /// Runs the restorer to the end of its list.
    pub(super) fn run_to_done(&mut self) -> Result<()> {
        match self.run_to_trap(&mut unexpected)? {
            ckpt_restorer::DONE => Ok(()),
            word => Err(Error::Bug(format!(
                "the restorer stopped at operation {word}, which is not its end"
            ))),
        }
    }

    /// Runs the restorer to its next trap; returns the word in `rax`.
    pub(super) fn run_to_trap(&mut self, born: Born<'_>) -> Result<u64> {
        loop {
            self.task.advance_among_others(Resume::Cont, 0)?;
            match self.task.stop() {
                Stop::Signal(libc::SIGTRAP) => {}
                Stop::Signal(libc::SIGSTOP) => {
                    self.disturbed.stop = true;
                    continue;
                }
                Stop::Event(signal) if signal != libc::SIGTRAP => {
                    self.disturbed.stop = true;
                    self.disturbed.continued = true;
                    stop::send(self.mem.pid(), libc::SIGCONT)?;
                    continue;
                }
                Stop::Signal(signal) => {
                    let regs = self.task.regs()?;
                    return Err(Error::Signalled {
                        signal,
                        at: regs.rip,
                    });
                }
                Stop::Clone => {
                    born(Tid(self.task.event_message()? as i32))?;
                    continue;
                }
                // A SIGCONT from outside.
                _ => continue,
            }
            match self.task.regs()?.rax {
                ckpt_restorer::FAILED => return Err(self.failed_operation()),
                word => match self.planned.plan.aim_at(self.part, word) {
                    Some(id) => next_pid::aim(self.planned.plan.pid_method, id)?,
                    None => return Ok(word),
                },
            }
        }
    }

    fn failed_operation(&self) -> Error {
        failed_operation(&self.planned.plan, self.part, &self.mem)
    }
}

/// The failure of a part of a plan, according to its header.
pub(super) fn failed_operation(plan: &Plan, part: Part, mem: &ProcessMemory) -> Error {
    let unknown = || Error::Bug("the restorer failed without reporting where".into());
    let failed_at = std::mem::offset_of!(ckpt_restorer::Plan, failed) as u64;
    let Ok(at) = mem.read_u64(RemoteAddr(part.header) + failed_at) else {
        return unknown();
    };
    let result_at = std::mem::offset_of!(ckpt_restorer::Op, result) as u64;
    let Ok(result) = mem.read_u64(RemoteAddr(at) + result_at) else {
        return unknown();
    };
    let Some((op, object)) = plan.operation_at(at) else {
        return unknown();
    };
    let result = result as i64;
    if let Some(pid) = plan.missed_at(at, result) {
        return Error::PidMissed { pid };
    }
    let reason = if (-4095..0).contains(&result) {
        Errno::from_raw(-result as i32).desc().to_owned()
    } else {
        format!("the kernel answered {result:#x}, which is not what the job had")
    };
    Error::Operation {
        object: object.to_owned(),
        op,
        reason,
    }
}

/// Differences: known while planning, or from an operation that was allowed to fail.
pub(super) fn warnings_of(plan: &Plan, mem: &ProcessMemory) -> Result<Vec<String>> {
    let mut all = plan.warnings.clone();
    for (at, text) in &plan.conditional {
        let result = mem.read_u64(RemoteAddr(*at))? as i64;
        match Errno::from_raw(result.min(0).unsigned_abs() as i32) {
            Errno::UnknownErrno => {}
            // An envoy's; the text contains the reason.
            Errno::ECANCELED => all.push(text.clone()),
            error => all.push(format!("{text}: {}", error.desc())),
        }
    }
    all.sort();
    all.dedup();
    Ok(all)
}
