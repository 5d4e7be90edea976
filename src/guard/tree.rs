//! The guard's work: traces all tasks of a job and handles their stops.
//!
//! There is a single poll, and tasks are not held longer than their handling takes: tasks of one process are held
//! until all of it are stopped, get their flag set or cleared, and are resumed.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ckpt_sys::channel::Channel;
use ckpt_tracer::proc::stat::read_stat;
use ckpt_tracer::proc::status::read_status;
use ckpt_tracer::proc::tasks;
use ckpt_tracer::remote::hide_interruption;
use ckpt_tracer::task::{AnyTask, Resume, Running, Stop, Stopped, Waited, poll_any};
use ckpt_tracer::{AttachError, Error, Pid, Result, Tid, cpuid, refusal};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::door::Server;
use super::first;
use super::flag::{self, Flag};
use crate::objects::job::Family;
use crate::objects::processor::{Answer, Baseline, shown};

/// New tasks are traced automatically; if we are killed, all continue.
pub(super) const OPTIONS: i32 = libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEEXEC;

/// SIGSEGV in a set of signals.
const SEGV: u64 = 1 << (libc::SIGSEGV - 1);

/// A task that does not stop within this time is in the kernel, where it executes no instructions of its own.
const PATIENCE: Duration = Duration::from_secs(1);
/// Interval of checking that time, milliseconds.
const TICK: u16 = 20;

#[derive(Debug)]
struct Task {
    process: Pid,
    flag: Flag,
    /// SIGSEGV was blocked when its program began. The kernel unblocks it at each CPUID, and whether the program
    /// itself has unblocked it meanwhile is unknown.
    blocked: bool,
    /// Its stop, while it waits for other tasks of its process.
    held: Option<Stopped>,
}

/// A guard.
struct Guard {
    level: Baseline,
    tasks: HashMap<Tid, Task>,
    /// New tasks whose first stop preceded their creator's clone event.
    unclaimed: Vec<Stopped>,
    /// Processes whose tasks are being held, with the start time.
    gathering: HashMap<Pid, Instant>,
    /// While detached: the job's processes, with their start times.
    away: Option<Vec<(Pid, u64)>>,
    /// A task cannot be detached.
    stuck: bool,
}

/// Guards a job until it has ended: the program that reports through the entrance, or the descendants of `roots`.
pub(super) fn guard(level: Baseline, roots: &[Pid], entrance: Option<UnixStream>, link: Channel) {
    let mut child = SigSet::empty();
    child.add(Signal::SIGCHLD);
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let Ok(children) = SignalFd::with_flags(&child, flags) else {
        return;
    };
    let mut guard = Guard {
        level,
        tasks: HashMap::new(),
        unclaimed: Vec::new(),
        gathering: HashMap::new(),
        away: None,
        stuck: false,
    };
    let mut server = Server::new();
    let taken = match &entrance {
        Some(entrance) => guard.let_in(entrance),
        None => guard.take_patiently(roots),
    };
    if let Err(error) = taken {
        let _ = link.send(&super::Taken::Err(error.to_string()));
        super::fail();
    }
    let _ = link.send(&super::Taken::Ok(()));
    drop((entrance, link));
    guard.run(&children, &mut server);
}

impl Guard {
    fn run(&mut self, children: &SignalFd, server: &mut Server) {
        loop {
            while let Ok(Some(_)) = children.read_signal() {}
            let alone = self.drain();
            match (server.look(), self.away.is_some()) {
                (true, false) => self.begin_to_leave(),
                (false, true) => self.come_back(),
                (true, true) if alone => server.left(),
                _ => {}
            }
            if !self.tick() {
                server.stays();
                continue;
            }
            if alone && self.away.is_none() && self.tasks.is_empty() {
                return;
            }
            let busy = !self.gathering.is_empty() || self.away.is_some() && !alone;
            let timeout = match busy {
                true => PollTimeout::from(TICK),
                false => PollTimeout::NONE,
            };
            let fds: Vec<BorrowedFd<'_>> = server.fds().chain([children.as_fd()]).collect();
            let mut fds: Vec<PollFd<'_>> = fds
                .into_iter()
                .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
                .collect();
            let _ = poll(&mut fds, timeout);
        }
    }

