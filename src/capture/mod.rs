//! A live job becomes an image: the order of the work, and the freeze window.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ckpt_image::Codec;
use ckpt_tracer::Pid;

use crate::error::Result;
use crate::progress::Progress;

pub mod source;

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
    /// The process.
    pub pid: Pid,
    /// How pages are compressed.
    pub codec: Codec,
    /// What becomes of the job.
    pub after: After,
    /// Who is told how far it is.
    pub progress: &'a dyn Progress,
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
}

/// Checkpoints into a file: complete and synced when this returns, or not there at all.
pub fn to_file(request: &Request<'_>, path: &Path) -> Result<Report> {
    let _ = (request, path);
    Err(crate::Error::Restore("not built yet".into()))
}

/// Checkpoints into a stream. With [`After::Stop`] and [`After::Kill`] "complete" means that
/// everything was written without error.
pub fn to_stream(request: &Request<'_>, sink: impl Write + Send + 'static) -> Result<Report> {
    let _ = (request, sink);
    Err(crate::Error::Restore("not built yet".into()))
}
