//! Stops every task of a process, and releases them again.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::error::AttachError;
use crate::fault::{self, Step};
use crate::proc::status::TaskState;
use crate::proc::syscall::{InSyscall, read_syscall};
use crate::proc::{status, tasks};
use crate::refusal;
use crate::remote::{self, hide_interruption};
use crate::task::{Polled, Resume, Running, Stop, Stopped, Waited};
use crate::vdso::Vdso;
use crate::{Error, Pid, Result, Tid};

/// Most rounds of rescanning. Only a task that is not yet stopped can create others, so each round leaves fewer that
/// can; a fork bomb is the exception.
const MAX_ROUNDS: u32 = 64;

/// A process whose tasks are all stopped. Dropping it releases them.
#[derive(Debug)]
pub struct Frozen {
    pid: Pid,
    tasks: Vec<Stopped>,
}

impl Frozen {
    /// Stops every task of `pid`: seizes and interrupts all, then rescans until there is no new one. On an error all
    /// seized tasks are released.
    pub fn freeze(pid: Pid) -> Result<Self> {
        let mut frozen = Frozen {
            pid,
            tasks: Vec::new(),
        };
        let mut known: HashSet<Tid> = HashSet::new();
        for round in 0.. {
            let fresh: Vec<Tid> = tasks::list_tasks(pid)?
                .into_iter()
                .filter(|t| !known.contains(t))
                .collect();
            if fresh.is_empty() {
                let mut tasks: Vec<&mut Stopped> = frozen.tasks.iter_mut().collect();
                match leave_stale_cave(pid, &mut tasks) {
                    Ok(false) => break,
                    // They were running, and may have created others.
                    Ok(true) => {}
                    Err(Error::Died { tid }) => frozen.tasks.retain(|t| t.tid() != tid),
                    Err(e) => return Err(e),
                }
            }
            if round == MAX_ROUNDS {
                return Err(Error::ThreadsGrow {
                    pid,
                    rounds: MAX_ROUNDS,
                });
            }
            known.extend(&fresh);
            frozen.stop_tasks(&fresh)?;
        }
        if frozen.tasks.is_empty() {
            return Err(Error::Died { tid: pid.leader() });
        }
        // The leader first: remote calls for the process run in it.
        frozen
            .tasks
            .sort_by_key(|t| (t.tid() != pid.leader(), t.tid()));
        let only = frozen.tasks.len() == 1;
        frozen.tasks.iter_mut().for_each(|t| t.note_only(only));
        fault::hit(Step::Frozen)?;
        Ok(frozen)
    }

