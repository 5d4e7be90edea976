//! Silly renames: where the server does not track open files, removing an open file renames it, and the new name is
//! removed at the last close.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Whether a file has such a name, and so counts as deleted: `.nfs` with 24 hexadecimal digits (`nfs_sillyrename`,
/// fs/nfs/unlink.c), or `.fuse_hidden` with 16 (libfuse).
pub fn is_silly_name(path: &Path) -> bool {
    let Some(name) = path.file_name() else {
        return false;
    };
    let digits = |prefix: &[u8], count: usize| {
        let rest = name.as_bytes().strip_prefix(prefix);
        rest.is_some_and(|rest| rest.len() == count && rest.iter().all(u8::is_ascii_hexdigit))
    };
    digits(b".nfs", 24) || digits(b".fuse_hidden", 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_removed_files_are_known() {
        let is = |name: &str| is_silly_name(&Path::new("/a b").join(name));
        assert!(is(".nfs000000000000a07f00000003"));
        assert!(is(".fuse_hidden0000000300000001"));
        for name in [
            ".nfs",
            ".nfsrc",
            ".nfs000000000000a07f0000000g",
            ".nfs000000000000a07f000000031",
            ".fuse_hidden",
            "fuse_hidden0000000300000001",
        ] {
            assert!(!is(name), "{name}");
        }
        assert!(!is_silly_name(Path::new("/")));
    }
}
