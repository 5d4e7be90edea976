//! The first new process: created with its old pid and the descriptors that it inherits from us, executing the job's
//! own executable up to its first instruction.
//!
//! The exec sets `/proc/PID/exe`, and provides a clean address space and the kernel's mappings without any privilege.
//! The tracer stops the process before it executes anything of the program.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use ckpt_sys::exec::{self, Program, Step};
use ckpt_sys::files;
use ckpt_sys::pipes::pipe;
use ckpt_sys::process::{self, Fork};
use ckpt_tracer::Tid;
use ckpt_tracer::task::{Running, Stop, Stopped};
use nix::errno::Errno;

use super::next_pid;
use crate::error::{Error, Result};
use crate::isolate::{First, cannot_place};
use crate::objects::clock::Clocks;
use crate::objects::plan::PidMethod;
use crate::objects::process::Process;
use crate::restore::decide::pids;

/// The new processes: killed and reaped unless they were released.
#[derive(Default)]
pub struct NewProcesses {
    pids: Vec<i32>,
    /// The root, if it is the first process of our pid namespace. Our signals cannot kill it; our end does, which
    /// ends all.
    first: Option<First>,
    kept: bool,
}

impl NewProcesses {
    /// Adds one.
    pub fn add(&mut self, pid: i32) {
        self.pids.push(pid);
    }

    /// All are complete and kept.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for NewProcesses {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        let pids = std::mem::take(&mut self.pids);
        // Processes that have changed their user may refuse our signal; they end with us (EXITKILL). The pids are our
        // children's or tracees', and not reused before they are reaped.
        let killed = pids
            .into_iter()
            .filter(|pid| process::kill(*pid, libc::SIGKILL) != Err(Errno::EPERM));
        self.pids = killed.collect();
        for pid in self.pids.iter().rev() {
            // The leader's end is reported only after every thread that we trace has been waited for.
            let tasks = ckpt_tracer::proc::tasks::list_tasks(Tid(*pid)).unwrap_or_default();
            let others = tasks.into_iter().filter(|t| t.raw() != *pid);
            for tid in others.map(Tid::raw).chain([*pid]) {
                let _ = process::end_of(tid);
            }
        }
        // Zombies that we inherited as a subreaper.
        while let Ok(Some(_)) = process::wait(-1, libc::__WALL | libc::WNOHANG) {}
    }
}

/// Creates the process and runs it to its exec stop; with `first`, that process executes the program.
pub fn spawn(
    process: &Process,
    executable: &File,
    descriptors: Vec<(OwnedFd, i32)>,
    clocks: Clocks,
    (first, pid_method): (Option<First>, PidMethod),
) -> Result<(NewProcesses, Stopped)> {
    crate::objects::limits::raise_descriptor_limit();
    let name = CString::new(process.threads[0].name.clone()).unwrap_or_default();
    let (report_read, report_write) = pipe().map_err(no_pipe)?;
    let mut created = NewProcesses::default();
    let is_first = first.is_some();
    let go_write;
    let go = match first {
        Some(first) => {
            first.request_exec(executable, &descriptors, &report_write, name, clocks)?;
            drop((report_write, descriptors));
            created.first.insert(first).go()
        }
        None => {
            let go_read;
            (go_read, go_write) = pipe().map_err(no_pipe)?;
            let program = Program::prepare(executable, descriptors, &go_read, &report_write);
            let program = program.map_err(cannot_place)?;
            let execute = || program.execute(&name, Some(go_write.as_fd()));
            let pid = fork_under(process.pid, pid_method, clocks, execute)?;
            created.add(pid);
            if pid != process.pid {
                return Err(Error::PidMissed { pid: process.pid });
            }
            go_write.as_fd()
        }
    };
    let task = Running::seize_with(Tid(process.pid), NEW_TASK_OPTIONS)?;
    let mut task = begin(go, task, report_read, is_first)?;
    leave_exec(&mut task)?;
    Ok((created, task))
}

