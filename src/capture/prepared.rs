//! Before the freeze, and repeated attempts at it.

use std::time::{Duration, Instant};

use ckpt_image::Header;

use super::captured::Captured;
use super::frozen::Frozen;
use super::{Pause, Request};
use crate::error::{Error, Result};
use crate::host;
use crate::objects::source::{Patience, Source};

/// Most attempts of a checkpoint while there are transient obstacles; the job runs in between.
const ATTEMPTS: u32 = 10;
/// When the job has been stopped for this time in total, the next attempt is the last.
const MOST_PAUSED: Duration = Duration::from_secs(4);
/// Running time of the job between two attempts.
const BETWEEN: Duration = Duration::from_millis(30);

/// A checkpoint without obstacles visible from outside; the job runs.
pub(super) struct Prepared<'r> {
    request: &'r Request<'r>,
    header: Header,
    begun: Instant,
}

impl<'r> Prepared<'r> {
    /// Inspects the job from outside.
    ///
    /// # Errors
    /// [`Error::Refused`] for obstacles that are not transient.
    pub(super) fn new(request: &'r Request<'r>) -> Result<Self> {
        let begun = Instant::now();
        refuse_obstacles(request)?;
        crate::objects::limits::raise_descriptor_limit();
        let header = host::image_header(&Source::open(request.pid)?)?;
        Ok(Self {
            request,
            header,
            begun,
        })
    }

    /// The request.
    pub(super) fn request(&self) -> &'r Request<'r> {
        self.request
    }

    /// The header of the image.
    pub(super) fn header(&self) -> &Header {
        &self.header
    }

    /// Freezes the job and captures everything but pages; repeats that for transient obstacles.
    ///
    /// # Errors
    /// Those of the last attempt; the job continues.
    pub(super) fn capture(self) -> Result<Captured<'r>> {
        let request = self.request;
        let mut attempts = 0;
        let mut before = Duration::ZERO;
        loop {
            let since = Instant::now();
            let patience = match attempts < ATTEMPTS && before < MOST_PAUSED {
                true => Patience::Some,
                false => Patience::None,
            };
            if let Some(guard) = request.guard {
                guard.leave(request.pid)?;
            }
            match Frozen::freeze(request).and_then(|frozen| frozen.capture(patience)) {
                Err(e) if e.is_passing() && patience == Patience::Some => {}
                state => {
                    return Ok(Captured {
                        request,
                        header: self.header,
                        begun: self.begun,
                        pause: Pause { before, since },
                        state: state?,
                    });
                }
            }
            request.guard.iter().for_each(|guard| guard.come());
            attempts += 1;
            before += since.elapsed();
            std::thread::sleep(BETWEEN);
        }
    }
}

fn refuse_obstacles(request: &Request<'_>) -> Result<()> {
    let obstacles =
        crate::capture::check::obstacles_at_a_glance(&request.roots(), &request.choices)?;
    if obstacles.is_empty() {
        Ok(())
    } else {
        let found = Error::Refused(obstacles);
        // Decided again when the job is frozen.
        if found.is_passing() {
            Ok(())
        } else {
            Err(found)
        }
    }
}
