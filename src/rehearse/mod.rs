//! Whether an image becomes the job again, found out before the job is ended.
//!
//! A [`Prover`] is a process beside `ckpt attach`. It stays where `restore` will be called: outside of
//! the namespaces that a job may have to itself and that its checkpoint enters.

mod canonical;
mod compare;
mod pages;
mod private;
mod prover;
mod stage;

pub use crate::error::Difference;
pub use prover::Prover;
pub use stage::in_the_way;
