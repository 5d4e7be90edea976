//! A job with captured state: stores its pages and releases it.

use std::io::Write;
use std::time::Instant;

use ckpt_image::{Header, Writer};
use ckpt_tracer::proc::maps::Vma;
use ckpt_tracer::proc::pagemap::PagemapScanner;

use super::bundle::Bundle;
use super::released::{Held, Released};
use super::stored::write_pages;
use super::{After, Pause, Request};
use crate::error::Result;
use crate::objects::job::FrozenJob;
use crate::objects::source::Contents;
use crate::objects::{Snapshot, SpaceId};

/// Access to the pages of a process.
pub(super) struct Pages {
    /// Its mappings.
    pub vmas: Vec<Vma>,
    /// Its page tables.
    pub scanner: PagemapScanner,
}

/// A frozen job and its state without pages.
pub(super) struct State {
    /// The job.
    pub job: FrozenJob,
    /// Its snapshot.
    pub snapshot: Snapshot,
    /// For each process of both.
    pub pages: Vec<Pages>,
    /// Spaces with other contents.
    pub contents: Vec<(SpaceId, Contents)>,
    /// The first free space.
    pub next_space: SpaceId,
    /// See [`Report::warnings`](super::Report).
    pub warnings: Vec<String>,
}

/// A checkpoint in which everything but pages is captured.
pub(super) struct Captured<'r> {
    /// The request.
    pub request: &'r Request<'r>,
    /// The header of the image.
    pub header: Header,
    /// Its start.
    pub begun: Instant,
    /// The pause.
    pub pause: Pause,
    /// The job.
    pub state: State,
}

impl<'r> Captured<'r> {
    /// Writes the pages of all processes, and other contents.
    ///
    /// # Errors
    /// Those of reading and writing; the job continues.
    pub(super) fn write_pages<W: Write + Send + 'static>(
        mut self,
        mut writer: Writer<W>,
    ) -> Result<Stored<'r, W>> {
        let bundle = match self.request.bundle {
            true => Bundle::open(&self.state.snapshot, self.state.next_space)?,
            false => Bundle::empty(),
        };
        let bytes = write_pages(&mut writer, &mut self.state, self.request.progress)?;
        Ok(Stored {
            captured: self,
            writer,
            bundle,
            bytes,
        })
    }
}

/// A checkpoint whose pages are stored.
pub(super) struct Stored<'r, W: Write + Send + 'static> {
    captured: Captured<'r>,
    writer: Writer<W>,
    bundle: Bundle,
    bytes: u64,
}

impl<'r, W: Write + Send + 'static> Stored<'r, W> {
    /// Releases the job, or keeps it frozen if it is to be stopped or killed.
    ///
    /// # Errors
    /// When a task cannot be released; those of reading and writing bundled files.
    pub(super) fn release(self) -> Result<Released<'r, W>> {
        let Captured {
            request,
            header,
            begun,
            pause,
            state,
        } = self.captured;
        let threads = state.job.tasks() as u32;
        let held = match request.after {
            After::Continue => {
                state.job.thaw()?;
                request.guard.iter().for_each(|guard| guard.come());
                None
            }
            After::Stop => Some(Held::ToStop(state.job)),
            After::Kill => Some(Held::ToEnd(state.job)),
        };
        let paused = pause.so_far();
        request.progress.end();
        let mut released = Released {
            request,
            header,
            begun,
            pause,
            paused,
            held,
            threads,
            writer: self.writer,
            snapshot: state.snapshot,
            bytes: self.bytes,
            warnings: state.warnings,
        };
        released.add_what_does_not_change(self.bundle)?;
        Ok(released)
    }
}
