//! The last steps of a restore: sets the state of every task, removes the restorer, and releases all.

use ckpt_tracer::fault::{self, Step};
use ckpt_tracer::mem::ProcessMemory;
use ckpt_tracer::proc::maps::read_maps;
use ckpt_tracer::remote::{Cave, RemoteCalls};
use ckpt_tracer::task::{Regs, Resume, Running, Stop, Stopped};
use ckpt_tracer::{Pid, RemoteAddr, Tid, abi};
use nix::errno::Errno;

use super::executor::{Disturbed, Worker};
use super::stop;
use crate::error::Result;
use crate::objects::files::changed::Cut;
use crate::objects::plan::Plan;
use crate::objects::process::Process;
use crate::objects::signals::{Action, Pending};
use crate::objects::thread::Thread;
use crate::objects::{limits, security, session};
use crate::restore::plan::Job;

/// The signal that stops a process before it runs.
fn stop_signal(process: &Process, job: &Job<'_>) -> Option<i32> {
    let wished = job.request.stopped.then_some(libc::SIGSTOP);
    process.stopped.or(wished)
}

/// A process whose tasks have their registers.
pub(in crate::restore) struct Complete {
    tasks: Vec<Stopped>,
    /// Its id, if it gets a SIGSTOP at its release.
    stops: Option<Pid>,
    /// Differences of its tasks.
    pub(super) warnings: Vec<String>,
}

/// For a process that creates no more processes.
pub(super) const TAKEN_OVER: i32 = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD;

/// Takes a process out of the restorer, which is removed with the last process in its memory, and sets the state of
/// every task.
pub(super) fn complete(worker: Worker, process: &Process, job: &Job<'_>) -> Result<Complete> {
    let Worker {
        task: mut leader,
        mem,
        planned,
        threads: traced,
        mut disturbed,
        ..
    } = worker;
    let (mem, plan) = (&mem, &planned.plan);
    let mut others = take_over(process, traced, &mut disturbed)?;
    leader.note_only(others.is_empty());
    // One cave for all remaining calls: reading the map of very many threads takes long.
    let cave = Cave::dig(mem, &read_maps(mem.pid())?, [])?;
    take_note_of_stops(&mut leader, mem, plan.stack, process, job, &cave)?;
    let mut warnings = Vec::new();
    let tasks = std::iter::once(&mut leader).chain(&mut others);
    for (task, thread) in tasks.zip(&process.threads) {
        if thread.security.is_empty() {
            continue;
        }
        if thread.seccomp.is_on() {
            suspend_seccomp(task)?;
        }
        // Below the end of the restorer's stack, which is not in use any more.
        let room = plan.stack - security::ROOM;
        let asked = security::rebuild(task, &thread.security, mem, room, &cave)?;
        warnings.extend(
            asked
                .into_iter()
                .map(|w| format!("process {}: {w}", process.pid)),
        );
    }
    let at = RemoteAddr(plan.stack);
    settle_traps((&mut leader, &mut others), process, mem, at, &cave)?;
    remove_restorer(&mut leader, process, plan, mem, (job, disturbed), &cave)?;
    let mut tasks = set_states(leader, others, process, job, &cave)?;
    cave.fill_in()?;
    if let Some(signal) = stop_signal(process, job) {
        stop::by_signal(&mut tasks, process, signal)?;
    } else if goes_on_untold(process, job) {
        stop::by_signal(&mut tasks, process, libc::SIGSTOP)?;
        stop::is_over(&mut tasks, process, waits(process, libc::SIGCONT))?;
    }
    let stops = disturbed.stop || waits(process, libc::SIGSTOP);
    Ok(Complete {
        tasks,
        stops: stops.then_some(Pid(process.pid)),
        warnings,
    })
}

/// Whether it was continued after a stop, unreported to its parent.
fn goes_on_untold(process: &Process, job: &Job<'_>) -> bool {
    let mut all = job.snapshot.processes.iter();
    all.any(|p| p.pid == process.parent && p.untold_continues.contains(&process.pid))
}

