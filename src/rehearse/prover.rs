//! The checking process, and its requests and replies.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use ckpt_image::Reader;
use ckpt_sys::channel::Channel;
use ckpt_sys::prctl;
use ckpt_sys::process::{self, Fork};
use ckpt_tracer::Pid;
use ckpt_tracer::fault::{self, Step};
use ckpt_tracer::proc::status::read_status;
use ckpt_tracer::proc::{ProcRoot, tasks};
use nix::unistd::getppid;
use serde::{Deserialize, Serialize};

use super::private::told;
use super::stage;
use crate::capture::prove::{Prove, Rehearsal};
use crate::error::{Error, Obstacle, Result};
use crate::isolate;
use crate::objects::job::Family;
use crate::objects::options::Options;
use crate::progress::Silent;
use crate::restore::{self, Request};

/// A process that checks images in the namespaces of the process that started it.
#[derive(Debug)]
pub struct Prover {
    link: Channel,
    child: i32,
}

/// Requests to the prover, with a descriptor of the image.
#[derive(Debug, Serialize, Deserialize)]
enum Question {
    /// Obstacles to its restore here.
    Check(#[serde(with = "crate::objects::raw_path")] PathBuf),
    /// Differences between a copy restored from it and the job.
    Rehearse(#[serde(with = "crate::objects::raw_path")] PathBuf),
}

/// Its replies.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Checked(Vec<Told>),
    Rehearsed(Rehearsal),
    Refused(Vec<Told>),
    Failed(String),
}

/// The serialized form of an obstacle.
#[derive(Debug, Serialize, Deserialize)]
struct Told {
    object: String,
    reason: String,
    remedy: Option<String>,
    by_option: bool,
}

impl Prover {
    /// Starts it for images of that job; `by` is a process that adopts the job's orphans.
    ///
    /// Must be called while this process is single-threaded.
    ///
    /// # Errors
    /// When no process can be created.
    pub fn start(root: Pid, by: Option<Pid>) -> Result<Self> {
        let failed = |e: io::Error| Error::step("prepare a check", e);
        let (link, theirs) = Channel::pair().map_err(|e| failed(e.into()))?;
        let parent = nix::unistd::getpid();
        match process::fork().map_err(|e| failed(e.into()))? {
            Fork::Parent(child) => Ok(Self { link, child }),
            Fork::Child => {
                drop(link);
                prctl::die_with_parent(true);
                if getppid() != parent {
                    process::leave(1);
                }
                let served = catch_unwind(AssertUnwindSafe(|| serve(theirs, root, by)));
                process::leave(i32::from(served.is_err()))
            }
        }
    }

    fn ask(&self, question: &Question, image: &File) -> Result<Answer> {
        let told = self.link.send_with(question, &[image.as_fd()]);
        let told = told.and_then(|()| self.link.receive());
        told.map_err(|_| Error::Killed("the process that checks the image"))
    }
}

impl Prove for Prover {
    fn obstacles(&self, image: &File, name: &Path) -> Result<Vec<Obstacle>> {
        match self.ask(&Question::Check(name.to_owned()), image)? {
            Answer::Checked(told) => Ok(told.into_iter().map(Told::obstacle).collect()),
            Answer::Rehearsed(_) | Answer::Refused(_) => Err(confused()),
            Answer::Failed(text) => Err(Error::Reported(text)),
        }
    }

    fn rehearsal(&self, image: &File, name: &Path) -> Result<Rehearsal> {
        match self.ask(&Question::Rehearse(name.to_owned()), image)? {
            Answer::Rehearsed(found) => Ok(found),
            Answer::Checked(_) => Err(confused()),
            Answer::Refused(told) => Err(Error::Refused(
                told.into_iter().map(Told::obstacle).collect(),
            )),
            Answer::Failed(text) => {
                let text = told(&text);
                Err(Error::Reported(format!("the rehearsal failed: {text}")))
            }
        }
    }
}

impl Drop for Prover {
    fn drop(&mut self) {
        self.link.hang_up();
        let _ = process::end_of(self.child);
    }
}

fn confused() -> Error {
    Error::Bug("the process that checks the image sent an unexpected answer".into())
}

/// Serves requests until the channel is closed.
fn serve(link: Channel, root: Pid, by: Option<Pid>) {
    while let Ok((question, mut fds)) = link.receive_with::<Question>() {
        let Some(image) = fds.pop() else { return };
        let image = File::from(image);
        let answer = match question {
            Question::Check(name) => check(image, &name, leaving(root, by)),
            Question::Rehearse(name) => {
                stage::rehearse(&image, &name, leaving(root, by)).map(Answer::Rehearsed)
            }
        };
        let answer = answer.unwrap_or_else(|error| match error {
            Error::Refused(obstacles) => {
                Answer::Refused(obstacles.into_iter().map(Told::of).collect())
            }
            error => Answer::Failed(error.to_string()),
        });
        if link.send(&answer).is_err() {
            return;
        }
    }
}

fn check(image: File, name: &Path, leaving: Vec<Pid>) -> Result<Answer> {
    fault::hit(Step::Check)?;
    let image = Reader::from_file(image, name)?;
    let request = Request {
        objects: Options {
            leaving,
            ..Options::default()
        },
        // The terminal will be known only at `restore --detach`.
        foreground: false,
        bounded: false,
        ..Request::plain(name, &Silent)
    };
    let obstacles = restore::obstacles_of(restore::open_trusted(image, &request)?)?;
    Ok(Answer::Checked(
        obstacles.into_iter().map(Told::of).collect(),
    ))
}

/// The processes of the job, as seen from here.
fn leaving(root: Pid, by: Option<Pid>) -> Vec<Pid> {
    let parent = read_status(root).ok().map(|status| status.ppid);
    let by = by.or(parent.filter(|parent| isolate::is_init(*parent)));
    let mut roots = vec![root];
    let adopted = by.and_then(|by| tasks::children(&ProcRoot::default(), by).ok());
    let ours = [nix::unistd::getpid().as_raw(), getppid().as_raw()];
    roots.extend(
        adopted
            .into_iter()
            .flatten()
            .filter(|pid| *pid != root && !ours.contains(&pid.raw())),
    );
    Family::of_all(&roots).unwrap_or_default().living
}

impl Told {
    fn of(obstacle: Obstacle) -> Self {
        let by_option = obstacle.by_option;
        let Obstacle {
            object,
            reason,
            remedy,
            ..
        } = obstacle;
        Self {
            object,
            reason,
            remedy,
            by_option,
        }
    }

    fn obstacle(self) -> Obstacle {
        let obstacle = Obstacle {
            remedy: self.remedy,
            ..Obstacle::without_remedy(self.object, self.reason)
        };
        match self.by_option {
            true => obstacle.by_option(),
            false => obstacle,
        }
    }
}
