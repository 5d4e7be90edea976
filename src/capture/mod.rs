//! A live job becomes an image: the order of the work, and the freeze window.
//!
//! A checkpoint goes through phases. Each is a type, and the way to the next one is a function that takes it: so no
//! phase is left out, and whoever drops one lets the job go on, as it was.
//!
//! 1. `Prepared`: nothing that shows from outside stands in the way; the job runs. The place for the image is opened.
//! 2. `Frozen`: every task is stopped.
//! 3. `Captured`: its state is known. Its pages are read; compression and writing go on beside.
//! 4. `Stored`: they are in the image.
//! 5. `Released`: the job goes on, or is held (see [`After`]). The metadata is written.
//! 6. `Whole`: the image is complete, and committed by whoever has its file. The job that was held is ended, or
//!    left stopped.

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

/// What becomes of the job after its checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum After {
    /// It goes on.
    #[default]
    Continue,
    /// It is left stopped, as by SIGSTOP, once the image is complete and synced.
    Stop,
    /// It is killed, once the image is complete and synced.
    Kill,
}

/// A wish for a checkpoint.
pub struct Request<'a> {
    /// The process: it and all that descend from it are the job.
    pub pid: Pid,
    /// The way to its guard, if it has one.
    pub guard: Option<&'a Door>,
    /// Further processes that belong to the job with their descendants, though another process
    /// has adopted them.
    pub adopted: Vec<Pid>,
    /// What it has to itself, as seen from outside of that.
    pub namespaces: Namespaces,
    /// Its supplementary groups as they are outside, if it has a user namespace to itself.
    pub groups: Vec<u32>,
    /// How pages are compressed.
    pub codec: Codec,
    /// What becomes of the job.
    pub after: After,
    /// Open files whose contents go into the image.
    pub save_files: SaveFiles,
    /// Programs, libraries and files that the job only reads go into the image as well.
    pub bundle: bool,
    /// Whether anything stands in the way of a restore is looked at before the image has its name.
    pub check: bool,
    /// Looks at the image.
    pub prover: Option<&'a dyn Prove>,
    /// The job is restored from the image in namespaces of its own, and compared, before anything else.
    pub rehearse: bool,
    /// It is such a copy: what goes with its IPC namespace is not missed.
    pub is_copy: bool,
    /// Descriptors that do not go into the image.
    pub choices: Choices,
    /// The job's frozen control groups, to be thawed for the checkpoint.
    pub frozen_groups: Option<Thawable>,
    /// Who is told how far it is.
    pub progress: &'a dyn Progress,
}

impl Request<'_> {
    /// The root of the job, and what was adopted.
    fn roots(&self) -> Vec<Pid> {
        let mut roots = vec![self.pid];
        roots.extend(&self.adopted);
        roots
    }

    /// Nothing stands in the way of a restore from that image but what an option of `restore` settles,
    /// which is told.
    fn prove(&self, image: &File, name: &Path) -> Result<Vec<String>> {
        let Some(prover) = self.prover else {
            return Ok(Vec::new());
        };
        let mut told = Vec::new();
        if self.check {
            let found = prover.obstacles(image, name)?;
            // What a job that goes on has done to its files since, it will go on doing.
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

/// How long the job stands still.
#[derive(Clone, Copy, Debug)]
struct Pause {
    /// In attempts that have failed.
    before: Duration,
    /// In this one, since then.
    since: Instant,
}

impl Pause {
    fn so_far(&self) -> Duration {
        self.before + self.since.elapsed()
    }
}

/// What a checkpoint was.
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
    /// Time in all.
    pub total: Duration,
    /// Time during which the job's tasks did not run.
    pub paused: Duration,
    /// The image, unless it went to a pipe.
    pub path: Option<PathBuf>,
    /// What the user should know of a checkpoint that succeeded, one sentence each.
    pub warnings: Vec<String>,
}

/// Checkpoints into a file: complete and synced when this returns, or not there at all.
///
/// # Errors
/// What stands in the way; [`Error::Image`] where the file cannot be written. The job goes on.
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

/// The writer does not know where its bytes go, but whoever reads the message has to.
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

/// Checkpoints into a stream. With [`After::Stop`] and [`After::Kill`] "complete" means that
/// everything was written without error, and what is looked at before is an image without pages: if
/// something stands in the way of its restore, the stream ends before it is an image.
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
    sink.flush().map_err(|source| Error::File {
        what: "write",
        path: "the image to the pipe".into(),
        source,
    })?;
    whole.end()
}

/// As far as everything is written but the metadata.
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
