//! An image that was read and verified.

use std::borrow::Cow;

use ckpt_image::{Arch, Reader};

use super::adapted::Adapted;
use super::decide::host;
use super::image_file::ImageFile;
use super::placed::Placed;
use super::probed::Probed;
use super::{Pids, Place, Request};
use crate::error::Result;
use crate::objects::findings::Findings;
use crate::objects::processor::Baseline;
use crate::objects::rights::Rights;
use crate::objects::{processor, seccomp};
use crate::snapshot;

/// A verified image, and its snapshot adapted to this machine.
pub struct Opened<'a> {
    pub(super) request: &'a Request<'a>,
    /// Bytes of memory that a plan may use.
    pub(super) room: u64,
    pub(super) image: Reader,
    pub(super) snapshot: Adapted,
    /// Probed features of this machine.
    pub(super) probed: Cow<'a, Probed>,
    /// Obstacles that are known already, and what the restored job lacks.
    pub(super) findings: Findings,
}

/// Reads an image, and compares it with this machine.
///
/// # Errors
/// [`Error::Image`](crate::error::Error::Image) and [`Error::Metadata`](crate::error::Error::Metadata), and
/// [`Error::Refused`](crate::error::Error::Refused) for an image of another user. Other obstacles are only recorded.
pub fn open<'a>(request: &'a Request<'a>) -> Result<Opened<'a>> {
    open_file(ImageFile::open(request.image)?, request)
}

/// The same for an open image.
///
/// # Errors
/// As [`open`].
pub fn open_file<'a>(image: ImageFile, request: &'a Request<'a>) -> Result<Opened<'a>> {
    open_trusted(image.ours()?, request)
}

/// The same for an image that we have just written, or made in memory.
///
/// # Errors
/// As [`open`].
pub fn open_trusted<'a>(image: Reader, request: &'a Request<'a>) -> Result<Opened<'a>> {
    image.require_arch(Arch::native())?;
    let mut room = match request.bounded {
        true => snapshot::allowance(&image),
        false => u64::MAX,
    };
    let snapshot = snapshot::read_within(&mut room, &image, request.image)?;
    let probed = match request.probed {
        Some(probed) => Cow::Borrowed(probed),
        None => Cow::Owned(Probed::here()?),
    };
    let verdict = processor::judge(&snapshot, &probed.kernel.cpu);
    let fewer_filters = seccomp::surroundings::fewer_here(snapshot.filters_around(), &probed.ours);
    let notes = verdict.warning().into_iter().chain(fewer_filters).collect();
    let mut findings = Findings {
        notes,
        ..Findings::from(verdict.obstacles)
    };
    let snapshot = Adapted::of(snapshot, request, &mut findings)?;
    Ok(Opened {
        request,
        room,
        image,
        snapshot,
        probed,
        findings,
    })
}

impl<'a> Opened<'a> {
    /// The user by whose rights files are opened, if not by ours.
    pub(super) fn rights(&self) -> Option<Rights> {
        let (credentials, held) = host::credentials(&self.probed, &self.probed.ours.groups);
        Rights::of(&self.snapshot, &credentials, held)
    }

    /// The processor baseline that the job was started with.
    pub fn baseline(&self) -> Option<Baseline> {
        self.snapshot.host.baseline
    }

    /// Decides whether the job is restored in our pid namespace or in a new one, before anything is created.
    ///
    /// # Errors
    /// [`Error::Refused`](crate::error::Error::Refused) if neither is possible.
    pub fn place(self, wanted: Pids) -> Result<Placed<'a>> {
        Placed::of(self, wanted)
    }

    /// The job gets a new pid namespace, without further checks: for a rehearsal.
    pub fn place_in_namespace(self) -> Placed<'a> {
        Placed::at(self, Place::Namespace(None))
    }

    /// The same decision for `check` and `--dry-run`: obstacles are recorded instead of returned.
    ///
    /// # Errors
    /// If this machine cannot be examined.
    pub fn place_for_a_look(self) -> Result<Placed<'a>> {
        Placed::for_a_look(self)
    }
}