    /// Attaches to the program before its first instruction.
    fn let_in(&mut self, entrance: &UnixStream) -> Result<()> {
        // End of file: it could not be started.
        let Some(pid) = first::sender(entrance) else {
            return Ok(());
        };
        let seized = self.seize(pid, pid.leader());
        let _ = (&mut &*entrance).write_all(b"!");
        seized.map_err(|error| explained(pid, error))
    }

    /// Attaches to untraced descendants of these. Those that may not be traced are left out; an error if none is
    /// left.
    fn take(&mut self, roots: &[Pid]) -> Result<()> {
        let mut refused: HashSet<Tid> = HashSet::new();
        let mut error = None;
        loop {
            let mut found = false;
            for pid in Family::of_all(roots).map_or_else(|_| roots.to_vec(), |f| f.living) {
                for tid in tasks::list_tasks(pid).unwrap_or_default() {
                    if self.tasks.contains_key(&tid) || refused.contains(&tid) {
                        continue;
                    }
                    match self.seize(pid, tid) {
                        Ok(()) => {
                            found = true;
                            let _ = Running::auto_attached(tid).interrupt();
                        }
                        Err(e) => {
                            refused.insert(tid);
                            if !matches!(e, Error::Died { .. }) && !has_ended(tid) {
                                error = error.or(Some(explained(pid, e)));
                            }
                        }
                    }
                }
            }
            if !found {
                break;
            }
        }
        match error {
            Some(error) if self.tasks.is_empty() => Err(error),
            _ => Ok(()),
        }
    }

    /// As [`take`](Self::take), with retries: a checkpoint may be in progress.
    fn take_patiently(&mut self, roots: &[Pid]) -> Result<()> {
        const PAUSE: Duration = Duration::from_millis(20);
        let begun = Instant::now();
        let traced = |pid: &Pid| read_status(*pid).is_ok_and(|status| status.tracer_pid != 0);
        loop {
            match self.take(roots) {
                Err(_) if begun.elapsed() < 5 * PATIENCE && roots.iter().any(traced) => {
                    std::thread::sleep(PAUSE);
                }
                other => return other,
            }
        }
    }

    fn seize(&mut self, process: Pid, tid: Tid) -> Result<()> {
        Running::seize_with(tid, OPTIONS)?;
        self.note(process, tid, Flag::No, false);
        Ok(())
    }

    fn note(&mut self, process: Pid, tid: Tid, flag: Flag, blocked: bool) {
        let held = None;
        self.tasks.entry(tid).or_insert(Task {
            process,
            flag,
            blocked,
            held,
        });
    }

    /// Handles all pending stops; returns whether no task is left. Tasks that execute CPUID all the time do not
    /// starve others: each is handled once per round, and after some rounds everything else gets its turn.
    fn drain(&mut self) -> bool {
        const ROUNDS: u32 = 8;
        for _ in 0..ROUNDS {
            let mut all = Vec::new();
            let alone = loop {
                match poll_any() {
                    Ok(AnyTask::Changed(tid, waited)) => all.push((tid, waited)),
                    other => break matches!(other, Ok(AnyTask::NoTasks)),
                }
            };
            if alone {
                self.tasks.clear();
                self.gathering.clear();
                self.unclaimed.clear();
                return true;
            }
            if all.is_empty() {
                break;
            }
            for (tid, waited) in all {
                match waited {
                    Waited::Gone(_) => self.gone(tid),
                    Waited::Stopped(stopped) => self.stopped(stopped),
                }
            }
        }
        // Their creator was killed before its clone event, or has not reported it yet.
        for stopped in std::mem::take(&mut self.unclaimed) {
            if let Ok(status) = read_status(Pid(stopped.tid().raw())) {
                self.note(status.tgid, stopped.tid(), Flag::No, false);
                self.event(stopped);
            }
        }
        false
    }

    fn gone(&mut self, tid: Tid) {
        if let Some(task) = self.tasks.remove(&tid)
            && self.gathering.contains_key(&task.process)
        {
            self.gather(task.process);
        }
    }

    /// If the task has ended meanwhile, its end is reported separately.
    fn stopped(&mut self, stopped: Stopped) {
        let _ = match stopped.stop() {
            Stop::Signal(signal) => self.signal(stopped, signal),
            Stop::Clone => self.clone(stopped),
            Stop::Exec => self.exec(stopped),
            Stop::Event(_) if self.tasks.contains_key(&stopped.tid()) => {
                self.event(stopped);
                Ok(())
            }
            Stop::Event(_) => {
                self.unclaimed.push(stopped);
                Ok(())
            }
            Stop::Syscall | Stop::Other(_) => stopped.resume(Resume::Cont, 0).map(drop),
        };
    }

