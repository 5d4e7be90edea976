//! The target of a descriptor: `/proc/PID/fd/N`, see proc_pid_fd(5).

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::ProcDir;
use super::parse::dec;
use super::silly::is_silly_name;
use crate::Result;

/// The kind of object behind a descriptor, by the target of its link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FdLink {
    /// An object with a path: a file, directory, device, FIFO, terminal …
    File {
        /// Seen from our root directory, without `" (deleted)"`.
        path: PathBuf,
        /// No longer reachable by that path when the link was read.
        deleted: bool,
    },
    /// A pipe without a name, by inode.
    Pipe(u64),
    /// A socket, by inode.
    Socket(u64),
    /// `anon_inode:[eventfd]` and its like; the name without brackets: `eventfd`, `eventpoll`,
    /// `inotify`, `signalfd`, `timerfd`, `io_uring`, `userfaultfd`, `fanotify`, `perf_event` …
    AnonInode(String),
    /// A memfd, by its name (any bytes).
    Memfd(Vec<u8>),
    /// A pidfd; its fdinfo shows the process.
    PidFd,
    /// A namespace: kind (`mnt`, `net` …) and inode.
    Namespace(String, u64),
    /// Another target, as the kernel printed it.
    Other(Vec<u8>),
}

/// Numbers of the open descriptors of a process, in order.
///
/// # Errors
/// See [`ProcDir::read`]; `EACCES` without the right to ptrace it.
pub fn list_fds(process: impl Into<ProcDir>) -> Result<Vec<i32>> {
    process.into().numbers_in("fd")
}

/// Reads the link of descriptor `fd`.
///
/// # Errors
/// See [`ProcDir::read_link`]; [`crate::Error::Proc`] with `NotFound` when it is not open.
pub fn read_fd_link(process: impl Into<ProcDir>, fd: i32) -> Result<FdLink> {
    let dir = process.into();
    let name = format!("fd/{fd}");
    let target = dir.read_link(&name)?;
    Ok(classify(&target, &|path| same_file(&dir, &name, path)))
}

/// Whether the path leads to the file that is open under the descriptor, from our root or from the target's.
fn same_file(dir: &ProcDir, fd: &str, path: &Path) -> bool {
    let Ok(open) = std::fs::metadata(dir.join(fd)) else {
        return false;
    };
    let inner = path
        .strip_prefix("/")
        .map(|path| dir.join("root").join(path));
    [Some(path.to_owned()), inner.ok()]
        .into_iter()
        .flatten()
        .any(|path| {
            std::fs::metadata(path)
                .is_ok_and(|found| (found.dev(), found.ino()) == (open.dev(), open.ino()))
        })
}

/// The kernel appends `" (deleted)"` to the path of an unlinked file, and a file's name may end like that; `is_it`
/// says whether a path leads to the open file.
fn classify(target: &[u8], is_it: &dyn Fn(&Path) -> bool) -> FdLink {
    let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
    if target.first() == Some(&b'/') {
        let Some(cut) = target.strip_suffix(b" (deleted)") else {
            let path = path(target);
            let deleted = is_silly_name(&path);
            return FdLink::File { path, deleted };
        };
        if is_it(Path::new(OsStr::from_bytes(target))) {
            return FdLink::File {
                path: path(target),
                deleted: false,
            };
        }
        return match cut.strip_prefix(b"/memfd:") {
            Some(name) => FdLink::Memfd(name.to_vec()),
            None => FdLink::File {
                path: path(cut),
                deleted: true,
            },
        };
    }
    bracketed(target).unwrap_or_else(|| FdLink::Other(target.to_vec()))
}

/// `pipe:[12]`, `anon_inode:inotify`, `net:[4026531833]`.
fn bracketed(target: &[u8]) -> Option<FdLink> {
    let colon = target.iter().position(|&byte| byte == b':')?;
    let (kind, rest) = (&target[..colon], &target[colon + 1..]);
    let inside = rest
        .strip_prefix(b"[")
        .and_then(|rest| rest.strip_suffix(b"]"));
    let kind = std::str::from_utf8(kind).ok()?;
    if kind == "anon_inode" {
        let name = String::from_utf8_lossy(inside.unwrap_or(rest)).into_owned();
        return Some(if name == "pidfd" {
            FdLink::PidFd
        } else {
            FdLink::AnonInode(name)
        });
    }
    let inode = dec(inside?)?;
    match kind {
        "pipe" => Some(FdLink::Pipe(inode)),
        "socket" => Some(FdLink::Socket(inode)),
        // Some kernels print this since pidfds have a file system of their own (Linux 6.9).
        "pidfd" => Some(FdLink::PidFd),
        "cgroup" | "ipc" | "mnt" | "net" | "pid" | "time" | "user" | "uts" => {
            Some(FdLink::Namespace(kind.to_owned(), inode))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(target: &str) -> FdLink {
        classify(target.as_bytes(), &|_| false)
    }

    fn file(path: &str, deleted: bool) -> FdLink {
        FdLink::File {
            path: path.into(),
            deleted,
        }
    }

    #[test]
    fn every_kind() {
        let anon = |name: &str| FdLink::AnonInode(name.into());
        let cases = [
            ("pipe:[10908]", FdLink::Pipe(10908)),
            ("socket:[10909]", FdLink::Socket(10909)),
            ("anon_inode:[eventfd]", anon("eventfd")),
            ("anon_inode:inotify", anon("inotify")),
            ("anon_inode:kvm-vcpu:0", anon("kvm-vcpu:0")),
            ("anon_inode:[pidfd]", FdLink::PidFd),
            ("pidfd:[5627]", FdLink::PidFd),
            ("/memfd:x (deleted)", FdLink::Memfd(b"x".to_vec())),
            (
                "/memfd: (deleted) (deleted)",
                FdLink::Memfd(b" (deleted)".to_vec()),
            ),
            ("/memfd:x", file("/memfd:x", false)),
            ("/dev/pts/0", file("/dev/pts/0", false)),
            ("/tmp/a\nb ", file("/tmp/a\nb ", false)),
            ("/tmp/pipe:[1]", file("/tmp/pipe:[1]", false)),
            ("/tmp/gone (deleted)", file("/tmp/gone", true)),
            (
                "mnt:[4026531832]",
                FdLink::Namespace("mnt".into(), 4_026_531_832),
            ),
            ("pipe:[x]", FdLink::Other(b"pipe:[x]".to_vec())),
            ("newthing:[3]", FdLink::Other(b"newthing:[3]".to_vec())),
            ("", FdLink::Other(vec![])),
        ];
        for (target, expected) in cases {
            assert_eq!(plain(target), expected, "{target:?}");
        }
    }

    #[test]
    fn a_name_that_ends_like_a_deleted_one() {
        let is_it = |path: &Path| path == Path::new("/tmp/x (deleted)");
        assert_eq!(
            classify(b"/tmp/x (deleted)", &is_it),
            file("/tmp/x (deleted)", false)
        );
        assert_eq!(
            classify(b"/tmp/x (deleted) (deleted)", &is_it),
            file("/tmp/x (deleted)", true)
        );
        let memfd = |path: &Path| path == Path::new("/memfd:x (deleted)");
        assert_eq!(
            classify(b"/memfd:x (deleted)", &memfd),
            file("/memfd:x (deleted)", false)
        );
    }
}
