//! Process and thread ids as distinct types.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Id of a process (a thread group), as seen in the caller's pid namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Pid(pub i32);

/// Id of a task (a thread), as seen in the caller's pid namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Tid(pub i32);

impl Pid {
    /// Our own.
    pub fn own() -> Self {
        Self(std::process::id() as i32)
    }

    /// The number, for system calls.
    pub const fn raw(self) -> i32 {
        self.0
    }

    /// The first task of the process, whose tid equals the pid.
    pub const fn leader(self) -> Tid {
        Tid(self.0)
    }
}

impl Tid {
    /// The number, for system calls.
    pub const fn raw(self) -> i32 {
        self.0
    }
}

impl fmt::Display for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Tid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
