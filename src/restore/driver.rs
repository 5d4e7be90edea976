//! Executes the plans in the new processes, then makes their threads what they were and lets go.

use std::collections::VecDeque;

use ckpt_image::Reader;
use ckpt_tracer::blob::Blob;
use ckpt_tracer::fault::{self, Step};
use ckpt_tracer::mem::ProcessMemory;
use ckpt_tracer::proc::maps::read_maps;
use ckpt_tracer::remote::{Cave, RemoteCalls};
use ckpt_tracer::task::{Regs, Resume, Running, Stop, Stopped, Waited};
use ckpt_tracer::{Pid, RemoteAddr, Tid, abi};
use nix::errno::Errno;

use super::fill::Pages;
use super::plan::{Plan, Stage};
use super::planner::{Job, Planned};
use super::spawn::{self, Brood};
use super::stop;
use crate::error::{Error, Result};
use crate::objects::cgroup;
use crate::objects::files::changed::Cut;
use crate::objects::memory::SharedAt;
use crate::objects::process::Process;
use crate::objects::thread::Thread;

/// A new process on its way.
struct Live {
    index: usize,
    leader: Stopped,
    mem: ProcessMemory,
    planned: Planned,
    /// Its other threads, once they are ours.
    others: Vec<Stopped>,
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
    before_release: &mut dyn FnMut(),
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
        complete.push(live.complete(job)?);
    }
    warnings.sort();
    warnings.dedup();
    before_release();
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
        let mut born = Vec::new();
        run_to(&mut leader, &mem, &planned.plan, Stage::Fill, &mut |_| {
            Ok(())
        })?;
        fault::hit(Step::RestoreMapped)?;
        let snapshot = self.job.snapshot;
        self.pages
            .fill(snapshot, index, forked, &planned.shared_at)?;
        run_to(&mut leader, &mem, &planned.plan, Stage::Born, &mut |tid| {
            born.push(tid);
            self.adopt(tid, &mem, &planned)
        })?;
        Ok(Live {
            index,
            leader,
            mem,
            planned,
            others: Vec::new(),
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

/// When a process creates no more processes.
const TAKEN_OVER: i32 = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD;

/// The signal that is to stop a process before it runs.
fn stop_signal(process: &Process, job: &Job<'_>) -> Option<i32> {
    let wished = job.request.stopped.then_some(libc::SIGSTOP);
    process.stopped.or(wished)
}

/// A process whose tasks have their registers.
struct Complete {
    tasks: Vec<Stopped>,
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

    /// Removes the restorer and gives every task its state.
    fn complete(mut self, job: &Job<'_>) -> Result<Complete> {
        let process = &job.snapshot.processes[self.index];
        let pid = Pid(process.pid);
        self.others = take_over(process)?;
        self.leader.note_only(self.others.is_empty());
        // One cave for all that is left to be done inside: a map of very many threads is long.
        let cave = Cave::dig(&self.mem, &read_maps(pid)?)?;
        let place = self.planned.plan.stack;
        take_note_of_stops(&mut self.leader, &self.mem, place, process, job, &cave)?;
        remove_restorer(
            &mut self.leader,
            process,
            &self.planned.plan,
            &self.mem,
            &cave,
        )?;
        let mut tasks = set_states(self.leader, self.others, process, &cave)?;
        cave.fill_in()?;
        if let Some(signal) = stop_signal(process, job) {
            stop::by_signal(&mut tasks, process, signal)?;
        }
        Ok(Complete { tasks })
    }
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

/// Runs the restorer to a stage. Processes that it creates meanwhile are handed to `born`.
fn run_to(
    leader: &mut Stopped,
    mem: &ProcessMemory,
    plan: &Plan,
    stage: Stage,
    born: &mut dyn FnMut(Tid) -> Result<()>,
) -> Result<()> {
    let word = run_to_trap(leader, plan, mem, born)?;
    match plan.stage_at(word) {
        Some(at) if at == stage => Ok(()),
        _ => Err(Error::Restore(format!(
            "the restorer stopped at operation {word}, which is not {stage:?}; this is a bug of ckpt"
        ))),
    }
}

fn run_to_done(leader: &mut Stopped, mem: &ProcessMemory, plan: &Plan) -> Result<()> {
    match run_to_trap(leader, plan, mem, &mut |_| Ok(()))? {
        ckpt_restorer::DONE => Ok(()),
        word => Err(Error::Restore(format!(
            "the restorer stopped at operation {word}, which is not its end; this is a bug of ckpt"
        ))),
    }
}

/// Runs the restorer until it hands over; what it hands over with.
fn run_to_trap(
    task: &mut Stopped,
    plan: &Plan,
    mem: &ProcessMemory,
    born: &mut dyn FnMut(Tid) -> Result<()>,
) -> Result<u64> {
    loop {
        task.advance_among_others(Resume::Cont, 0)?;
        match task.stop() {
            Stop::Signal(libc::SIGTRAP) => {}
            Stop::Signal(signal) => {
                let regs = task.regs()?;
                return Err(Error::Restore(format!(
                    "the restorer met signal {signal} at {:#x} in the new process; this is a bug of \
                     ckpt",
                    regs.rip
                )));
            }
            Stop::Clone => {
                born(Tid(task.event_message()? as i32))?;
                continue;
            }
            // A stop or a continue from outside.
            _ => continue,
        }
        match task.regs()?.rax {
            ckpt_restorer::FAILED => return Err(failed_operation(plan, mem)),
            word => return Ok(word),
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
fn warnings_of(plan: &Plan, mem: &ProcessMemory) -> Result<Vec<String>> {
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
    refused
        .chain(cgroup::rebuild(&process.cgroups, pid))
        .collect()
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

/// A process's children that are stopped have just told it so: what the process was told in its former life it
/// is not told again, and no SIGCHLD is left that was not there.
fn take_note_of_stops(
    leader: &mut Stopped,
    mem: &ProcessMemory,
    place: u64,
    process: &Process,
    job: &Job<'_>,
    cave: &Cave<'_>,
) -> Result<()> {
    let children = job.snapshot.processes.iter().filter(|p| {
        p.parent == process.pid && p.pid != process.pid && stop_signal(p, job).is_some()
    });
    let children: Vec<i32> = children.map(|p| p.pid).collect();
    if children.is_empty() {
        return Ok(());
    }
    let at = RemoteAddr(place);
    let sigchld = 1u64 << (libc::SIGCHLD - 1);
    mem.write(at, &[sigchld, 0, 0].map(u64::to_le_bytes).concat())?;
    if process.threads[0].seccomp.mode == 2 {
        suspend_seccomp(leader)?;
    }
    let mut calls = RemoteCalls::begin_without_scratch(leader, cave)?;
    for child in children {
        if !process.untold_stops.contains(&child) {
            let how = (libc::WUNTRACED | libc::WNOHANG) as u64;
            let args = [child as u64, 0, how, 0, 0, 0];
            calls.call("wait4", libc::SYS_wait4, args)?;
        }
    }
    let waits = |p: &crate::objects::signals::Pending| p.signal() == libc::SIGCHLD;
    if !process.pending.iter().any(waits) {
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
    calls.finish()?;
    Ok(())
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

/// Lets all go, of each process the leader last: until then the loss of the tracer kills the
/// whole process, which is then not there at all. Files are cut back when nothing else is left to
/// be done.
fn release(complete: Vec<Complete>, cuts: &[Cut]) -> Result<()> {
    fault::hit(Step::RestoreRelease)?;
    for cut in cuts {
        cut.make()?;
    }
    for task in complete.iter().flat_map(|c| &c.tasks) {
        task.set_options(0)?;
    }
    for task in complete.into_iter().flat_map(|c| c.tasks) {
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
