//! Opens paths without following the magic links of `/proc` (`/proc/PID/exe`, `fd`, `cwd`, `ns` …), whose target is not a
//! path: by openat2(2) or, where that call is not available, component by component.

use std::collections::VecDeque;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags, RawMode, ResolveFlags, Stat};

use crate::files::set_close_on_exec;
use crate::{Errno, Result, errno};

/// `MAXSYMLINKS` of the kernel.
const LINKS: u32 = 40;
/// `PROC_ROOT_INO` of linux/proc_fs.h.
const PROC_ROOT: u64 = 1;
/// `PROC_SUPER_MAGIC` of linux/magic.h.
const PROC: i64 = 0x9fa0;

/// Opens a path without following a magic link. The descriptor becomes close-on-exec, but its description does not
/// show `O_CLOEXEC` in its flags, as it would forever. `flags` include `O_PATH` or `O_NOFOLLOW`.
///
/// # Errors
/// Those of openat2(2): `ELOOP` when the path has such a link. `EAGAIN` where that call is not available, if a link on
/// the path has been changed meanwhile.
pub fn open_without_magic_links(path: &CStr, flags: i32) -> Result<OwnedFd> {
    let flags = OFlags::from_bits_retain(flags as u32);
    let fd = match by_the_kernel(path, flags) {
        // Older than Linux 5.6, or a seccomp filter.
        Err(Errno::ENOSYS | Errno::EPERM) => by_components(path, flags)?,
        opened => opened?,
    };
    set_close_on_exec(&fd, true)?;
    Ok(fd)
}

fn by_the_kernel(path: &CStr, flags: OFlags) -> Result<OwnedFd> {
    let resolve = ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(CWD, path, flags, Mode::empty(), resolve).map_err(errno)
}

/// The same without openat2(2), as in path_resolution(7). Each component is opened with `O_NOFOLLOW`, relative to the
/// directory before it; the target of a link is read through its descriptor, so that the link that is judged is the
/// one that is followed.
fn by_components(path: &CStr, flags: OFlags) -> Result<OwnedFd> {
    let found = walk(path, flags)?;
    let Walked::ThroughLinks(fd) = found else {
        return Ok(found.into_fd());
    };
    // The kernel's own rules for following links (`fs.protected_symlinks`) are left to it: it has to find the same
    // inode. What it opens here is only compared.
    let nofollow = flags & OFlags::NOFOLLOW;
    let kernels = open(CWD, path, OFlags::PATH | OFlags::CLOEXEC | nofollow)?;
    let (ours, theirs) = (stat(&fd)?, stat(&kernels)?);
    match (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino) {
        true => Ok(fd),
        false => Err(Errno::EAGAIN),
    }
}

/// What a path leads to.
enum Walked {
    Straight(OwnedFd),
    ThroughLinks(OwnedFd),
}

impl Walked {
    fn into_fd(self) -> OwnedFd {
        match self {
            Walked::Straight(fd) | Walked::ThroughLinks(fd) => fd,
        }
    }
}

fn walk(path: &CStr, flags: OFlags) -> Result<Walked> {
    const STEP: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
    if path.is_empty() {
        return Err(Errno::ENOENT);
    }
    let mut left: VecDeque<CString> = components(path);
    let mut place = open(CWD, start(path), STEP)?;
    let mut links = 0;
    let follows_none = flags.contains(OFlags::NOFOLLOW);
    while let Some(name) = left.pop_front() {
        let last = left.is_empty();
        // With O_DIRECTORY, which mounts what autofs has there.
        let wanted = match last {
            true => flags | OFlags::NOFOLLOW,
            false => STEP | OFlags::DIRECTORY,
        };
        let step = match open(&place, &name, wanted) {
            Ok(found) if last && (follows_none || !is_link(&stat(&found)?)) => {
                return Ok(match links {
                    0 => Walked::Straight(found),
                    _ => Walked::ThroughLinks(found),
                });
            }
            Ok(directory) if !last => {
                place = directory;
                continue;
            }
            Ok(link) => link,
            // Of a link too.
            Err(Errno::ENOTDIR) if !(last && follows_none) => open(&place, &name, STEP)?,
            Err(e) => return Err(e),
        };
        if !is_link(&stat(&step)?) {
            return Err(Errno::ENOTDIR);
        }
        links += 1;
        // Of a magic link this is denied where following it would be.
        let target = rustix::fs::readlinkat(&step, c"", Vec::new()).map_err(errno)?;
        if links > LINKS || is_magic(&step, &place)? {
            return Err(Errno::ELOOP);
        }
        if target.as_bytes().starts_with(b"/") {
            place = open(CWD, start(&target), STEP)?;
        }
        for name in components(&target).into_iter().rev() {
            left.push_front(name);
        }
    }
    Err(Errno::ENOENT)
}

fn open(at: impl AsFd, name: &CStr, flags: OFlags) -> Result<OwnedFd> {
    rustix::fs::openat(at, name, flags, Mode::empty()).map_err(errno)
}

fn stat(fd: &OwnedFd) -> Result<Stat> {
    rustix::fs::fstat(fd).map_err(errno)
}

fn is_link(stat: &Stat) -> bool {
    stat.st_mode as RawMode & libc::S_IFMT == libc::S_IFLNK
}

/// Where a path begins.
fn start(path: &CStr) -> &'static CStr {
    match path.to_bytes().starts_with(b"/") {
        true => c"/",
        false => c".",
    }
}

