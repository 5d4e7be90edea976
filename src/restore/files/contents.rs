//! Files that the new process inherits: with contents from the image, or our own.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use ckpt_image::Reader;
use ckpt_sys::files;
use nix::sys::statvfs::{FsFlags, statvfs};

use super::named::Named;
use super::pty::{self, Ptys};
use crate::error::{Error, Result};
use crate::objects::files::attributes::Attributes;
use crate::objects::files::changed::{self, Written};
use crate::objects::files::device::Device;
use crate::objects::files::fifo::FifoEnd;
use crate::objects::files::kind::Record;
use crate::objects::files::memfd::MemFd;
use crate::objects::files::pidfd::PidFd;
use crate::objects::files::procfs::ProcFile;
use crate::objects::files::regular::Regular;
use crate::objects::files::terminal::End;
use crate::objects::files::{Description, inotify, removed, reopen_flags};
use crate::objects::index::{DescriptionId, FileId, RemovedId};
use crate::objects::memory::{self, FileIdentity, Uses, space::fill};
use crate::objects::options::FilesPolicy;
use crate::objects::plan::{Inherit, Inherited};
use crate::objects::rights::{self, Rights};
use crate::objects::sockets::inet;
use crate::objects::{Snapshot, SpaceId};
use crate::text::Shown;

/// Descriptors and their target numbers, and warnings, one sentence each.
pub type Opened = (Vec<(OwnedFd, i32)>, Vec<String>);

/// Opens every descriptor that the plan requests, with the rights of the job's user if that is not us.
pub fn open_all(
    inherit: &[Inherit],
    snapshot: &Snapshot,
    image: &Reader,
    ptys: &Ptys,
    (rights, policy): (Option<&Rights>, FilesPolicy),
) -> Result<Opened> {
    let mut inet = rights::with(rights, || inet::make::make(snapshot, image))?;
    let mut made = Made {
        warnings: std::mem::take(&mut inet.warnings),
        inet,
        files: Vec::new(),
        ready: Vec::new(),
        ptys,
        rights,
        policy,
        uses: Uses::of(snapshot),
        written: Written::by(snapshot),
    };
    let mut descriptors = Vec::with_capacity(inherit.len());
    for i in inherit {
        descriptors.push((open(&i.what, snapshot, image, &mut made)?, i.number));
    }
    // After all are opened, which the mode may forbid.
    let mut warnings = made.warnings;
    for file in &made.files {
        warnings.extend(file.complete());
        if let Some(memfd) = file.seals {
            seal(&file.file, memfd)?;
        }
    }
    Ok((descriptors, warnings))
}

/// Files created so far.
struct Made<'a> {
    files: Vec<MadeFile<'a>>,
    /// Created together with others, until requested.
    ready: Vec<(Inherited, OwnedFd)>,
    ptys: &'a Ptys,
    inet: inet::make::Made,
    rights: Option<&'a Rights>,
    policy: FilesPolicy,
    uses: Uses,
    /// Files that the job may have written after the checkpoint.
    written: Written,
    warnings: Vec<String>,
}

/// A file with contents of the image; several descriptors may refer to it.
struct MadeFile<'a> {
    space: SpaceId,
    file: File,
    name: String,
    mode: u32,
    attributes: Option<&'a Attributes>,
    /// To be sealed by us.
    seals: Option<&'a MemFd>,
    /// The description with which it was created is one of the job's.
    given: bool,
}

impl MadeFile<'_> {
    /// Sets its other attributes; returns a warning about those that cannot be set.
    fn complete(&self) -> Option<String> {
        let lost = match self.attributes {
            Some(attributes) => attributes.give(&self.file, self.mode),
            None => {
                let mode = PermissionsExt::from_mode(self.mode & 0o777);
                let _ = self.file.set_permissions(mode);
                Vec::new()
            }
        };
        let of = &self.name;
        (!lost.is_empty()).then(|| format!("{of}: could not be given back: {}", lost.join("; ")))
    }
}

