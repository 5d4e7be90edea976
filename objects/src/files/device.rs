//! Character devices without state between calls.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use ckpt_tracer::proc::fdlink::FdLink;
use serde::{Deserialize, Serialize};

use super::Look;
use super::kind::{Captured, OpenFile, Opened, Place, Sight};
use crate::Snapshot;
use crate::access::MISSING;
use crate::error::Obstacle;
use crate::need::Need;
use crate::open::{Handle, Last};
use crate::plan::{Builder, Inherited};
use crate::rights::{self, Rights};
use crate::source::Collector;
use crate::text::Shown;

/// An open character device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// The path under which it was opened.
    #[serde(with = "crate::raw_path")]
    pub path: PathBuf,
    /// Device number, major and minor.
    pub number: (u32, u32),
}

/// The devices known to have no state, and their paths.
const STATELESS: &[((u32, u32), &str)] = &[
    ((1, 3), "/dev/null"),
    ((1, 5), "/dev/zero"),
    ((1, 7), "/dev/full"),
    ((1, 8), "/dev/random"),
    ((1, 9), "/dev/urandom"),
];

/// Whether the device has no state.
fn is_stateless(look: &Look) -> bool {
    let number = look.stat.st_rdev;
    let number = (libc::major(number), libc::minor(number));
    STATELESS.iter().any(|(known, _)| *known == number)
}

impl OpenFile for Device {
    fn capture(sight: &Sight, _: &mut Collector) -> Captured {
        let FdLink::File { path, .. } = &sight.look.link else {
            return None;
        };
        if sight.look.file_type() != libc::S_IFCHR || !is_stateless(sight.look) {
            return None;
        }
        let number = sight.look.stat.st_rdev;
        let number = (libc::major(number), libc::minor(number));
        Some(Ok(Device {
            path: path.to_owned(),
            number,
        }
        .into()))
    }

    fn class(&self) -> &'static str {
        "device"
    }

    fn label(&self) -> String {
        self.path.shown()
    }

    fn needs(&self, _: u32, _: &Snapshot) -> Vec<Need> {
        let (major, minor) = self.number;
        let detail = format!("number {major}:{minor}");
        vec![Need::new("device", self.path.shown(), detail)]
    }

    fn each_path(&mut self, f: &mut dyn FnMut(&mut PathBuf)) {
        f(&mut self.path);
    }

    /// It is opened by another name if its own has gone.
    fn make_comparable(&mut self, _: &mut u32) {
        self.path.clear();
    }

    fn keeps_paths(&self, _: u32) -> bool {
        true
    }

    fn is_of_surroundings(&self) -> bool {
        true
    }

    fn opened(&self) -> Opened {
        Opened::WithFlags
    }

    fn open(&self, place: &Place, plan: &mut Builder) -> Result<(), Vec<Obstacle>> {
        let rights = plan.host().rights.as_ref();
        self.find(place.flags, rights).map_err(|o| vec![*o])?;
        plan.inherit(place.at, Inherited::Device(place.index));
        Ok(())
    }
}

impl Device {
    /// For messages.
    pub fn object(&self) -> String {
        format!("the device {}", self.path.shown())
    }

    /// Looks it up, to be opened with these rights: by its own name, or if that has gone by another name of the same
    /// device.
    pub fn find(&self, flags: u32, rights: Option<&Rights>) -> Result<Handle, Box<Obstacle>> {
        rights::with(rights, || {
            let usual = STATELESS.iter().find(|(known, _)| *known == self.number);
            let usual = usual.map(|(_, path)| Path::new(path));
            let found = device(&self.path, self.number);
            let found = found.or_else(|reason| {
                let other = usual.map(|path| device(path, self.number));
                other.and_then(Result::ok).ok_or(reason)
            });
            let found =
                found.map_err(|reason| Box::new(Obstacle::new(self.object(), reason, MISSING)))?;
            if let Err(errno) = rights::may_open(None, &found.link(), flags as i32) {
                let reason = format!("cannot be opened by the job's user: {}", errno.desc());
                let remedy = "give that user access to it (chmod)";
                return Err(Box::new(Obstacle::new(self.object(), reason, remedy)));
            }
            Ok(found)
        })
    }
}

/// The character device with that number at a path.
///
/// # Errors
/// Why there is none.
pub fn device(path: &Path, (major, minor): (u32, u32)) -> Result<Handle, String> {
    let found = Handle::of(path, Last::LeadsOn).map_err(|e| format!("cannot be opened: {e}"))?;
    let meta = found.meta();
    match meta.file_type().is_char_device() && meta.rdev() == libc::makedev(major, minor) {
        true => Ok(found),
        false => Err("is something else by now".to_owned()),
    }
}