/// Whether a signal is pending for the process, for any thread to take.
fn waits_for_all(process: &Process, signal: i32) -> bool {
    process.pending.iter().any(|p| p.signal() == signal)
}

/// Whether a signal is pending for the process or a thread.
fn waits(process: &Process, signal: i32) -> bool {
    pending(process).any(|pending| pending.signal() == signal)
}

/// Whether signals are queued only after the restorer's traps are over.
pub(in crate::restore) fn meets_traps(process: &Process) -> bool {
    pending(process).any(Pending::meets_traps)
}

fn pending(process: &Process) -> impl Iterator<Item = &Pending> {
    let of_threads = process.threads.iter().flat_map(|t| &t.pending);
    process.pending.iter().chain(of_threads)
}

/// Sets attributes through `/proc`. Lowering the OOM score below our own needs CAP_SYS_RESOURCE; what the kernel
/// refuses is left as it is, with a warning.
pub(super) fn adjust_from_outside(process: &Process, pid: Pid) -> Vec<String> {
    let score = process.oom_score_adj.to_string();
    let filter = process.coredump_filter.map(|filter| format!("{filter:#x}"));
    let wanted = [("oom_score_adj", Some(score)), ("coredump_filter", filter)];
    let refused = wanted.into_iter().filter_map(|(file, value)| {
        let (path, value) = (format!("/proc/{pid}/{file}"), value?);
        let error = std::fs::write(&path, &value).err()?;
        let is = std::fs::read_to_string(&path).unwrap_or_else(|_| "unknown".into());
        Some(format!(
            "{file} was {value} and is {} now: {}",
            is.trim(),
            Errno::from_raw(error.raw_os_error().unwrap_or(0)).desc()
        ))
    });
    refused
        .chain(session::rebuild_autogroup(process, pid))
        .chain(session::other_login_uid(process, pid))
        .collect()
}

/// Attaches to the parked threads, in the order of the snapshot; `traced` are those traced from their beginning.
fn take_over(
    process: &Process,
    mut traced: Vec<Running>,
    disturbed: &mut Disturbed,
) -> Result<Vec<Stopped>> {
    let mut seized = Vec::with_capacity(process.threads.len());
    for thread in &process.threads[1..] {
        let tid = Tid(thread.tid);
        let task = match traced.iter().position(|task| task.tid() == tid) {
            Some(at) => traced.swap_remove(at),
            None => Running::seize_with(tid, TAKEN_OVER)?,
        };
        task.interrupt()?;
        seized.push(task);
    }
    let mut stopped = Vec::with_capacity(seized.len());
    for task in seized {
        let mut task = task.wait_stopped()?;
        while let Stop::Signal(signal) = task.stop() {
            disturbed.stop |= signal == libc::SIGSTOP;
            task.advance_among_others(Resume::Cont, 0)?;
        }
        stopped.push(task);
    }
    Ok(stopped)
}

/// Stopped children have just reported their stop: reports that the process had already received are consumed, and
/// new SIGCHLDs removed.
fn take_note_of_stops(
    leader: &mut Stopped,
    mem: &ProcessMemory,
    place: u64,
    process: &Process,
    job: &Job<'_>,
    cave: &Cave<'_>,
) -> Result<()> {
    let all = job.snapshot.processes.iter();
    let children: Vec<&Process> = all
        .filter(|p| p.parent == process.pid && p.pid != process.pid)
        .collect();
    let stops = |p: &&&Process| stop_signal(p, job).is_some();
    let stopped: Vec<i32> = children.iter().filter(stops).map(|p| p.pid).collect();
    if stopped.is_empty() && process.untold_continues.is_empty() {
        return Ok(());
    }
    let at = RemoteAddr(place);
    if process.threads[0].seccomp.is_on() {
        suspend_seccomp(leader)?;
    }
    let mut calls = RemoteCalls::begin_without_scratch(leader, cave)?;
    for child in stopped {
        if !process.untold_stops.contains(&child) {
            let how = (libc::WUNTRACED | libc::WNOHANG | libc::__WALL) as u64;
            let args = [child as u64, 0, how, 0, 0, 0];
            calls.call("wait4", libc::SYS_wait4, args)?;
        }
    }
    if !waits_for_all(process, libc::SIGCHLD) {
        take_signal(libc::SIGCHLD, process, mem, &mut calls, at)?;
    }
    calls.finish()?;
    Ok(())
}

