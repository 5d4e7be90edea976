//! Mechanism over live Linux tasks: typed ptrace, freezing, remote system calls, `/proc` readers.
//!
//! This crate knows no image and no policy. It offers
//!
//! * [`task`]: a traced task as a type state, [`Running`](task::Running) and [`Stopped`](task::Stopped);
//! * [`freeze`]: stopping every task of a process, and letting go of it again;
//! * [`remote`]: system calls executed in a stopped task, such that the task survives the
//!   loss of its tracer at any moment;
//! * [`cpuid`]: programs that are answered when they ask what the processor is;
//! * [`mem`]: another process's memory, addressed by [`RemoteAddr`];
//! * [`dispatch`]: tasks whose own system calls are dispatched to the program;
//! * [`refusal`]: why the kernel lets nobody attach;
//! * [`proc`]: typed readers of `/proc`;
//! * [`unix_diag`]: unix domain sockets, their peers and backlogs;
//! * [`features`]: what this kernel and this user can do, probed once;
//! * [`capabilities`]: every use of a capability, in one table.

pub mod abi;
mod addr;
pub mod blob;
pub mod bystander;
pub mod capabilities;
pub mod cpuid;
pub mod dispatch;
mod error;
pub mod fault;
pub mod features;
pub mod freeze;
mod ids;
pub mod kcmp;
pub mod mem;
pub mod pidfd;
pub mod proc;
pub mod refusal;
pub mod remote;
pub mod syscall_names;
pub mod task;
pub mod trial;
pub mod unix_diag;
mod vdso;

pub use addr::RemoteAddr;
pub use error::{AttachError, Error, Result};
pub use ids::{Pid, Tid};
