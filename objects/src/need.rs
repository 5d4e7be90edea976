//! Requirements of a job on the machine where it is restored.

use std::path::Path;

use serde::Serialize;

use crate::Snapshot;
use crate::memory::FileIdentity;
use crate::text::Shown;

/// One requirement; the JSON keys are fixed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Need {
    /// Its kind: `program`, `mapped file`, `open file`, `directory` …
    pub kind: &'static str,
    /// Its path or name.
    pub name: String,
    /// Its purpose or amount.
    pub detail: String,
    /// Size of a file in bytes.
    pub size: Option<u64>,
    /// Modification time, nanoseconds since 1970.
    pub modified_ns: Option<i64>,
    /// Its inode number.
    pub inode: Option<u64>,
    /// Stored in the image, so not required.
    pub bundled: bool,
}

impl Need {
    /// A requirement other than a file of the job.
    pub fn new(kind: &'static str, name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            kind,
            name: name.into(),
            detail: detail.into(),
            size: None,
            modified_ns: None,
            inode: None,
            bundled: false,
        }
    }

    /// A file of the job.
    pub fn file(
        kind: &'static str,
        path: &Path,
        identity: &FileIdentity,
        detail: &str,
        snapshot: &Snapshot,
    ) -> Self {
        let bundled = snapshot.bundled(identity).is_some();
        let detail = match bundled {
            true => format!("{detail}; bundled"),
            false => detail.to_owned(),
        };
        Self {
            size: Some(identity.size),
            modified_ns: Some(identity.modified_ns),
            inode: Some(identity.inode),
            bundled,
            ..Self::new(kind, path.shown(), detail)
        }
    }
}
