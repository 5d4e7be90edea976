//! The doorbell: a signal that the program ignores, and a traced task stops for.

use super::RemoteCalls;
use crate::Pid;
use crate::task::{Stop, Stopped};

/// A signal that the process ignores, to be the doorbell. SIGCONT wakes a stopped process, so
/// it is the last choice and none for a stopped one. One that any of the tasks blocks is none
/// either: it may be waiting, to be read from a signalfd, and would be taken with the ring.
pub(super) fn doorbell(pid: Pid, tasks: &[Stopped], stopped: bool) -> Option<i32> {
    let signals = crate::proc::status::read_status(pid).ok()?.signals;
    let mut taken = signals.caught;
    for task in tasks {
        taken |= task.signal_mask().ok()?;
    }
    let cont = (!stopped).then_some(libc::SIGCONT);
    [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD]
        .into_iter()
        .chain(cont)
        .find(|signal| taken & (1 << (signal - 1)) == 0)
}

impl RemoteCalls<'_> {
    pub(super) fn at_doorbell(&self) -> bool {
        matches!((self.task.stop(), self.doorbell), (Stop::Signal(at), Some(bell)) if at == bell)
    }
}
