//! Descriptors whose far end is outside the job: 0 to 2 become those of `restore`, others are
//! named by `restore --fd N=PATH`.

use serde::{Deserialize, Serialize};

use super::{Kind, Look};
use crate::Snapshot;
use crate::bounds;
use crate::error::Obstacle;
use crate::plan::Inherited;

/// Something of the surroundings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outside {
    /// The descriptor through which it was seen first; `restore` gives its own of that number.
    #[serde(deserialize_with = "bounds::fd")]
    pub fd: i32,
    /// What it was: a pipe, a socket.
    pub what: Surroundings,
    /// The name that the kernel shows for it.
    pub name: String,
}

/// What may be taken from the surroundings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Surroundings {
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
    /// That a FIFO has become ours; nothing says so of what has no name that leads there again.
    pub fn warning(&self, given: &Inherited) -> Option<String> {
        let Inherited::Own(fd) = given else {
            return None;
        };
        let fifo = self.what == Surroundings::Pipe && self.name.starts_with('/');
        fifo.then(|| {
            format!(
                "fd {fd} of the job led to the FIFO {name}, whose other end is outside the job, and is that of restore \
                 now; with --fd {fd}={name} it leads there again",
                name = self.name
            )
        })
    }

    /// What the restored job gets in its place: our own descriptor of that number.
    pub fn rebuild(&self, index: usize, snapshot: &Snapshot) -> Result<Inherited, Box<Obstacle>> {
        let numbers = snapshot.processes.iter().flat_map(|p| &p.fds);
        let mut numbers = numbers.filter(|e| e.description == index).map(|e| e.fd);
        if let Some(fd) = numbers.find(|fd| *fd <= 2) {
            return Ok(Inherited::Own(fd));
        }
        let what = match self.what {
            Surroundings::Pipe => "a pipe",
            Surroundings::Socket => "a socket",
        };
        let obstacle = Obstacle::new(
            format!("fd {} of the job", self.fd),
            format!(
                "was {what} ({}) with its far end outside the job",
                self.name
            ),
            format!("say what it shall be with --fd {}=PATH", self.fd),
        );
        Err(Box::new(obstacle.by_option()))
    }
}
