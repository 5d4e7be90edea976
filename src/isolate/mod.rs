//! A pid namespace for a job: its pids are then free whoever has them outside.
//!
//! ```text
//! restore ──┬── (the middle: makes the namespaces, gone in a moment)
//!           └── ckpt-init, pid 1 inside: rebuilds the job, then reaps
//!                └── the job
//! ```
//!
//! Who asked for it stays outside, with the terminal, the signals and the exit code ([`Init`]). The
//! work is done by the namespace's first process, as it would be done outside: all pids that it
//! meets are the job's own. Both talk by a link. When the job's root has ended the outer
//! process is told; the first process ends when nobody is left, since its end is the end of all
//! processes inside.

mod enter;
mod init;
mod link;
mod make;
mod outside;

pub use enter::{Visited, visit};
pub use link::Link;
pub use make::{IdMaps, Owner, Spec, start};
pub use outside::{Init, Running};
