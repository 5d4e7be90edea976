//! Files of a job, made and opened before its processes exist.

pub mod contents;
pub mod env;
mod named;
pub mod pty;
pub mod put;
