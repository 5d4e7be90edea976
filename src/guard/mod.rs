//! The guard: a process that stays the tracer of a job that was started for a baseline, and answers when
//! its programs ask the processor what it is (CPUID faulting, [`ckpt_tracer::cpuid`]).
//!
//! ```text
//! ckpt run ──┬── ckpt-guard      traces all of the job
//!            └── the program, and what descends from it
//! ```
//!
//! It is the one exception from the rule that between checkpoints nothing of ours is there, and the user
//! has asked for it. It is beside the job and not above it, and outside of the job's pid namespace if that has one:
//! whatever becomes of it, nobody of the job has another parent for it, and it has no other one if `ckpt run` is
//! killed. What holds at every moment: no task has CPUID faulting while nobody traces it. The only
//! exception is a guard that is killed with SIGKILL, until whoever waits for the job has put
//! another one in its place.
//!
//! A task has one tracer at most, so for a checkpoint the guard steps aside ([`door`]) and comes back
//! when the job runs again. Meanwhile programs see the processor as it is.

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

/// What it is called in `ps`.
pub const NAME: &str = "ckpt-guard";

/// What a guard says once: that it has the job, or why not.
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
    /// Where it tells that it has taken the job, or why not.
    link: Channel,
}

/// The program's end: it is held until the guard has it.
#[derive(Debug)]
pub struct Entrance(UnixStream);

impl Entrance {
    /// Makes `command` wait, between fork and exec, until it is traced.
    pub fn pass_through(self, command: &mut Command) {
        let socket = self.0;
        let pass = move || {
            // The guard knows by the credentials of the message who this is.
            let mut socket = &socket;
            socket.write_all(b"?")?;
            // Without a guard the program runs as without the option; whoever waits for it tells.
            let _ = socket.read_exact(&mut [0]);
            Ok(())
        };
        process::before_exec(command, pass);
    }
}

impl Guard {
    /// Whether there can be one here.
    pub fn is_possible() -> bool {
        cpuid::can_fault()
    }

    /// Starts one for a program that is yet to be started. To be called while this process has one thread.
    ///
    /// # Errors
    /// When there are no descriptors or processes to be had.
    pub fn before_the_program(level: Baseline) -> io::Result<(Self, Entrance)> {
        let (inside, entrance) = UnixStream::pair()?;
        first::wants_credentials(&inside)?;
        let guard = Self::start(level, Vec::new(), Some(inside), &entrance)?;
        Ok((guard, Entrance(entrance)))
    }

    /// Starts one for a job that runs, and waits until it has the job: for why it has not, else.
    ///
    /// # Errors
    /// When there are no descriptors or processes to be had, or the kernel lets it trace nobody.
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
        // The child allocates, which the C library's fork allows; what other threads there may
        // be (that of a terminal's relay) hold nothing else that it wants.
        match process::fork()? {
            Fork::Parent(pid) => Ok(Self { level, pid, link }),
            Fork::Child => {
                let kept: Vec<i32> = entrance
                    .iter()
                    .map(AsRawFd::as_raw_fd)
                    .chain([theirs.as_fd().as_raw_fd()])
                    .collect();
                // Closed below, as one of those that are not kept.
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

    /// Puts another one in the place of one that was killed: what became of it. `roots` are all
    /// that is left of the job.
    ///
    /// # Errors
    /// As [`over`](Self::over).
    pub fn replace(&mut self, roots: impl FnOnce() -> Vec<Pid>) -> io::Result<State> {
        match changed(self.pid) {
            Ok(Some(Change::Ended(0))) | Err(_) => Ok(State::Ended),
            // 128 and a signal.
            Ok(Some(Change::Ended(129..))) => {
                *self = Self::over(self.level, roots()).map_err(|error| {
                    let harm = "a program of it that asks the processor may be ended by SIGSEGV";
                    io::Error::other(format!(
                        "its guard was killed and not replaced: {error}; {harm}"
                    ))
                })?;
                Ok(State::Guards)
            }
            Ok(Some(Change::Ended(_))) => {
                let said = self.link.receive::<Taken>();
                let said = said.ok().and_then(Result::err).unwrap_or_default();
                let harm = "its programs see the processor as it is";
                Err(io::Error::other(format!("{said}; {harm}")))
            }
            Ok(_) => Ok(State::Guards),
        }
    }
}

/// What a guard does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It is there.
    Guards,
    /// It has nobody left to guard.
    Ended,
}

/// What is told of a guard.
pub type Tell = Box<dyn Fn(&str)>;

/// The guard of a job that is waited for, if it has one: where it is killed, another one takes its place.
pub struct Watch {
    guard: Option<Guard>,
    tell: Tell,
}

impl Watch {
    /// Over this guard, if there is one; `tell` is told what goes wrong.
    pub fn over(guard: Option<Guard>, tell: Tell) -> Self {
        Self { guard, tell }
    }

    /// The guard's process.
    pub fn pid(&self) -> Option<i32> {
        self.guard.as_ref().map(Guard::pid)
    }

    /// Looks whether it is still there; `roots` are all that is left of the job.
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

/// Children of a process but for those: with the job's own root, what is left of a job when its
/// members' parents end.
pub fn children_but(pid: i32, not: &[i32]) -> Vec<Pid> {
    let mut children = tasks::children(&ProcRoot::default(), Pid(pid)).unwrap_or_default();
    children.retain(|child| !not.contains(&child.raw()));
    children
}

/// The end of a guard that has not got the job.
fn fail() -> ! {
    process::leave(1)
}

/// Only SIGKILL ends us before the job has ended.
fn settle() {
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None);
    prctl::set_name(c"ckpt-guard");
    let _ = ckpt_sys::signals::by_default(libc::SIGCHLD);
}