impl<'a> Made<'a> {
    fn get(
        &mut self,
        space: SpaceId,
        make: impl FnOnce() -> Result<MadeFile<'a>>,
    ) -> Result<&mut MadeFile<'a>> {
        let at = match self.files.iter().position(|file| file.space == space) {
            Some(at) => at,
            None => {
                self.files.push(make()?);
                self.files.len() - 1
            }
        };
        Ok(&mut self.files[at])
    }

    /// A file without a name, with contents from the image.
    fn nameless(
        &mut self,
        space: Option<SpaceId>,
        (path, identity): (&Path, &FileIdentity),
        attributes: Option<&'a Attributes>,
        image: &Reader,
    ) -> Result<&mut MadeFile<'a>> {
        let space = space.unwrap_or(SpaceId(u32::MAX));
        let rights = self.rights;
        self.get(space, || {
            Ok(MadeFile {
                space,
                file: nameless(path, space, identity.size, (image, rights))?,
                name: format!("the nameless file {}", path.shown()),
                mode: identity.mode,
                attributes,
                seals: None,
                given: false,
            })
        })
    }

    /// An existing descriptor for it, if any.
    fn take(&mut self, what: &Inherited) -> Option<OwnedFd> {
        let at = self.ready.iter().position(|(ready, _)| ready == what)?;
        Some(self.ready.swap_remove(at).1)
    }

    /// A nameless object, opened at once for all that have it.
    fn removed(&mut self, id: RemovedId, snapshot: &Snapshot) -> Result<()> {
        let Some(removed) = id.find(&snapshot.removed) else {
            return Err(Error::Bug(format!("there is no removed directory {id}")));
        };
        let of = |d: &Description| {
            let file = d.kind.get::<Regular>();
            file.is_some_and(|file| file.removed == Some(id))
        };
        let all = DescriptionId::each(&snapshot.descriptions);
        let all = all.filter(|(_, description)| of(description));
        let all = all.map(|(at, d)| (Inherited::Removed(at), reopen_flags(d.flags)));
        let mut all: Vec<(Inherited, u32)> = all.collect();
        if removed::is_place(id, snapshot) {
            let handle = (libc::O_PATH | libc::O_DIRECTORY) as u32;
            all.push((Inherited::RemovedPlace(id), handle));
        }
        let (what, flags): (Vec<Inherited>, Vec<u32>) = all.into_iter().unzip();
        // Temporary names are created: with the rights of the job's user, not ours.
        let made = rights::with(self.rights, || removed.make(&flags));
        let (opened, lost) =
            made.map_err(Error::file("create again the deleted", &removed.path))?;
        self.ready.extend(what.into_iter().zip(opened));
        self.warnings.extend(lost);
        Ok(())
    }

    /// A pidfd of an ended process. All pidfds of one process are made together: they share an inode.
    fn ended(&mut self, index: DescriptionId, snapshot: &Snapshot) -> Result<OwnedFd> {
        if let Some(fd) = self.take(&Inherited::EndedProcess(index)) {
            return Ok(fd);
        }
        let of = |at: DescriptionId| record::<PidFd>(snapshot, at).ok();
        let (pidfd, _) = record::<PidFd>(snapshot, index)?;
        let all = (0..snapshot.descriptions.len())
            .map(DescriptionId)
            .filter(|at| {
                *at == index || of(*at).is_some_and(|(other, _)| pidfd.is_same_process(other))
            });
        let all: Vec<DescriptionId> = all.collect();
        let flags: Vec<u32> = all.iter().filter_map(|at| Some(of(*at)?.1)).collect();
        let made = pidfd.of_ended(&flags).map_err(|e| {
            let reason = e.desc();
            Error::object("a pidfd of an ended process", "made", reason)
        })?;
        let all = all.into_iter().map(Inherited::EndedProcess);
        self.ready.extend(all.zip(made));
        let own = self.take(&Inherited::EndedProcess(index));
        own.ok_or_else(|| Error::Bug(format!("description {index} was not made")))
    }
}

/// The record of a description, which must be of the kind that the plan expects, and its flags.
fn record<T: Record>(snapshot: &Snapshot, index: DescriptionId) -> Result<(&T, u32)> {
    let description = index.find(&snapshot.descriptions);
    let found = description.and_then(|d| Some((d.kind.get()?, d.flags)));
    found.ok_or_else(|| Error::Bug(format!("description {index} is of another kind")))
}

