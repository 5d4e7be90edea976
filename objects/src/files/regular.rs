//! Regular files, directories and `O_PATH` handles.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::{DirEntryExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ckpt_tracer::proc::fdlink::FdLink;
use ckpt_tracer::proc::silly::is_silly_name;
use serde::{Deserialize, Serialize};

use super::attributes::Attributes;
use super::changed;
use super::kind::{Captured, OpenFile, Opened, Place, Sight, Substitutes};
use super::lock::Lock;
use super::saved::{Saved, is_shared_memory};
use super::{Look, removed};
use crate::error::{Obstacle, Result};
use crate::index::{DescriptionId, RemovedId};
use crate::memory::FileIdentity;
use crate::need::Need;
use crate::plan::{Builder, Inherited};
use crate::references::{Faults, require};
use crate::source::{Collector, Contents, Source};
use crate::text::Shown;
use crate::{Snapshot, SpaceId};

/// A file that has, or had, a name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Regular {
    /// Its path, possibly a former one.
    #[serde(with = "crate::raw_path")]
    pub path: PathBuf,
    /// Its identity.
    pub identity: FileIdentity,
    /// Offset in bytes (for a directory, the file system's cookie).
    pub offset: u64,
    /// Its contents in the image, if it has no name any more.
    pub contents: Option<SpaceId>,
    /// Its index in the snapshot's removed objects, if it is not a regular file and has no name any more.
    #[serde(default)]
    pub removed: Option<RemovedId>,
    /// Its other attributes, if it has no name any more.
    #[serde(default)]
    pub attributes: Option<Attributes>,
    /// Its contents in the image, though it has a name.
    #[serde(default)]
    pub saved: Option<Saved>,
    /// [`Description::locks`](super::Description::locks) in images that store them here.
    #[serde(default, skip_serializing)]
    pub locks: Vec<Lock>,
}

/// Captures a file, a directory or an `O_PATH` handle.
fn capture(
    source: &Source,
    look: &Look,
    path: &Path,
    deleted: bool,
    collector: &mut Collector,
) -> Result<Regular, Box<Obstacle>> {
    let refuse = |reason: String, remedy: &str| {
        Err(Box::new(Obstacle::new(look.object(source), reason, remedy)))
    };
    let file = File::from(look.copy.try_clone().map_err(|e| {
        Box::new(Obstacle::without_remedy(
            look.object(source),
            format!("cannot be copied: {e}"),
        ))
    })?);
    let identity = match file.metadata() {
        Ok(meta) => FileIdentity::of(&meta),
        Err(e) => return refuse(format!("cannot be examined: {e}"), "close it"),
    };
    let mut path = path.to_owned();
    let (mut contents, mut attributes, mut removed) = (None, None, None);
    if deleted {
        match other_name(&file, &path) {
            // Another hard link still refers to it.
            Some(name) => path = name,
            None if identity.mode & libc::S_IFMT != libc::S_IFREG => {
                removed = match removed::enter(&path, &look.copy, &mut collector.removed) {
                    Ok(index) => Some(index),
                    Err(e) => {
                        let path = path.shown();
                        let reason = format!("was deleted ({path}) and cannot be made again: {e}");
                        return refuse(reason, "close it before the checkpoint");
                    }
                };
            }
            None if has_names_elsewhere(&file, &path) => {
                let reason = format!(
                    "has lost the name by which it was opened ({}), and the one that it still has \
                     was not found",
                    path.shown()
                );
                return refuse(reason, "move it to that directory, or close it");
            }
            None => {
                contents = match contents_of(source, look, &identity, collector) {
                    Ok(space) => Some(space),
                    Err(e) => {
                        let reason = format!(
                            "is a deleted file ({}) that cannot be read: {e}",
                            path.shown()
                        );
                        return refuse(reason, "close it before the checkpoint");
                    }
                };
                let read = look.contents(source, identity.size, &collector.held).ok();
                let file = read.as_ref().and_then(Contents::as_file);
                attributes = file.and_then(|f| Some(Attributes::of(f, &f.metadata().ok()?)));
            }
        }
    }
    let owner = look.owner().filter(|owner| owner.id != 0);
    if identity.mode & libc::S_IFMT == libc::S_IFDIR && owner.is_some() && collector.frozen() {
        // Only F_NOTIFY sets an owner of a directory implicitly (`fcntl_dirnotify`, fs/notify/dnotify/dnotify.c).
        collector.findings.notes.push(format!(
            "{} ({}) reports changes in the directory (F_NOTIFY): the kernel does not show which, so a \
             restored process gets no such signals",
            look.object(source),
            path.shown()
        ));
    }
    let mut saved = None;
    let is_file = identity.mode & libc::S_IFMT == libc::S_IFREG;
    let asked_for = collector.save_files.wants(&path);
    let wanted = asked_for || (is_shared_memory(&path) && !look.is_path());
    if is_file && wanted && contents.is_none() {
        saved = match contents_of(source, look, &identity, collector) {
            Ok(space) => Some(Saved {
                space,
                owner: (look.stat.st_uid, look.stat.st_gid),
            }),
            Err(_) if !asked_for => None,
            Err(e) => {
                let reason = format!("({}) cannot be read to be saved: {e}", path.shown());
                return refuse(reason, "make it readable, or leave it out of --save-files");
            }
        };
    }
    Ok(Regular {
        path,
        identity,
        offset: look.info.pos,
        contents,
        removed,
        attributes,
        saved,
        locks: Vec::new(),
    })
}

