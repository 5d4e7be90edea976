//! Socket files created by a restore, which are removed if it fails, and files renamed meanwhile, which get their
//! names back.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use super::plan::Job;
use super::{names, rebuild};
use crate::Snapshot;
use crate::files::Staging;
use crate::rights::{self, Rights};

/// Files that a restore will create. When dropped, those that are new are removed, unless another live socket has the
/// name.
#[derive(Debug)]
pub struct Made {
    files: Vec<(PathBuf, Option<Identity>)>,
    /// Names, and the temporary names of the files that had them.
    asides: Vec<(PathBuf, PathBuf)>,
    rights: Option<Rights>,
}

/// Device and inode.
type Identity = (u64, u64);

impl Made {
    /// Records which files exist before any socket is bound; they are created, and removed, with these rights.
    pub fn before(snapshot: &Snapshot, rights: Option<&Rights>) -> Self {
        let job = Job::of(snapshot, Staging::beside(snapshot));
        let files = job
            .present()
            .map(|(_, path)| (path.clone(), socket_at(path)));
        Self {
            files: files.collect(),
            asides: asides(&job),
            rights: rights.cloned(),
        }
    }

    /// The restore has succeeded: they stay.
    pub fn keep(mut self) {
        self.files.clear();
        self.asides.clear();
    }
}

/// All temporary names that the plan may use, except existing ones.
fn asides(job: &Job<'_>) -> Vec<(PathBuf, PathBuf)> {
    let of_sockets = (0..job.all.len()).map(|at| (job.socket(at).name.as_ref(), job.at(at)));
    let of_stand_ins = job.stand_ins.iter().enumerate();
    let of_stand_ins = of_stand_ins.map(|(n, s)| (Some(s.name), job.stand_in_at(n).0));
    let all = of_sockets.chain(of_stand_ins).filter_map(|(name, at)| {
        let named = &name?.file.as_ref()?.named;
        Some((named.clone(), rebuild::aside(named, at)))
    });
    all.filter(|(_, aside)| aside.symlink_metadata().is_err())
        .collect()
}

impl Drop for Made {
    fn drop(&mut self) {
        let files = std::mem::take(&mut self.files);
        let asides = std::mem::take(&mut self.asides);
        rights::with(self.rights.as_ref(), || {
            for (path, before) in files {
                let now = socket_at(&path);
                if now.is_some() && now != before && names::is_live(&path) != Some(true) {
                    let _ = std::fs::remove_file(path);
                }
            }
            for (named, aside) in asides.iter().filter(|(_, aside)| is_there(aside)) {
                if socket_at(named).is_some() && names::is_live(named) != Some(true) {
                    let _ = std::fs::remove_file(named);
                }
                // Not over a file created there meanwhile.
                let only = RenameFlags::RENAME_NOREPLACE;
                let _ = renameat2(AT_FDCWD, aside, AT_FDCWD, named, only);
            }
        });
    }
}

fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

fn socket_at(path: &Path) -> Option<Identity> {
    let meta = std::fs::symlink_metadata(path).ok()?;
    meta.file_type()
        .is_socket()
        .then(|| (meta.dev(), meta.ino()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn moved_socket_files_get_their_names_back() {
        let dir = std::env::temp_dir().join(format!("ckpt-made.{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir(&dir).unwrap();
        let named = |name: &str| (dir.join(name), rebuild::aside(&dir.join(name), 7));
        let (bound, free, live) = (named("bound"), named("free"), named("live"));
        for (_, aside) in [&bound, &free, &live] {
            std::fs::write(aside, "theirs").unwrap();
        }
        drop(UnixListener::bind(&bound.0).unwrap());
        let _others = UnixListener::bind(&live.0).unwrap();
        drop(Made {
            files: Vec::new(),
            asides: vec![bound.clone(), free.clone(), live.clone()],
            rights: None,
        });
        for (name, aside) in [&bound, &free] {
            assert_eq!(std::fs::read(name).unwrap(), b"theirs");
            assert!(!is_there(aside));
        }
        assert!(socket_at(&live.0).is_some() && is_there(&live.1));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
