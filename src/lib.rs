//! Checkpoint and restore of running programs, from outside.
//!
//! Data flow: a live job is frozen ([`ckpt_tracer`]), and captured into a [`Snapshot`](objects::Snapshot) and a
//! stream of pages ([`capture`]), which are stored in an image ([`ckpt_image`]). [`restore`] turns the snapshot into
//! a plan, which the freestanding restorer executes in the new process.

#![forbid(unsafe_code)]

pub mod capture;
pub mod children;
pub mod cli;
pub mod guard;
pub mod host;
pub mod inspect;
pub mod isolate;
mod metered;
pub mod progress;
pub mod rehearse;
pub mod restore;
pub mod snapshot;
pub mod supervise;

pub use ckpt_objects as objects;
pub use ckpt_objects::{Error, Obstacle, Result, error, text};
