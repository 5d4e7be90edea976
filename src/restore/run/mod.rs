//! Creates the processes, has them execute their plans, releases them.

pub mod driver;
pub mod executor;
pub mod fill;
pub(super) mod handover;
pub mod next_pid;
pub mod spawn;
pub mod stop;
