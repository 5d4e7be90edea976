//! Puts files whose contents are in the image back, before the job opens them: POSIX shared memory that is missing,
//! as after a reboot, and with `--put-files` all of them. A restore that fails undoes this.

use std::collections::HashSet;
use std::fs::{self, FileTimes, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use ckpt_image::Reader;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use crate::error::{Error, Obstacle, Result};
use crate::objects::Snapshot;
use crate::objects::files::regular::Regular;
use crate::objects::files::saved::{Saved, is_shared_memory};
use crate::objects::memory::{FileIdentity, space};
use crate::objects::open::{Handle, Last};
use crate::objects::rights::{self, Rights};
use crate::text::Shown;

/// What to do with the files in the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PutFiles {
    /// They stay in the image; the job uses the existing files. Missing POSIX shared memory is put back.
    #[default]
    No,
    /// They are put back, but not over files changed after the checkpoint, nor over POSIX shared memory, whose times
    /// do not show writes through a mapping.
    UnlessNewer,
    /// They are put back over any existing file.
    Overwrite,
}

/// Removes files that are not to be put back from the snapshot: the rest decides whether the present file matters.
pub fn forget(policy: PutFiles, snapshot: &mut Snapshot) {
    let stays = |path: &Path| {
        let missing =
            || fs::symlink_metadata(path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
        match policy {
            PutFiles::No => is_shared_memory(path) && missing(),
            PutFiles::UnlessNewer => !is_shared_memory(path) || missing(),
            PutFiles::Overwrite => true,
        }
    };
    for description in &mut snapshot.descriptions {
        if let Some(file) = description.kind.get_mut::<Regular>() {
            file.saved = file.saved.filter(|_| stays(&file.path));
        }
    }
    for file in &mut snapshot.mapped_files {
        file.saved = file.saved.filter(|_| stays(&file.path));
    }
}

/// The warning that the image lacks what was requested.
pub fn warning(policy: PutFiles, snapshot: &Snapshot) -> Option<String> {
    let nothing = policy != PutFiles::No && saved(snapshot).next().is_none();
    nothing.then(|| {
        "the image has no file for --put-files; name them to ckpt attach with --save-files".into()
    })
}

/// Paths of the files that are put back, and so are unchanged.
pub fn covered(snapshot: &Snapshot) -> HashSet<&Path> {
    saved(snapshot).map(|(file, _, _)| file).collect()
}

/// A saved file: its path, identity and saved contents.
type SavedFile<'a> = (&'a Path, &'a FileIdentity, Saved);

fn saved(snapshot: &Snapshot) -> impl Iterator<Item = SavedFile<'_>> {
    let open = snapshot.descriptions.iter();
    let open = open.filter_map(|d| d.kind.get::<Regular>());
    let open = open.filter_map(|f| Some((f.path.as_path(), &f.identity, f.saved?)));
    let mapped = snapshot.mapped_files.iter();
    open.chain(mapped.filter_map(|f| Some((f.path.as_path(), &f.identity, f.saved?))))
}

/// A file to put back.
#[derive(Debug)]
pub struct Put<'a> {
    identity: &'a FileIdentity,
    saved: Saved,
    /// Its path; symbolic links are followed.
    path: PathBuf,
    /// Device and inode of the file that it replaces.
    replaces: Option<(u64, u64)>,
}

/// The files to put back, except those whose contents are unchanged. Has no side effects.
///
/// # Errors
/// [`Error::Refused`] with each obstructing file; [`Error::Image`] when the image cannot be read.
pub fn decide<'a>(
    snapshot: &'a Snapshot,
    image: &Reader,
    policy: PutFiles,
) -> Result<Vec<Put<'a>>> {
    let mut puts: Vec<Put<'a>> = Vec::new();
    let mut obstacles = Vec::new();
    let mut seen: HashSet<&Path> = HashSet::new();
    for file in saved(snapshot) {
        if !seen.insert(file.0) {
            continue;
        }
        let taken_at = snapshot.host.realtime_ns;
        match decide_one(file, image, policy, taken_at)? {
            Ok(put) => puts.extend(put),
            Err(o) => obstacles.push(*o),
        }
    }
    match obstacles.is_empty() {
        true => Ok(puts),
        false => Err(Error::Refused(obstacles)),
    }
}

