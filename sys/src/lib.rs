//! Safe wrappers of system calls, and bytes of the kernel's as text: the lowest crate, without knowledge of jobs, images and
//! tracing.
//!
//! One module for each area of the kernel, one function for each call. A function is here if the call is needed in
//! more than one place or has no safe wrapper elsewhere; it uses rustix where rustix has the call, else libc.
//! Arguments are those of the manual page (flags and commands as its constants), descriptors are borrowed, results
//! are owned. Errors are [`Errno`] as the manual page describes them.
//!
//! ptrace, remote calls and other operations on other tasks are in the crate `ckpt-tracer`.

pub mod as_owner;
pub mod attributes;
pub mod channel;
pub mod clocks;
pub mod control;
pub mod credentials;
pub mod events;
pub mod exec;
pub mod files;
pub mod helper;
pub mod lookup;
pub mod memory;
pub mod mounts;
pub mod mqueue;
pub mod namespaces;
pub mod pipes;
pub mod prctl;
pub mod process;
pub mod signals;
pub mod sockets;
pub mod standard;
pub mod sysv;
pub mod tasks;
pub mod text;
pub mod tty;

pub use nix::errno::Errno;

/// Result of a system call.
pub type Result<T> = std::result::Result<T, Errno>;

/// Converts an errno of rustix.
fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

/// The errno of an error of the standard library; `EIO` where it has none.
pub fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}
