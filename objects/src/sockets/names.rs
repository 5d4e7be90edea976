//! Names of sockets: their files, and other users of a name.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirEntryExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ckpt_sys::sockets;
use ckpt_tracer::Pid;
use ckpt_tracer::proc::fdlink::{FdLink, list_fds, read_fd_link};
use ckpt_tracer::proc::{ProcRoot, tasks};
use nix::errno::Errno;
use nix::unistd::AccessFlags;

use super::unix::{NameFile, Style, show, sockaddr};
use crate::access::may;
use crate::outsiders::process_name;

/// The file of a name that is a path. `inode` is from sock_diag, `cwd` the directory of a process that has the
/// socket.
pub fn file(socket: &OwnedFd, bytes: &[u8], inode: Option<u32>, cwd: &Path) -> Option<NameFile> {
    if bytes.first().is_none_or(|b| *b == 0) {
        return None;
    }
    let name = Path::new(OsStr::from_bytes(bytes));
    let found = sockets::bound_file(socket).ok();
    let link = found.as_ref().and_then(|f| {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", f.as_raw_fd())).ok()?;
        let bytes = link.as_os_str().as_bytes();
        let without = bytes.strip_suffix(b" (deleted)").unwrap_or(bytes);
        Some((link.clone(), PathBuf::from(OsStr::from_bytes(without))))
    });
    let stat = found.as_ref().and_then(|f| ckpt_sys::files::fstat(f).ok());
    let is_it = |path: &Path| match (std::fs::symlink_metadata(path), &stat) {
        (Ok(m), Some(s)) => (m.dev(), m.ino()) == (s.st_dev, s.st_ino),
        (Ok(m), None) => Some(m.ino() as u32) == inode && m.mode() & libc::S_IFMT == libc::S_IFSOCK,
        _ => false,
    };
    let directory = name.is_relative().then(|| {
        let before = link.as_ref().and_then(|(_, path)| {
            let path = path.as_os_str().as_bytes().strip_suffix(bytes)?;
            let path = path.strip_suffix(b"/")?;
            Some(PathBuf::from(OsStr::from_bytes(path)))
        });
        before.unwrap_or_else(|| std::fs::read_link(cwd).unwrap_or_else(|_| "/".into()))
    });
    let named = directory.as_deref().unwrap_or(Path::new("/")).join(name);
    let now = if is_it(&named) {
        Some(named.clone())
    } else if let Some((whole, without)) = link {
        [whole, without].into_iter().find(|path| is_it(path))
    } else {
        // Without privilege only a file renamed within its directory is found.
        let neighbours = named.parent().and_then(|d| std::fs::read_dir(d).ok());
        let mut neighbours = neighbours.into_iter().flatten().flatten();
        neighbours.find_map(|entry| {
            (Some(entry.ino() as u32) == inode && is_it(&entry.path())).then(|| entry.path())
        })
    };
    let meta = now.as_ref().and_then(|p| std::fs::symlink_metadata(p).ok());
    let of = |from_file: fn(&std::fs::Metadata) -> u32, from_stat: fn(&libc::stat) -> u32| {
        meta.as_ref()
            .map(from_file)
            .or(stat.as_ref().map(from_stat))
            .unwrap_or(0)
    };
    Some(NameFile {
        mode: of(|m| m.mode(), |s| s.st_mode) & 0o7777,
        uid: of(|m| m.uid(), |s| s.st_uid),
        gid: of(|m| m.gid(), |s| s.st_gid),
        named,
        directory,
        now,
    })
}

/// Whether a live socket is bound to a name; `None` when we may not ask. Tries to connect a datagram socket, which is
/// not noticed.
pub fn in_use(bytes: &[u8]) -> Option<bool> {
    let socket = sockets::socket(libc::AF_UNIX, Style::Datagram.number()).ok()?;
    match sockets::connect(&socket, &sockaddr(bytes)) {
        // Another type; a socket connected elsewhere; success.
        Err(Errno::EPROTOTYPE | Errno::EPERM) | Ok(()) => Some(true),
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => Some(false),
        Err(_) => None,
    }
}