fn open<'a>(
    what: &Inherited,
    snapshot: &'a Snapshot,
    image: &Reader,
    made: &mut Made<'a>,
) -> Result<OwnedFd> {
    match what {
        Inherited::Terminal(index) => {
            let (end, flags) = record(snapshot, *index)?;
            made.ptys.open(end, flags)
        }
        Inherited::Leading(terminal) => made.ptys.slave(*terminal),
        Inherited::OwnTerminal(controlling, flags) => {
            let terminal = pty::own_terminal(*controlling, *flags);
            terminal.ok_or_else(|| Error::step("take our terminal", "it is gone"))
        }
        Inherited::Own(fd) => own(*fd),
        Inherited::Named(path, flags) => {
            let access = *flags as i32 & libc::O_ACCMODE;
            let file = OpenOptions::new()
                .read(access != libc::O_WRONLY)
                .write(access != libc::O_RDONLY)
                .custom_flags(libc::O_NOCTTY)
                .open(path)
                .map_err(Error::file("open", &path))?;
            Ok(file.into())
        }
        Inherited::MemFd(index) => {
            let description = &snapshot.descriptions[*index];
            let (memfd, _) = record::<MemFd>(snapshot, *index)?;
            let made = made.get(memfd.contents, || {
                let file = create_memfd(memfd)?;
                let name = PathBuf::from(std::ffi::OsString::from_vec(memfd.name.clone()));
                fill(&file, &name, memfd.contents, memfd.size, image)?;
                Ok(MadeFile {
                    space: memfd.contents,
                    file,
                    name: format!("the memfd {}", name.shown()),
                    mode: memfd.mode,
                    attributes: memfd.attributes.as_ref(),
                    seals: (!memfd.is_writable(snapshot)).then_some(memfd),
                    given: false,
                })
            })?;
            // Only a description that open(2) made for writing prevents execution of the file (ETXTBSY,
            // `deny_write_access`); the one of memfd_create(2), which is the first, does not. It also lacks O_SYNC,
            // which only an open sets, and O_DIRECT, which F_SETFL sets only on such a description
            // (`FMODE_CAN_ODIRECT`).
            let given = libc::O_ACCMODE | libc::O_PATH | libc::O_SYNC | libc::O_DIRECT;
            let writes = description.flags as i32 & given;
            // It does not count as a writer either, and a write lease requires that there is no other writer.
            let first = writes == libc::O_RDWR && !description.is_leased();
            let file = match first && !std::mem::replace(&mut made.given, true) {
                true => made
                    .file
                    .try_clone()
                    .map_err(Error::file("copy", "a memfd"))?,
                false => reopen(&made.file, description.flags)?,
            };
            if description.flags as i32 & libc::O_PATH == 0 {
                seek(&file, memfd.offset)?;
            }
            Ok(file.into())
        }
        Inherited::Removed(_) | Inherited::RemovedPlace(_) => {
            if let Some(fd) = made.take(what) {
                return Ok(fd);
            }
            let id = match what {
                Inherited::RemovedPlace(id) => Some(*id),
                Inherited::Removed(at) => record::<Regular>(snapshot, *at)?.0.removed,
                _ => None,
            };
            made.removed(id.unwrap_or(RemovedId(usize::MAX)), snapshot)?;
            let own = made.take(what);
            own.ok_or_else(|| Error::Bug("a deleted directory was not made".into()))
        }
        Inherited::EndedProcess(index) => made.ended(*index, snapshot),
        Inherited::EndedProcFile(index) => {
            let (file, flags) = record::<ProcFile>(snapshot, *index)?;
            file.of_ended(flags)
                .map_err(Error::file("open", &file.path))
        }
        Inherited::InetSocket(index) => {
            let socket = made.inet.take(*index);
            socket.ok_or_else(|| {
                Error::Bug(format!("the socket of description {index} was not made"))
            })
        }
        Inherited::Inotify(index) => inotify::create(snapshot.descriptions[*index].flags),
        Inherited::DeletedFile(index) => {
            let (regular, flags) = record::<Regular>(snapshot, *index)?;
            let (path, identity) = (&regular.path, &regular.identity);
            let (space, attributes) = (regular.contents, regular.attributes.as_ref());
            let made = made.nameless(space, (path, identity), attributes, image)?;
            Ok(reopen(&made.file, flags)?.into())
        }
        Inherited::Executable(file) => {
            Ok(executable(*file, snapshot, image, (made.rights, made.policy))?.into())
        }
        Inherited::File(index) => {
            let (file, flags) = record(snapshot, *index)?;
            let named = Named::open_file(*index, file, made.rights);
            let find = || changed::check(file, flags, &made.written, made.policy);
            Ok(named.open(find, reopen_flags(flags) as i32)?.into())
        }
        Inherited::Device(index) => {
            let (device, flags) = record::<Device>(snapshot, *index)?;
            let found = device.find(flags, made.rights);
            let found = found.map_err(|o| Error::refuse(*o))?;
            let opened = rights::with(made.rights, || found.open(reopen_flags(flags) as i32));
            Ok(opened.map_err(Error::file("open", &device.path))?.into())
        }
        Inherited::Fifo(index) => {
            let (fifo, _) = record::<FifoEnd>(snapshot, *index)?;
            Ok(fifo.read_end(made.rights)?.into())
        }
        Inherited::MachineTerminal(index) => {
            let (end, flags) = record::<End>(snapshot, *index)?;
            Ok(end.reopened(flags)?.into())
        }
        Inherited::MappedFile(index, writable) => {
            let record = &snapshot.mapped_files[*index];
            if record.contents.is_none() {
                let flags = match writable {
                    true => libc::O_RDWR,
                    false => libc::O_RDONLY,
                };
                let shared_only = !made.uses.as_it_was(*index);
                let find = || memory::check_file(record, shared_only, made.policy);
                let named = Named::mapped(*index, record, made.rights);
                return Ok(named
                    .open(find, flags | libc::O_NONBLOCK | libc::O_NOCTTY)?
                    .into());
            }
            let (path, identity) = (&record.path, &record.identity);
            let (space, attributes) = (record.contents, record.attributes.as_ref());
            let made = made.nameless(space, (path, identity), attributes, image)?;
            let access = if *writable {
                libc::O_RDWR
            } else {
                libc::O_RDONLY
            };
            Ok(reopen(&made.file, access as u32)?.into())
        }
    }
}

