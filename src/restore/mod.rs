//! Restores a job from an image.
//!
//! A restore is a sequence of types, one file each. A function leads from each to the next:
//!
//! ```text
//! Opened ─▶ Placed ─▶ Decided ─▶ Ready ─▶ Built ─▶ Restored
//! ```
//!
//! Everything that can be checked is checked before anything is created: the image's metadata, the machine, the files,
//! the pids, the plans (`Decided`). Each decision is made once and passed on, since a second look may find
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

/// A request for a restore.
pub struct Request<'a> {
    /// The image.
    pub image: &'a Path,
    /// Options of single objects.
    pub objects: Options,
    /// Path mappings (`--map-path OLD=NEW`).
    pub map_paths: Vec<paths::Mapping>,
    /// For files whose contents the image stores.
    pub put_files: PutFiles,
    /// For the clocks that start at boot.
    pub clock: ClockPolicy,
    /// Descriptors to drop (`--drop-fd`).
    pub drop: Vec<Chosen>,
    /// For control groups.
    pub cgroups: cgroup::Policy,
    /// Leaves the job stopped, for a debugger.
    pub stopped: bool,
    /// The caller waits for the job: a job that led its process group gets the terminal.
    pub foreground: bool,
    /// The image is only inspected: refuses one that needs more memory than its size allows.
    pub bounded: bool,
    /// Probed features and our own status; probed on opening if absent.
    pub probed: Option<&'a Probed>,
    /// Progress sink.
    pub progress: &'a dyn Progress,
}

impl<'a> Request<'a> {
    /// A restore without options, of a job in the foreground.
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
    /// Differences that are harmless to the job (a hard limit, for example), one sentence each.
    pub warnings: Vec<String>,
    /// The master of the job's terminal, if that is a new one.
    pub master: Option<OwnedFd>,
}

/// All obstacles to a restore; empty if there are none. Has no side effects.
///
/// # Errors
/// When the image is unreadable or invalid.
pub fn obstacles(request: &Request<'_>) -> Result<Vec<Obstacle>> {
    obstacles_of(open(request)?)
}

/// The same for an open image.
///
/// # Errors
/// As [`obstacles`].
pub fn obstacles_of(opened: Opened<'_>) -> Result<Vec<Obstacle>> {
    Ok(opened.place_for_a_look()?.look()?.obstacles())
}

/// Restores; when the job is complete and about to be released, `lend` gets its request for our terminal, if it may
/// have it.
///
/// # Errors
/// [`Error::Refused`] with all obstacles, and errors of creating processes. No process is left behind.
pub fn restore(
    placed: &mut Placed<'_>,
    lend: &mut dyn FnMut(Option<JobTerminal>),
) -> Result<Restored> {
    /// Attempts, since a process that creates others all the time may take ids of the job repeatedly.
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
