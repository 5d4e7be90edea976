//! After the release of the job: completes its image.

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

/// A job that does not continue.
pub(super) enum Held {
    /// To be left stopped.
    ToStop(FrozenJob),
    /// To be killed.
    ToEnd(FrozenJob),
}

/// A checkpoint in which everything but the metadata is written.
pub(super) struct Released<'r, W: Write + Send + 'static> {
    /// The request.
    pub request: &'r Request<'r>,
    /// The header of the image.
    pub header: Header,
    /// Its start.
    pub begun: Instant,
    /// The pause.
    pub pause: Pause,
    /// Length of the pause, if the job continues.
    pub paused: Duration,
    /// The job, if it does not continue.
    pub held: Option<Held>,
    /// Its number of threads.
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
    /// Reads what can be read after the job continues: identities of its files, settings of its control groups,
    /// bundled files.
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

    /// The image without its pages, for a check.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub(super) fn without_pages(&self) -> Result<File> {
        without_pages(&self.snapshot, &self.header)
    }

    /// Adds warnings.
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

/// A checkpoint with a complete image.
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
    /// Adds warnings.
    pub(super) fn tell(&mut self, more: Vec<String>) {
        self.warnings.extend(more);
    }

    /// Kills a frozen job, or leaves it stopped. The image has its final name.
    ///
    /// # Errors
    /// When a task cannot be released.
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
