//! Substitutes for files that the job is using meanwhile.
//!
//! Every path of the job is redirected below a file system of the copy's own, in memory and visible in its mount
//! namespace only. It has an empty file of the same size, a directory or a FIFO in each place, which the copy opens,
//! maps, locks and removes as a restore does with the job's own. No code of the copy runs, and contents of named
//! files are in no image, so their absence has no effect. Only programs, their interpreters, devices and `/proc` are
//! the real ones.

use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::stat::{Mode, umask};

use crate::error::{Error, Obstacle, Result};
use crate::objects::Snapshot;
use crate::objects::files::Description;
use crate::objects::files::device::Device;
use crate::objects::files::kind::Substitutes;
use crate::objects::files::outside::{Outside, Surroundings};
use crate::objects::files::pipe::PipeEnd;
use crate::objects::files::procfs;
use crate::objects::files::regular::Regular;
use crate::objects::index::FileId;
use crate::objects::memory::{Backing, FileIdentity};
use crate::restore::paths;

/// Mount point of that file system: a directory of `/proc` that always exists, and in which a job has nothing open.
/// Short, since it lengthens names of sockets.
const ROOT: &str = "/proc/fs";
const MOUNT: &CStr = c"/proc/fs";

/// Substitutes for sockets outside to which the job is connected.
#[derive(Debug, Default)]
pub(super) struct StandIns(Vec<UnixDatagram>);

/// Creates everything; afterwards the snapshot is what the copy should be.
///
/// Must be called in the namespaces of the copy.
///
/// # Errors
/// When a substitute cannot be created; names the original.
pub(super) fn substitute(snapshot: &mut Snapshot) -> Result<StandIns> {
    let flags = libc::MS_NOSUID;
    let mounted = ckpt_sys::mounts::mount(c"none", MOUNT, c"tmpfs", flags);
    mounted.map_err(|errno| failed("a file system of its own")(errno.into()))?;
    outside(snapshot);
    move_paths(snapshot);
    // Processes of several users create names there.
    let ours = umask(Mode::empty());
    let made = stand_ins(snapshot);
    umask(ours);
    made
}

fn stand_ins(snapshot: &mut Snapshot) -> Result<StandIns> {
    let mut made = Made::default();
    for place in snapshot.processes.iter().flat_map(|p| [&p.cwd, &p.root]) {
        made.directory(place)?;
    }
    for file in &mut snapshot.mapped_files {
        file.saved = None;
        match file.contents {
            Some(_) => file.path = made.nameless(&file.path),
            None if !is_moved(&file.path) => {}
            None => made.like(&file.path, &file.identity)?,
        }
    }
    for removed in &mut snapshot.removed {
        removed.path = moved(&removed.path);
        made.parent(&removed.path)?;
    }
    for description in &mut snapshot.descriptions {
        let file = description.kind.file_mut();
        file.substitute(&mut description.flags, &mut made)?;
        // The copy uses the device itself.
        if description.kind.get::<Device>().is_some() {
            description.locks.clear();
        }
    }
    let descriptions = &snapshot.descriptions;
    for process in &mut snapshot.processes {
        let fds = &process.fds;
        process.record_locks.retain(|(fd, _)| {
            let entry = fds.iter().find(|entry| entry.fd == *fd);
            let kind = entry.map(|entry| &descriptions[entry.description].kind);
            !kind.is_some_and(|k| k.get::<Device>().is_some() || k.get::<PipeEnd>().is_some())
        });
    }
    snapshot.bundle.clear();
    made.identities(snapshot)?;
    Ok(made.sockets)
}

/// A path for messages: that of the job.
pub(super) fn told(text: &str) -> String {
    text.replace(&format!("{ROOT}/"), "/")
}

fn moved(path: &Path) -> PathBuf {
    let below = path.strip_prefix("/").unwrap_or(path);
    Path::new(ROOT).join(below)
}

fn is_moved(path: &Path) -> bool {
    path.starts_with(ROOT)
}

fn failed(what: &str) -> impl Fn(io::Error) -> Error + use<> {
    let step = format!("make a place for {what} in the rehearsal");
    move |error| Error::step(&step, error)
}

/// The same for the original of a path.
fn no_place(path: &Path) -> impl Fn(io::Error) -> Error + use<> {
    failed(&told(&crate::text::of_path(path)))
}

