//! Standing between a shell and a program: waiting for it, passing signals on to it, stopping
//! when it stops, and taking checkpoints of it now and then.
//!
//! Everything waits in one `poll` on a signalfd, whose timeout is the next checkpoint. The
//! checkpoint itself is taken by another process (see [`periodic`]), for two reasons: a defect
//! there must not take the supervisor with it, and Linux lets the threads of one process reap
//! each other's tracees, so that a tracer inside the supervisor would swallow the program's exit
//! status (see `wait_consider_task` in kernel/exit.c).

mod child;
pub mod console;
pub mod interval;
pub mod periodic;
pub mod relay;
pub mod retention;
pub mod signals;
mod sys;

pub use child::{start, wait_for};
pub use sys::{Signals, adopt_orphans};

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
