//! The files that come with binding sockets: gone again if the restore fails.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::names;
use super::plan::Job;
use crate::objects::Snapshot;
use crate::objects::files::Staging;
use crate::objects::rights::{self, Rights};

/// Files that a restore will make. When dropped, those are removed that are there and were not before, unless
/// somebody else's live socket has the name.
#[derive(Debug)]
pub struct Made {
    files: Vec<(PathBuf, Option<Identity>)>,
    rights: Option<Rights>,
}

/// Device and inode.
type Identity = (u64, u64);

impl Made {
    /// Notes what is there before any socket is bound; they are made, and removed, with these rights.
    pub fn before(snapshot: &Snapshot, rights: Option<&Rights>) -> Self {
        let job = Job::of(snapshot, Staging::beside(snapshot));
        let files = job
            .present()
            .map(|(_, path)| (path.clone(), socket_at(path)));
        Self {
            files: files.collect(),
            rights: rights.cloned(),
        }
    }

    /// The restore has succeeded: they stay.
    pub fn keep(mut self) {
        self.files.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        let files = std::mem::take(&mut self.files);
        rights::with(self.rights.as_ref(), || {
            for (path, before) in files {
                let now = socket_at(&path);
                if now.is_some() && now != before && names::is_live(&path) != Some(true) {
                    let _ = std::fs::remove_file(path);
                }
            }
        });
    }
}

fn socket_at(path: &Path) -> Option<Identity> {
    let meta = std::fs::symlink_metadata(path).ok()?;
    meta.file_type()
        .is_socket()
        .then(|| (meta.dev(), meta.ino()))
}
