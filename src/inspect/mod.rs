//! Looking into an image: what the job was, where its threads are, what it has open and mapped.
//!
//! Everything here bears any image whose container is whole: its metadata may have been made by
//! somebody else. [`references`](crate::objects::references) says whether it fits together. Memory is read through
//! [`TargetMemory`](crate::objects::memory::image::TargetMemory), so that the same views can be given of a live process.

pub mod attributes;
pub mod calls;
pub mod disassembly;
pub mod fds;
pub mod maps;
pub mod needs;
pub mod summary;
pub mod symbols;
pub mod threads;
