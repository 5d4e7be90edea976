//! The mounts of a process: `/proc/PID/mountinfo`, see proc_pid_mountinfo(5).

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::ProcDir;
use super::parse::{dec, device, fields, lines, unescape_octal};
use crate::Result;

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Its id, the `mnt_id` of fdinfo. Ids are reused after an unmount.
    pub id: i32,
    /// Id of its parent mount.
    pub parent: i32,
    /// `st_dev` of its files: major and minor.
    pub dev: (u32, u32),
    /// The directory of the file system that is its root; `/` unless bind-mounted.
    pub root: PathBuf,
    /// Mount point, relative to the process's root directory.
    pub mount_point: PathBuf,
    /// Options of the mount, separated by commas.
    pub options: String,
    /// `shared:N`, `master:N`, `propagate_from:N`, `unbindable`.
    pub propagation: Vec<String>,
    /// Type of the file system, `ext4`, `fuse.sshfs` …
    pub fs_type: String,
    /// Mount source, a device or a word.
    pub source: Vec<u8>,
    /// Options of the file system, separated by commas.
    pub super_options: String,
}

/// All mounts of a process's mount namespace that are below its root directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountTable(Vec<Mount>);

impl MountTable {
    /// In the order of the file: a mount follows the one that it covers.
    pub fn all(&self) -> &[Mount] {
        &self.0
    }

    /// The mount with this id. `None` for the kernel's internal mounts (pipes, sockets, memfds), for lazily unmounted
    /// ones, and outside the process's root.
    pub fn mount_of(&self, mnt_id: i32) -> Option<&Mount> {
        self.0.iter().find(|mount| mount.id == mnt_id)
    }
}

/// Reads the mounts of a process.
///
/// # Errors
/// See [`ProcDir::read`]; [`crate::Error::ProcSyntax`] when the format is unknown.
pub fn read_mounts(process: impl Into<ProcDir>) -> Result<MountTable> {
    let dir = process.into();
    let text = dir.read("mountinfo")?;
    parse(&text).map_err(|line| dir.syntax("mountinfo", line))
}

fn parse(text: &[u8]) -> Result<MountTable, &[u8]> {
    let mounts = lines(text).filter(|line| !line.is_empty());
    mounts
        .map(|line| mount(line).ok_or(line))
        .collect::<Result<_, _>>()
        .map(MountTable)
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
fn mount(line: &[u8]) -> Option<Mount> {
    let path = |field: &[u8]| PathBuf::from(OsStr::from_bytes(&unescape_octal(field)));
    let text = |field: &[u8]| String::from_utf8_lossy(&unescape_octal(field)).into_owned();
    let mut parts = fields(line);
    let (id, parent) = (dec(parts.next()?)?, dec(parts.next()?)?);
    let dev = device(parts.next()?, 10)?;
    let (root, mount_point) = (path(parts.next()?), path(parts.next()?));
    let options = text(parts.next()?);
    let propagation = parts
        .by_ref()
        .take_while(|field| *field != b"-")
        .map(text)
        .collect();
    let fs_type = text(parts.next()?);
    // An empty source leaves nothing between two blanks; the options then take its place.
    let (second, third) = (parts.next()?, parts.next());
    let (source, super_options) = third.map_or((&b""[..], second), |third| (second, third));
    Some(Mount {
        id,
        parent,
        dev,
        root,
        mount_point,
        options,
        propagation,
        fs_type,
        source: unescape_octal(source).into_owned(),
        super_options: text(super_options),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_with_odd_names() {
        let text = br"22 27 0:21 / /proc rw,relatime - proc proc rw
23 22 254:0 /sub\040dir /mnt/a\012b\134c rw,noatime shared:7 master:1 - ext4 /dev/my\040disk rw,errors=continue
24 23 0:9 / /x rw - tmpfs  rw,size=4k
";
        let table = parse(text).unwrap();
        assert_eq!(table.all().len(), 3);
        let odd = table.mount_of(23).unwrap();
        assert_eq!((odd.parent, odd.dev), (22, (254, 0)));
        assert_eq!(odd.root.to_str(), Some("/sub dir"));
        assert_eq!(odd.mount_point.to_str(), Some("/mnt/a\nb\\c"));
        assert_eq!(
            (odd.options.as_str(), odd.super_options.as_str()),
            ("rw,noatime", "rw,errors=continue")
        );
        assert_eq!(odd.propagation, ["shared:7", "master:1"]);
        assert_eq!(
            (odd.fs_type.as_str(), &*odd.source),
            ("ext4", &b"/dev/my disk"[..])
        );
        let unnamed = table.mount_of(24).unwrap();
        assert_eq!(
            (&*unnamed.source, unnamed.super_options.as_str()),
            (&b""[..], "rw,size=4k")
        );
        assert_eq!(table.mount_of(17), None);
    }

    #[test]
    fn odd_text_is_an_error_that_names_the_line() {
        assert_eq!(parse(b"1 2 3:4 / /\n"), Err(&b"1 2 3:4 / /"[..]));
        assert_eq!(parse(b""), Ok(MountTable::default()));
    }
}
