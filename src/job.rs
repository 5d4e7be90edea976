//! What is checkpointed together: a process and all that descend from it.

use std::collections::HashSet;

use ckpt_tracer::freeze::Frozen;
use ckpt_tracer::proc::status::read_status;
use ckpt_tracer::proc::{ProcRoot, tasks};
use ckpt_tracer::{Error as TracerError, Pid};

use crate::error::{Error, Obstacle, Result};

/// Rounds of looking for new processes before giving up. A process can only be created by one
/// that is not yet stopped, so each round leaves fewer that could; a fork bomb is the exception.
const MAX_ROUNDS: u32 = 64;

/// The processes of a job, by what can be done with them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Family {
    /// Those that live; parents before their children, the root first.
    pub living: Vec<Pid>,
    /// Those that have ended and that their parents have not waited for.
    pub ended: Vec<Pid>,
}

impl Family {
    /// The process and its descendants, as they are at this moment.
    ///
    /// # Errors
    /// As [`tasks::children`] for the root; a descendant that ends meanwhile is no error.
    pub fn of(root: Pid) -> Result<Self> {
        Self::of_all(&[root])
    }

    /// The same of several roots; the first one is the job's.
    pub fn of_all(roots: &[Pid]) -> Result<Self> {
        let proc = ProcRoot::default();
        let mut family = Self {
            living: roots.to_vec(),
            ended: Vec::new(),
        };
        let mut next = 0;
        while let Some(&pid) = family.living.get(next) {
            next += 1;
            let children = match tasks::children(&proc, pid) {
                Ok(children) => children,
                Err(e) if pid == roots[0] => return Err(e.into()),
                Err(_) => continue,
            };
            for child in children {
                if family.living.contains(&child) {
                    continue;
                }
                match read_status(child) {
                    Ok(status) if status.state.has_ended() => family.ended.push(child),
                    Ok(_) => family.living.push(child),
                    Err(_) => {}
                }
            }
        }
        Ok(family)
    }
}

/// A job of which every task is stopped. Letting it drop lets it go on.
pub struct FrozenJob {
    /// Its living processes, in the order of [`Family::living`].
    pub processes: Vec<Frozen>,
    /// Its zombies.
    pub ended: Vec<Pid>,
}

impl FrozenJob {
    /// Stops every task of every process, and looks for more until there are none. On any error
    /// everything stopped so far is let go.
    pub fn freeze(roots: &[Pid]) -> Result<Self> {
        let mut processes: Vec<Frozen> = Vec::new();
        let mut known: HashSet<Pid> = HashSet::new();
        for round in 0.. {
            let family = Family::of_all(roots)?;
            let fresh: Vec<Pid> = family
                .living
                .iter()
                .copied()
                .filter(|pid| !known.contains(pid))
                .collect();
            if fresh.is_empty() {
                // Parents first, though a child may have been met before an adopted one's parent.
                let place = |pid| family.living.iter().position(|p| *p == pid);
                processes.retain(|f| place(f.pid()).is_some());
                processes.sort_by_key(|f| place(f.pid()));
                return Ok(Self {
                    processes,
                    ended: family.ended,
                });
            }
            if round == MAX_ROUNDS {
                return Err(Error::refuse(Obstacle::new(
                    format!("process {}", roots[0]),
                    format!(
                        "has descendants that create processes faster than they can be stopped (gave up \
                         after {MAX_ROUNDS} rounds)"
                    ),
                    format!("try again, or stop it first with kill -STOP {}", roots[0]),
                )));
            }
            for pid in fresh {
                known.insert(pid);
                match Frozen::freeze(pid) {
                    Ok(frozen) => processes.push(frozen),
                    // It has ended meanwhile; if it is a zombie now, the next round tells.
                    Err(TracerError::Died { .. }) if pid != roots[0] => {}
                    Err(e) => return Err(e.into()),
                }
            }
        }
        unreachable!("the rounds end")
    }

    /// Tasks in all.
    pub fn tasks(&self) -> usize {
        self.processes.iter().map(|f| f.tasks().len()).sum()
    }

    /// Lets every process go on.
    pub fn thaw(self) -> Result<()> {
        each(self.processes, Frozen::thaw)
    }

    /// Lets go of every process but leaves it stopped, as `kill -STOP` would.
    pub fn leave_stopped(self) -> Result<()> {
        each(self.processes, Frozen::leave_stopped)
    }
}

/// All are let go, whatever happens to one of them.
fn each(processes: Vec<Frozen>, let_go: impl Fn(Frozen) -> ckpt_tracer::Result<()>) -> Result<()> {
    let results: Vec<_> = processes.into_iter().map(let_go).collect();
    Ok(results.into_iter().collect::<ckpt_tracer::Result<()>>()?)
}
