//! Stopping a new process as a signal would have done, before it executes anything.
#![allow(unsafe_code)]

use ckpt_tracer::task::{Resume, Stop, Stopped};
use nix::errno::Errno;

use crate::error::{Error, Result};
use crate::objects::process::Process;

/// Brings a process, whose tasks are all ours and of which the leader comes last, into the group
/// stop of `signal`. It stays in it when its tasks are let go.
///
/// The leader takes the signal, with everything else blocked meanwhile; then the others take part
/// in the stop. A task that is resumed for it comes to its stop before it is in user mode.
pub fn by_signal(tasks: &mut [Stopped], process: &Process, signal: i32) -> Result<()> {
    let Some((leader, others)) = tasks.split_last_mut() else {
        return Ok(());
    };
    // A stop signal that is caught now was sent in other circumstances.
    let caught = process.actions.iter().any(|a| a.signal == signal as u32);
    let signal = if caught { libc::SIGSTOP } else { signal };
    if !take(leader, process, signal)? && !take(leader, process, libc::SIGSTOP)? {
        return Err(Error::Restore(format!(
            "process {} does not stop, as it was stopped at the checkpoint",
            process.pid
        )));
    }
    for task in others {
        task.advance_among_others(Resume::Cont, 0)?;
    }
    Ok(())
}

/// False when the kernel ignores the signal: SIGTSTP and its like in an orphaned process group.
fn take(leader: &mut Stopped, process: &Process, signal: i32) -> Result<bool> {
    leader.set_signal_mask(!(1 << (signal - 1)))?;
    let pid = process.pid;
    // SAFETY: a call without pointers; the task is ours and stopped.
    let sent = unsafe { libc::syscall(libc::SYS_tgkill, pid, pid, signal) };
    Errno::result(sent)
        .map_err(|e| Error::Restore(format!("cannot stop process {pid}: {}", e.desc())))?;
    while leader.stop() != Stop::Signal(signal) {
        leader.advance_among_others(Resume::Cont, 0)?;
    }
    // If the signal does nothing, the task comes to an event stop instead of going on.
    leader.interrupt()?;
    leader.advance_among_others(Resume::Cont, signal)?;
    let stopped = leader.stop() == Stop::Event(signal);
    leader.set_signal_mask(process.threads[0].signal_mask)?;
    Ok(stopped)
}
