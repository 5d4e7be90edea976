//! `--bundle`: files that a job needs and does not write are stored in its image.
//!
//! They are opened while the job is frozen and read after it continues, so they do not extend the pause. A file that
//! is written meanwhile fails the checkpoint.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::pages::PageSink;
use crate::error::{Error, Obstacle, Result};
use crate::objects::bundle::Bundled;
use crate::objects::bundle::digest;
use crate::objects::files::changed::{Written, is_of_the_kernel};
use crate::objects::files::regular::Regular;
use crate::objects::memory::FileIdentity;
use crate::objects::open::Handle;
use crate::objects::source::Contents;
use crate::objects::{Snapshot, SpaceId};
use crate::text::Shown;

/// Files to be stored in the image.
pub struct Bundle {
    files: Vec<Opened>,
    next: SpaceId,
}

struct Opened {
    path: PathBuf,
    file: File,
    identity: FileIdentity,
}

impl Bundle {
    /// No file.
    pub fn empty() -> Self {
        Self {
            files: Vec::new(),
            next: SpaceId(0),
        }
    }

    /// Opens everything that is mapped, executed, or open for reading, and not written by the job. `next` is the
    /// first free space.
    ///
    /// # Errors
    /// [`Error::Refused`] names each file that cannot be read.
    pub fn open(snapshot: &Snapshot, next: SpaceId) -> Result<Self> {
        let mut files: Vec<Opened> = Vec::new();
        let mut obstacles = Vec::new();
        for (path, identity) in wanted(snapshot) {
            if files.iter().any(|f| f.is(identity)) {
                continue;
            }
            match open(path, identity) {
                Ok(file) => files.push(Opened {
                    path: path.to_owned(),
                    identity: FileIdentity::of(
                        &file.metadata().map_err(Error::file("bundle", path))?,
                    ),
                    file,
                }),
                Err(reason) => obstacles.push(Obstacle::new(
                    format!("the file {}", path.shown()),
                    format!("cannot be bundled: {reason}"),
                    "make it readable for you, or leave --bundle out",
                )),
            }
        }
        match obstacles.is_empty() {
            true => Ok(Self { files, next }),
            false => Err(Error::Refused(obstacles)),
        }
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|f| f.identity.size).sum()
    }

    /// Writes them, equal contents once.
    ///
    /// # Errors
    /// [`Error::Refused`] for a file that was written meanwhile, and [`Error::File`].
    pub fn store<W: Write + Send + 'static>(
        self,
        sink: &mut PageSink<'_, W>,
    ) -> Result<Vec<Bundled>> {
        let mut spaces: HashMap<blake3::Hash, SpaceId> = HashMap::new();
        let mut next = self.next;
        let mut bundled = Vec::with_capacity(self.files.len());
        for Opened {
            path,
            file,
            identity,
        } in self.files
        {
            let digest = digest(&file).map_err(Error::file("bundle", &path))?;
            let mut contents = spaces.get(&digest).copied();
            if contents.is_none() {
                let copy = file.try_clone().map_err(Error::file("bundle", &path))?;
                sink.contents(next, &Contents::File(copy, identity.size))?;
                spaces.insert(digest, next);
                contents = Some(next);
                next.0 += 1;
            }
            let now = file.metadata().map_err(Error::file("bundle", &path))?;
            if FileIdentity::of(&now) != identity {
                return Err(Error::refuse(Obstacle::new(
                    format!("the file {}", path.shown()),
                    "was changed while it was being bundled",
                    "try again, or leave --bundle out",
                )));
            }
            bundled.extend(contents.map(|contents| Bundled {
                device: identity.device,
                inode: identity.inode,
                size: identity.size,
                digest: digest.as_bytes().to_vec(),
                contents,
            }));
        }
        Ok(bundled)
    }
}

impl Opened {
    fn is(&self, other: &FileIdentity) -> bool {
        let mine = &self.identity;
        (mine.device, mine.inode) == (other.device, other.inode)
    }
}

/// The files to bundle: regular files with a name that the job does not write.
fn wanted(snapshot: &Snapshot) -> impl Iterator<Item = (&Path, &FileIdentity)> {
    let written = Written::by(snapshot);
    let mapped = snapshot.mapped_files.iter();
    let mapped = mapped.filter(|file| file.contents.is_none() && file.saved.is_none());
    let mapped = mapped.map(|file| (file.path.as_path(), &file.identity));
    let open = snapshot.descriptions.iter();
    let open = open.filter(|d| d.flags as i32 & libc::O_PATH == 0);
    let open = open.filter_map(|d| d.kind.get::<Regular>());
    let open = open.filter(|file| file.contents.is_none() && file.saved.is_none());
    let open = open.map(|file| (file.path.as_path(), &file.identity));
    mapped.chain(open).filter(move |(path, identity)| {
        identity.mode & libc::S_IFMT == libc::S_IFREG
            && !written.has(identity)
            && !is_of_the_kernel(path)
    })
}

fn open(path: &Path, identity: &FileIdentity) -> Result<File, String> {
    let found = Handle::of_regular(path).map_err(|e| e.to_string())?;
    let now = FileIdentity::of(found.meta());
    let same = (now.device, now.inode) == (identity.device, identity.inode);
    match same {
        true => found.read().map_err(|e| e.to_string()),
        false => Err("another file has its name by now".into()),
    }
}
