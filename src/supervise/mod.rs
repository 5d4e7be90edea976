//! Supervises a program for a shell: waits for it, passes signals on to it, stops when it stops, and takes
//! checkpoints of it at intervals.
//!
//! Everything waits in one `poll` on a signalfd, whose timeout is the next checkpoint. Another process takes the
//! checkpoint (see [`periodic`]), for two reasons: a defect there must not end the supervisor, and Linux lets the
//! threads of one process reap each other's tracees, so that a tracer inside the supervisor would consume the
//! program's exit status (see `wait_consider_task` in kernel/exit.c).

use crate::children::Change;

mod child;
pub mod console;
pub mod foreground;
pub mod interval;
pub mod periodic;
pub mod relay;
pub mod retention;
pub mod signals;
mod sys;

pub use child::{Child, start, wait_for};
pub use sys::Signals;

/// A job to wait for.
pub trait Supervised {
    /// Its root, in our pid namespace.
    fn pid(&self) -> i32;

    /// The child of ours whose end [`changed`](Self::changed) reports; it must not be reaped elsewhere.
    fn child(&self) -> i32;

    /// Its state change, without waiting.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn changed(&mut self) -> nix::Result<Option<Change>>;

    /// Passes a signal on.
    ///
    /// # Errors
    /// The kernel's error.
    fn send(&self, received: &signals::Received) -> nix::Result<()>;

    /// A descriptor that is readable when it has changed, in addition to `SIGCHLD`.
    fn wakes(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }
}

/// Handling of a terminal while its job is waited for.
pub trait Terminal {
    /// A signal has arrived; true if it concerns the terminal and not the job.
    fn takes(&mut self, _signal: i32) -> bool {
        false
    }

    /// Called before we stop, because the job was stopped by its terminal.
    fn before_stop(&mut self) {}

    /// Called when we continue.
    fn after_stop(&mut self) {}
}

/// For a job whose terminal needs no handling.
pub struct NoTerminal;

impl Terminal for NoTerminal {}
