//! The loop that waits for a program.

use std::io;
use std::process::Command;
use std::time::{Duration, Instant};

use ckpt_tracer::Pid as CkptPid;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, raise};
use nix::unistd::{Pid, getpgid, getpgrp};

use super::periodic::Periodic;
use super::signals::{Received, is_forwarded, stops_the_shell_job};
use super::sys::{Signals, send};
use super::{Supervised, Terminal};
use crate::children::{Change, changed, reap_adopted};
use crate::guard::{Entrance, Watch, children_but};

/// Starts a program in our process group, with our original signal state; returns its pid. `traced` says that
/// checkpoints will be taken; with an entrance it starts under its guard.
///
/// # Errors
/// When the program cannot be started.
pub fn start(
    mut command: Command,
    signals: &Signals,
    traced: bool,
    entrance: Option<Entrance>,
) -> io::Result<i32> {
    signals.leave_to(&mut command, traced || entrance.is_some());
    if let Some(entrance) = entrance {
        entrance.pass_through(&mut command);
    }
    // Dropping the handle has no effect on the child; `wait_for` reaps it.
    Ok(command.spawn()?.id() as i32)
}

/// A child of this process.
#[derive(Clone, Copy, Debug)]
pub struct Child(pub i32);

impl Supervised for Child {
    fn pid(&self) -> i32 {
        self.0
    }

    fn child(&self) -> i32 {
        self.0
    }

    fn changed(&mut self) -> nix::Result<Option<Change>> {
        changed(self.0)
    }

    fn send(&self, received: &Received) -> nix::Result<()> {
        send(self.0, received)
    }
}

/// Waits for the end of a job, passes signals on to it meanwhile, and takes checkpoints when they are due. Returns
/// its exit code, or 128 plus the signal that ended it.
///
/// # Errors
/// When the kernel refuses to wait: `ECHILD` when the child was reaped elsewhere.
pub fn wait_for(
    job: &mut dyn Supervised,
    signals: &Signals,
    mut periodic: Option<&mut Periodic>,
    terminal: &mut dyn Terminal,
    watch: &mut Watch,
) -> nix::Result<i32> {
    let mut end = None;
    loop {
        while let Some(received) = signals.next()? {
            match end {
                None if terminal.takes(received.signal) => {}
                None => forward(job, &received)?,
                // Only the last checkpoint is being waited for; a signal to end ends us.
                Some(_) if is_forwarded(&received, job.pid(), false) => {
                    periodic.iter_mut().for_each(|periodic| periodic.abandon());
                }
                Some(_) => {}
            }
        }
        // A child may change its state again while the last change is handled.
        while end.is_none() {
            match job.changed()? {
                Some(Change::Ended(code)) => end = Some(code),
                Some(Change::Stopped(signal)) if stops_the_shell_job(signal) => {
                    terminal.before_stop();
                    stop_like(signal)?;
                    terminal.after_stop();
                }
                Some(Change::Stopped(_)) => {}
                None => break,
            }
        }
        let helper = periodic.as_deref().and_then(Periodic::helper);
        let ours = |guard: Option<i32>| {
            let [helper, guard] = [helper, guard].map(|pid| pid.unwrap_or(job.child()));
            [job.child(), helper, guard]
        };
        if end.is_none() {
            let known = ours(watch.pid());
            watch.look(|| all_of(job, &known));
        }
        reap_adopted(&ours(watch.pid()));
        let now = Instant::now();
        let timeout = match periodic.as_deref_mut() {
            Some(periodic) => {
                periodic.reap(now)?;
                match end {
                    Some(code) if !periodic.is_busy() => return Ok(code),
                    Some(_) => None,
                    None => periodic.begin_if_due(now),
                }
            }
            None if end.is_some() => return Ok(end.unwrap_or_default()),
            None => None,
        };
        let wakes = job.wakes().filter(|_| end.is_none());
        let wakes = [Some(std::os::fd::AsFd::as_fd(signals)), wakes];
        let fds = wakes.into_iter().flatten();
        let mut fds: Vec<PollFd<'_>> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, poll_timeout(timeout)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// The root of a job and its orphans: children of ours, or of the first process of a namespace.
fn all_of(job: &dyn Supervised, known: &[i32]) -> Vec<CkptPid> {
    let mut all = vec![CkptPid(job.pid())];
    all.extend(children_but(std::process::id() as i32, known));
    if job.child() != job.pid() {
        all.extend(children_but(job.child(), &[job.pid()]));
    }
    all
}

/// Rounded up, so that a checkpoint is due when the poll ends; at most the maximum of poll.
fn poll_timeout(timeout: Option<Duration>) -> PollTimeout {
    let Some(timeout) = timeout else {
        return PollTimeout::NONE;
    };
    let millis = timeout.as_nanos().div_ceil(1_000_000);
    i32::try_from(millis)
        .ok()
        .and_then(|ms| ms.try_into().ok())
        .unwrap_or(PollTimeout::MAX)
}

fn forward(job: &dyn Supervised, received: &Received) -> nix::Result<()> {
    let root = Pid::from_raw(job.pid());
    let same_group = getpgid(Some(root)).is_ok_and(|group| group == getpgrp());
    if !is_forwarded(received, job.pid(), same_group) {
        return Ok(());
    }
    match job.send(received) {
        // It has changed its user (a set-uid program): a shell could not signal it either.
        Ok(()) | Err(Errno::ESRCH | Errno::EPERM) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Stops us by the signal that stopped the child, so that our shell shows its prompt; returns when we are continued.
/// In an orphaned process group the kernel ignores it, as for any program.
fn stop_like(signal: i32) -> nix::Result<()> {
    let signal = Signal::try_from(signal)?;
    raise(signal)?;
    // The signal is blocked, so that it can be read; unblocking delivers it.
    let mut only = SigSet::empty();
    only.add(signal);
    only.thread_unblock()?;
    if signal == Signal::SIGTSTP {
        only.thread_block()
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_never_end_early() {
        let millis = |timeout| poll_timeout(Some(timeout)).as_millis();
        assert_eq!(millis(Duration::ZERO), Some(0));
        assert_eq!(millis(Duration::from_nanos(1)), Some(1));
        assert_eq!(millis(Duration::from_micros(1500)), Some(2));
        assert_eq!(millis(Duration::MAX), PollTimeout::MAX.as_millis());
        assert!(poll_timeout(None).is_none());
    }
}
