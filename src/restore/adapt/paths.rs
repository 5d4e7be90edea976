//! `--map-path OLD=NEW`: maps paths of the job's files to new ones.
//!
//! The paths in the records are rewritten as soon as the snapshot is read; later code sees only the new ones.

use std::path::{Path, PathBuf};

use crate::error::Obstacle;
use crate::objects::Snapshot;
use crate::text::Shown;

/// One mapping: paths at or below one path become paths at or below another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The path at the checkpoint; absolute.
    pub old: PathBuf,
    /// The path now; absolute.
    pub new: PathBuf,
}

impl Mapping {
    /// The new path, if the path is the old one or lies below it. Only whole components match.
    fn apply(&self, path: &Path) -> Option<PathBuf> {
        let rest = path.strip_prefix(&self.old).ok()?;
        // Joining an empty path would add a slash.
        Some(match rest.as_os_str().is_empty() {
            true => self.new.clone(),
            false => self.new.join(rest),
        })
    }

    fn components(&self) -> usize {
        self.old.components().count()
    }
}

/// Rewrites every path of the snapshot; of several matching mappings the longest old path wins.
///
/// # Errors
/// An obstacle for each mapping that matches no path, which is usually a typing error.
pub fn apply(mappings: &[Mapping], snapshot: &mut Snapshot) -> Result<(), Vec<Obstacle>> {
    let mut longest_first: Vec<&Mapping> = mappings.iter().collect();
    longest_first.sort_by_key(|mapping| std::cmp::Reverse(mapping.components()));
    let mut used = vec![false; mappings.len()];
    every_path(snapshot, &mut |path| {
        for (mapping, used) in mappings.iter().zip(&mut used) {
            *used |= path.starts_with(&mapping.old);
        }
        if let Some(new) = longest_first.iter().find_map(|m| m.apply(path)) {
            *path = new;
        }
    });
    let unused = mappings.iter().zip(used).filter(|(_, used)| !used);
    let obstacles: Vec<Obstacle> = unused.map(|(mapping, _)| fits_nothing(mapping)).collect();
    match obstacles.is_empty() {
        true => Ok(()),
        false => Err(obstacles),
    }
}

fn fits_nothing(mapping: &Mapping) -> Obstacle {
    Obstacle::new(
        format!("--map-path {}={}", mapping.old.shown(), mapping.new.shown()),
        "fits no path of the job",
        "see its paths with: ckpt inspect IMAGE --fds --maps",
    )
}

/// Calls `f` with every path that a restore uses.
fn every_path(snapshot: &mut Snapshot, f: &mut dyn FnMut(&mut PathBuf)) {
    for process in &mut snapshot.processes {
        f(&mut process.cwd);
        // Mapping `/` moves the files below it, but does not chroot the job.
        if process.root != Path::new("/") {
            f(&mut process.root);
        }
    }
    for file in &mut snapshot.mapped_files {
        f(&mut file.path);
    }
    for description in &mut snapshot.descriptions {
        description.kind.file_mut().each_path(f);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::fixture;

    fn mapping(old: &str, new: &str) -> Mapping {
        Mapping {
            old: old.into(),
            new: new.into(),
        }
    }

    fn cwd_after(mappings: &[Mapping], cwd: &str) -> PathBuf {
        let mut snapshot = fixture::snapshot();
        snapshot.processes[0].cwd = cwd.into();
        apply(mappings, &mut snapshot).expect("all fit");
        snapshot.processes[0].cwd.clone()
    }

    #[test]
    fn the_longest_prefix_wins() {
        let both = [mapping("/a", "/x"), mapping("/a/b", "/y/z")];
        assert_eq!(cwd_after(&both, "/a/b/c"), Path::new("/y/z/c"));
        assert_eq!(cwd_after(&both, "/a/b"), Path::new("/y/z"));
        let reversed = [mapping("/a/b/", "/y/z"), mapping("/a", "/x")];
        assert_eq!(cwd_after(&reversed, "/a/b/c"), Path::new("/y/z/c"));
    }

    #[test]
    fn what_was_mapped_is_not_mapped_again() {
        let swapped = [mapping("/a", "/nonexistent"), mapping("/nonexistent", "/a")];
        assert_eq!(cwd_after(&swapped, "/a/b"), Path::new("/nonexistent/b"));
    }

    #[test]
    fn only_whole_components_count() {
        let mut snapshot = fixture::snapshot();
        snapshot.processes[0].cwd = "/home/annabel".into();
        let refused = apply(&[mapping("/home/anna", "/x")], &mut snapshot).unwrap_err();
        assert_eq!(refused.len(), 1);
        assert_eq!(refused[0].object, "--map-path /home/anna=/x");
        assert_eq!(snapshot.processes[0].cwd, Path::new("/home/annabel"));
    }

    #[test]
    fn everything_can_be_moved() {
        let mut snapshot = fixture::snapshot();
        apply(&[mapping("/", "/mnt")], &mut snapshot).unwrap();
        assert_eq!(snapshot.processes[0].cwd, Path::new("/mnt"));
        assert_eq!(snapshot.processes[0].root, Path::new("/"));
        let program = &snapshot.mapped_files[0].path;
        assert_eq!(program, Path::new("/mnt/nonexistent/program"));
    }
}
