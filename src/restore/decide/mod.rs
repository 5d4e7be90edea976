//! Decisions of a restore, one subject a file.

pub mod clock;
pub(super) mod host;
mod ids;
pub(super) mod late;
pub mod pids;
pub mod surroundings;
pub(super) mod taken;
pub mod terminals;
