//! Executes a plan in the new process, then makes its threads what they were and lets go.

use ckpt_image::Reader;
use ckpt_tracer::blob::Blob;
use ckpt_tracer::fault::{self, Step};
use ckpt_tracer::mem::ProcessMemory;
use ckpt_tracer::proc::maps::read_maps;
use ckpt_tracer::remote::{Cave, RemoteCalls};
use ckpt_tracer::task::{Regs, Resume, Running, Stop, Stopped};
use ckpt_tracer::{Pid, RemoteAddr, Tid, abi};
use nix::errno::Errno;

use super::plan::{HostState, Plan, Stage};
use super::planner::{self, Planned};
use super::spawn::Child;
use super::{Request, fill};
use crate::error::{Error, Result};
use crate::objects::Snapshot;
use crate::objects::process::Process;
use crate::objects::thread::Thread;

/// Rebuilds the process that stands at its exec stop.
pub fn rebuild(
    image: &Reader,
    snapshot: &Snapshot,
    request: &Request<'_>,
    host: &HostState,
    child: &Child,
    mut leader: Stopped,
) -> Result<Vec<String>> {
    let process = &snapshot.processes[0];
    let pid = Pid(child.pid());
    fault::hit(Step::RestoreSpawned)?;
    let present = read_maps(pid)?;
    let planned = planner::plan(snapshot, request, host, &present).map_err(Error::Refused)?;
    let mem = ProcessMemory::open(pid)?;
    place(&mut leader, &mem, &present, &planned.plan)?;
    run(&mut leader, &mem, &planned, |stage| match stage {
        Stage::Fill => {
            fault::hit(Step::RestoreMapped)?;
            fill::fill(image, snapshot, &planned.shared_at, pid.raw(), request)?;
            fault::hit(Step::RestoreFilled)?;
            Ok(())
        }
        Stage::Threads => Ok(fault::hit(Step::RestoreThreads)?),
    })?;
    let mut warnings = warnings(&planned.plan, &mem)?;
    warnings.extend(adjust_from_outside(process, pid));
    let others = take_over(process)?;
    // One cave for all that is left to be done inside: a map of very many threads is long.
    let cave = Cave::dig(&mem, &read_maps(pid)?)?;
    remove_restorer(&mut leader, process, &planned.plan, &mem, &cave)?;
    let tasks = set_states(leader, others, process, &cave)?;
    cave.fill_in()?;
    release(tasks, process, request)?;
    Ok(warnings)
}

/// Puts restorer and plan into a hole of the process and sends its first thread there.
fn place(
    leader: &mut Stopped,
    mem: &ProcessMemory,
    present: &[ckpt_tracer::proc::maps::Vma],
    plan: &Plan,
) -> Result<()> {
    let cave = Cave::dig(mem, present)?;
    let mut calls = RemoteCalls::begin(leader, &cave, RemoteAddr(plan.base), plan.len)?;
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
    regs.rdi = plan.header;
    regs.orig_rax = u64::MAX;
    calls.leave_at(&regs, restorer_mask())?;
    cave.fill_in()?;
    Ok(())
}

/// Everything but SIGTRAP: a breakpoint that finds it blocked resets its action
/// (`force_sig_info_to_task`, kernel/signal.c).
fn restorer_mask() -> u64 {
    !(1 << (libc::SIGTRAP - 1))
}

/// Runs the restorer to its end, doing our part at each stage.
fn run(
    leader: &mut Stopped,
    mem: &ProcessMemory,
    planned: &Planned,
    mut at_stage: impl FnMut(Stage) -> Result<()>,
) -> Result<()> {
    let plan = &planned.plan;
    loop {
        leader.advance(mem.pid(), Resume::Cont, 0)?;
        match leader.stop() {
            Stop::Signal(libc::SIGTRAP) => {}
            Stop::Signal(signal) => {
                let regs = leader.regs()?;
                return Err(Error::Restore(format!(
                    "the restorer met signal {signal} at {:#x} in the new process; this is a bug of \
                     ckpt",
                    regs.rip
                )));
            }
            // A stop or a continue from outside.
            _ => continue,
        }
        let word = leader.regs()?.rax;
        match word {
            ckpt_restorer::DONE => return Ok(()),
            ckpt_restorer::FAILED => return Err(failed_operation(plan, mem)),
            index => match plan.stage_at(index) {
                Some(stage) => at_stage(stage)?,
                None => {
                    return Err(Error::Restore(format!(
                        "the restorer stopped at operation {index}, which is no stage; this is a \
                         bug of ckpt"
                    )));
                }
            },
        }
    }
}