/// An executable: the file itself, or one made from the image.
pub fn executable(
    file: FileId,
    snapshot: &Snapshot,
    image: &Reader,
    (rights, policy): (Option<&Rights>, FilesPolicy),
) -> Result<File> {
    let record = &snapshot.mapped_files[file];
    match record.contents {
        // A program may be executable without being readable.
        None => {
            let find = || memory::check_file(record, false, policy);
            Named::mapped(file, record, rights).open(find, libc::O_PATH)
        }
        Some(space) => {
            let mode = record.identity.mode | 0o500;
            let file = nameless(&record.path, space, record.identity.size, (image, rights))?;
            let _ = file.set_permissions(PermissionsExt::from_mode(mode & 0o777));
            // It must not be open for writing anywhere, otherwise exec fails with ETXTBSY.
            reopen(&file, libc::O_RDONLY as u32)
        }
    }
}

fn own(fd: i32) -> Result<OwnedFd> {
    let copy = files::duplicate_number(fd, 3).map_err(|_| Error::NoDescriptor { fd })?;
    Ok(pty::reopened(&copy).unwrap_or(copy))
}

/// A nameless file, in the directory of the original if possible.
fn nameless(
    path: &Path,
    space: SpaceId,
    size: u64,
    (image, rights): (&Reader, Option<&Rights>),
) -> Result<File> {
    let temp = std::env::temp_dir();
    let parent = path.parent().unwrap_or(Path::new("/"));
    let places = [parent, &temp, Path::new("/var/tmp")];
    // Code cannot be mapped from noexec file systems.
    let places = places.into_iter().filter(|place| may_hold_programs(place));
    let made = places.map(|place| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .mode(0o600)
            .custom_flags(libc::O_TMPFILE)
            .open(place)
    });
    // The path is resolved with the rights of the job's user, not ours.
    let made = rights::with(rights, || made.flat_map(std::io::Result::ok).next());
    let file = match made {
        Some(file) => file,
        None => in_memory(path)?,
    };
    fill(&file, path, space, size, image)?;
    Ok(file)
}

fn may_hold_programs(place: &Path) -> bool {
    statvfs(place).is_ok_and(|s| !s.flags().contains(FsFlags::ST_NOEXEC))
}

/// If no directory is possible.
fn in_memory(path: &Path) -> Result<File> {
    let name = path.file_name().unwrap_or_default().as_bytes();
    let name = CString::new(&name[..name.len().min(200)]).unwrap_or_default();
    let made = files::memfd(&name, 0);
    made.map(File::from)
        .map_err(Error::file("make a nameless file for", path))
}

fn create_memfd(memfd: &MemFd) -> Result<File> {
    let name = CString::new(memfd.name.clone()).unwrap_or_default();
    let fd = files::memfd(&name, memfd.create_flags()).map_err(|e| {
        let name = crate::text::of(&memfd.name);
        Error::object(format!("the memfd {name}"), "created", e.desc())
    })?;
    let file = File::from(fd);
    let _ = file.set_permissions(PermissionsExt::from_mode(memfd.mode));
    Ok(file)
}

fn seal(file: &File, memfd: &MemFd) -> Result<()> {
    if memfd.seals & !(libc::F_SEAL_SEAL as u32) == 0 {
        return Ok(());
    }
    files::add_seals(file, memfd.seals).map_err(|e| {
        let name = crate::text::of(&memfd.name);
        Error::object(format!("the memfd {name}"), "sealed", e.desc())
    })
}

/// Another description of the same file, with that access mode.
fn reopen(file: &File, flags: u32) -> Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let access = flags as i32 & libc::O_ACCMODE;
    // Of these, O_SYNC (which includes O_DSYNC) can only be set by open(2).
    let kept = libc::O_APPEND | libc::O_NONBLOCK | libc::O_DIRECT | libc::O_SYNC | libc::O_NOATIME;
    let status = flags as i32 & (kept | libc::O_PATH);
    OpenOptions::new()
        .read(access != libc::O_WRONLY)
        .write(access != libc::O_RDONLY)
        .custom_flags(status)
        .open(&path)
        .map_err(Error::file("open", path))
}

fn seek(file: &File, offset: u64) -> Result<()> {
    use std::io::{Seek, SeekFrom};
    let mut file = file;
    file.seek(SeekFrom::Start(offset))
        .map(drop)
        .map_err(Error::file("seek in", "a memfd"))
}
