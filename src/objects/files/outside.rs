//! Descriptors whose far end is outside the job: 0 to 2 become those of `restore`, others are
//! named by `restore --fd N=PATH`.

use serde::{Deserialize, Serialize};

use super::{Kind, Look};
use crate::error::Obstacle;
use crate::objects::Snapshot;
use crate::restore::plan::Inherited;

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

/// Captures a descriptor that leads outside.
pub fn capture(look: &Look, what: Surroundings) -> Kind {
    Kind::Outside(Outside {
        fd: look.fd,
        what,
        name: look.name(),
    })
}

impl Outside {
    /// What the restored job gets in its place: our own descriptor of that number, or for a terminal any of ours that was the same one.
    pub fn rebuild(&self, index: usize, snapshot: &Snapshot) -> Result<Inherited, Box<Obstacle>> {
        let numbers = snapshot.processes.iter().flat_map(|p| &p.fds);
        let mut numbers = numbers.filter(|e| e.description == index).map(|e| e.fd);
        if let Some(fd) = numbers.find(|fd| *fd <= 2) {
            return Ok(Inherited::Own(fd));
        }
        if self.what == Surroundings::Terminal
            && let Some(fd) = snapshot.standard_terminal(&self.name)
        {
            return Ok(Inherited::Own(fd));
        }
        let what = match self.what {
            Surroundings::Terminal => "a terminal",
            Surroundings::Pipe => "a pipe",
            Surroundings::Socket => "a socket",
        };
        Err(Box::new(Obstacle::new(
            format!("fd {} of the job", self.fd),
            format!(
                "was {what} ({}) with its far end outside the job",
                self.name
            ),
            format!("say what it shall be with --fd {}=PATH", self.fd),
        )))
    }
}

impl Snapshot {
    /// Which of descriptors 0 to 2 was the terminal of that name.
    fn standard_terminal(&self, name: &str) -> Option<i32> {
        let fds = self.processes.iter().flat_map(|p| &p.fds);
        fds.filter(|e| e.fd <= 2)
            .find(|e| match &self.descriptions[e.description].kind {
                Kind::Outside(o) => o.what == Surroundings::Terminal && o.name == name,
                _ => false,
            })
            .map(|e| e.fd)
    }
}
