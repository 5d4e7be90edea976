//! Rehearsal: whether the job can be restored from an image, checked before the job is ended.
//!
//! A [`Prover`] is a process beside `ckpt attach`. It stays in the namespaces where `restore` will be called, outside
//! those that a job may have of its own and that its checkpoint enters.

mod canonical;
mod compare;
mod pages;
mod private;
mod prover;
mod stage;

pub use crate::error::Difference;
pub use prover::Prover;
pub use stage::in_the_way;
