//! Whether an image becomes the job again, asked while the job still lives.

use std::fs::File;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Difference, Obstacle, Result};

/// What looks at images in the place where `restore` will be called.
pub trait Prove {
    /// What stands in the way of a restore from `image`, whose job is frozen and will be gone: what its
    /// processes hold counts as free. `name` is for messages.
    ///
    /// # Errors
    /// When the image cannot be read or believed, or whoever is asked was killed.
    fn obstacles(&self, image: &File, name: &Path) -> Result<Vec<Obstacle>>;

    /// In what a job that is restored from `image`, stopped and in namespaces of its own, differs from the
    /// one that is in it.
    ///
    /// # Errors
    /// When it cannot be restored there.
    fn rehearsal(&self, image: &File, name: &Path) -> Result<Rehearsal>;
}

/// What a rehearsal has shown.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Rehearsal {
    /// In what the copy differs.
    pub differences: Vec<Difference>,
    /// What a restore by this user has to do without, one sentence each.
    pub warnings: Vec<String>,
}
