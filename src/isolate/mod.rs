//! A pid namespace for a job: its pids are then free whoever has them outside.
//!
//! ```text
//! restore ──┬── (the middle: makes the namespaces, gone in a moment)
//!           └── ckpt-init, pid 1 inside: rebuilds the job, then reaps
//!                └── the job
//! ```
//!
//! If the job's root was the first process of its namespace it is so again, and what rebuilds it comes
//! beside it, for as long as that takes ([`First`]):
//!
//! ```text
//! restore ──┬── (the middle)
//!           ├── the job, from pid 1 on
//!           └── (the builder: a process inside, gone when the job runs)
//! ```
//!
//! Who asked for it stays outside, with the terminal, the signals and the exit code ([`Init`]). The
//! work is done by a process of the namespace, as it would be done outside: all pids that it
//! meets are the job's own. Both talk by a link. When the job's root has ended the outer
//! process is told; the first process ends when nobody is left, since its end is the end of all
//! processes inside.

mod enter;
mod first;
mod idmap;
mod init;
mod link;
mod make;
mod outside;
mod owner;
mod work;

pub(crate) use enter::is_init;
pub use enter::{Visited, visit};
pub use first::First;
pub(crate) use first::cannot_place;
pub use idmap::IdMaps;
pub use link::Link;
pub use make::{Spec, start};
pub use outside::{Init, Running};
pub use owner::Owner;
