//! Stops a new process as a signal would have, before it executes anything.

use ckpt_sys::process;
use ckpt_tracer::Pid;
use ckpt_tracer::task::{Resume, Stop, Stopped};

use crate::error::{Error, Result};
use crate::objects::process::Process;

/// Puts a process into the group stop of `signal`. We trace all its tasks, the leader comes last. It stays in the
/// group stop when its tasks are detached.
///
/// The leader takes the signal, with everything else blocked meanwhile; then the other tasks join the group stop. A
/// task resumed for that stops before it returns to user mode.
pub fn by_signal(tasks: &mut [Stopped], process: &Process, signal: i32) -> Result<()> {
    let Some((leader, others)) = tasks.split_last_mut() else {
        return Ok(());
    };
    // A stop signal that is caught now was sent before the handler was installed.
    let caught = process.actions.iter().any(|a| a.signal == signal as u32);
    let signal = if caught { libc::SIGSTOP } else { signal };
    if !take(leader, process, signal)? && !take(leader, process, libc::SIGSTOP)? {
        return Err(Error::DoesNotStop { pid: process.pid });
    }
    for task in others {
        task.advance_among_others(Resume::Cont, 0)?;
    }
    Ok(())
}

/// Sends a signal to a process.
pub fn send(pid: Pid, signal: i32) -> Result<()> {
    process::kill(pid.raw(), signal)
        .map_err(|e| Error::step(format!("signal process {pid}"), e.desc()))
}

/// Ends the group stop of a process whose tasks we all trace, as SIGCONT would have, so that its parent can be
/// notified (`WCONTINUED`); `pending` says whether that signal stays.
pub fn is_over(tasks: &mut [Stopped], process: &Process, pending: bool) -> Result<()> {
    const CONT: u64 = 1 << (libc::SIGCONT - 1);
    send(Pid(process.pid), libc::SIGCONT)?;
    let Some((leader, others)) = tasks.split_last_mut() else {
        return Ok(());
    };
    leader.set_signal_mask(if pending { !0 } else { !CONT })?;
    while !pending && leader.stop() != Stop::Signal(libc::SIGCONT) {
        leader.advance_among_others(Resume::Cont, 0)?;
    }
    // On the way to its next stop it notifies its parent.
    leader.interrupt()?;
    while leader.stop() != Stop::Event(libc::SIGTRAP) {
        leader.advance_among_others(Resume::Cont, 0)?;
    }
    leader.set_signal_mask(process.threads[0].signal_mask)?;
    for task in others {
        task.interrupt()?;
        task.advance_among_others(Resume::Cont, 0)?;
    }
    Ok(())
}

/// Returns false if the kernel ignores the signal: SIGTSTP and the like in an orphaned process group.
fn take(leader: &mut Stopped, process: &Process, signal: i32) -> Result<bool> {
    leader.set_signal_mask(!(1 << (signal - 1)))?;
    let pid = process.pid;
    process::kill_thread(pid, pid, signal)
        .map_err(|e| Error::step(format!("stop process {pid}"), e.desc()))?;
    while leader.stop() != Stop::Signal(signal) {
        leader.advance_among_others(Resume::Cont, 0)?;
    }
    // If the signal has no effect, the task stops at an event instead of continuing.
    leader.interrupt()?;
    leader.advance_among_others(Resume::Cont, signal)?;
    let stopped = leader.stop() == Stop::Event(signal);
    leader.set_signal_mask(process.threads[0].signal_mask)?;
    Ok(stopped)
}