/// Whether a new process may change to this security context, and then create threads with chosen ids: tried in a
/// child. Not if that would use up a wanted id.
pub fn may_become(context: &[u8], pid_method: PidMethod) -> bool {
    if pid_method == PidMethod::UseUp {
        return false;
    }
    // Last, a fork that always fails: its id is taken, which is reported only if choosing is permitted.
    let try_out = || {
        let attributes = files::open(Path::new("/proc/self/attr/current"), libc::O_WRONLY)?;
        nix::unistd::write(&attributes, context)?;
        match pid_method != PidMethod::SetTid || process::may_choose_pids() {
            true => Ok(()),
            false => Err(Errno::EPERM),
        }
    };
    process::in_a_child(try_out).is_ok()
}

/// Creates a child of ours with that pid and these clocks; it may get another pid, unless set_tid was used.
fn fork_under(
    pid: i32,
    pid_method: PidMethod,
    clocks: Clocks,
    execute: impl Fn() -> Infallible,
) -> Result<i32> {
    next_pid::aim(pid_method, pid)?;
    let created = clocks.during(|| {
        let created = match pid_method {
            PidMethod::SetTid => process::fork_under(pid),
            _ => process::fork_bare(),
        };
        match created? {
            Fork::Child => match execute() {},
            Fork::Parent(child) => Ok(child),
        }
    })?;
    created.map_err(|errno| cannot_have_pid(pid, errno))
}

/// Lets the new process continue to its exec.
fn begin(go: BorrowedFd<'_>, task: Running, report: OwnedFd, first: bool) -> Result<Stopped> {
    nix::unistd::write(go, b"!").map_err(Error::file("write to", "the new process"))?;
    let mut task = match task.wait_stopped() {
        Ok(stopped) => stopped,
        Err(_) => return Err(failed_before_exec(report)),
    };
    while task.stop() != Stop::Exec {
        // The first process does not end when it has failed.
        if first && task.stop() == Stop::Signal(libc::SIGTRAP) {
            return Err(failed_before_exec(report));
        }
        // An unexpected signal from outside.
        task = match task
            .resume(ckpt_tracer::task::Resume::Cont, 0)?
            .wait_stopped()
        {
            Ok(stopped) => stopped,
            Err(_) => return Err(failed_before_exec(report)),
        };
    }
    Ok(task)
}

/// For processes that create others: the loss of the tracer kills them, and their children are traced from the
/// beginning.
pub const NEW_TASK_OPTIONS: i32 = libc::PTRACE_O_EXITKILL
    | libc::PTRACE_O_TRACEEXEC
    | libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACECLONE;

/// The exec stop is inside the system call, whose exit would be taken for that of the first remote call. The event
/// stop comes after it, still before the program's first instruction.
pub fn leave_exec(task: &mut Stopped) -> Result<()> {
    task.interrupt()?;
    while !matches!(task.stop(), Stop::Event(_)) {
        task.advance_among_others(ckpt_tracer::task::Resume::Cont, 0)?;
    }
    Ok(())
}

fn cannot_have_pid(pid: i32, errno: Errno) -> Error {
    match errno {
        Errno::EEXIST => Error::refuse(crate::restore::decide::taken::pid_taken(pid)),
        Errno::EPERM => Error::refuse(pids::not_permitted(pid, "")),
        Errno::EINVAL => Error::refuse(pids::above_the_highest(pid)),
        other => Error::object(format!("process {pid}"), "created", other.desc()),
    }
}

fn failed_before_exec(report: OwnedFd) -> Error {
    match exec::failure(report) {
        Some((step, errno)) => {
            let step = match step {
                Step::Descriptors => "placing descriptors",
                Step::Exec => "executing the program's file",
            };
            let text = format!("the new process failed at {step}: {}", errno.desc());
            Error::Reported(text)
        }
        None => Error::Killed("the new process, before it could start,"),
    }
}

fn no_pipe(errno: Errno) -> Error {
    Error::step("make a pipe", errno.desc())
}
