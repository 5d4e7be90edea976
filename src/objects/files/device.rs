//! Character devices that keep no state between calls.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Kind, Look};
use crate::error::Obstacle;
use crate::restore::plan::Builder;
use crate::restore::surroundings::MISSING;

/// An open character device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Where it was opened.
    pub path: PathBuf,
    /// Device number, major and minor.
    pub number: (u32, u32),
}

/// The devices that are known to keep no state: null, zero, full, random, urandom.
pub const STATELESS: &[(u32, u32)] = &[(1, 3), (1, 5), (1, 7), (1, 8), (1, 9)];

/// Whether the device is one of [`STATELESS`].
pub fn is_stateless(look: &Look) -> bool {
    let number = look.stat.st_rdev;
    STATELESS.contains(&(libc::major(number), libc::minor(number)))
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
    /// Opens it at its staging number, if it is still that device.
    pub fn rebuild(&self, flags: u32, at: i32, plan: &mut Builder) -> Result<(), Box<Obstacle>> {
        let object = || format!("the device {}", self.path.display());
        let reason = match std::fs::metadata(&self.path) {
            Ok(meta) if meta.rdev() == libc::makedev(self.number.0, self.number.1) => None,
            Ok(_) => Some("is something else by now".to_owned()),
            Err(e) => Some(format!("cannot be opened: {e}")),
        };
        if let Some(reason) = reason {
            return Err(Box::new(Obstacle::new(object(), reason, MISSING)));
        }
        let path = plan.path(&self.path);
        let args = [libc::AT_FDCWD as u64, path, u64::from(flags), 0];
        plan.expect(libc::SYS_openat, &args, 0, object);
        super::place(0, at, plan, object);
        Ok(())
    }
}
