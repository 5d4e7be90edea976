//! Access to paths that a job refers to.

use std::path::Path;

use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, faccessat};

/// The remedy when something is not where it was.
pub const MISSING: &str =
    "put it back in its place, or say where it is now with --map-path OLD=NEW";

/// access(2) of a file with our effective ids.
pub fn may(path: &Path, how: AccessFlags) -> nix::Result<()> {
    faccessat(AT_FDCWD, path, how, AtFlags::AT_EACCESS)
}
