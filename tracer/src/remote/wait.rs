//! Resumes a task in the cave up to a stop.

use super::RemoteCalls;
use crate::task::{Resume, Stop, Stopped};
use crate::{Error, Pid, Result};

/// Resumes a task in place and waits for its next stop.
pub(super) fn advance(pid: Pid, task: &mut Stopped, how: Resume, signal: i32) -> Result<Stop> {
    let tid = task.tid();
    task.advance(pid, how, signal)?;
    match task.stop() {
        Stop::Exec | Stop::Clone | Stop::Other(_) => Err(Error::UnexpectedStop {
            tid,
            what: format!("{:?}", task.stop()),
        }),
        stop => Ok(stop),
    }
}

impl RemoteCalls<'_> {
    pub(super) fn reach_syscall_stop(&mut self) -> Result<()> {
        let mut signal = 0;
        loop {
            match advance(self.cave.mem.pid(), self.task, Resume::Syscall, signal)? {
                Stop::Syscall => return Ok(()),
                // Only SIGSTOP passes a full mask. It takes effect when the task is detached; until then the tracer
                // decides.
                Stop::Signal(arrived) => signal = arrived,
                _ => signal = 0,
            }
        }
    }

    /// If it is in none.
    pub(super) fn reach_event_stop(&mut self) -> Result<()> {
        self.task.interrupt()?;
        let mut signal = 0;
        while !matches!(self.task.stop(), Stop::Event(_)) {
            match advance(self.cave.mem.pid(), self.task, Resume::Cont, signal)? {
                Stop::Signal(arrived) => signal = arrived,
                _ => signal = 0,
            }
        }
        Ok(())
    }
}
