//! Named files whose contents are stored in the image: those matching `--save-files`, if they are open or the job may
//! write them through a mapping; and POSIX shared memory and named semaphores (shm_overview(7), sem_overview(7)),
//! which do not survive a reboot.

use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use ckpt_tracer::proc::maps::{VmFlags, Vma};
use serde::{Deserialize, Serialize};

use super::regular::Regular;
use crate::SpaceId;
use crate::error::Obstacle;
use crate::index::FileId;
use crate::memory::FileIdentity;
use crate::open::Handle;
use crate::source::{Collector, Contents, Source};
use crate::text::Shown;

/// A named file that can be put back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Its contents in the image.
    pub space: SpaceId,
    /// Its owner, and its owner's group.
    pub owner: (u32, u32),
}

/// Whether a path is POSIX shared memory or a named semaphore: the C library keeps both in this directory, which is
/// empty after a reboot.
pub fn is_shared_memory(path: &Path) -> bool {
    path.starts_with("/dev/shm")
}

/// Stores the contents of a mapped file, if requested.
pub fn save_mapped(
    source: &Source,
    vma: &Vma,
    file: FileId,
    collector: &mut Collector,
) -> Result<(), Box<Obstacle>> {
    let record = &collector.mapped_files[file];
    let is_file = record.identity.mode & libc::S_IFMT == libc::S_IFREG;
    if record.contents.is_some() || record.saved.is_some() || !is_file {
        return Ok(());
    }
    let path = record.path.clone();
    let identity = record.identity.clone();
    let writes = vma.shared && vma.flags.contains(VmFlags::MAY_WRITE);
    let asked_for = writes && collector.save_files.wants(&path);
    if !asked_for && !is_shared_memory(&path) {
        return Ok(());
    }
    let saved = match known(&identity, collector) {
        Some(saved) => Ok(saved),
        None => open(source, vma, &path).map(|(file, meta)| Saved {
            space: collector.space_for(Contents::File(file, identity.size)),
            owner: (meta.uid(), meta.gid()),
        }),
    };
    match saved {
        Ok(saved) => collector.mapped_files[file].saved = Some(saved),
        Err(e) if asked_for => {
            return Err(Box::new(Obstacle::new(
                format!("the mapped file {} of {}", path.shown(), source.title()),
                format!("cannot be read to be saved: {e}"),
                "make it readable, or leave it out of --save-files",
            )));
        }
        Err(_) => {}
    }
    Ok(())
}

/// The stored contents of the same file, if any.
fn known(identity: &FileIdentity, collector: &Collector) -> Option<Saved> {
    let same =
        |other: &FileIdentity| (other.device, other.inode) == (identity.device, identity.inode);
    let mut open = collector.descriptions.iter();
    let open = open.find_map(|d| {
        let file = d.kind.get::<Regular>()?;
        file.saved.filter(|_| same(&file.identity))
    });
    let mut mapped = collector.mapped_files.iter();
    open.or_else(|| mapped.find_map(|f| f.saved.filter(|_| same(&f.identity))))
}

/// Opens the file that is mapped.
fn open(source: &Source, vma: &Vma, path: &Path) -> std::io::Result<(File, Metadata)> {
    // Following this link needs CAP_CHECKPOINT_RESTORE.
    let link = format!("map_files/{:x}-{:x}", vma.start, vma.end);
    if let Ok(file) = File::open(source.dir.join(link)) {
        let meta = file.metadata()?;
        return Ok((file, meta));
    }
    let found = Handle::of_regular(path)?;
    match found.meta().ino() == vma.inode {
        true => Ok((found.read()?, found.meta().clone())),
        false => Err(std::io::Error::other("another file has its name")),
    }
}