/// Stores the file's contents, once for all descriptions of it.
fn contents_of(
    source: &Source,
    look: &Look,
    identity: &FileIdentity,
    collector: &mut Collector,
) -> std::io::Result<SpaceId> {
    let is_it = |file: &&Regular| {
        (file.identity.inode, file.identity.device) == (identity.inode, identity.device)
    };
    let open = collector.descriptions.iter();
    let open = open.filter_map(|d| d.kind.get::<Regular>());
    let mut open = open.filter(is_it);
    let known = open.find_map(|file| file.contents.or(file.saved.map(|saved| saved.space)));
    match known {
        Some(space) => Ok(space),
        None => Ok(collector.space_for(look.contents(source, identity.size, &collector.held)?)),
    }
}

/// Opens a file for reading, with O_NOATIME if permitted.
///
/// # Errors
/// Those of open(2).
pub fn open_quietly(path: &Path) -> std::io::Result<File> {
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_NOATIME);
    options.open(path).or_else(|_| File::open(path))
}

/// Most names that are examined for another name of a file.
const NAMES: usize = 10_000;

/// Searches another name of a file that was unlinked under the one with which it was opened: in the same directory,
/// then in the directories below. This also finds files created by `O_TMPFILE` and linked later.
pub(super) fn other_name(file: &File, path: &Path) -> Option<PathBuf> {
    let meta = file.metadata().ok()?;
    if meta.nlink() == 0 {
        return None;
    }
    name_of((meta.dev(), meta.ino()), path)
}

/// The same for the file with this device and inode.
pub fn name_of((device, inode): (u64, u64), path: &Path) -> Option<PathBuf> {
    let is_it = |m: &std::fs::Metadata| (m.dev(), m.ino()) == (device, inode);
    let mut left = NAMES;
    let mut directories = VecDeque::from([path.parent()?.to_owned()]);
    while let Some(directory) = directories.pop_front() {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.ino() == inode
                && entry.metadata().is_ok_and(|m| is_it(&m))
                && !is_silly_name(&entry.path())
            {
                return Some(entry.path());
            }
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                directories.push_back(entry.path());
            }
            left = left.checked_sub(1)?;
        }
    }
    None
}

/// Whether it has names that were not found, besides the open one.
fn has_names_elsewhere(file: &File, path: &Path) -> bool {
    let Ok(meta) = file.metadata() else {
        return false;
    };
    let neighbours = path.parent().and_then(|dir| std::fs::read_dir(dir).ok());
    let silly = neighbours
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.ino() == meta.ino() && is_silly_name(&entry.path()));
    meta.nlink() > silly.count() as u64
}

/// Whether it is on the file system of memfd_secret(2), `SECRETMEM_MAGIC`.
pub(super) fn is_secret(look: &Look) -> bool {
    ckpt_sys::files::fstatfs(&look.copy).is_some_and(|(kind, _)| kind == 0x5345_434d)
}

impl OpenFile for Regular {
    fn capture(sight: &Sight, collector: &mut Collector) -> Captured {
        let FdLink::File { path, deleted } = &sight.look.link else {
            return None;
        };
        let named = matches!(
            sight.look.file_type(),
            libc::S_IFREG | libc::S_IFDIR | libc::S_IFLNK
        );
        if !named && !sight.look.is_path() || *deleted && is_secret(sight.look) {
            return None;
        }
        let captured = capture(sight.source, sight.look, path, *deleted, collector);
        Some(captured.map(Into::into))
    }

