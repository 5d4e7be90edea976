//! Files of a job, created and opened before its processes.

pub mod contents;
pub mod env;
mod named;
pub mod pty;
pub mod put;
