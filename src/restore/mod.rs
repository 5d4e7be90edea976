//! An image becomes a running job.
//!
//! A restore is a row of types, one file each. A function leads from each to the next:
//!
//! ```text
//! Opened ─▶ Placed ─▶ Decided ─▶ Ready ─▶ Built ─▶ Restored
//! ```
//!
//! Everything that can be checked is checked before anything is created: the image's metadata, the machine, the files,
//! the pids, the plans ([`Decided`]). Each decision is made once and passed on, since a second look may find
//! something else.

pub mod adapt;
mod adapted;
mod built;
pub mod decide;
mod decided;
pub mod files;
mod image_file;
mod opened;
mod placed;
pub mod plan;
mod probed;
mod ready;
pub mod run;

use std::os::fd::OwnedFd;
use std::path::Path;

use crate::error::{Error, Obstacle, Result};
use crate::objects::cgroup;
use crate::objects::files::left::Chosen;
use crate::objects::options::Options;
use crate::progress::Progress;
use crate::supervise::foreground::JobTerminal;
use decided::Decided;

pub use adapt::paths;
pub use decide::clock::ClockPolicy;
pub use decide::pids::{Pids, Place, note_of_waiting, still_runs};
pub use decide::surroundings;
pub use decided::Looked;
pub use files::env;
pub use files::put::PutFiles;
pub use image_file::ImageFile;
pub use opened::{Opened, open, open_file, open_trusted};
pub use placed::Placed;
pub use probed::Probed;
pub use run::next_pid;

/// A wish for a restore.
pub struct Request<'a> {
    /// The image.
    pub image: &'a Path,
    /// What single objects heed.
    pub objects: Options,
    /// Where the job's paths lead now (`--map-path OLD=NEW`).
    pub map_paths: Vec<paths::Mapping>,
    /// About files whose contents the image holds.
    pub put_files: PutFiles,
    /// About the clocks that differ from boot to boot.
    pub clock: ClockPolicy,
    /// Descriptors that the job does without (`--drop-fd`).
    pub drop: Vec<Chosen>,
    /// In which control groups the job is.
    pub cgroups: cgroup::Policy,
    /// Leave the job stopped, for a debugger.
    pub stopped: bool,
    /// The caller waits for the job: a job that led its process group gets the terminal.
    pub foreground: bool,
    /// The image is looked at and not restored: what takes more memory than its size allows is refused.
    pub bounded: bool,
    /// Probed features and our own status; probed on opening if absent.
    pub probed: Option<&'a Probed>,
    /// Who is told how far it is.
    pub progress: &'a dyn Progress,
}

impl<'a> Request<'a> {
    /// A restore without options of a job that goes on in the foreground.
    pub fn plain(image: &'a Path, progress: &'a dyn Progress) -> Self {
        Self {
            image,
            objects: Options::default(),
            map_paths: Vec::new(),
            put_files: PutFiles::No,
            clock: ClockPolicy::default(),
            drop: Vec::new(),
            cgroups: cgroup::Policy::default(),
            stopped: false,
            foreground: true,
            bounded: true,
            probed: None,
            progress,
        }
    }
}

/// A restored job: its root is a child of the caller.
#[derive(Debug)]
pub struct Restored {
    /// The root's pid.
    pub pid: i32,
    /// What could not be brought back exactly, without harm to the job (a hard limit, say);
    /// one sentence each.
    pub warnings: Vec<String>,
    /// The master of the job's terminal, when that is a new one.
    pub master: Option<OwnedFd>,
}

/// Everything that stands in the way of a restore; empty when there is nothing. Touches nothing.
///
/// # Errors
/// When the image cannot be read, or cannot be believed.
pub fn obstacles(request: &Request<'_>) -> Result<Vec<Obstacle>> {
    obstacles_of(open(request)?)
}

/// The same of an image that is open already.
///
/// # Errors
/// As [`obstacles`].
pub fn obstacles_of(opened: Opened<'_>) -> Result<Vec<Obstacle>> {
    Ok(opened.place_for_a_look()?.look()?.obstacles())
}

/// Restores; `lend` is told what the job wants of our terminal, if it shall have it, when it is
/// complete and about to be let go.
///
/// # Errors
/// [`Error::Refused`] with everything that stands in the way, and those of making. No process is left behind.
pub fn restore(
    placed: &mut Placed<'_>,
    lend: &mut dyn FnMut(Option<JobTerminal>),
) -> Result<Restored> {
    /// Somebody who creates processes all the time may take an id of the job's as often.
    const ATTEMPTS: u32 = 8;
    let mut first = placed.first.take();
    let decided = Decided::of(placed, first.is_some())?;
    let mut attempt = || decided.make_ready()?.build(first.take())?.release(lend);
    for _ in 1..ATTEMPTS {
        match attempt() {
            Err(Error::PidMissed { .. }) if decided.is_not_waited_for() => decided.look_again()?,
            other => return other,
        }
    }
    attempt()
}
