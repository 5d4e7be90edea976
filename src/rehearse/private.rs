//! What the copy has in the place of what the job uses at that moment.
//!
//! Every path of the job leads below a file system of the copy's own, in memory and in its mount namespace alone. There
//! is an empty file of the same size, directory or FIFO in each place, which the copy opens, maps, locks and removes just
//! as a restore does with the job's own. Nothing of the copy's code runs and contents of named files are in no image, so
//! that nobody misses them. Only programs, their interpreters, devices and what `/proc` shows are what they are.

use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::stat::{Mode, umask};

use crate::error::{Error, Obstacle, Result};
use crate::objects::Snapshot;
use crate::objects::files::Kind;
use crate::objects::files::outside::Surroundings;
use crate::objects::files::pipe::PipeEnd;
use crate::objects::files::procfs::{self, Of};
use crate::objects::files::regular::Regular;
use crate::objects::memory::{Backing, FileIdentity};
use crate::objects::sockets::unix::Role;
use crate::restore::paths;

/// Where that file system is: a directory of `/proc` that is always there, and of which a job has nothing open.
/// Short, since names of sockets become longer by it.
const ROOT: &str = "/proc/fs";
/// Bytes of a path as the address of a socket (`sun_path`, unix(7)).
const LONGEST_NAME: usize = 108;
const MOUNT: &CStr = c"/proc/fs";

/// Sockets in the place of those outside that the job is connected to.
#[derive(Debug, Default)]
pub(super) struct StandIns(Vec<UnixDatagram>);

/// Makes everything; from then on the snapshot is what the copy shall be.
///
/// To be called in the namespaces of the copy.
///
/// # Errors
/// What cannot be made, by the name of what it stands for.
pub(super) fn substitute(snapshot: &mut Snapshot) -> Result<StandIns> {
    let flags = libc::MS_NOSUID;
    let mounted = ckpt_sys::mounts::mount(c"none", MOUNT, c"tmpfs", flags);
    mounted.map_err(|errno| failed("a file system of its own")(errno.into()))?;
    outside(snapshot);
    move_paths(snapshot);
    // Processes of several users make names there.
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
    let temp = std::env::temp_dir();
    let nameless = |path: &Path| temp.join(path.file_name().unwrap_or_default());
    for file in &mut snapshot.mapped_files {
        file.saved = None;
        match file.contents {
            Some(_) => file.path = nameless(&file.path),
            None if !is_moved(&file.path) => {}
            None => made.like(&file.path, &file.identity)?,
        }
    }
    for removed in &mut snapshot.removed {
        removed.path = moved(&removed.path);
        made.parent(&removed.path)?;
    }
    let mut sockets = StandIns::default();
    for description in &mut snapshot.descriptions {
        match &mut description.kind {
            Kind::Regular(file) if file.contents.is_some() => file.path = nameless(&file.path),
            Kind::Regular(file) => made.regular(file, &mut description.flags)?,
            Kind::Fifo(end) if !end.deleted => made.fifo(&end.path, end.mode)?,
            Kind::Fifo(end) => made.parent(&end.path)?,
            Kind::Inotify(inotify) => {
                for watch in inotify.watches.iter().filter(|w| w.open.is_none()) {
                    made.watched(&watch.path)?;
                }
            }
            Kind::UnixSocket(socket) => {
                let name = socket.name.as_ref().map_or(0, |name| name.bytes.len());
                if name > LONGEST_NAME {
                    return Err(Error::refuse(Obstacle::new(
                        format!("the {}", told(&socket.label())),
                        "has a name that is too long for a rehearsal, whose names are longer by 8 bytes",
                        WITHOUT,
                    )));
                }
                for file in socket.name.iter().filter_map(|name| name.file.as_ref()) {
                    if let Some(directory) = &file.directory {
                        made.directory(directory)?;
                    }
                    if let Some(now) = &file.now {
                        made.parent(&file.named)?;
                        made.parent(now)?;
                    }
                }
                if let Role::Beyond { address } = &socket.role {
                    sockets.0.extend(made.socket(address)?);
                }
            }
            Kind::Fanotify(_) => {
                return Err(Error::refuse(Obstacle::new(
                    "a fanotify group of the job",
                    "is told of what its copy would do and cannot be rehearsed",
                    WITHOUT,
                )));
            }
            // Nothing stands for it, and the job has it.
            Kind::Device(_) => description.locks.clear(),
            Kind::MessageQueue(queue) if queue.held > 0 && !queue.unlinked => queue.make_like()?,
            _ => {}
        }
    }
    let descriptions = &snapshot.descriptions;
    for process in &mut snapshot.processes {
        let fds = &process.fds;
        process.record_locks.retain(|(fd, _)| {
            let entry = fds.iter().find(|entry| entry.fd == *fd);
            let kind = entry.map(|entry| &descriptions[entry.description].kind);
            !matches!(kind, Some(Kind::Device(_) | Kind::Pipe(_)))
        });
    }
    snapshot.bundle.clear();
    made.identities(snapshot)?;
    Ok(sockets)
}

