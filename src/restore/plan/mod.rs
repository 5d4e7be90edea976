//! From the decisions to the plans.

mod build;
mod job;

pub use job::{Job, Planned};