/// Replaces other ends outside the job by pipes whose other end is closed.
fn outside(snapshot: &mut Snapshot) {
    const STATUS: i32 = libc::O_ACCMODE | libc::O_NONBLOCK | libc::O_ASYNC;
    let pipes = snapshot.descriptions.iter();
    let pipes = pipes.filter_map(|d| d.kind.get::<PipeEnd>());
    let inodes = pipes.map(|end| end.inode);
    let mut inode = inodes.max().unwrap_or(0);
    for description in &mut snapshot.descriptions {
        let Some(outside) = description.kind.get::<Outside>() else {
            continue;
        };
        let packets = match outside.what {
            Surroundings::Pipe => libc::O_DIRECT,
            Surroundings::Socket => 0,
        };
        inode += 1;
        description.flags &= (STATUS | packets) as u32;
        (description.owner, description.made_by) = (None, None);
        description.locks.clear();
        let end = PipeEnd {
            inode,
            capacity: 16 * 4096,
            unread: Vec::new(),
        };
        description.kind = end.into();
    }
}

/// Moves all paths below [`ROOT`], except those of programs, devices, `O_PATH` handles and `/proc`.
fn move_paths(snapshot: &mut Snapshot) {
    let programs: Vec<(FileId, PathBuf)> = programs(snapshot)
        .into_iter()
        .map(|index| (index, snapshot.mapped_files[index].path.clone()))
        .collect();
    let files = FileId::each(&snapshot.mapped_files);
    let others = files.filter(|(_, file)| file.identity.mode & libc::S_IFMT != libc::S_IFREG);
    let programs: Vec<(FileId, PathBuf)> = others
        .map(|(index, file)| (index, file.path.clone()))
        .chain(programs)
        .collect();
    let descriptions = snapshot.descriptions.iter_mut();
    let kept: Vec<Vec<PathBuf>> = descriptions.map(kept_paths).collect();
    let places: Vec<Option<PathBuf>> = snapshot
        .processes
        .iter()
        .map(|p| procfs::is_of_job(&p.cwd, snapshot).then(|| p.cwd.clone()))
        .collect();
    let all = paths::Mapping {
        old: "/".into(),
        new: ROOT.into(),
    };
    // A job may have no path at all.
    let _ = paths::apply(&[all], snapshot);
    for (index, path) in programs {
        snapshot.mapped_files[index].path = path;
    }
    for (description, paths) in snapshot.descriptions.iter_mut().zip(kept) {
        let mut paths = paths.into_iter();
        let file = description.kind.file_mut();
        file.each_path(&mut |path| *path = paths.next().unwrap_or_else(|| path.clone()));
    }
    for (process, cwd) in snapshot.processes.iter_mut().zip(places) {
        if let Some(cwd) = cwd {
            process.cwd = cwd;
        }
    }
}

/// Paths of an open file that are not moved.
fn kept_paths(description: &mut Description) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    let file = description.kind.file_mut();
    if file.keeps_paths(description.flags) {
        file.each_path(&mut |path| paths.push(path.clone()));
    }
    paths
}

/// Files that an exec opens: programs, and the interpreter if one is mapped at its base address.
fn programs(snapshot: &Snapshot) -> HashSet<FileId> {
    let mut found = HashSet::new();
    for process in &snapshot.processes {
        found.insert(process.memory.executable);
        let base = auxiliary(&process.memory.auxv, libc::AT_BASE);
        let mut mappings = process.memory.mappings.iter();
        let at_base = mappings.find(|m| base.is_some_and(|b| m.start <= b && b < m.end));
        if let Some(Backing::PrivateFile { file, .. }) = at_base.map(|m| &m.backing) {
            found.insert(*file);
        }
    }
    found
}

/// An entry of an auxiliary vector, getauxval(3).
fn auxiliary(auxv: &[u8], kind: u64) -> Option<u64> {
    let (pairs, _) = auxv.as_chunks::<16>();
    let word = |pair: &[u8; 16], at: usize| {
        u64::from_ne_bytes(std::array::from_fn(|byte| pair[8 * at + byte]))
    };
    let found = pairs.iter().find(|pair| word(pair, 0) == kind)?;
    Some(word(found, 1))
}

/// Existing substitutes.
#[derive(Default)]
struct Made {
    /// By device and inode of the original.
    files: HashMap<((u32, u32), u64), PathBuf>,
    sockets: StandIns,
}

impl Substitutes for Made {
    fn is_own(&self, path: &Path) -> bool {
        is_moved(path)
    }

    fn nameless(&self, path: &Path) -> PathBuf {
        std::env::temp_dir().join(path.file_name().unwrap_or_default())
    }

