//! Standing between a shell and a program: waiting for it, passing signals on to it, stopping
//! when it stops, and taking checkpoints of it now and then.
//!
//! Everything waits in one `poll` on a signalfd, whose timeout is the next checkpoint. The
//! checkpoint itself is taken by another process (see [`periodic`]), for two reasons: a defect
//! there must not take the supervisor with it, and Linux lets the threads of one process reap
//! each other's tracees, so that a tracer inside the supervisor would swallow the program's exit
//! status (see `wait_consider_task` in kernel/exit.c).

mod child;
pub mod interval;
pub mod periodic;
pub mod retention;
pub mod signals;
mod sys;

pub use child::{start, wait_for};
pub use sys::{Signals, adopt_orphans};