    /// Seizes and interrupts all before waiting for the first, so that they stop at nearly the same instant.
    fn stop_tasks(&mut self, tids: &[Tid]) -> Result<()> {
        let mut seized = Vec::with_capacity(tids.len());
        let mut failure = None;
        for &tid in tids {
            match Running::seize(tid) {
                Ok(task) => seized.push(task),
                // The task ended meanwhile.
                Err(Error::Died { .. }) => {}
                Err(Error::Kernel {
                    errno: Errno::EPERM,
                    ..
                }) => {
                    if is_ours(self.pid, tid) {
                        // It was seized by an earlier attempt, and only a stopped task can be detached.
                        seized.push(Running::auto_attached(tid));
                    } else if !is_dead(self.pid, tid) {
                        failure = Some(explain_refusal(self.pid, tid));
                        break;
                    }
                }
                Err(e) => {
                    failure = Some(e);
                    break;
                }
            }
        }
        if failure.is_none() {
            failure = fault::hit(Step::Seized).err();
        }
        // Also after a failure: a seized task can only be detached from a stop.
        for task in &seized {
            match task.interrupt() {
                Ok(()) | Err(Error::Died { .. }) => {}
                Err(e) => failure = failure.or(Some(e)),
            }
        }
        // The leader last, with all others in their stops: if the process is killed now, the leader can be waited for
        // only after the others.
        seized.sort_by_key(|task| task.tid() == self.pid.leader());
        // Until a second task is found, this one can be waited for alone.
        let only = seized.len() == 1 && self.tasks.is_empty();
        let vdso = Vdso::of(self.pid);
        for task in seized {
            let leader = task.tid() == self.pid.leader();
            let task = if only { task.only() } else { task };
            match wait_interrupted(task, leader, &vdso) {
                Ok(Some(stopped)) => self.tasks.push(stopped),
                Ok(None) => {}
                Err(e) => failure = failure.or(Some(e)),
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// The process.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Its tasks; the leader first, unless it has ended.
    pub fn tasks(&self) -> &[Stopped] {
        &self.tasks
    }

    /// Its tasks, for remote calls.
    pub fn tasks_mut(&mut self) -> &mut [Stopped] {
        &mut self.tasks
    }

    /// The signal of the group stop in which the process was found.
    pub fn stopped_by(&self) -> Option<i32> {
        let mut stops = self.tasks.iter().map(Stopped::stop);
        stops.find_map(|stop| match stop {
            Stop::Event(signal) if signal != libc::SIGTRAP => Some(signal),
            _ => None,
        })
    }

    /// Resumes and detaches every task. A task that has died is no error.
    pub fn thaw(mut self) -> Result<()> {
        self.release(0)
    }

    /// Detaches the process but leaves it stopped, as `kill -STOP` would. On return all tasks have stopped, ended, or
    /// been continued again.
    pub fn leave_stopped(mut self) -> Result<()> {
        self.release(libc::SIGSTOP)?;
        const LONGEST: Duration = Duration::from_secs(5);
        let begun = Instant::now();
        while begun.elapsed() < LONGEST && !has_stopped(self.pid) {
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// The first detached task gets the signal; a stop signal stops them all.
    fn release(&mut self, mut signal: i32) -> Result<()> {
        let mut failure = None;
        let half = self.tasks.len() / 2;
        for (i, task) in std::mem::take(&mut self.tasks).into_iter().enumerate() {
            if i == half
                && let Err(e) = fault::hit(Step::ReleaseHalf)
            {
                failure = Some(e);
            }
            if signal != 0 {
                // PTRACE_DETACH injects a signal only from a signal-delivery-stop; queue it instead.
                send_signal(self.pid, signal)?;
                signal = 0;
            }
            match task.detach(0) {
                Ok(()) | Err(Error::Died { .. }) => {}
                Err(e) => failure = failure.or(Some(e)),
            }
        }
        failure.map_or(Ok(()), Err)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for task in self.tasks.drain(..) {
            let _ = task.detach(0);
        }
    }
}

/// Whether all of its tasks have stopped.
fn has_stopped(pid: Pid) -> bool {
    let tasks = tasks::list_tasks(pid).unwrap_or_default();
    tasks.into_iter().all(|tid| {
        let status = status::read_task(pid, tid);
        status.map_or(true, |s| {
            s.state == TaskState::Stopped || s.state.has_ended()
        })
    })
}

fn send_signal(pid: Pid, signal: i32) -> Result<()> {
    let signal = nix::sys::signal::Signal::try_from(signal).ok();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.raw()), signal)
        .map_err(|errno| Error::from_errno("kill", pid.leader(), errno))
}

/// Waits for the stop after `PTRACE_INTERRUPT`. A signal that is just being delivered is delivered first: its
/// handler's frame is set up, and the pending interrupt then stops the task before the handler's first instruction. A
/// task inside the vDSO, whose code works on this kernel only, runs a little further, so that it can be restored on
/// another one.
fn wait_interrupted(mut task: Running, leader: bool, vdso: &Vdso) -> Result<Option<Stopped>> {
    let mut tries = 0;
    loop {
        match wait_patiently(task, leader)? {
            Waited::Gone(_) => return Ok(None),
            Waited::Stopped(stopped) => match stopped.stop() {
                Stop::Event(libc::SIGTRAP) if tries < VDSO_TRIES && vdso.holds(&stopped)? => {
                    tries += 1;
                    task = stopped.resume(Resume::Cont, 0)?;
                    std::thread::sleep(VDSO_RUN);
                    match task.interrupt() {
                        Ok(()) | Err(Error::Died { .. }) => {}
                        Err(e) => return Err(e),
                    }
                }
                Stop::Event(_) => {
                    // At once: whatever happens from here on, the task must not see EINTR.
                    hide_interruption(&stopped)?;
                    return Ok(Some(stopped));
                }
                Stop::Signal(signal) => task = stopped.resume(Resume::Cont, signal)?,
                _ => task = stopped.resume(Resume::Cont, 0)?,
            },
        }
    }
}

/// Lets the tasks of a process that are in the cave of a killed tracer run, all together, until they have left it and
/// are stopped again; whether there were any. Those held there wait for the others.
///
/// # Errors
/// [`Error::Died`] when one has ended; [`Error::DoesNotStop`] if they do not leave the cave.
pub fn leave_stale_cave(pid: Pid, tasks: &mut [&mut Stopped]) -> Result<bool> {
    let vdso = Vdso::of(pid);
    let begun = Instant::now();
    let mut any = false;
    loop {
        let mut inside = Vec::new();
        for task in tasks.iter_mut() {
            if remote::holds(pid, task)? {
                inside.push(task);
            }
        }
        if inside.is_empty() {
            return Ok(any);
        }
        any = true;
        if begun.elapsed() > HOMEWARD {
            return Err(does_not_stop(inside[0].tid()));
        }
        let mut running = Vec::with_capacity(inside.len());
        for task in inside {
            running.push((task.go_on()?, task));
        }
        std::thread::sleep(VDSO_RUN);
        // The leader last, see `stop_tasks`.
        running.sort_by_key(|(task, _)| task.tid() == pid.leader());
        let mut failure = None;
        for (task, _) in &running {
            match task.interrupt() {
                Ok(()) | Err(Error::Died { .. }) => {}
                Err(e) => failure = failure.or(Some(e)),
            }
        }
        for (task, place) in running {
            let tid = task.tid();
            match wait_interrupted(task, tid == pid.leader(), &vdso) {
                Ok(Some(stopped)) => **place = stopped,
                Ok(None) => failure = failure.or(Some(Error::Died { tid })),
                Err(e) => failure = failure.or(Some(e)),
            }
        }
        if let Some(failure) = failure {
            return Err(failure);
        }
    }
}

/// Time limit for leaving a cave; a batch of calls takes milliseconds.
const HOMEWARD: Duration = Duration::from_secs(10);

/// How often a task that stopped inside the vDSO may run on. A program that only asks for the time is there most of
/// the time. Single-stepping would be reliable, but if we were killed between a step and its report, SIGTRAP would be
/// delivered and end the process.
const VDSO_TRIES: u32 = 256;
/// How long it runs each time: a function of the vDSO takes some ten nanoseconds.
const VDSO_RUN: Duration = Duration::from_micros(20);

/// A task in uninterruptible sleep does not stop: in vfork(2) until its child's exec, or in I/O that does not
/// complete. The job stands still meanwhile.
const PATIENCE: Duration = Duration::from_secs(1);
/// The same for a runnable task that waits for a processor.
const PATIENCE_FOR_CPU: Duration = Duration::from_secs(20);

/// Waits for the next stop, with a time limit.
fn wait_patiently(mut task: Running, leader: bool) -> Result<Waited> {
    const LONGEST_NAP: Duration = Duration::from_millis(2);
    let begun = Instant::now();
    let mut nap = Duration::from_micros(20);
    loop {
        task = match task.poll(leader)? {
            Polled::Came(waited) => return Ok(waited),
            Polled::Runs(task) => task,
        };
        // A runnable task stops as soon as it gets a processor.
        let waits = match begun.elapsed() > PATIENCE {
            true => begun.elapsed() < PATIENCE_FOR_CPU && is_runnable(task.tid()),
            false => true,
        };
        if !waits {
            return Err(does_not_stop(task.tid()));
        }
        std::thread::sleep(nap);
        nap = (nap * 2).min(LONGEST_NAP);
    }
}

fn does_not_stop(tid: Tid) -> Error {
    let name = tasks::name_to_tell(tid);
    let call = match read_syscall(tid) {
        Ok(InSyscall::Inside { nr, .. }) => nr,
        _ => -1,
    };
    let vfork = [libc::SYS_vfork, libc::SYS_clone, libc::SYS_clone3].contains(&call);
    let reason = match vfork {
        true => "waits in vfork for a child that has not executed its program yet",
        false => {
            "waits in the kernel for something that cannot be interrupted (a disk, a network file \
                  system)"
        }
    };
    Error::DoesNotStop {
        reason: format!("task {tid} ({name}) {reason}; try again when that is over"),
    }
}

fn is_runnable(tid: Tid) -> bool {
    let status = status::read_status(Pid(tid.raw()));
    status.is_ok_and(|status| status.state == TaskState::Running)
}

fn is_ours(pid: Pid, tid: Tid) -> bool {
    let status = status::read_task(pid, tid);
    status.is_ok_and(|status| status.tracer_pid == Pid::own().raw())
}

fn is_dead(pid: Pid, tid: Tid) -> bool {
    match status::read_task(pid, tid) {
        Ok(status) => status.state.has_ended(),
        Err(_) => true,
    }
}

/// Explains in one sentence why the kernel refused the attach, and what to do.
fn explain_refusal(pid: Pid, tid: Tid) -> Error {
    let reason = match status::read_task(pid, tid) {
        Err(_) => return AttachError::NoSuchProcess { pid }.into(),
        Ok(s) if s.tracer_pid != 0 => {
            let name = tasks::name_to_tell(Pid(s.tracer_pid));
            format!(
                "process {pid} is being traced by {name} (pid {}), and a task has one tracer at \
                 most; end that one first",
                s.tracer_pid
            )
        }
        Ok(s) if s.state.has_ended() => {
            format!(
                "process {pid} ({}) has already ended and waits for its parent",
                s.name
            )
        }
        Ok(s) => {
            let me = nix::unistd::geteuid().as_raw();
            let owner = s.uid.real;
            if me != 0 && owner != me {
                format!(
                    "process {pid} ({}) belongs to uid {owner} and you are uid {me}; run ckpt as \
                     that user or as root",
                    s.name
                )
            } else {
                let (why, remedy) = refusal::why(pid);
                format!(
                    "process {pid} ({}) may not be traced by you: {why}; {remedy}",
                    s.name
                )
            }
        }
    };
    AttachError::Refused { reason }.into()
}
