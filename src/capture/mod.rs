//! Checkpoint of a live job into an image: the order of the work, and the freeze window.
//!
//! A checkpoint goes through phases. Each is a type, and the next one is reached by a function that consumes it: so
//! no phase can be skipped, and dropping one lets the job continue as it was.
//!
//! 1. `Prepared`: there are no obstacles visible from outside; the job runs. The image file is opened.
//! 2. `Frozen`: every task is stopped.
//! 3. `Captured`: its state is captured. Its pages are read; compression and writing run concurrently.
//! 4. `Stored`: the pages are in the image.
//! 5. `Released`: the job continues, or is kept frozen (see [`After`]). The metadata is written.
//! 6. `Whole`: the image is complete, and committed by the owner of the file. A frozen job is killed or left stopped.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ckpt_image::{Codec, ImageFile, Writer, WriterOptions};
use ckpt_tracer::Pid;
use ckpt_tracer::fault::{self, Step};

use crate::error::{Error, Result};
use crate::guard::door::Door;
use crate::objects::cgroup::freezer::Thawable;
use crate::objects::files::left::Choices;
use crate::objects::namespaces::Namespaces;
use crate::objects::save_files::SaveFiles;
use crate::progress::Progress;
use prepared::Prepared;
use prove::Prove;
use released::Released;

mod borrow;
pub mod bundle;
mod captured;
pub mod check;
mod cow;
mod end;
mod frozen;
pub mod pages;
mod prepared;
pub mod prove;
mod released;
pub mod seen;
mod stored;

/// What to do with the job after its checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum After {
    /// Let it continue.
    #[default]
    Continue,
    /// Leave it stopped, as by SIGSTOP, once the image is complete and synced.
    Stop,
    /// Kill it, once the image is complete and synced.
    Kill,
}

/// A request for a checkpoint.
pub struct Request<'a> {
    /// The root process; it and all its descendants are the job.
    pub pid: Pid,
    /// The connection to its guard, if it has one.
    pub guard: Option<&'a Door>,
    /// Further processes that belong to the job with their descendants, though another process has adopted them.
    pub adopted: Vec<Pid>,
    /// Its own namespaces, as seen from outside.
    pub namespaces: Namespaces,
    /// Its supplementary groups as seen from outside, if it has its own user namespace.
    pub groups: Vec<u32>,
    /// Compression of pages.
    pub codec: Codec,
    /// What to do with the job afterwards.
    pub after: After,
    /// Open files whose contents are stored.
    pub save_files: SaveFiles,
    /// Whether to store programs, libraries and files that the job only reads.
    pub bundle: bool,
    /// Whether to check for obstacles to a restore before the image gets its name.
    pub check: bool,
    /// Checks the image.
    pub prover: Option<&'a dyn Prove>,
    /// Whether to restore the job from the image in new namespaces first, and compare.
    pub rehearse: bool,
    /// Whether the job is such a copy, whose IPC namespace may be lost.
    pub is_copy: bool,
    /// Descriptors to drop or replace.
    pub choices: Choices,
    /// The job's frozen control groups, which may be thawed for the checkpoint.
    pub frozen_groups: Option<Thawable>,
    /// Progress sink.
    pub progress: &'a dyn Progress,
}

impl Request<'_> {
    /// The root of the job, and adopted processes.
    fn roots(&self) -> Vec<Pid> {
        let mut roots = vec![self.pid];
        roots.extend(&self.adopted);
        roots
    }

    /// Checks for obstacles to a restore from that image. Those that an option of `restore` resolves are returned as
    /// notes.
    fn prove(&self, image: &File, name: &Path) -> Result<Vec<String>> {
        let Some(prover) = self.prover else {
            return Ok(Vec::new());
        };
        let mut told = Vec::new();
        if self.check {
            let found = prover.obstacles(image, name)?;
            // A job that continues will go on changing its files.
            let runs = self.after == After::Continue;
            let (notes, obstacles): (Vec<_>, Vec<_>) =
                found.into_iter().partition(|o| o.by_option || runs);
            if !obstacles.is_empty() {
                return Err(Error::NotRestorable(obstacles));
            }
            told.extend(notes.iter().map(seen::note));
        }
        if self.rehearse {
            let found = prover.rehearsal(image, name)?;
            if !found.differences.is_empty() {
                return Err(Error::Differs(found.differences));
            }
            told.extend(found.warnings);
        }
        Ok(told)
    }
}

