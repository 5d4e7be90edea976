//! Standing between a shell and a program: waiting for it, passing signals on to it, stopping
//! when it stops, and taking checkpoints of it now and then.
//!
//! Everything waits in one `poll` on a signalfd, whose timeout is the next checkpoint. The
//! checkpoint itself is taken by another process (see [`periodic`]), for two reasons: a defect
//! there must not take the supervisor with it, and Linux lets the threads of one process reap
//! each other's tracees, so that a tracer inside the supervisor would swallow the program's exit
//! status (see `wait_consider_task` in kernel/exit.c).

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

/// A job that is waited for.
pub trait Supervised {
    /// Its root, as we see it.
    fn pid(&self) -> i32;

    /// The child of ours whose end is told by [`changed`](Self::changed), and is not to be waited
    /// for by anybody else.
    fn child(&self) -> i32;

    /// What has become of it, without waiting.
    ///
    /// # Errors
    /// When the kernel refuses to tell.
    fn changed(&mut self) -> nix::Result<Option<Change>>;

    /// Passes a signal on.
    ///
    /// # Errors
    /// The kernel's answer.
    fn send(&self, received: &signals::Received) -> nix::Result<()>;

    /// What is readable when it has changed, beside a `SIGCHLD`.
    fn wakes(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }
}

/// What is done about a terminal while its job is waited for.
pub trait Terminal {
    /// A signal has come; true when it was about the terminal and is not for the job.
    fn takes(&mut self, _signal: i32) -> bool {
        false
    }

    /// We are about to stop, because the job was stopped by its terminal.
    fn before_stop(&mut self) {}

    /// We go on.
    fn after_stop(&mut self) {}
}

/// Of a job whose terminal needs nothing.
pub struct NoTerminal;

impl Terminal for NoTerminal {}
