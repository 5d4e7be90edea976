//! Inspects an image: the job, the positions of its threads, its open files and mappings.
//!
//! Everything here works with any image whose container is intact: its metadata is untrusted.
//! [`references`](crate::objects::references) checks its consistency. Memory is read through
//! [`TargetMemory`](crate::objects::memory::image::TargetMemory), so that a live process has the same views.

pub mod attributes;
pub mod calls;
pub mod disassembly;
pub mod fds;
pub mod maps;
pub mod needs;
pub mod summary;
pub mod symbols;
pub mod threads;