type Decision<'a> = Result<Option<Put<'a>>, Box<Obstacle>>;

fn decide_one<'a>(
    (name, identity, saved): SavedFile<'a>,
    image: &Reader,
    policy: PutFiles,
    taken_at: u64,
) -> Result<Decision<'a>> {
    let object = format!("the saved file {}", name.shown());
    let refuse = |reason: String, remedy: &str| {
        Ok(Err(Box::new(Obstacle::new(object.clone(), reason, remedy))))
    };
    let found = Handle::of(name, Last::LeadsOn);
    // A dangling link counts as an obstructing file.
    let found = found.or_else(|e| Handle::of(name, Last::IsIt).map_err(|_| e));
    let path = found.as_ref().ok().and_then(Handle::place);
    let path = path.unwrap_or_else(|| name.to_owned());
    let put = |replaces| Put {
        identity,
        saved,
        path: path.clone(),
        replaces,
    };
    let found = match found {
        Ok(found) if found.meta().is_file() => found,
        Ok(_) => {
            let reason = "cannot be put back: something else than a file is in its place".into();
            return refuse(reason, "move that away");
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let directory = path.parent().unwrap_or(Path::new("/"));
            if directory.is_dir() {
                return Ok(Ok(Some(put(None))));
            }
            let directory = directory.shown();
            let reason = format!("cannot be put back: there is no directory {directory}");
            return refuse(reason, "make it, or say where it is now with --map-path");
        }
        Err(e) => {
            return refuse(
                format!("cannot be put back: {e}"),
                "see what is in its place",
            );
        }
    };
    let meta = found.meta();
    if meta.len() == identity.size {
        match found.read() {
            Ok(there) => {
                let size = identity.size;
                if space::same(&there, &path, saved.space, size, image)? {
                    return Ok(Ok(None));
                }
            }
            Err(e) => {
                let reason = format!("cannot be compared with what is in its place: {e}");
                return refuse(reason, "make that readable");
            }
        }
    }
    if policy != PutFiles::Overwrite && modified_ns(meta) > i128::from(taken_at) {
        let reason = "would replace a file that was changed after the checkpoint".into();
        return refuse(reason, "move that away, or replace it with --overwrite");
    }
    Ok(Ok(Some(put(Some((meta.dev(), meta.ino()))))))
}

/// Time of the last change of contents, nanoseconds since 1970.
fn modified_ns(meta: &Metadata) -> i128 {
    i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec())
}

impl Put<'_> {
    /// The action, on one line.
    pub fn describe(&self) -> String {
        let (path, size) = (self.path.shown(), self.identity.size);
        match self.replaces {
            Some(_) => format!("overwrite {path} with the {size} bytes of the image"),
            None => format!("create {path} with the {size} bytes of the image"),
        }
    }

    /// A temporary file beside the path, with all attributes of the old one.
    fn prepare(&self, image: &Reader, warnings: &mut Vec<String>) -> Result<Prepared> {
        let name = self.path.file_name().unwrap_or_default();
        // The name must stay within the limit of the file system.
        let name: String = name.to_string_lossy().chars().take(50).collect();
        let at = format!(".{name}.put.{}.{}", std::process::id(), self.saved.space.0);
        let at = self.path.with_file_name(at);
        let opened = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&at);
        let file = opened.map_err(self.error())?;
        let prepared = Prepared { at };
        let identity = self.identity;
        space::fill(&file, &self.path, self.saved.space, identity.size, image)?;
        let meta = file.metadata().map_err(self.error())?;
        let (uid, gid) = self.saved.owner;
        let mut mode = identity.mode & 0o7777;
        if (meta.uid(), meta.gid()) != (uid, gid)
            && let Err(e) = std::os::unix::fs::fchown(&file, Some(uid), Some(gid))
        {
            warnings.push(format!(
                "{} was put back and belongs to uid {} now, not to {uid}:{gid}: {e}",
                self.path.shown(),
                meta.uid()
            ));
            // No set-user-ID and set-group-ID bits.
            mode &= 0o777;
        }
        // After the owner, whose change clears set-user-ID.
        let mode = Permissions::from_mode(mode);
        let modified = UNIX_EPOCH + Duration::from_nanos(identity.modified_ns.max(0) as u64);
        file.set_permissions(mode)
            .and_then(|()| file.set_times(FileTimes::new().set_modified(modified)))
            .and_then(|()| file.sync_all())
            .map_err(self.error())?;
        Ok(prepared)
    }

    fn error(&self) -> impl Fn(io::Error) -> Error {
        Error::file("put back", &self.path)
    }
}

