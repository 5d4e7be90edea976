//! System calls with safe faces: the lowest floor, which knows nothing of jobs, images and tracing.
//!
//! One module a kernel area, one function a call. A function is here if the call is needed in more than one place or
//! has no safe face elsewhere; inside it is rustix where rustix has the call, else libc. Arguments are what the
//! manual page says (flags and commands as its constants), descriptors are borrowed, results are owned. Errors are
//! the kernel's, as [`Errno`]; the manual page that is named says what they mean.
//!
//! ptrace, remote calls and what else is done to other tasks is in the crate `ckpt-tracer`.

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
pub mod tty;

pub use nix::errno::Errno;

/// The answer of a system call.
pub type Result<T> = std::result::Result<T, Errno>;

/// rustix has a type of its own for the same numbers.
fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

/// The number in an error of the standard library; `EIO` where that has none.
pub fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}
