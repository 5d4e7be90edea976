//! Descriptors whose far end is outside the job: 0 to 2 become those of `restore`, others are
//! named by `restore --fd N=PATH`.

use serde::{Deserialize, Serialize};

/// Something of the surroundings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outside {
    /// The descriptor through which it was seen first; `restore` gives its own of that number.
    pub fd: i32,
    /// What it was: a terminal, a pipe, a socket.
    pub what: Surroundings,
    /// The name that the kernel shows for it.
    pub name: String,
}

/// What may be taken from the surroundings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Surroundings {
    /// A terminal.
    Terminal,
    /// A pipe or FIFO with its other end outside.
    Pipe,
    /// A connected socket.
    Socket,
}