/// Consumes a pending signal of the process, if there is one, and leaves the leader's own, which the kernel takes
/// first. `at` is memory for a set and a `struct timespec`, or a signal.
fn take_signal(
    signal: i32,
    process: &Process,
    mem: &ProcessMemory,
    calls: &mut RemoteCalls<'_>,
    at: RemoteAddr,
) -> Result<()> {
    let leader = &process.threads[0];
    let own = leader.pending.iter().find(|p| p.signal() == signal);
    let set = 1u64 << (signal - 1);
    mem.write(at, &[set, 0, 0].map(u64::to_le_bytes).concat())?;
    for _ in 0..1 + usize::from(own.is_some()) {
        let args = [at.raw(), 0, at.raw() + 8, 8, 0, 0];
        match calls.call("rt_sigtimedwait", libc::SYS_rt_sigtimedwait, args) {
            Ok(_) => {}
            Err(ckpt_tracer::Error::Remote {
                errno: Errno::EAGAIN,
                ..
            }) => {}
            Err(e) => return Err(e.into()),
        }
    }
    if let Some(own) = own {
        mem.write(at, &own.0)?;
        let (pid, tid) = (process.pid as u64, leader.tid as u64);
        let args = [pid, tid, signal as u64, at.raw(), 0, 0];
        calls.call("rt_tgsigqueueinfo", libc::SYS_rt_tgsigqueueinfo, args)?;
    }
    Ok(())
}

