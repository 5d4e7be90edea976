//! Ends a job that has been checkpointed with `--kill`.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use ckpt_sys::process;
use ckpt_tracer::Tid;
use ckpt_tracer::task::Stopped;
use nix::poll::{PollFd, PollFlags, poll};

use crate::error::Result;
use crate::objects::job::FrozenJob;
use crate::objects::source::Source;

/// Kills all before any is reaped, so that none sees the end of another, and children first: the end of a parent
/// would orphan a process group with a stopped child, and everything in that group, including us, would get SIGHUP
/// (`kill_orphaned_pgrp`, kernel/exit.c).
pub(super) fn kill(mut job: FrozenJob) -> Result<()> {
    let groups = job.groups.take();
    for source in job.sources().into_iter().rev() {
        match source.pidfd.signal(libc::SIGKILL) {
            // In a pid namespace, killed by the end of its first process.
            Ok(()) | Err(ckpt_tracer::Error::Died { .. }) => {}
            Err(e) => return Err(e.into()),
        }
    }
    // All threads but the leaders, whose end is reported to their parents.
    let threads = job.processes.iter().flat_map(|p| &p.frozen.tasks()[1..]);
    let tids: Vec<Tid> = threads.map(Stopped::tid).collect();
    let sources = job.thaw()?;
    // Version 1 would freeze processes that have not ended yet, forever.
    await_end(&sources, tids);
    drop(groups);
    Ok(())
}

/// Waits for the end of the threads: a killed process keeps its pid, its names and its memory until the kernel has
/// released them, and an immediate restore should find them free. For longer delays `restore` waits itself. A process
/// ends after its threads have been reaped, and those that were traced when they were killed are reaped by us.
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
