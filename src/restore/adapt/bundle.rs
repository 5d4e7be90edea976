//! Bundled files: if the job's own file is missing or differs, the image's takes its place. From here on it is
//! treated like one that was deleted before the checkpoint.

use std::path::{Path, PathBuf};

use crate::objects::Snapshot;
use crate::objects::bundle::Bundled;
use crate::objects::bundle::digest;
use crate::objects::files;
use crate::objects::files::regular::Regular;
use crate::objects::index::DescriptionId;
use crate::objects::memory::FileIdentity;
use crate::objects::open::Handle;
use crate::objects::options::FilesPolicy;
use crate::restore::Request;
use crate::restore::files::put;

/// Decides for every bundled file; returns the paths of those taken from the image.
pub fn choose(snapshot: &mut Snapshot, request: &Request<'_>) -> Vec<PathBuf> {
    // A file that was put back is unchanged.
    let covered = put::covered(snapshot);
    let files = snapshot.mapped_files.iter();
    let put: Vec<bool> = files.map(|f| covered.contains(f.path.as_path())).collect();
    let bundle = std::mem::take(&mut snapshot.bundle);
    let mut given = Vec::new();
    let mut decide = |path: &Path, identity: &mut FileIdentity| {
        let of_it = |b: &&Bundled| (b.device, b.inode) == (identity.device, identity.inode);
        let bundled = bundle.iter().find(of_it)?;
        match here(path, identity, bundled, request.objects.files) {
            Here::Same => None,
            Here::Copied(now) => {
                // Later checks treat it as the same.
                (identity.size, identity.modified_ns) = (now.size, now.modified_ns);
                None
            }
            Here::Other => {
                given.push(path.to_owned());
                Some(bundled.contents)
            }
        }
    };
    for (file, put) in snapshot.mapped_files.iter_mut().zip(put) {
        if file.contents.is_none() && !put {
            file.contents = decide(&file.path, &mut file.identity);
        }
    }
    for index in 0..snapshot.descriptions.len() {
        if files::named(DescriptionId(index), snapshot, &request.objects).is_some() {
            continue;
        }
        if let Some(file) = snapshot.descriptions[index].kind.get_mut::<Regular>()
            && file.contents.is_none()
            && file.saved.is_none()
        {
            file.contents = decide(&file.path, &mut file.identity);
        }
    }
    snapshot.bundle = bundle;
    given.sort();
    given.dedup();
    given
}

/// The present file with the name of a bundled file.
enum Here {
    /// The same by size and time; or any file, if requested.
    Same,
    /// A file with equal contents.
    Copied(FileIdentity),
    /// A different file, or none that can be used.
    Other,
}

fn here(path: &Path, was: &FileIdentity, bundled: &Bundled, policy: FilesPolicy) -> Here {
    let Ok(found) = Handle::of_regular(path) else {
        return Here::Other;
    };
    let Ok(file) = found.read() else {
        return Here::Other;
    };
    let now = FileIdentity::of(found.meta());
    if (now.size, now.modified_ns) == (was.size, was.modified_ns) || policy == FilesPolicy::Adopt {
        return Here::Same;
    }
    let same = now.size == bundled.size
        && digest(&file).is_ok_and(|digest| digest.as_bytes()[..] == bundled.digest);
    match same {
        true => Here::Copied(now),
        false => Here::Other,
    }
}
