//! Whether the job can be restored from an image, checked while the job is alive.

use std::fs::File;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Difference, Obstacle, Result};

/// Checks images where `restore` will be called.
pub trait Prove {
    /// Obstacles to a restore from `image`, whose job is frozen and will have ended: objects that its processes hold
    /// count as free. `name` is for messages.
    ///
    /// # Errors
    /// When the image is unreadable or invalid, or the checking process was killed.
    fn obstacles(&self, image: &File, name: &Path) -> Result<Vec<Obstacle>>;

    /// Differences between the job in `image` and a copy restored from it, stopped and in new namespaces.
    ///
    /// # Errors
    /// When it cannot be restored there.
    fn rehearsal(&self, image: &File, name: &Path) -> Result<Rehearsal>;
}

/// Result of a rehearsal.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Rehearsal {
    /// Differences of the copy.
    pub differences: Vec<Difference>,
    /// What a restore by this user cannot restore, one sentence each.
    pub warnings: Vec<String>,
}