/// The same for a socket file, with a path of any length.
pub fn is_live(path: &Path) -> Option<bool> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
        .open(path)
        .ok()?;
    in_use(format!("/proc/self/fd/{}", file.as_raw_fd()).as_bytes())
}

/// Whether all live sockets bound to a name, or to the file at `path`, are among these inodes. One without a
/// descriptor yet waits at a listening socket to be accepted.
pub fn are_these(bytes: &[u8], path: Option<&Path>, inodes: &[u64]) -> bool {
    let Ok(all) = ckpt_tracer::sock_diag::unix::dump() else {
        return false;
    };
    let file = path.map(|path| std::fs::symlink_metadata(path).map(|meta| meta.ino() as u32));
    let bound = |socket: &&ckpt_tracer::sock_diag::unix::UnixSocket| match &file {
        None => socket.name.as_deref().map(trim) == Some(bytes),
        Some(inode) => inode.as_ref().ok() == socket.file.map(|(_, inode)| inode).as_ref(),
    };
    all.iter()
        .filter(bound)
        .all(|socket| socket.inode == 0 || inodes.contains(&socket.inode.into()))
}

/// `process 44 (food)`, a process that has the socket open; `None` when it is not visible.
pub fn holder(inode: u64) -> Option<String> {
    holder_pid(inode).map(process_name)
}

/// The process of [`holder`].
pub(super) fn holder_pid(inode: u64) -> Option<Pid> {
    let root = ProcRoot::default();
    let has = |pid: &Pid| {
        let fds = list_fds(*pid).unwrap_or_default();
        fds.into_iter()
            .any(|fd| matches!(read_fd_link(*pid, fd), Ok(FdLink::Socket(i)) if i == inode))
    };
    tasks::list_processes(&root).ok()?.into_iter().find(has)
}

/// ` of process 44 (food)` for the socket of a name, if known.
pub fn holder_of_name(bytes: &[u8]) -> String {
    let all = ckpt_tracer::sock_diag::unix::dump().unwrap_or_default();
    let socket = all
        .iter()
        .find(|s| s.name.as_deref().map(trim) == Some(bytes));
    match socket.and_then(|s| holder(s.inode.into())) {
        Some(holder) => format!("{} of {holder}", show(bytes)),
        None => show(bytes),
    }
}

/// The missing directories of a name, the deepest first; `None` if they cannot be created.
pub fn missing_directories(name: &Path) -> Option<Vec<PathBuf>> {
    let mut missing = Vec::new();
    for directory in name.ancestors().skip(1) {
        match std::fs::metadata(directory) {
            Ok(meta) => {
                let writes = AccessFlags::W_OK | AccessFlags::X_OK;
                let possible = missing.is_empty() || may(directory, writes).is_ok();
                return (meta.is_dir() && possible).then_some(missing);
            }
            Err(_) => missing.push(directory.to_owned()),
        }
    }
    None
}

/// sock_diag includes the zero byte that ends a path.
fn trim(name: &[u8]) -> &[u8] {
    match name.first() {
        Some(0) | None => name,
        _ => name.split(|b| *b == 0).next().unwrap_or(name),
    }
}

/// The file of a name whose socket has gone: only its path matters. `cwd` is the directory of a process that knows
/// the name.
pub fn gone(bytes: &[u8], cwd: &Path) -> Option<NameFile> {
    if bytes.first().is_none_or(|b| *b == 0) {
        return None;
    }
    let name = Path::new(OsStr::from_bytes(bytes));
    let directory = name
        .is_relative()
        .then(|| std::fs::read_link(cwd).unwrap_or_else(|_| "/".into()));
    Some(NameFile {
        named: directory.as_deref().unwrap_or(Path::new("/")).join(name),
        directory,
        now: None,
        mode: 0o777,
        uid: 0,
        gid: 0,
    })
}