    fn refusal(&self, object: String, reason: &str) -> Error {
        Error::refuse(Obstacle::new(told(&object), reason, WITHOUT))
    }

    fn directory(&mut self, path: &Path) -> Result<()> {
        match is_moved(path) {
            true => fs::create_dir_all(path).map_err(no_place(path)),
            false => Ok(()),
        }
    }

    /// A file of that size, one for all names of the original.
    fn like(&mut self, path: &Path, was: &FileIdentity) -> Result<()> {
        self.parent(path)?;
        let failed = no_place(path);
        if path.symlink_metadata().is_err() {
            let key = (was.device, was.inode);
            match self.files.get(&key) {
                Some(first) => fs::hard_link(first, path).map_err(&failed)?,
                None => {
                    make(path, was).map_err(&failed)?;
                    self.files.insert(key, path.to_owned());
                }
            }
        }
        Ok(())
    }

    /// Whether the original file is on a hugetlbfs.
    fn is_of_huge_pages(&self, path: &Path) -> bool {
        let real = Path::new("/").join(path.strip_prefix(ROOT).unwrap_or(path));
        nix::sys::statfs::statfs(&real)
            .is_ok_and(|s| s.filesystem_type() == nix::sys::statfs::HUGETLBFS_MAGIC)
    }

    fn fifo(&mut self, path: &Path, mode: u32) -> Result<()> {
        self.parent(path)?;
        let failed = no_place(path);
        match ckpt_sys::files::make_node(path, libc::S_IFIFO, 0o600) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(e) => return Err(failed(e.into())),
        }
        fs::set_permissions(path, PermissionsExt::from_mode(mode)).map_err(failed)
    }

    /// An object to be watched, of the original's type.
    fn watched(&mut self, path: &Path) -> Result<()> {
        if path.symlink_metadata().is_ok() {
            return Ok(());
        }
        let real = Path::new("/").join(path.strip_prefix(ROOT).unwrap_or(path));
        if real.is_dir() {
            return self.directory(path);
        }
        self.parent(path)?;
        let made = File::create(path);
        made.map(drop).map_err(no_place(path))
    }

    /// A socket with that address, unless it is a relative path, which need not exist.
    fn socket(&mut self, address: &[u8]) -> Result<()> {
        let bound = match address.first() {
            Some(0) => SocketAddr::from_abstract_name(&address[1..])
                .and_then(|address| UnixDatagram::bind_addr(&address)),
            Some(b'/') => {
                let end = address.iter().position(|byte| *byte == 0);
                let path = Path::new(std::ffi::OsStr::from_bytes(
                    &address[..end.unwrap_or(address.len())],
                ));
                self.parent(path)?;
                UnixDatagram::bind(path)
            }
            _ => return Ok(()),
        };
        match bound {
            Ok(socket) => {
                self.sockets.0.push(socket);
                Ok(())
            }
            // Another socket of the job has created it.
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => Ok(()),
            Err(e) => Err(failed("a socket that the job is connected to")(e)),
        }
    }
}

impl Made {
    /// When all exist: sets the identities that the copy should find.
    fn identities(&self, snapshot: &mut Snapshot) -> Result<()> {
        let mapped = snapshot.mapped_files.iter_mut();
        let mapped = mapped.filter(|file| file.contents.is_none());
        let mapped = mapped.map(|file| (&file.path, &mut file.identity));
        let open = snapshot.descriptions.iter_mut();
        let open = open.filter_map(|d| d.kind.get_mut::<Regular>());
        let open = open.filter(|file| file.contents.is_none() && file.removed.is_none());
        let open = open.map(|file| (&file.path, &mut file.identity));
        for (path, identity) in mapped.chain(open).filter(|(path, _)| is_moved(path)) {
            let meta = fs::metadata(path).map_err(no_place(path))?;
            *identity = FileIdentity::of(&meta);
        }
        Ok(())
    }
}

/// The remedy for a refused rehearsal.
pub(super) const WITHOUT: &str = "leave --rehearse out; --kill still checks for obstacles";

/// An empty file of that size, or a directory.
fn make(path: &Path, was: &FileIdentity) -> io::Result<()> {
    if was.mode & libc::S_IFMT == libc::S_IFDIR {
        return fs::create_dir_all(path);
    }
    let file = File::create_new(path)?;
    file.set_len(was.size)?;
    // Accessible to all users of the job: the plan checks the permissions of the job's own files.
    file.set_permissions(PermissionsExt::from_mode(0o666 | was.mode & 0o111))
}
