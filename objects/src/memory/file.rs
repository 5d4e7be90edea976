//! Whether a mapped file is still the same.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::unistd::AccessFlags;

use super::{FileIdentity, MappedFile};
use crate::access::MISSING;
use crate::error::Obstacle;
use crate::files::changed;
use crate::open::Handle;
use crate::options::FilesPolicy;
use crate::text::Shown;

/// Whether two stat(2) results are of one file.
pub fn same_file(a: &Metadata, b: &Metadata) -> bool {
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

impl FileIdentity {
    /// The identity of a file, without its build id (see [`read_build_id`](Self::read_build_id)).
    pub fn of(meta: &Metadata) -> Self {
        Self {
            device: (libc::major(meta.dev()), libc::minor(meta.dev())),
            inode: meta.ino(),
            mode: meta.mode(),
            size: meta.len(),
            modified_ns: meta.mtime() * 1_000_000_000 + meta.mtime_nsec(),
            build_id: None,
            created_ns: meta.created().ok().and_then(|time| {
                let since = time.duration_since(std::time::UNIX_EPOCH).ok()?;
                i64::try_from(since.as_nanos()).ok()
            }),
        }
    }

    /// Whether both are the same file, even if it was written to. Some file systems reuse inode numbers at once, so
    /// the time of creation counts too.
    pub fn is_same_file(&self, other: &Self) -> bool {
        let (mine, theirs) = (self.created_ns, other.created_ns);
        let created_together = mine.is_none() || theirs.is_none() || mine == theirs;
        self.inode == other.inode && created_together
    }

    /// Reads the build id of an ELF file; does nothing for other and missing files.
    pub fn read_build_id(&mut self, path: &Path) {
        let file = Handle::of_regular(path).ok();
        let same = file.filter(|file| Self::of(file.meta()).is_same_file(self));
        self.build_id = same.and_then(|file| build_id(&file));
    }
}

/// The build id of an ELF file.
fn build_id(file: &Handle) -> Option<Vec<u8>> {
    let file = file.read().ok()?;
    let mut magic = [0; 4];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut magic, 0).ok()?;
    if magic != *b"\x7fELF" {
        return None;
    }
    let cache = object::ReadCache::new(file);
    let elf = object::File::parse(&cache).ok()?;
    object::Object::build_id(&elf)
        .ok()
        .flatten()
        .map(<[u8]>::to_vec)
}

/// The present file for one that was mapped, if it is unchanged as far as that can be determined: same size and time,
/// or same build id. A file with only shared mappings may have been written since, by the job itself; then the same
/// file suffices.
pub fn check_file(
    file: &MappedFile,
    shared_only: bool,
    policy: FilesPolicy,
) -> Result<Handle, Box<Obstacle>> {
    let object = format!("the mapped file {}", file.path.shown());
    // A file that was put back is unchanged.
    let policy = file.saved.map_or(policy, |_| FilesPolicy::Adopt);
    let there = match changed::look(&file.path, &file.identity, policy) {
        Ok(there) => there,
        Err(e) => {
            let reason = format!("cannot be opened: {e}");
            return Err(Box::new(Obstacle::new(object, reason, MISSING)));
        }
    };
    if let Err(e) = there.may(AccessFlags::R_OK) {
        let reason = format!("cannot be opened: {}", e.desc());
        let remedy = "make it readable for you, or restore as root";
        return Err(Box::new(Obstacle::new(object, reason, remedy)));
    }
    let now = FileIdentity::of(there.meta());
    let was = &file.identity;
    if let Some(reason) = changed::is_another_kind(&there, &file.path, was) {
        return Err(Box::new(Obstacle::new(object, reason, MISSING)));
    }
    let same_file = shared_only && now.is_same_file(was) && now.size >= was.size;
    if same_file
        || (now.size, now.modified_ns) == (was.size, was.modified_ns)
        || policy == FilesPolicy::Adopt
        || (was.build_id.is_some() && build_id(&there) == was.build_id)
        || was.mode & libc::S_IFMT != libc::S_IFREG
    {
        return Ok(there);
    }
    Err(Box::new(Obstacle::new(
        object,
        "was changed since the checkpoint, and the job would continue with other contents",
        "put the old one back, or take what is there with --files adopt",
    )))
}