fn failed_operation(plan: &Plan, mem: &ProcessMemory) -> Error {
    let unknown = || Error::Restore("the restorer failed without saying where".into());
    let failed_at = std::mem::offset_of!(ckpt_restorer::Plan, failed) as u64;
    let Ok(at) = mem.read_u64(RemoteAddr(plan.header) + failed_at) else {
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

/// What was not kept: decided while planning, or told by an operation that was allowed to fail.
fn warnings(plan: &Plan, mem: &ProcessMemory) -> Result<Vec<String>> {
    let mut all = plan.warnings.clone();
    for (at, text) in &plan.conditional {
        let result = mem.read_u64(RemoteAddr(*at))? as i64;
        if result < 0 {
            all.push(format!(
                "{text}: {}",
                Errno::from_raw(-result as i32).desc()
            ));
        }
    }
    all.sort();
    all.dedup();
    Ok(all)
}

/// What is written through `/proc`. Lowering the OOM score below our own wants CAP_SYS_RESOURCE;
/// what the kernel does not take is left as it is, with a warning.
fn adjust_from_outside(process: &Process, pid: Pid) -> Vec<String> {
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
    refused.collect()
}

/// Attaches to the parked threads, in the order of the snapshot.
fn take_over(process: &Process) -> Result<Vec<Stopped>> {
    let options = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD;
    let mut seized = Vec::with_capacity(process.threads.len());
    for thread in &process.threads[1..] {
        let task = Running::seize_with(Tid(thread.tid), options)?;
        task.interrupt()?;
        seized.push(task);
    }
    let mut stopped = Vec::with_capacity(seized.len());
    for task in seized {
        stopped.push(task.wait_stopped()?);
    }
    Ok(stopped)
}

/// Unmaps the restorer. Traps are over, so SIGTRAP's own action is set here.
fn remove_restorer(
    leader: &mut Stopped,
    process: &Process,
    plan: &Plan,
    mem: &ProcessMemory,
    cave: &Cave<'_>,
) -> Result<()> {
    if process.threads[0].seccomp.mode == 2 {
        suspend_seccomp(leader)?;
    }
    let mut calls = RemoteCalls::begin_without_scratch(leader, cave)?;
    let trap = process
        .actions
        .iter()
        .find(|a| a.signal == libc::SIGTRAP as u32);
    if let Some(action) = trap {
        let words = [action.handler, action.flags, action.restorer, action.mask];
        let at = RemoteAddr(plan.stack);
        mem.write(at, &words.map(u64::to_le_bytes).concat())?;
        let args = [libc::SIGTRAP as u64, at.raw(), 0, 8, 0, 0];
        calls.call("rt_sigaction", libc::SYS_rt_sigaction, args)?;
    }
    calls.call(
        "munmap",
        libc::SYS_munmap,
        [plan.base, plan.len, 0, 0, 0, 0],
    )?;
    calls.finish()?;
    Ok(())
}

fn suspend_seccomp(task: &Stopped) -> Result<()> {
    const SUSPEND_SECCOMP: i32 = 1 << 21;
    let options = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD | SUSPEND_SECCOMP;
    Ok(task.set_options(options)?)
}

/// Gives every thread its registers; the leader comes last.
fn set_states(
    leader: Stopped,
    others: Vec<Stopped>,
    process: &Process,
    cave: &Cave<'_>,
) -> Result<Vec<Stopped>> {
    let (first, rest) = (&process.threads[..1], &process.threads[1..]);
    let tasks = others.into_iter().chain([leader]);
    tasks
        .zip(rest.iter().chain(first))
        .map(|(task, thread)| set_state(task, thread, process, cave))
        .collect()
}

/// Lets all go, the leader last: until then the loss of the tracer kills the whole process,
/// which is then not there at all.
fn release(tasks: Vec<Stopped>, process: &Process, request: &Request<'_>) -> Result<()> {
    fault::hit(Step::RestoreRelease)?;
    if process.stopped || request.stopped {
        // Taken by the first task that runs, which stops them all.
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(process.pid),
            nix::sys::signal::Signal::SIGSTOP,
        )
        .map_err(|e| Error::Restore(format!("cannot stop the new process: {}", e.desc())))?;
    }
    for task in &tasks {
        task.set_options(0)?;
    }
    for task in tasks {
        task.detach(0)?;
    }
    Ok(())
}

/// Registers, extended state and mask of one thread.
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
            // No restart block exists in a new task: the call is made again as a whole.
            Rearmed::No => (-abi::ERESTARTNOHAND) as u64,
        };
    }
    task.set_xstate(&thread.xstate)?;
    task.set_regs(&regs)?;
    task.set_signal_mask(thread.signal_mask)?;
    Ok(task)
}

enum Rearmed {
    /// The task has a restart block for what remains.
    Block,
    /// What remained is over.
    Finished,
    /// What remains is not known.
    No,
}

/// A sleep that was interrupted with its remainder written out goes on with that remainder:
/// the same call is begun in the new task and interrupted at once, which leaves the kernel's
/// restart block behind, expiry and all. The registers never show it.
fn rearm(task: &mut Stopped, regs: &Regs, process: &Process, cave: &Cave<'_>) -> Result<Rearmed> {
    let remainder = match regs.orig_rax as i64 {
        libc::SYS_nanosleep => regs.rsi,
        libc::SYS_clock_nanosleep => regs.r10,
        _ => 0,
    };
    if remainder == 0 || process.threads.iter().any(|t| t.seccomp.mode == 2) {
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
    use crate::inspect::fixture;

    /// A process that ends with the test.
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
        // Told unless it was done, as for those with CAP_SYS_RESOURCE.
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
