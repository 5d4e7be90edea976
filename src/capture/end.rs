//! The end of a job that has been checkpointed with `--kill`.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use ckpt_sys::process;
use ckpt_tracer::Tid;
use ckpt_tracer::task::Stopped;
use nix::poll::{PollFd, PollFlags, poll};

use crate::error::Result;
use crate::objects::job::FrozenJob;
use crate::objects::source::Source;

/// All at once, so that none sees the end of another one, and children first: a parent's end would orphan a process group with a
/// stopped child in it, which is told to everything in that group, us too, by SIGHUP (`kill_orphaned_pgrp`, kernel/exit.c).
pub(super) fn kill(mut job: FrozenJob) -> Result<()> {
    let groups = job.groups.take();
    for source in job.sources().into_iter().rev() {
        match source.pidfd.signal(libc::SIGKILL) {
            // Ended by the end of another one, in a pid namespace.
            Ok(()) | Err(ckpt_tracer::Error::Died { .. }) => {}
            Err(e) => return Err(e.into()),
        }
    }
    // Of each process all but the first, whose end is its parent's to know.
    let threads = job.processes.iter().flat_map(|p| &p.frozen.tasks()[1..]);
    let tids: Vec<Tid> = threads.map(Stopped::tid).collect();
    let sources = job.thaw()?;
    // Version 1 would freeze what has not ended yet, for ever.
    await_end(&sources, tids);
    drop(groups);
    Ok(())
}

/// A process that was killed has its pid, its names and its memory until the kernel has taken it apart.
/// A restore that comes at once shall find them free. It awaits itself what takes longer. A process ends
/// when its threads have been waited for, and those that were traced when they were killed are ours.
fn await_end(sources: &[Source], mut tids: Vec<Tid>) {
    let give_up = Instant::now() + Duration::from_secs(10);
    let flags = libc::WNOHANG | libc::__WALL;
    while !tids.is_empty() && Instant::now() < give_up {
        tids.retain(|tid| process::wait(tid.raw(), flags) == Ok(None));
        if !tids.is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    for source in sources {
        let left = give_up.saturating_duration_since(Instant::now());
        let mut ended = [PollFd::new(source.pidfd.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut ended, left.as_millis() as u16);
    }
}