    /// Emulates CPUID; other signals are delivered.
    fn signal(&self, stopped: Stopped, signal: i32) -> Result<()> {
        let (process, blocked) = match self.tasks.get(&stopped.tid()) {
            Some(task) => (task.process, task.blocked),
            None => (Pid(stopped.tid().raw()), false),
        };
        let level = self.level;
        let answered = cpuid::answer(&stopped, process, |leaf, subleaf, raw| {
            let raw = Answer {
                eax: raw.eax,
                ebx: raw.ebx,
                ecx: raw.ecx,
                edx: raw.edx,
            };
            let shown = shown(level, leaf, subleaf, raw);
            std::arch::x86_64::CpuidResult {
                eax: shown.eax,
                ebx: shown.ebx,
                ecx: shown.ecx,
                edx: shown.edx,
            }
        });
        let signal = match answered {
            Ok(true) => 0,
            _ => signal,
        };
        // A program with a handler expects it to be called.
        let caught = || read_status(process).map_or(0, |status| status.signals.caught);
        if signal == 0 && blocked && caught() & SEGV == 0 {
            stopped.set_signal_mask(stopped.signal_mask()? | SEGV)?;
        }
        stopped.resume(Resume::Cont, signal).map(drop)
    }

    /// A new task inherits the flag.
    fn clone(&mut self, stopped: Stopped) -> Result<()> {
        let new = Tid(stopped.event_message()? as i32);
        let creator = self.tasks.get(&stopped.tid());
        let (flag, blocked) = creator.map_or((Flag::No, false), |task| (task.flag, task.blocked));
        if let Ok(status) = read_status(Pid(new.raw())) {
            self.note(status.tgid, new, flag, blocked);
        }
        stopped.resume(Resume::Cont, 0)?;
        if let Some(at) = self.unclaimed.iter().position(|s| s.tid() == new) {
            let first = self.unclaimed.swap_remove(at);
            self.stopped(first);
        }
        Ok(())
    }

    /// The exec has cleared the flag and ended all other tasks of the process. The task stops once more, where system
    /// calls can be made in it, before the program's first instruction.
    fn exec(&mut self, stopped: Stopped) -> Result<()> {
        let former = Tid(stopped.event_message()? as i32);
        let process = Pid(stopped.tid().raw());
        self.tasks.remove(&former);
        self.tasks.insert(
            stopped.tid(),
            Task {
                process,
                flag: Flag::No,
                blocked: stopped.signal_mask()? & SEGV != 0,
                held: None,
            },
        );
        self.gathering.remove(&process);
        stopped.interrupt()?;
        stopped.resume(Resume::Cont, 0).map(drop)
    }

    /// It was interrupted by us, or its process was stopped or continued.
    fn event(&mut self, stopped: Stopped) {
        let Some(task) = self.tasks.get_mut(&stopped.tid()) else {
            return;
        };
        let process = task.process;
        let _ = hide_interruption(&stopped);
        let wanted = self.away.is_some() || task.flag == Flag::No;
        if wanted || self.gathering.contains_key(&process) {
            task.held = Some(stopped);
            self.gather(process);
        } else {
            let _ = go_on(stopped);
        }
    }

    /// Holds all tasks of a process; when all are held, handles them.
    fn gather(&mut self, process: Pid) {
        if let Entry::Vacant(entry) = self.gathering.entry(process) {
            entry.insert(Instant::now());
            let others = self.tasks.iter();
            others
                .filter(|(_, task)| task.process == process && task.held.is_none())
                .for_each(|(tid, _)| drop(Running::auto_attached(*tid).interrupt()));
        }
        let all = tasks::list_tasks(process).unwrap_or_default();
        let held = |tid: &Tid| self.tasks.get(tid).is_some_and(|t| t.held.is_some());
        if all.iter().all(|tid| held(tid) || has_ended(*tid)) {
            self.act(process);
        }
    }

