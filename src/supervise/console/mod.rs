//! The terminal of a job in the background: a small process keeps it, and shows it to clients that connect to its
//! socket, one at a time.
//!
//! The socket is `console.NAMESPACE.PID` in a directory of the user's own, where NAMESPACE is the inode number of the
//! pid namespace that PID belongs to. The keeper sends a client one byte, `FREE` or `BUSY`, then the job's output,
//! beginning with the last screenful. A client sends frames: one byte for the type, two for the length (big endian),
//! the contents. It is not a channel (`ckpt_sys::channel`): both may be of different versions, and the job's output
//! is not framed.

use crate::text::Shown;

use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

mod client;
mod keeper;

pub use client::{End, show};
pub use keeper::serve;

/// No other client is connected.
const FREE: u8 = b'+';
/// Another client is connected.
const BUSY: u8 = b'-';
/// A frame of typed input.
const TYPED: u8 = b't';
/// A frame with the size of the client's terminal: rows, columns, width, height, two bytes each.
const SIZED: u8 = b's';

/// The directory of the sockets; created if missing, and refused unless only the user can access it.
fn directory() -> io::Result<PathBuf> {
    let uid = nix::unistd::geteuid().as_raw();
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let runtime = runtime.filter(|dir| dir.is_absolute() && dir.is_dir());
    let dir = match runtime {
        Some(dir) => dir.join("ckpt"),
        None => PathBuf::from(format!("/tmp/ckpt-{uid}")),
    };
    match std::fs::DirBuilder::new().mode(0o700).create(&dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let meta = std::fs::symlink_metadata(&dir)?;
    if !meta.is_dir() || meta.uid() != uid || meta.mode() & 0o077 != 0 {
        return Err(io::Error::other(format!(
            "{} is not a directory of yours alone; remove it or set XDG_RUNTIME_DIR",
            dir.shown()
        )));
    }
    Ok(dir)
}

/// The socket of a job's terminal, by the job's pid.
fn socket(dir: &Path, pid: i32) -> io::Result<PathBuf> {
    let namespace = std::fs::metadata("/proc/self/ns/pid")?.ino();
    Ok(dir.join(format!("console.{namespace}.{pid}")))
}