/// A file under a temporary name, which is removed with it.
struct Prepared {
    at: PathBuf,
}

impl Prepared {
    /// It has its own name, or another file has the temporary one.
    fn placed(mut self) {
        self.at = PathBuf::new();
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        if !self.at.as_os_str().is_empty() {
            let _ = fs::remove_file(&self.at);
        }
    }
}

/// Files that were put back. Unless they are kept, everything is undone.
#[derive(Default)]
pub struct Undo {
    done: Vec<Done>,
    /// Differences, one sentence each.
    pub warnings: Vec<String>,
    /// The user with whose rights this is done, if not ours: the owner of a directory may redirect its paths.
    rights: Option<Rights>,
}

/// A file that was put back.
struct Done {
    path: PathBuf,
    /// Device and inode of the new file.
    new: (u64, u64),
    /// Path of the old one.
    old: Option<PathBuf>,
}

impl Undo {
    /// Keeps them for the job.
    pub fn keep(mut self) -> Vec<String> {
        for done in std::mem::take(&mut self.done) {
            if let Some(old) = done.old
                && let Err(e) = rights::with(self.rights.as_ref(), || fs::remove_file(&old))
            {
                let old = old.shown();
                self.warnings
                    .push(format!("the replaced file is left as {old}: {e}"));
            }
        }
        std::mem::take(&mut self.warnings)
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        rights::with(self.rights.as_ref(), || self.take_back());
    }
}

impl Undo {
    fn take_back(&self) {
        for done in self.done.iter().rev() {
            let still =
                fs::symlink_metadata(&done.path).is_ok_and(|m| (m.dev(), m.ino()) == done.new);
            // Replaced by another process meanwhile: that file stays, and the old one keeps its temporary name.
            if !still {
                continue;
            }
            let _ = match &done.old {
                Some(old) => fs::rename(old, &done.path),
                None => fs::remove_file(&done.path),
            };
        }
    }
}