/// The duration for which the job is stopped.
#[derive(Clone, Copy, Debug)]
struct Pause {
    /// In failed attempts.
    before: Duration,
    /// Start of the current attempt.
    since: Instant,
}

impl Pause {
    fn so_far(&self) -> Duration {
        self.before + self.since.elapsed()
    }
}

/// Summary of a checkpoint.
#[derive(Clone, Debug)]
pub struct Report {
    /// The process's name.
    pub name: String,
    /// Its pid.
    pub pid: i32,
    /// Processes in the image.
    pub processes: u32,
    /// Threads in the image.
    pub threads: u32,
    /// Bytes of memory in the image, before compression.
    pub memory_bytes: u64,
    /// Bytes of the image.
    pub image_bytes: u64,
    /// Total time.
    pub total: Duration,
    /// Time during which the job's tasks did not run.
    pub paused: Duration,
    /// The image, unless it went to a pipe.
    pub path: Option<PathBuf>,
    /// Warnings of a successful checkpoint, one sentence each.
    pub warnings: Vec<String>,
}

/// Checkpoints to a file: complete and synced on return, or absent.
///
/// # Errors
/// Obstacles; [`Error::Image`] when the file cannot be written. The job continues.
pub fn to_file(request: &Request<'_>, path: &Path) -> Result<Report> {
    let prepared = Prepared::new(request)?;
    let file = ImageFile::create(path)?;
    let report = to_image_file(prepared, file, path).map_err(|error| named(error, path))?;
    Ok(Report {
        path: Some(path.to_owned()),
        ..report
    })
}

fn to_image_file(prepared: Prepared<'_>, file: ImageFile, path: &Path) -> Result<Report> {
    let request = prepared.request();
    let (file, mut whole) = released(prepared, file)?.finish()?;
    whole.tell(request.prove(file.file(), path)?);
    fault::hit(Step::BeforeSync)?;
    file.sync()?;
    fault::hit(Step::BeforeRename)?;
    file.commit()?;
    whole.end()
}

/// Adds the file's path, which the writer does not know.
fn named(error: Error, path: &Path) -> Error {
    match error {
        Error::Image(ckpt_image::Error::Sink { source }) => Error::Image(ckpt_image::Error::Io {
            path: path.to_owned(),
            action: "write the image",
            source,
        }),
        other => other,
    }
}

/// Checkpoints to a stream. With [`After::Stop`] and [`After::Kill`] "complete" means that everything was written
/// without error, and the check is done on an image without pages: if there is an obstacle to its restore, the stream
/// ends incomplete.
///
/// # Errors
/// As [`to_file`].
pub fn to_stream(request: &Request<'_>, sink: impl Write + Send + 'static) -> Result<Report> {
    let mut released = released(Prepared::new(request)?, sink)?;
    if request.prover.is_some() {
        let image = released.without_pages()?;
        released.tell(request.prove(&image, Path::new("(stream)"))?);
    }
    let (mut sink, whole) = released.finish()?;
    sink.flush()
        .map_err(Error::file("write", "the image to the pipe"))?;
    whole.end()
}

/// Up to the point where everything but the metadata is written.
fn released<'r, W: Write + Send + 'static>(
    prepared: Prepared<'r>,
    sink: W,
) -> Result<Released<'r, W>> {
    let options = WriterOptions {
        codec: prepared.request().codec,
        threads: 0,
    };
    let writer = Writer::new(sink, prepared.header(), options)?;
    let captured = prepared.capture()?;
    fault::hit(Step::StateCaptured)?;
    let stored = captured.write_pages(writer)?;
    fault::hit(Step::Release)?;
    stored.release()
}
