//! A pid namespace for a job: its pids are free there, even if they are taken outside.
//!
//! ```text
//! restore ──┬── (intermediate: creates the namespaces, then ends)
//!           └── ckpt-init, pid 1 inside: rebuilds the job, then reaps
//!                └── the job
//! ```
//!
//! If the job's root was the first process of its namespace it becomes that again, and the building process is its
//! temporary sibling ([`First`]):
//!
//! ```text
//! restore ──┬── (intermediate)
//!           ├── the job, from pid 1 on
//!           └── (building process inside, ends when the job runs)
//! ```
//!
//! The calling process stays outside, with the terminal, the signals and the exit code ([`Init`]). A process of the
//! namespace does the work, as it would outside: all pids that it sees are the job's own. The two communicate by a
//! link. The end of the job's root is reported to the outer process; the first process ends when no other is left,
//! since its end kills all processes inside.

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
