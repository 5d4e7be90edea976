//! Errors: each message is one sentence with the object, the reason and, if there is one, the remedy.

use crate::text::Shown;

use std::fmt;
use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An obstacle to a checkpoint or a restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Obstacle {
    /// Its object: `process 12 (name)`, `fd 3 of process 12 (socket:[99])` …
    pub object: String,
    /// Why it cannot be done.
    pub reason: String,
    /// What the user can do.
    pub remedy: Option<String>,
    /// Transient: retried before it is reported.
    #[serde(skip)]
    pub passing: bool,
    /// Resolved by an option of `restore`: it depends on how a restore is requested, not on whether it is possible.
    #[serde(skip)]
    pub by_option: bool,
}

impl Obstacle {
    /// An obstacle with a remedy.
    pub fn new(
        object: impl Into<String>,
        reason: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            object: object.into(),
            reason: reason.into(),
            remedy: Some(remedy.into()),
            passing: false,
            by_option: false,
        }
    }

    /// The same, marked as transient.
    pub fn passing(self) -> Self {
        Self {
            passing: true,
            ..self
        }
    }

    /// The same, marked as resolved by an option of `restore`.
    pub fn by_option(self) -> Self {
        Self {
            by_option: true,
            ..self
        }
    }

    /// An obstacle without a remedy.
    pub fn without_remedy(object: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            object: object.into(),
            reason: reason.into(),
            remedy: None,
            passing: false,
            by_option: false,
        }
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.object, self.reason)?;
        match &self.remedy {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

/// A difference from the checkpointed state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// Its object: `process 12`, `fd 3 of process 12` …
    pub object: String,
    /// Which attribute.
    pub part: String,
    /// Its value in the job.
    pub before: String,
    /// Its value in the copy.
    pub after: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            object,
            part,
            before,
            after,
        } = self;
        write!(f, "{object}: {part} was {before} and comes back as {after}")
    }
}

/// An error of checkpoint or restore.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Refused, for these reasons; nothing was changed.
    #[error("{}", join(.0))]
    Refused(Vec<Obstacle>),
    /// The job was not ended, since these would prevent its restore.
    #[error(
        "{}\nthe job continues and no image is left: the job could not be restored from it; --no-check \
         skips this check",
        join(.0)
    )]
    NotRestorable(Vec<Obstacle>),
    /// A copy restored from the image differs from the job.
    #[error(
        "{}\nthe rehearsal shows that the restored job would differ; the job continues, and no image is left",
        lines(.0)
    )]
    Differs(Vec<Difference>),
    /// An operation on the live process failed.
    #[error(transparent)]
    Tracer(#[from] ckpt_tracer::Error),
    /// The image could not be read or written.
    #[error(transparent)]
    Image(#[from] ckpt_image::Error),
    /// A file could not be used.
    #[error("cannot {what} {}: {source}", path.shown())]
    File {
        /// "open", "create" …
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The image's metadata is inconsistent.
    #[error("the image {} is damaged or was made by another program: {what}", path.shown())]
    Metadata {
        /// The image.
        path: PathBuf,
        /// What is inconsistent.
        what: String,
    },
    /// Inspecting an image would take more memory than its size allows.
    #[error(
        "the metadata of {} would take more memory than 64 MiB and four times its size, which is the limit \
         for inspecting an image; restore has no such limit",
        path.shown()
    )]
    TooLarge {
        /// The image.
        path: PathBuf,
    },
    /// An operation of the plan failed in the process being restored.
    #[error("cannot restore {object}: {op} failed: {reason}")]
    Operation {
        /// The object it belongs to.
        object: String,
        /// The operation with its operands.
        op: String,
        /// The kernel's error.
        reason: String,
    },
    /// A task did not get its id.
    #[error(
        "another process keeps taking pid {pid} first; try again when fewer processes are created here"
    )]
    PidMissed {
        /// The id, or the one that was assigned instead.
        pid: i32,
    },
    /// A step failed that is about no object of the job.
    #[error("cannot {step}: {reason}")]
    Step {
        /// The step, as a verb phrase: "make a pipe".
        step: String,
        /// The system's error.
        reason: String,
    },
    /// Something failed on an object of the job.
    #[error("{object} cannot be {what}: {reason}")]
    Object {
        /// The object.
        object: String,
        /// What was tried: "created", "sealed".
        what: String,
        /// The system's error.
        reason: String,
    },
    /// Descriptor `fd` of the job led outside of it, and restore has none of that number.
    #[error(
        "the job's descriptor {fd} was of something outside, and restore has no descriptor {fd} to replace \
         it; redirect it, for instance {}",
        redirected(*.fd)
    )]
    NoDescriptor {
        /// Its number.
        fd: i32,
    },
    /// A process that was stopped at the checkpoint is to be stopped again.
    #[error("process {pid} does not stop, as it was stopped at the checkpoint")]
    DoesNotStop {
        /// The process.
        pid: i32,
    },
    /// The new process got a signal while it was being built.
    #[error(
        "the restorer got signal {signal} at {at:#x} in the new process; if ckpt wrote the image, this is a \
         bug of ckpt"
    )]
    Signalled {
        /// The signal.
        signal: i32,
        /// The address of the instruction.
        at: u64,
    },
    /// The pages of the image do not fit its metadata.
    #[error("the image is damaged: {0}")]
    Pages(String),
    /// A process of ours was killed.
    #[error("{0} was killed")]
    Killed(&'static str),
    /// A process of ours reported an error.
    #[error("{0}")]
    Reported(String),
    /// An assumption of this program does not hold.
    #[error("{0}; this is a bug of ckpt")]
    Bug(String),
}

impl Error {
    /// A refusal for one reason.
    pub fn refuse(obstacle: Obstacle) -> Self {
        Error::Refused(vec![obstacle])
    }

    /// Makes [`Error::File`] of the error of a call; `path` may also name a file that has no path.
    pub fn file<E: Into<io::Error>>(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl Fn(E) -> Self {
        let path = path.into();
        move |source| Error::File {
            what,
            path: path.clone(),
            source: source.into(),
        }
    }

    /// A step that failed.
    pub fn step(step: impl Into<String>, reason: impl fmt::Display) -> Self {
        Error::Step {
            step: step.into(),
            reason: reason.to_string(),
        }
    }

    /// An object with which something failed.
    pub fn object(object: impl Into<String>, what: &str, reason: impl fmt::Display) -> Self {
        Error::Object {
            object: object.into(),
            what: what.into(),
            reason: reason.to_string(),
        }
    }
}

impl Error {
    /// Whether all of its obstacles are transient.
    pub fn is_passing(&self) -> bool {
        match self {
            Error::Refused(obstacles) => obstacles.iter().all(|o| o.passing),
            Error::Tracer(error) => matches!(
                error,
                ckpt_tracer::Error::OtherCode { .. }
                    | ckpt_tracer::Error::DoesNotStop { .. }
                    | ckpt_tracer::Error::ThreadsGrow { .. }
            ),
            _ => false,
        }
    }
}

/// How a shell redirects a descriptor.
fn redirected(fd: i32) -> String {
    match fd {
        0 => "restore IMAGE </dev/null".into(),
        _ => format!("{fd}>/dev/null"),
    }
}

fn lines(found: &[Difference]) -> String {
    let lines: Vec<String> = found.iter().map(Difference::to_string).collect();
    lines.join("\n")
}

fn join(obstacles: &[Obstacle]) -> String {
    let lines: Vec<String> = obstacles.iter().map(Obstacle::to_string).collect();
    lines.join("\n")
}
