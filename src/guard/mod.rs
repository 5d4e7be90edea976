//! The guard: a process that permanently traces a job started with a baseline, and emulates CPUID for its programs
//! (CPUID faulting, [`ckpt_tracer::cpuid`]).
//!
//! ```text
//! ckpt run ──┬── ckpt-guard      traces all of the job
//!            └── the program, and its descendants
//! ```
//!
//! It is the only exception from the rule that no process of ours stays with a job between checkpoints, and the user
//! has requested it. It is a sibling of the job, not an ancestor, and outside the job's pid namespace if it has one:
//! so its end changes no process's parent, and the end of `ckpt run` does not either. Invariant: no task has CPUID
//! faulting while it is untraced. The only exception: after SIGKILL of a guard, until the process that waits for the
//! job has started another one.
//!
//! A task has at most one tracer, so for a checkpoint the guard detaches ([`door`]) and attaches again when the job
//! runs. Meanwhile programs see the real processor.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::process::Command;

use ckpt_sys::channel::{self, Channel};
use ckpt_sys::prctl;
use ckpt_sys::process::{self, Fork};
use ckpt_tracer::proc::{ProcRoot, tasks};
use ckpt_tracer::{Pid, cpuid};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::unistd::setsid;

use crate::children::{Change, changed, stay};
use crate::objects::processor::Baseline;

pub mod door;
mod first;
mod flag;
mod tree;

/// Its name in `ps`.
pub const NAME: &str = "ckpt-guard";

/// The guard's only report: that it traces the job, or why not.
type Taken = Result<(), String>;

/// Whether a process is a guard, by its name.
pub fn is_one(pid: Pid) -> bool {
    tasks::comm(pid).is_ok_and(|comm| comm.0 == NAME.as_bytes())
}

/// A guard that is a child of ours.
#[derive(Debug)]
pub struct Guard {
    level: Baseline,
    pid: i32,
    /// Where it reports that it traces the job, or why not.
    link: Channel,
}

/// The program's end: it waits until the guard traces it.
#[derive(Debug)]
pub struct Entrance(UnixStream);

impl Entrance {
    /// Makes `command` wait, between fork and exec, until it is traced.
    pub fn pass_through(self, command: &mut Command) {
        let socket = self.0;
        let pass = move || {
            // The credentials of the message tell the guard the pid.
            let mut socket = &socket;
            socket.write_all(b"?")?;
            // Without a guard the program runs as without the option; the process that waits for it reports that.
            let _ = socket.read_exact(&mut [0]);
            Ok(())
        };
        process::before_exec(command, pass);
    }
}

impl Guard {
    /// Whether a guard is possible here.
    pub fn is_possible() -> bool {
        cpuid::can_fault()
    }

    /// Starts one for a program that is not started yet. Must be called while this process is single-threaded.
    ///
    /// # Errors
    /// When descriptors or processes cannot be created.
    pub fn before_the_program(level: Baseline) -> io::Result<(Self, Entrance)> {
        let (inside, entrance) = UnixStream::pair()?;
        first::wants_credentials(&inside)?;
        let guard = Self::start(level, Vec::new(), Some(inside), &entrance)?;
        Ok((guard, Entrance(entrance)))
    }

    /// Starts one for a running job, and waits until it traces the job.
    ///
    /// # Errors
    /// When descriptors or processes cannot be created, or the guard cannot trace the job.
    pub fn over(level: Baseline, roots: Vec<Pid>) -> io::Result<Self> {
        let (unused, _) = UnixStream::pair()?;
        let guard = Self::start(level, roots, None, &unused)?;
        match guard.link.receive::<Taken>() {
            Ok(Ok(())) => Ok(guard),
            Ok(Err(said)) => Err(io::Error::other(said)),
            Err(channel::Error::Closed) => Err(io::Error::other("the guard was killed at once")),
            Err(error) => Err(error.into()),
        }
    }