/// Traps are over, so SIGTRAP's own action is set, and synchronous signals are queued, by each thread for itself: the
/// kernel delivers those of a fault only to the thread itself. `at` is memory for one.
fn settle_traps(
    (leader, others): (&mut Stopped, &mut [Stopped]),
    process: &Process,
    mem: &ProcessMemory,
    at: RemoteAddr,
    cave: &Cave<'_>,
) -> Result<()> {
    let is_trap = |a: &&Action| a.signal == libc::SIGTRAP as u32 && !process.shares.actions;
    let mut action = process.actions.iter().find(is_trap);
    let mut of_all: Vec<&Pending> = process.pending.iter().filter(|p| p.meets_traps()).collect();
    let tasks = std::iter::once(leader).chain(others);
    for (task, thread) in tasks.zip(&process.threads) {
        let (action, of_all) = (action.take(), std::mem::take(&mut of_all));
        let own: Vec<&Pending> = thread.pending.iter().filter(|p| p.meets_traps()).collect();
        if action.is_none() && of_all.is_empty() && own.is_empty() {
            continue;
        }
        if thread.seccomp.is_on() {
            suspend_seccomp(task)?;
        }
        let mut calls = RemoteCalls::begin_without_scratch(task, cave)?;
        if let Some(action) = action {
            let words = [action.handler, action.flags, action.restorer, action.mask];
            mem.write(at, &words.map(u64::to_le_bytes).concat())?;
            let args = [libc::SIGTRAP as u64, at.raw(), 0, 8, 0, 0];
            calls.call("rt_sigaction", libc::SYS_rt_sigaction, args)?;
        }
        let (pid, tid) = (process.pid as u64, thread.tid as u64);
        for info in of_all {
            mem.write(at, &info.0)?;
            let args = [pid, info.signal() as u64, at.raw(), 0, 0, 0];
            calls.call("rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo, args)?;
        }
        for info in own {
            mem.write(at, &info.0)?;
            let args = [pid, tid, info.signal() as u64, at.raw(), 0, 0];
            calls.call("rt_tgsigqueueinfo", libc::SYS_rt_tgsigqueueinfo, args)?;
        }
        calls.finish()?;
    }
    Ok(())
}

/// Signals are queued, so their limit is set, and the restorer is unmapped. Memory shared with the parent is left to
/// the last process. Then there is room for the last mappings.
fn remove_restorer(
    leader: &mut Stopped,
    process: &Process,
    plan: &Plan,
    mem: &ProcessMemory,
    (job, disturbed): (&Job<'_>, Disturbed),
    cave: &Cave<'_>,
) -> Result<()> {
    let continued = disturbed.continued && !waits_for_all(process, libc::SIGCONT);
    let limit = match meets_traps(process) {
        true => limits::last(&process.limits, Pid(process.pid))?,
        false => None,
    };
    if process.shares.memory && !continued && limit.is_none() {
        return Ok(());
    }
    if process.threads[0].seccomp.is_on() {
        suspend_seccomp(leader)?;
    }
    let mut calls = RemoteCalls::begin_without_scratch(leader, cave)?;
    let at = RemoteAddr(plan.stack);
    if let Some(limit) = limit {
        mem.write(at, &limit.map(u64::to_le_bytes).concat())?;
        let resource = libc::RLIMIT_SIGPENDING.into();
        let args = [0, resource, at.raw(), 0, 0, 0];
        calls.call("prlimit64", libc::SYS_prlimit64, args)?;
    }
    if continued {
        take_signal(libc::SIGCONT, process, mem, &mut calls, at)?;
    }
    if !process.shares.memory {
        let args = [plan.base, plan.len, 0, 0, 0, 0];
        calls.call("munmap", libc::SYS_munmap, args)?;
        job.late.map(process, &mut calls)?;
    }
    calls.finish()?;
    Ok(())
}

/// Suspends the seccomp filters of a task that creates threads, and theirs from their beginning.
pub(super) fn suspend_from_the_beginning(task: &Stopped) -> Result<()> {
    Ok(task.set_options(TAKEN_OVER | libc::PTRACE_O_SUSPEND_SECCOMP | libc::PTRACE_O_TRACECLONE)?)
}

fn suspend_seccomp(task: &Stopped) -> Result<()> {
    Ok(task.set_options(TAKEN_OVER | libc::PTRACE_O_SUSPEND_SECCOMP)?)
}

/// Sets the registers of every thread; the leader comes last.
fn set_states(
    leader: Stopped,
    others: Vec<Stopped>,
    process: &Process,
    job: &Job<'_>,
    cave: &Cave<'_>,
) -> Result<Vec<Stopped>> {
    let present = leader.xstate()?;
    let (first, rest) = (&process.threads[..1], &process.threads[1..]);
    let tasks = others.into_iter().chain([leader]);
    tasks
        .zip(rest.iter().chain(first))
        .map(|(task, thread)| {
            task.set_xstate(&job.refit.fit(&thread.xstate, &present))?;
            set_state(task, thread, process, cave)
        })
        .collect()
}

/// Releases all, the leader of each process last: until then the loss of the tracer kills the whole process. Files
/// are truncated when nothing else can fail.
pub(in crate::restore) fn release(complete: Vec<Complete>, cuts: &[Cut]) -> Result<()> {
    fault::hit(Step::RestoreRelease)?;
    for cut in cuts {
        cut.make()?;
    }
    for task in complete.iter().flat_map(|c| &c.tasks) {
        task.set_options(0)?;
    }
    for process in complete {
        if let Some(pid) = process.stops {
            stop::send(pid, libc::SIGSTOP)?;
        }
        for task in process.tasks {
            task.detach(0)?;
        }
    }
    Ok(())
}

/// Sets registers and mask of one thread.
fn set_state(
    mut task: Stopped,
    thread: &Thread,
    process: &Process,
    cave: &Cave<'_>,
) -> Result<Stopped> {
    let mut regs = Regs::from(&thread.regs);
    if regs.rax as i64 == -abi::ERESTART_RESTARTBLOCK && (regs.orig_rax as i64) >= 0 {
        regs.rax = match rearm(&mut task, &regs, process, cave)? {
            Rearmed::Block => regs.rax,
            Rearmed::Finished => {
                regs.orig_rax = u64::MAX;
                0
            }
            // A new task has no restart block: the call is restarted from the beginning.
            Rearmed::No => (-abi::ERESTARTNOHAND) as u64,
        };
    }
    task.set_regs(&regs)?;
    task.set_signal_mask(thread.signal_mask)?;
    if let Some(dispatch) = &thread.dispatch {
        dispatch.rebuild(&task)?;
    }
    Ok(task)
}

enum Rearmed {
    /// The task has a restart block for the remaining time.
    Block,
    /// The time is over.
    Finished,
    /// The remaining time is unknown.
    No,
}

/// An interrupted sleep that has written its remaining time continues with that: the same call is started in the new
/// task and interrupted at once, which creates the kernel's restart block, including the expiry. The registers never
/// show it.
fn rearm(task: &mut Stopped, regs: &Regs, process: &Process, cave: &Cave<'_>) -> Result<Rearmed> {
    let remainder = match regs.orig_rax as i64 {
        libc::SYS_nanosleep => regs.rsi,
        libc::SYS_clock_nanosleep => regs.r10,
        _ => 0,
    };
    if remainder == 0 || process.is_under_seccomp() {
        return Ok(Rearmed::No);
    }
    let (nr, args) = match regs.orig_rax as i64 {
        libc::SYS_nanosleep => (libc::SYS_nanosleep, [remainder, remainder, 0, 0, 0, 0]),
        _ => (
            libc::SYS_clock_nanosleep,
            [regs.rdi, 0, remainder, remainder, 0, 0],
        ),
    };
    let calls = RemoteCalls::begin_without_scratch(task, cave)?;
    let answer = calls.begin_and_interrupt(nr, args)?;
    Ok(match answer {
        a if a == -abi::ERESTART_RESTARTBLOCK => Rearmed::Block,
        0 => Rearmed::Finished,
        _ => Rearmed::No,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::fixture;

    /// A process that is killed when dropped.
    struct Sleeper(std::process::Child);

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_score_that_cannot_be_lowered_is_told() {
        let sleeper = std::process::Command::new("sleep").arg("1000").spawn();
        let sleeper = Sleeper(sleeper.expect("sleep is installed"));
        let pid = Pid(sleeper.0.id() as i32);
        let mut process = fixture::snapshot().processes.remove(0);
        process.oom_score_adj = -1000;
        process.coredump_filter = Some(0x21);
        let warnings = adjust_from_outside(&process, pid);
        let file = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}"));
        let score = file("oom_score_adj").expect("it runs");
        let filter = file("coredump_filter").expect("it runs");
        assert_eq!(filter.trim(), "00000021");
        // Reported unless it succeeded, as with CAP_SYS_RESOURCE.
        assert_eq!(warnings.is_empty(), score.trim() == "-1000", "{warnings:?}");
        for warning in warnings {
            let expected = format!("oom_score_adj was -1000 and is {} now: ", score.trim());
            assert!(warning.starts_with(&expected), "{warning}");
        }
    }

    #[test]
    fn a_filter_that_cannot_be_set_is_told() {
        let mut process = fixture::snapshot().processes.remove(0);
        process.coredump_filter = Some(0x21);
        // No process has this pid.
        let warnings = adjust_from_outside(&process, Pid(i32::MAX));
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(warnings[1].starts_with("coredump_filter was 0x21 and is unknown now"));
    }
}
