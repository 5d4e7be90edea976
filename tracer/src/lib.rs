//! Mechanisms for live Linux tasks: typed ptrace, freezing, remote system calls, `/proc` readers.
//!
//! This crate knows nothing of images and policy. Its modules:
//!
//! * [`task`]: a traced task as a type state, [`Running`](task::Running) and [`Stopped`](task::Stopped);
//! * [`freeze`]: stops every task of a process, and releases them again;
//! * [`remote`]: system calls executed in a stopped task, such that the task survives the loss of its tracer at any
//!   moment;
//! * [`cpuid`]: emulation of CPUID for traced programs;
//! * [`mem`]: another process's memory, addressed by [`RemoteAddr`];
//! * [`dispatch`]: syscall user dispatch of a task;
//! * [`refusal`]: why the kernel refuses to attach;
//! * [`proc`]: typed readers of `/proc`;
//! * [`sock_diag`]: sockets, their peers and backlogs;
//! * [`features`]: what this kernel and user support, probed once;
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
pub mod sock_diag;
pub mod syscall_names;
pub mod task;
pub mod trial;
mod vdso;

pub use addr::RemoteAddr;
pub use error::{AttachError, Error, Result};
pub use ids::{Pid, Tid};