    fn start(
        level: Baseline,
        roots: Vec<Pid>,
        entrance: Option<UnixStream>,
        programs: &UnixStream,
    ) -> io::Result<Self> {
        let (link, theirs) = Channel::pair()?;
        // The child allocates, which the C library's fork allows; other threads (a terminal relay) hold no lock that
        // it needs.
        match process::fork()? {
            Fork::Parent(pid) => Ok(Self { level, pid, link }),
            Fork::Child => {
                let kept: Vec<i32> = entrance
                    .iter()
                    .map(AsRawFd::as_raw_fd)
                    .chain([theirs.as_fd().as_raw_fd()])
                    .collect();
                // Closed below, unless kept.
                let _ = (&link, programs);
                let _ = setsid();
                stay(&kept, || {
                    settle();
                    tree::guard(level, &roots, entrance, theirs);
                    0
                })
            }
        }
    }

    /// The process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Replaces a killed guard; returns its state. `roots` are the remaining processes of the job.
    ///
    /// # Errors
    /// As [`over`](Self::over).
    pub fn replace(&mut self, roots: impl FnOnce() -> Vec<Pid>) -> io::Result<State> {
        match changed(self.pid) {
            Ok(Some(Change::Ended(0))) | Err(_) => Ok(State::Ended),
            // 128 plus a signal.
            Ok(Some(Change::Ended(129..))) => {
                *self = Self::over(self.level, roots()).map_err(|error| {
                    let harm = "a program of it that executes CPUID may be ended by SIGSEGV";
                    io::Error::other(format!(
                        "its guard was killed and not replaced: {error}; {harm}"
                    ))
                })?;
                Ok(State::Guards)
            }
            Ok(Some(Change::Ended(_))) => {
                let said = self.link.receive::<Taken>();
                let said = said.ok().and_then(Result::err).unwrap_or_default();
                let harm = "its programs see all features of the processor";
                Err(io::Error::other(format!("{said}; {harm}")))
            }
            Ok(_) => Ok(State::Guards),
        }
    }
}

/// State of a guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It is running.
    Guards,
    /// It has no job any more.
    Ended,
}

/// Receives messages about a guard.
pub type Tell = Box<dyn Fn(&str)>;

/// The guard of a job being waited for, if any: a killed one is replaced.
pub struct Watch {
    guard: Option<Guard>,
    tell: Tell,
}

impl Watch {
    /// For this guard, if any; `tell` receives messages about failures.
    pub fn over(guard: Option<Guard>, tell: Tell) -> Self {
        Self { guard, tell }
    }

    /// The guard's process.
    pub fn pid(&self) -> Option<i32> {
        self.guard.as_ref().map(Guard::pid)
    }

    /// Checks whether it is running; `roots` are the remaining processes of the job.
    pub fn look(&mut self, roots: impl FnOnce() -> Vec<Pid>) {
        let Some(guard) = &mut self.guard else { return };
        match guard.replace(roots) {
            Ok(State::Guards) => {}
            Ok(State::Ended) => self.guard = None,
            Err(error) => {
                self.guard = None;
                (self.tell)(&format!("the job is not guarded: {error}"));
            }
        }
    }
}

/// Children of a process, except `not`: together with the job's root, what remains of a job after its members'
/// parents have ended.
pub fn children_but(pid: i32, not: &[i32]) -> Vec<Pid> {
    let mut children = tasks::children(&ProcRoot::default(), Pid(pid)).unwrap_or_default();
    children.retain(|child| !not.contains(&child.raw()));
    children
}

/// Ends a guard that does not trace the job.
fn fail() -> ! {
    process::leave(1)
}

/// Ensures that only SIGKILL ends us before the job has ended.
fn settle() {
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None);
    prctl::set_name(c"ckpt-guard");
    let _ = ckpt_sys::signals::by_default(libc::SIGCHLD);
}
