//! Descriptors whose other end is outside the job: 0 to 2 become those of `restore`, others are set by `restore --fd
//! N=PATH`.

use ckpt_tracer::proc::fdlink::FdLink;
use serde::{Deserialize, Serialize};

use super::kind::{Captured, OpenFile, Opened, Place, Sight};
use super::{Kind, Look};
use crate::Snapshot;
use crate::bounds;
use crate::error::Obstacle;
use crate::index::DescriptionId;
use crate::need::Need;
use crate::plan::{Builder, Inherited};
use crate::references::{Faults, require};
use crate::source::Collector;

/// An object outside the job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outside {
    /// The descriptor through which it was first found; `restore` provides its own of that number.
    #[serde(deserialize_with = "bounds::fd")]
    pub fd: i32,
    /// Its kind: a pipe, a socket.
    pub what: Surroundings,
    /// The name that the kernel shows for it.
    pub name: String,
}

/// Kinds of objects that a restore may take from its environment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Surroundings {
    /// A pipe or FIFO with its other end outside.
    Pipe,
    /// A connected socket.
    Socket,
}

/// Captures a descriptor of an object outside.
pub fn capture(look: &Look, what: Surroundings) -> Kind {
    Kind::from(Outside {
        fd: look.fd,
        what,
        name: look.name(),
    })
}

impl OpenFile for Outside {
    /// One of the first three that is a socket of an unsupported family; pipes are recognized by their ends.
    fn capture(sight: &Sight, _: &mut Collector) -> Captured {
        match sight.look.link {
            FdLink::Socket(_) if sight.look.fd <= 2 => {
                Some(Ok(capture(sight.look, Surroundings::Socket)))
            }
            _ => None,
        }
    }

    fn class(&self) -> &'static str {
        "outside"
    }

    fn label(&self) -> String {
        self.name.clone()
    }

    fn needs(&self, _: u32, _: &Snapshot) -> Vec<Need> {
        let detail = match self.fd {
            fd @ 0..=2 => format!("fd {fd} of restore takes its place"),
            fd => format!("restore --fd {fd}=PATH"),
        };
        vec![Need::new("outside", &self.name, detail)]
    }

    fn check(&self, number: DescriptionId, _: &Snapshot, faults: &mut Faults) {
        require!(
            faults,
            self.fd >= 0,
            "description {number} comes from the impossible descriptor {}",
            self.fd
        );
    }

    fn is_of_surroundings(&self) -> bool {
        true
    }

    fn opened(&self) -> Opened {
        Opened::Unknown
    }

    fn open(&self, place: &Place, plan: &mut Builder) -> Result<(), Vec<Obstacle>> {
        let what = self
            .source(place.index, place.snapshot)
            .map_err(|o| vec![*o])?;
        self.warning(&what).into_iter().for_each(|w| plan.warn(w));
        plan.inherit(place.at, what);
        Ok(())
    }
}

impl Outside {
    /// Warns that a FIFO has become ours; an object without a name needs no warning.
    fn warning(&self, given: &Inherited) -> Option<String> {
        let Inherited::Own(fd) = given else {
            return None;
        };
        let fifo = self.what == Surroundings::Pipe && self.name.starts_with('/');
        fifo.then(|| {
            format!(
                "fd {fd} of the job was the FIFO {name}, whose other end is outside the job, and is that of \
                 restore now; --fd {fd}={name} opens the FIFO again",
                name = self.name
            )
        })
    }

    /// What the restored job gets instead: our own descriptor of that number.
    fn source(
        &self,
        index: DescriptionId,
        snapshot: &Snapshot,
    ) -> Result<Inherited, Box<Obstacle>> {
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
                "was {what} ({}) with its other end outside the job",
                self.name
            ),
            format!("say what it shall be with --fd {}=PATH", self.fd),
        );
        Err(Box::new(obstacle.by_option()))
    }
}