    fn class(&self) -> &'static str {
        "regular"
    }

    fn label(&self) -> String {
        self.path.shown()
    }

    fn offset(&self) -> Option<u64> {
        Some(self.offset)
    }

    fn contents(&self) -> Option<(SpaceId, u64)> {
        let saved = self.saved.map(|saved| saved.space);
        Some((self.contents.or(saved)?, self.identity.size))
    }

    fn needs(&self, flags: u32, snapshot: &Snapshot) -> Vec<Need> {
        let flags = flags as i32;
        if self.contents.is_some() || self.removed.is_some() {
            return Vec::new();
        }
        let how = match flags & libc::O_ACCMODE {
            _ if flags & libc::O_PATH != 0 => "as a handle",
            libc::O_RDONLY => "for reading",
            libc::O_WRONLY => "for writing",
            _ => "for reading and writing",
        };
        let kind = match self.is(libc::S_IFDIR) {
            true => "open directory",
            false => "open file",
        };
        let detail = match self.saved {
            Some(_) => format!("{how}; restore --put-files puts it back"),
            None => how.to_owned(),
        };
        vec![Need::file(
            kind,
            &self.path,
            &self.identity,
            &detail,
            snapshot,
        )]
    }

    fn check(&self, number: DescriptionId, snapshot: &Snapshot, faults: &mut Faults) {
        require!(
            faults,
            self.removed
                .is_none_or(|id| id.find(&snapshot.removed).is_some()),
            "description {number} refers to a removed directory that does not exist"
        );
    }

    fn each_path(&mut self, f: &mut dyn FnMut(&mut PathBuf)) {
        f(&mut self.path);
    }

    /// A file without a name is created anew, and one with a name is opened by it: `O_TMPFILE` and `O_NOFOLLOW` only
    /// say how it was opened. Reading changes the access time, and a directory of the copy has other entries than the
    /// job's.
    fn make_comparable(&mut self, flags: &mut u32) {
        const HOW: u32 = (libc::O_TMPFILE & !libc::O_DIRECTORY | libc::O_NOFOLLOW) as u32;
        self.attributes.iter_mut().for_each(|a| a.accessed_ns = 0);
        *flags &= !HOW;
        match self.is(libc::S_IFDIR) {
            true => (self.identity.size, self.identity.modified_ns) = (0, 0),
            // A part of O_TMPFILE.
            false => *flags &= !(libc::O_DIRECTORY as u32),
        }
        if self.contents.is_some() || self.removed.is_some() {
            let mode = self.identity.mode;
            (self.identity, self.path) = Default::default();
            self.identity.mode = mode;
        }
        // The copy is checkpointed without --save-files.
        self.saved = None;
    }

    fn substitute(&mut self, flags: &mut u32, by: &mut dyn Substitutes) -> Result<()> {
        if self.contents.is_some() {
            self.path = by.nameless(&self.path);
            return Ok(());
        }
        self.saved = None;
        if self.removed.is_some() || !by.is_own(&self.path) {
            return Ok(());
        }
        if by.is_of_huge_pages(&self.path) {
            return Err(by.refusal(
                self.object(),
                "is made of huge pages and cannot be rehearsed: that would take as many huge pages once more",
            ));
        }
        by.like(&self.path, &self.identity)?;
        if self.is(libc::S_IFREG) && *flags as i32 & libc::O_DIRECT != 0 {
            let mut open = File::options();
            let open = open.read(true).custom_flags(libc::O_DIRECT);
            // tmpfs has none before Linux 6.6.
            if open.open(&self.path).is_err() {
                *flags &= !(libc::O_DIRECT as u32);
            }
        }
        Ok(())
    }

    /// Opening an `O_PATH` handle has no effect, and its file may be one that only root can create.
    fn keeps_paths(&self, flags: u32) -> bool {
        flags as i32 & libc::O_PATH != 0
    }

    fn is_of_surroundings(&self) -> bool {
        true
    }

    fn opened(&self) -> Opened {
        Opened::WithFlags
    }

    /// Opens it if it is unchanged.
    fn open(&self, place: &Place, plan: &mut Builder) -> Result<(), Vec<Obstacle>> {
        let Place {
            index, flags, at, ..
        } = *place;
        if self.removed.is_some() {
            plan.inherit(at, Inherited::Removed(index));
        } else if self.contents.is_some() {
            plan.inherit(at, Inherited::DeletedFile(index));
        } else {
            // A file to be put back does not exist yet.
            if self.saved.is_none() {
                let checked = changed::check(self, flags, place.written, place.options.files);
                checked.map_err(|obstacle| vec![*obstacle])?;
            }
            plan.inherit(at, Inherited::File(index));
        }
        // A removed directory is empty.
        if self.offset != 0 && flags as i32 & libc::O_PATH == 0 && self.removed.is_none() {
            let args = [at as u64, self.offset, libc::SEEK_SET as u64];
            plan.expect(libc::SYS_lseek, &args, self.offset, || self.object());
        }
        Ok(())
    }
}

impl Regular {
    /// For messages.
    pub fn object(&self) -> String {
        format!("the open file {}", self.path.shown())
    }

    /// Whether it is a file of that type (`S_IFREG` …).
    pub fn is(&self, kind: u32) -> bool {
        self.identity.mode & libc::S_IFMT == kind
    }
}
