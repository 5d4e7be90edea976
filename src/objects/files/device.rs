//! Character devices that keep no state between calls.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Kind, Look};
use crate::error::Obstacle;
use crate::restore::plan::Builder;
use crate::restore::rights;
use crate::restore::surroundings::MISSING;

/// An open character device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Where it was opened.
    #[serde(with = "crate::objects::raw_path")]
    pub path: PathBuf,
    /// Device number, major and minor.
    pub number: (u32, u32),
}

/// The devices that are known to keep no state, and where they are.
const STATELESS: &[((u32, u32), &str)] = &[
    ((1, 3), "/dev/null"),
    ((1, 5), "/dev/zero"),
    ((1, 7), "/dev/full"),
    ((1, 8), "/dev/random"),
    ((1, 9), "/dev/urandom"),
];

/// Whether the device is one that keeps no state.
pub fn is_stateless(look: &Look) -> bool {
    let number = look.stat.st_rdev;
    let number = (libc::major(number), libc::minor(number));
    STATELESS.iter().any(|(known, _)| *known == number)
}

/// Captures a stateless device.
pub fn capture(look: &Look, path: &Path) -> Kind {
    let number = look.stat.st_rdev;
    let number = (libc::major(number), libc::minor(number));
    Kind::Device(Device {
        path: path.to_owned(),
        number,
    })
}

impl Device {
    /// Opens it at its staging number: by the name that it had, or by another that leads to the same
    /// device where that is gone.
    pub fn rebuild(&self, flags: u32, at: i32, plan: &mut Builder) -> Result<(), Box<Obstacle>> {
        let object = || format!("the device {}", self.path.display());
        let number = libc::makedev(self.number.0, self.number.1);
        let leads_to = |path: &Path| match std::fs::metadata(path) {
            Ok(meta) if meta.file_type().is_char_device() && meta.rdev() == number => Ok(()),
            Ok(_) => Err("is something else by now".to_owned()),
            Err(e) => Err(format!("cannot be opened: {e}")),
        };
        let usual = STATELESS.iter().find(|(known, _)| *known == self.number);
        let usual = usual.map(|(_, path)| Path::new(path));
        let path = match leads_to(&self.path) {
            Ok(()) => self.path.as_path(),
            Err(reason) => match usual.filter(|path| leads_to(path).is_ok()) {
                Some(path) => path,
                None => return Err(Box::new(Obstacle::new(object(), reason, MISSING))),
            },
        };
        let rights = plan.host().rights.as_ref();
        if let Err(errno) = rights::may_open(rights, path, flags as i32) {
            let reason = format!("cannot be opened by the job's user: {}", errno.desc());
            let remedy = "give that user the right to it (chmod)";
            return Err(Box::new(Obstacle::new(object(), reason, remedy)));
        }
        let path = plan.path(path);
        let args = [libc::AT_FDCWD as u64, path, u64::from(flags), 0];
        rights::led(plan, |plan| plan.expect(libc::SYS_openat, &args, 0, object));
        super::place(0, at, plan, object);
        Ok(())
    }
}