/// A path that ends in a slash refers to a directory, as one that ends in `/.`.
fn components(path: &CStr) -> VecDeque<CString> {
    let bytes = path.to_bytes();
    let names = bytes.split(|byte| *byte == b'/');
    let end = bytes.ends_with(b"/").then_some(b".".as_slice());
    let names = names.filter(|name| !name.is_empty()).chain(end);
    names.filter_map(|name| CString::new(name).ok()).collect()
}

/// Of the links of `/proc`, those in its root directory are text (`self`, `mounts` …).
fn is_magic(link: &OwnedFd, directory: &OwnedFd) -> Result<bool> {
    let system = rustix::fs::fstatfs(link).map_err(errno)?;
    let (link, directory) = (stat(link)?, stat(directory)?);
    let of_the_root = directory.st_dev == link.st_dev && directory.st_ino == PROC_ROOT;
    Ok(system.f_type as i64 == PROC && !of_the_root)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    use super::*;
    use crate::files::c_path;

    /// What a path leads to, as far as two openings of it can be compared.
    fn seen(opened: Result<OwnedFd>) -> Result<(u64, u64, i32)> {
        let fd = opened?;
        let (stat, flags) = (stat(&fd)?, crate::files::flags(&fd)?);
        Ok((stat.st_dev, stat.st_ino, flags & !libc::O_NOFOLLOW))
    }

    fn place() -> PathBuf {
        let dir = std::env::temp_dir().join(format!("ckpt-lookup.{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("real/deep")).unwrap();
        fs::write(dir.join("real/file"), "text").unwrap();
        let links = [
            ("to-file", "real/file"),
            ("to-directory", "real/deep/"),
            ("to-nothing", "real/gone"),
            ("to-itself", "to-itself"),
            ("upwards", "../../../../../../../.."),
            ("absolute", "/proc/self/status"),
            ("to-magic", "/proc/self/cwd"),
            ("to-a-link", "to-directory"),
            ("real/deep/back", "../file"),
            ("link-0", "real"),
        ];
        for (name, target) in links {
            symlink(target, dir.join(name)).unwrap();
        }
        // MAXSYMLINKS of them, and one more.
        for n in 1..=41 {
            symlink(format!("link-{}", n - 1), dir.join(format!("link-{n}"))).unwrap();
        }
        dir
    }

    #[test]
    fn both_lead_to_the_same() {
        const PATHS: &[&str] = &[
            "",
            "/",
            "//",
            ".",
            "..",
            "./",
            "/proc/self",
            "/proc/self/",
            "/proc/thread-self/status",
            "/proc/mounts",
            "/proc/net/dev",
            "/proc/self/exe",
            "/proc/self/cwd",
            "/proc/self/cwd/Cargo.toml",
            "/proc/self/root/etc",
            "/proc/self/fd/0",
            "/proc/self/ns/pid",
            "/proc/thread-self/fd/0",
            "/proc/1/root/etc",
            "/dev/stdin",
            "/dev/fd/0",
            "/dev/null",
            "/dev/null/x",
            "/nowhere/at/all",
            "/etc/../proc/../proc/self/exe",
        ];
        const IN_PLACE: &[&str] = &[
            "real",
            "real/",
            "real/file",
            "real//./file",
            "real/file/",
            "real/file/.",
            "real/deep/../file",
            "to-file",
            "to-file/",
            "to-directory",
            "to-directory/",
            "to-directory/.",
            "to-directory/..",
            "to-directory/back",
            "to-nothing",
            "to-nothing/x",
            "to-itself",
            "to-itself/x",
            "upwards",
            "upwards/proc/self/exe",
            "absolute",
            "to-magic",
            "to-magic/",
            "to-magic/src",
            "to-a-link/back",
            "link-39",
            "link-39/file",
            "link-40",
            "link-40/file",
            "link-41",
        ];
        let dir = place();
        let paths = PATHS.iter().map(PathBuf::from);
        let mut magic = 0;
        for path in paths.chain(IN_PLACE.iter().map(|name| {
            // Not joined, which would normalize it.
            PathBuf::from(format!("{}/{name}", dir.display()))
        })) {
            let name = c_path(&path).unwrap();
            let only_path = [
                OFlags::PATH,
                OFlags::PATH | OFlags::NOFOLLOW,
                OFlags::PATH | OFlags::DIRECTORY,
                OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW,
            ];
            let opens = OFlags::NOFOLLOW | OFlags::NONBLOCK;
            for flags in only_path.into_iter().chain([opens]) {
                let (kernel, ours) = (by_the_kernel(&name, flags), by_components(&name, flags));
                magic += u32::from(matches!(ours, Err(Errno::ELOOP)));
                assert_eq!(seen(ours), seen(kernel), "{path:?} {flags:?}");
            }
        }
        assert!(magic > 30, "{magic}");
        fs::remove_dir_all(&dir).unwrap();
    }

    /// The kernel's rule for links of others in a directory that all may write to, where it is in force.
    #[test]
    fn links_that_the_kernel_does_not_follow() {
        use std::os::unix::fs::{PermissionsExt, lchown};
        let dir = std::env::temp_dir().join(format!("ckpt-sticky.{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, PermissionsExt::from_mode(0o1777)).unwrap();
        let link = dir.join("link");
        symlink("/etc/passwd", &link).unwrap();
        // Only root may give it away; else it is our own, which is followed.
        let _ = lchown(&link, Some(12345), Some(12345));
        let name = c_path(&link).unwrap();
        let kernel = seen(by_the_kernel(&name, OFlags::PATH));
        assert_eq!(seen(by_components(&name, OFlags::PATH)), kernel);
        fs::remove_dir_all(&dir).unwrap();
    }
}
