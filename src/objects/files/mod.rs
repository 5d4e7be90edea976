//! Open file descriptions and the descriptors that refer to them; one file a kind.

use serde::{Deserialize, Serialize};

pub mod device;
pub mod epoll;
pub mod eventfd;
pub mod inotify;
pub mod memfd;
pub mod pipe;
pub mod regular;
pub mod signalfd;
pub mod outside;
pub mod timerfd;

/// One descriptor of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdEntry {
    /// The number.
    pub fd: i32,
    /// Index in the snapshot's descriptions.
    pub description: usize,
    /// `FD_CLOEXEC`.
    pub close_on_exec: bool,
}

/// An open file description (`struct file`): what dup and fork share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Description {
    /// What kind of file, and its state.
    pub kind: Kind,
    /// Access mode and status flags, `F_GETFL` and `O_CLOEXEC` excluded.
    pub flags: u32,
    /// Who gets SIGIO.
    pub owner: Option<Owner>,
}

/// `F_SETOWN_EX` and `F_SETSIG`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// `F_OWNER_TID`, `F_OWNER_PID` or `F_OWNER_PGRP`.
    pub kind: i32,
    /// Whose.
    pub id: i32,
    /// `F_GETSIG`; 0 is SIGIO.
    pub signal: i32,
}

/// Kinds of open files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Kind {
    /// A regular file, directory or `O_PATH` handle.
    Regular(regular::Regular),
    /// A character device without state.
    Device(device::Device),
    /// One end of a pipe that is wholly inside the job.
    Pipe(pipe::PipeEnd),
    /// eventfd(2).
    EventFd(eventfd::EventFd),
    /// signalfd(2).
    SignalFd(signalfd::SignalFd),
    /// timerfd_create(2).
    TimerFd(timerfd::TimerFd),
    /// epoll(7).
    Epoll(epoll::Epoll),
    /// memfd_create(2).
    MemFd(memfd::MemFd),
    /// inotify(7).
    Inotify(inotify::Inotify),
    /// Something of the surroundings that the restored job gets anew: a terminal, or a pipe
    /// with its other end outside.
    Outside(outside::Outside),
}