/// A path as it is said to people: that of the job.
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
    let text = format!("the rehearsal has no place for {what}");
    move |error| Error::Restore(format!("{text}: {error}"))
}

/// The same of the file of the job that a path stands for.
fn no_place(path: &Path) -> impl Fn(io::Error) -> Error + use<> {
    failed(&told(&crate::text::of_path(path)))
}

/// Other ends outside of the job are pipes whose other end has been closed; other processes have ended.
fn outside(snapshot: &mut Snapshot) {
    const STATUS: i32 = libc::O_ACCMODE | libc::O_NONBLOCK | libc::O_ASYNC;
    let inodes = snapshot.descriptions.iter().map(|d| match &d.kind {
        Kind::Pipe(end) => end.inode,
        _ => 0,
    });
    let mut inode = inodes.max().unwrap_or(0);
    for description in &mut snapshot.descriptions {
        match &mut description.kind {
            Kind::Outside(outside) => {
                let packets = match outside.what {
                    Surroundings::Pipe => libc::O_DIRECT,
                    Surroundings::Socket => 0,
                };
                inode += 1;
                description.flags &= (STATUS | packets) as u32;
                (description.owner, description.made_by) = (None, None);
                description.locks.clear();
                description.kind = Kind::Pipe(PipeEnd {
                    inode,
                    capacity: 16 * 4096,
                    unread: Vec::new(),
                });
            }
            Kind::ProcFile(file) if matches!(file.of, Of::Outside { .. }) => file.of = Of::Ended,
            _ => {}
        }
    }
}

/// Makes all paths lead below [`ROOT`], but for those of programs, devices, handles and `/proc`.
fn move_paths(snapshot: &mut Snapshot) {
    let programs: Vec<(usize, PathBuf)> = programs(snapshot)
        .into_iter()
        .map(|index| (index, snapshot.mapped_files[index].path.clone()))
        .collect();
    let files = snapshot.mapped_files.iter().enumerate();
    let others = files.filter(|(_, file)| file.identity.mode & libc::S_IFMT != libc::S_IFREG);
    let programs: Vec<(usize, PathBuf)> = others
        .map(|(index, file)| (index, file.path.clone()))
        .chain(programs)
        .collect();
    let kept = |kind: &Kind, flags: u32| match kind {
        Kind::Device(device) => Some(device.path.clone()),
        // Opening one tells nobody, and what it leads to may be something that only root can make.
        Kind::Regular(file) if flags as i32 & libc::O_PATH != 0 => Some(file.path.clone()),
        _ => None,
    };
    let descriptions = snapshot.descriptions.iter();
    let kept: Vec<Option<PathBuf>> = descriptions.map(|d| kept(&d.kind, d.flags)).collect();
    let places: Vec<Option<PathBuf>> = snapshot
        .processes
        .iter()
        .map(|p| procfs::is_of_job(&p.cwd, snapshot).then(|| p.cwd.clone()))
        .collect();
    let all = paths::Mapping {
        old: "/".into(),
        new: ROOT.into(),
    };
    // A job without any path is possible.
    let _ = paths::apply(&[all], snapshot);
    for (index, path) in programs {
        snapshot.mapped_files[index].path = path;
    }
    for (description, path) in snapshot.descriptions.iter_mut().zip(kept) {
        match (&mut description.kind, path) {
            (Kind::Device(device), Some(path)) => device.path = path,
            (Kind::Regular(file), Some(path)) => file.path = path,
            _ => {}
        }
    }
    for (process, cwd) in snapshot.processes.iter_mut().zip(places) {
        if let Some(cwd) = cwd {
            process.cwd = cwd;
        }
    }
}

