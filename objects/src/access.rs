//! Whether paths that a job names can be used.

use std::path::Path;

use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, faccessat};

/// What to do about something that is not where it was.
pub const MISSING: &str =
    "put it back in its place, or say where it is now with --map-path OLD=NEW";

/// Whether we may use a file in that way, as the error of access(2) with our effective ids.
pub fn may(path: &Path, how: AccessFlags) -> nix::Result<()> {
    faccessat(AT_FDCWD, path, how, AtFlags::AT_EACCESS)
}