/// Puts the files back, each atomically.
///
/// # Errors
/// [`Error::File`] and [`Error::Image`]; files that were put back already are removed again.
pub fn put(puts: &[Put<'_>], image: &Reader, rights: Option<&Rights>) -> Result<Undo> {
    let mut undo = Undo::default();
    undo.rights = rights.cloned();
    rights::with(rights, || put_all(puts, image, &mut undo))?;
    Ok(undo)
}

fn put_all(puts: &[Put<'_>], image: &Reader, undo: &mut Undo) -> Result<()> {
    for put in puts {
        let prepared = put.prepare(image, &mut undo.warnings)?;
        let meta = fs::symlink_metadata(&prepared.at).map_err(put.error())?;
        let placed = match put.replaces {
            Some(_) => exchange(prepared, &put.path).map(Some),
            None => create(prepared, &put.path).map(|()| None),
        };
        let old = placed.map_err(put.error())?;
        let replaced = old.as_deref().map(fs::symlink_metadata).transpose();
        undo.done.push(Done {
            path: put.path.clone(),
            new: (meta.dev(), meta.ino()),
            old,
        });
        let replaced = replaced.map_err(put.error())?;
        if replaced.map(|m| (m.dev(), m.ino())) != put.replaces {
            let other = io::Error::other("another file has come into its place");
            return Err(put.error()(other));
        }
    }
    Ok(())
}

/// Gives the file its name, which must be free.
fn create(prepared: Prepared, path: &Path) -> io::Result<()> {
    match renameat2(
        AT_FDCWD,
        &prepared.at,
        AT_FDCWD,
        path,
        RenameFlags::RENAME_NOREPLACE,
    ) {
        Ok(()) => {
            prepared.placed();
            Ok(())
        }
        // Without support for RENAME_NOREPLACE. The temporary name remains, and is removed.
        Err(Errno::EINVAL | Errno::ENOSYS) => fs::hard_link(&prepared.at, path),
        Err(e) => Err(e.into()),
    }
}

/// Exchanges the file with the existing one; returns the path of the latter.
fn exchange(prepared: Prepared, path: &Path) -> io::Result<PathBuf> {
    let at = prepared.at.clone();
    match renameat2(AT_FDCWD, &at, AT_FDCWD, path, RenameFlags::RENAME_EXCHANGE) {
        Ok(()) => {}
        // Without support for RENAME_EXCHANGE.
        Err(Errno::EINVAL | Errno::ENOSYS) => {
            let aside = at.with_extension("old");
            fs::rename(path, &aside)?;
            if let Err(e) = fs::rename(&at, path) {
                fs::rename(&aside, path)?;
                return Err(e);
            }
            fs::rename(&aside, &at)?;
        }
        Err(e) => return Err(e.into()),
    }
    prepared.placed();
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory with a file of old contents, which has just been exchanged for a new one.
    fn exchanged(name: &str) -> (PathBuf, PathBuf, Undo) {
        let dir = std::env::temp_dir().join(format!("ckpt-put-{name}.{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir(&dir).unwrap();
        let (path, at) = (dir.join("file"), dir.join(".file.put"));
        fs::write(&path, "old").unwrap();
        fs::write(&at, "new").unwrap();
        let meta = fs::metadata(&at).unwrap();
        let old = exchange(Prepared { at }, &path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        let mut undo = Undo::default();
        undo.done.push(Done {
            path: path.clone(),
            new: (meta.dev(), meta.ino()),
            old: Some(old),
        });
        (dir, path, undo)
    }

    fn files(dir: &Path) -> usize {
        fs::read_dir(dir).unwrap().count()
    }

    #[test]
    fn what_was_overwritten_comes_back() {
        let (dir, path, undo) = exchanged("back");
        drop(undo);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(files(&dir), 1);
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn kept_files_leave_no_temporary_ones() {
        let (dir, path, undo) = exchanged("kept");
        assert_eq!(undo.keep(), [""; 0]);
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(files(&dir), 1);
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_file_of_another_program_stays() {
        let (dir, path, undo) = exchanged("else");
        fs::write(dir.join("theirs"), "theirs").unwrap();
        fs::rename(dir.join("theirs"), &path).unwrap();
        drop(undo);
        assert_eq!(fs::read(&path).unwrap(), b"theirs");
        // The old one is not lost either.
        assert_eq!(files(&dir), 2);
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn nothing_is_created_over_a_file() {
        let dir = std::env::temp_dir().join(format!("ckpt-put-over.{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir(&dir).unwrap();
        let (path, at) = (dir.join("file"), dir.join(".file.put"));
        fs::write(&path, "old").unwrap();
        fs::write(&at, "new").unwrap();
        assert!(create(Prepared { at }, &path).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(files(&dir), 1);
        fs::remove_dir_all(&dir).unwrap();
    }
}
