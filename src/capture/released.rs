//! A job that was let go, or is held: its image is completed.

use std::fs::File;
use std::io::Write;
use std::time::{Duration, Instant};

use ckpt_image::{Header, ImageSummary, Writer};

use super::bundle::Bundle;
use super::end::kill;
use super::pages::PageSink;
use super::seen::without_pages;
use super::{Pause, Report, Request};
use crate::error::Result;
use crate::host;
use crate::objects::Snapshot;
use crate::objects::cgroup::settings;
use crate::objects::job::FrozenJob;
use crate::snapshot;

/// A job that does not go on.
pub(super) enum Held {
    /// It is left stopped in the end.
    ToStop(FrozenJob),
    /// It is ended.
    ToEnd(FrozenJob),
}

/// A checkpoint of which all is written but the metadata.
pub(super) struct Released<'r, W: Write + Send + 'static> {
    /// What was asked for.
    pub request: &'r Request<'r>,
    /// The header of the image.
    pub header: Header,
    /// When it began.
    pub begun: Instant,
    /// How long the job stands still.
    pub pause: Pause,
    /// How long it has stood still if it goes on.
    pub paused: Duration,
    /// The job, if it does not go on.
    pub held: Option<Held>,
    /// Threads of it.
    pub threads: u32,
    /// The image.
    pub writer: Writer<W>,
    /// The metadata.
    pub snapshot: Snapshot,
    /// Bytes of memory in the image.
    pub bytes: u64,
    /// See [`Report::warnings`].
    pub warnings: Vec<String>,
}

impl<'r, W: Write + Send + 'static> Released<'r, W> {
    /// What is read when the job goes on: identities of its files, settings of its control groups, files of the bundle.
    pub(super) fn add_what_does_not_change(&mut self, bundle: Bundle) -> Result<()> {
        host::read_build_ids(&mut self.snapshot);
        settings::read_groups(&mut self.snapshot);
        if self.request.bundle {
            let progress = self.request.progress;
            progress.begin(bundle.bytes());
            let mut sink = PageSink::new(&mut self.writer, progress);
            self.snapshot.bundle = bundle.store(&mut sink)?;
            self.bytes += sink.finish()?;
            progress.end();
        }
        Ok(())
    }

    /// The image without its pages, to be looked at.
    ///
    /// # Errors
    /// Where there is no memory for it.
    pub(super) fn without_pages(&self) -> Result<File> {
        without_pages(&self.snapshot, &self.header)
    }

    /// Adds to what the user should know.
    pub(super) fn tell(&mut self, more: Vec<String>) {
        self.warnings.extend(more);
    }

    /// Writes the metadata.
    ///
    /// # Errors
    /// Those of writing.
    pub(super) fn finish(mut self) -> Result<(W, Whole<'r>)> {
        snapshot::write(&mut self.writer, &self.snapshot)?;
        let (sink, image) = self.writer.finish()?;
        let root = &self.snapshot.processes[0];
        let whole = Whole {
            request: self.request,
            begun: self.begun,
            pause: self.pause,
            paused: self.paused,
            held: self.held,
            name: crate::text::of(&root.threads[0].name),
            processes: self.snapshot.processes.len() as u32,
            threads: self.threads,
            bytes: self.bytes,
            image,
            warnings: self.warnings,
        };
        Ok((sink, whole))
    }
}

/// A checkpoint whose image is complete.
pub(super) struct Whole<'r> {
    request: &'r Request<'r>,
    begun: Instant,
    pause: Pause,
    paused: Duration,
    held: Option<Held>,
    name: String,
    processes: u32,
    threads: u32,
    bytes: u64,
    image: ImageSummary,
    warnings: Vec<String>,
}

impl Whole<'_> {
    /// Adds to what the user should know.
    pub(super) fn tell(&mut self, more: Vec<String>) {
        self.warnings.extend(more);
    }

    /// Ends a job that is held, or leaves it stopped. The image is where it is to stay.
    ///
    /// # Errors
    /// Where a task cannot be let go.
    pub(super) fn end(self) -> Result<Report> {
        let mut paused = self.paused;
        if let Some(held) = self.held {
            match held {
                Held::ToEnd(job) if self.request.pid.raw() == 1 => job.end_with_us()?,
                Held::ToEnd(job) => kill(job)?,
                Held::ToStop(job) => drop(job.leave_stopped()?),
            }
            paused = self.pause.so_far();
        }
        Ok(Report {
            name: self.name,
            pid: self.request.pid.raw(),
            processes: self.processes,
            threads: self.threads,
            memory_bytes: self.bytes,
            image_bytes: self.image.bytes,
            total: self.begun.elapsed(),
            paused,
            path: None,
            warnings: self.warnings,
        })
    }
}