    /// Sets or clears the flag of held tasks, and resumes or detaches them.
    fn act(&mut self, process: Pid) {
        self.gathering.remove(&process);
        let mine = self.tasks.iter_mut().filter(|(_, t)| t.process == process);
        let mut held: Vec<(Stopped, Flag)> = mine
            .filter_map(|(_, task)| Some((task.held.take()?, task.flag)))
            .collect();
        held.sort_by_key(|(stopped, _)| (stopped.tid() != process.leader(), stopped.tid()));
        let wanted = match self.away {
            Some(_) => Flag::No,
            None => Flag::Yes,
        };
        let changed = flag::change(process, &mut held, wanted);
        for (stopped, flag) in held {
            let tid = stopped.tid();
            let flag = match (changed.is_ok(), wanted) {
                (true, _) => flag,
                // Otherwise it would be retried forever.
                (false, Flag::Yes) if flag == Flag::No => Flag::Never,
                (false, _) => flag,
            };
            self.stuck |= self.away.is_some() && flag == Flag::Yes;
            if self.away.is_some() && flag != Flag::Yes {
                self.tasks.remove(&tid);
                let _ = stopped.detach(0);
                continue;
            }
            if let Some(task) = self.tasks.get_mut(&tid) {
                task.flag = flag;
            }
            let _ = go_on(stopped);
        }
    }

    fn begin_to_leave(&mut self) {
        let mut processes: Vec<Pid> = self.tasks.values().map(|task| task.process).collect();
        processes.sort_unstable();
        processes.dedup();
        let begun = |pid: Pid| Some((pid, read_stat(pid).ok()?.starttime));
        self.away = Some(processes.iter().copied().filter_map(begun).collect());
        for process in processes {
            self.gather(process);
        }
    }

    fn come_back(&mut self) {
        let Some(processes) = self.away.take() else {
            return;
        };
        let lives = |(pid, begun): &(Pid, u64)| {
            read_stat(*pid).is_ok_and(|s| s.starttime == *begun && !s.state.has_ended())
        };
        let living: Vec<Pid> = processes.iter().filter(|p| lives(p)).map(|p| p.0).collect();
        if !living.is_empty() {
            until_untraced(&living);
            // Processes that may not be traced any more continue without the flag.
            let _ = self.take(&living);
        }
        // Those not yet detached.
        let waiting: Vec<Pid> = self.gathering.keys().copied().collect();
        waiting.into_iter().for_each(|process| self.act(process));
    }

    /// Handles timeouts: false if a task cannot be detached.
    fn tick(&mut self) -> bool {
        let late = |since: &Instant| since.elapsed() > PATIENCE;
        let late: Vec<Pid> = self
            .gathering
            .iter()
            .filter(|(_, since)| late(since))
            .map(|(pid, _)| *pid)
            .collect();
        if self.away.is_some() && (self.stuck || !late.is_empty()) {
            self.stuck = false;
            self.come_back();
            return false;
        }
        late.into_iter().for_each(|process| self.act(process));
        let gone = |tid: &Tid| !std::path::Path::new(&format!("/proc/{tid}")).exists();
        if self.away.is_some() {
            self.tasks.retain(|tid, _| !gone(tid));
        }
        true
    }
}

/// When a requester was killed, its connection closes before the kernel has detached its tracees, which follows at
/// once. Another process may trace the job permanently; its processes run meanwhile, but we do not wait long.
fn until_untraced(processes: &[Pid]) {
    const PAUSE: Duration = Duration::from_millis(1);
    let begun = Instant::now();
    let us = Pid::own().raw();
    let others = |tracer: i32| tracer != 0 && tracer != us;
    let traced = |pid: &Pid| read_status(*pid).is_ok_and(|status| others(status.tracer_pid));
    while processes.iter().any(traced) && begun.elapsed() < PATIENCE {
        std::thread::sleep(PAUSE);
    }
}

/// Resumes a task; a stopped process stays stopped.
fn go_on(stopped: Stopped) -> Result<()> {
    match stopped.stopped_by_signal() {
        true => stopped.listen(),
        false => stopped.resume(Resume::Cont, 0).map(drop),
    }
}

fn has_ended(tid: Tid) -> bool {
    read_status(Pid(tid.raw())).map_or(true, |status| status.state.has_ended())
}

/// Explains why a process is not guarded.
fn explained(pid: Pid, error: Error) -> Error {
    match error {
        Error::Kernel {
            errno: nix::errno::Errno::EPERM,
            ..
        } => {
            let (why, remedy) = refusal::why(pid);
            let reason = format!("process {pid} may not be traced by you: {why}; {remedy}");
            AttachError::Refused { reason }.into()
        }
        other => other,
    }
}