/// Files that an exec opens: programs, and where one is mapped at the base of its interpreter, that one.
fn programs(snapshot: &Snapshot) -> HashSet<usize> {
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

/// What there is already.
#[derive(Default)]
struct Made {
    /// By device and inode of what it stands for.
    files: HashMap<((u32, u32), u64), PathBuf>,
}

impl Made {
    fn directory(&self, path: &Path) -> Result<()> {
        match is_moved(path) {
            true => fs::create_dir_all(path).map_err(no_place(path)),
            false => Ok(()),
        }
    }

    fn parent(&self, path: &Path) -> Result<()> {
        path.parent()
            .map_or(Ok(()), |parent| self.directory(parent))
    }

    /// A file of that size, the same one for all names of one.
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

    /// With all of it there: what the copy is to find.
    fn identities(&self, snapshot: &mut Snapshot) -> Result<()> {
        let mapped = snapshot.mapped_files.iter_mut();
        let mapped = mapped.filter(|file| file.contents.is_none());
        let mapped = mapped.map(|file| (&file.path, &mut file.identity));
        let open = snapshot.descriptions.iter_mut();
        let open = open.filter_map(|d| match &mut d.kind {
            Kind::Regular(f) if f.contents.is_none() && f.removed.is_none() => {
                Some((&f.path, &mut f.identity))
            }
            _ => None,
        });
        for (path, identity) in mapped.chain(open).filter(|(path, _)| is_moved(path)) {
            let meta = fs::metadata(path).map_err(no_place(path))?;
            *identity = FileIdentity::of(&meta);
        }
        Ok(())
    }

    fn regular(&mut self, file: &mut Regular, flags: &mut u32) -> Result<()> {
        file.saved = None;
        if file.removed.is_some() || !is_moved(&file.path) {
            return Ok(());
        }
        if is_of_huge_pages(&file.path) {
            return Err(Error::refuse(Obstacle::new(
                format!("the open file {}", told(&crate::text::of_path(&file.path))),
                "is made of huge pages and cannot be rehearsed: there would have to be as many once more",
                WITHOUT,
            )));
        }
        self.like(&file.path, &file.identity)?;
        if file.is(libc::S_IFREG) && *flags as i32 & libc::O_DIRECT != 0 {
            let mut open = OpenOptions::new();
            // A file system in memory has none before Linux 6.6.
            if open
                .read(true)
                .custom_flags(libc::O_DIRECT)
                .open(&file.path)
                .is_err()
            {
                *flags &= !(libc::O_DIRECT as u32);
            }
        }
        Ok(())
    }

    fn fifo(&self, path: &Path, mode: u32) -> Result<()> {
        self.parent(path)?;
        let failed = no_place(path);
        match ckpt_sys::files::make_node(path, libc::S_IFIFO, 0o600) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(e) => return Err(failed(e.into())),
        }
        fs::set_permissions(path, PermissionsExt::from_mode(mode)).map_err(failed)
    }

    /// Something to be watched, of the kind that is there.
    fn watched(&self, path: &Path) -> Result<()> {
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

    /// A socket of that address, unless it is a relative path: then there may be none.
    fn socket(&self, address: &[u8]) -> Result<Option<UnixDatagram>> {
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
            _ => return Ok(None),
        };
        match bound {
            Ok(socket) => Ok(Some(socket)),
            // Another socket of the job has made it.
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => Ok(None),
            Err(e) => Err(failed("a socket that the job is connected to")(e)),
        }
    }
}

/// What is left to whoever wants no rehearsal.
pub(super) const WITHOUT: &str =
    "leave --rehearse out; --kill still checks that nothing stands in the way";

/// An empty file of that size, or a directory.
fn make(path: &Path, was: &FileIdentity) -> io::Result<()> {
    if was.mode & libc::S_IFMT == libc::S_IFDIR {
        return fs::create_dir_all(path);
    }
    let file = File::create_new(path)?;
    file.set_len(was.size)?;
    // Whoever of the job opens it may: the plan looks at the job's own.
    file.set_permissions(PermissionsExt::from_mode(0o666 | was.mode & 0o111))
}

/// Whether the file that this stands for is of a hugetlbfs.
fn is_of_huge_pages(path: &Path) -> bool {
    let real = Path::new("/").join(path.strip_prefix(ROOT).unwrap_or(path));
    nix::sys::statfs::statfs(&real)
        .is_ok_and(|s| s.filesystem_type() == nix::sys::statfs::HUGETLBFS_MAGIC)
}
