//! A job whose state is known: its pages go into the image, and it is let go.

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

/// Where the pages of a process are.
pub(super) struct Pages {
    /// Its mappings.
    pub vmas: Vec<Vma>,
    /// What finds pages in them.
    pub scanner: PagemapScanner,
}

/// A frozen job, and all of it but its pages.
pub(super) struct State {
    /// The job.
    pub job: FrozenJob,
    /// What was captured.
    pub snapshot: Snapshot,
    /// Of each process of both.
    pub pages: Vec<Pages>,
    /// What has contents beside them.
    pub contents: Vec<(SpaceId, Contents)>,
    /// The first that nothing has.
    pub next_space: SpaceId,
    /// See [`Report::warnings`](super::Report).
    pub warnings: Vec<String>,
}

/// A checkpoint of which all is captured but the pages.
pub(super) struct Captured<'r> {
    /// What was asked for.
    pub request: &'r Request<'r>,
    /// The header of the image.
    pub header: Header,
    /// When it began.
    pub begun: Instant,
    /// How long the job stands still.
    pub pause: Pause,
    /// The job.
    pub state: State,
}

impl<'r> Captured<'r> {
    /// Writes the pages of all processes, and what else has contents.
    ///
    /// # Errors
    /// Those of reading and writing; the job goes on.
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

/// A checkpoint whose pages are in the image.
pub(super) struct Stored<'r, W: Write + Send + 'static> {
    captured: Captured<'r>,
    writer: Writer<W>,
    bundle: Bundle,
    bytes: u64,
}

impl<'r, W: Write + Send + 'static> Stored<'r, W> {
    /// Lets the job go on, or holds it where it is not to.
    ///
    /// # Errors
    /// Where a task cannot be let go; those of reading and writing files of the bundle.
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
