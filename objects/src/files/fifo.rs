//! FIFOs, fifo(7): pipes with a name, which may have been removed.
//!
//! A FIFO is opened by its name again, so that later openers share it with the job. One whose name was removed is
//! created under a name, which is removed again. If a process outside the job holds the other end, it is [`outside`].

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use ckpt_tracer::proc::fdlink::FdLink;
use nix::sys::stat::Mode;
use nix::unistd::{AccessFlags, mkfifo};

use serde::{Deserialize, Serialize};

use super::kind::{Captured, OpenFile, Opened, Place, Sight, Substitutes};
use super::pieces::{self, Piece};
use super::rebuild::set_status;
use super::{Description, Kind, Look, outside, pipe, regular};
use crate::Snapshot;
use crate::access::may;
use crate::bounds;
use crate::error::{Error, Obstacle};
use crate::index::DescriptionId;
use crate::need::Need;
use crate::open::{Handle, Last};
use crate::plan::{Builder, Inherited};
use crate::references::Faults;
use crate::rights::{self, Rights};
use crate::source::{Collector, Source};
use crate::text::Shown;

/// One open file description of a FIFO: a read end, a write end, or both in one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FifoEnd {
    /// Its name, possibly removed.
    #[serde(with = "crate::raw_path")]
    pub path: PathBuf,
    /// Its name was removed.
    pub deleted: bool,
    /// Device of the file system, major and minor.
    pub device: (u32, u32),
    /// Inode number; the ends of one FIFO share it and the device.
    pub inode: u64,
    /// Permission bits.
    #[serde(deserialize_with = "bounds::mode")]
    pub mode: u32,
    /// `F_GETPIPE_SZ`, bytes.
    pub capacity: u32,
    /// Unread data; empty for write ends.
    pub unread: Vec<Piece>,
    /// A read end opened with `O_NONBLOCK` that has not had a writer yet: poll(2) does not report POLLHUP
    /// (`fifo_open`, fs/pipe.c).
    pub awaits_writer: bool,
}

/// Captures one end; the contents are copied without being consumed.
fn capture(
    source: &Source,
    look: &Look,
    path: &Path,
    deleted: bool,
    ends: &pipe::Ends,
    frozen: bool,
) -> Result<Kind, Box<Obstacle>> {
    if !ends.inside(look) {
        return Ok(outside::capture(look, outside::Surroundings::Pipe));
    }
    let refuse = |reason: String| Box::new(Obstacle::without_remedy(look.object(source), reason));
    let (mut path, mut nameless) = (path.to_owned(), deleted);
    if deleted {
        let copy = look.copy.try_clone();
        let copy = File::from(copy.map_err(|e| refuse(format!("cannot be copied: {e}")))?);
        if let Some(name) = regular::other_name(&copy, &path) {
            (path, nameless) = (name, false);
        }
    }
    let capacity = pipe::capacity(look, frozen);
    let reads = look.access() != libc::O_WRONLY;
    let mut unread = Vec::new();
    if reads && frozen {
        unread = pieces::capture(look, capacity).map_err(|trouble| {
            Box::new(Obstacle::new(
                look.object(source),
                format!("is a FIFO {}", trouble.reason()),
                "let the program read from it first",
            ))
        })?;
    } else if !reads && !ends.has_reader(look) && ckpt_sys::files::unread(&look.copy) > 0 {
        let name = path.shown();
        return Err(Box::new(Obstacle::new(
            look.object(source),
            format!("is a FIFO ({name}) with data that no process has open for reading"),
            "read it, or close the FIFO",
        )));
    }
    let hung_up = || ckpt_sys::events::poll_now(&look.copy, libc::POLLIN) & libc::POLLHUP != 0;
    Ok(Kind::from(FifoEnd {
        path,
        deleted: nameless,
        device: (libc::major(look.stat.st_dev), libc::minor(look.stat.st_dev)),
        inode: look.stat.st_ino,
        mode: look.stat.st_mode & 0o7777,
        capacity: capacity as u32,
        unread,
        awaits_writer: reads && !ends.has_writer(look) && !hung_up(),
    }))
}

impl OpenFile for FifoEnd {
    fn capture(sight: &Sight, collector: &mut Collector) -> Captured {
        let FdLink::File { path, deleted } = &sight.look.link else {
            return None;
        };
        (sight.look.file_type() == libc::S_IFIFO).then(|| {
            let frozen = collector.frozen();
            capture(
                sight.source,
                sight.look,
                path,
                *deleted,
                sight.pipes,
                frozen,
            )
        })
    }

    fn class(&self) -> &'static str {
        "fifo"
    }

    fn label(&self) -> String {
        self.path.shown()
    }

    fn needs(&self, _: u32, _: &Snapshot) -> Vec<Need> {
        let by_name = (!self.deleted).then(|| Need::new("FIFO", self.path.shown(), "by its name"));
        by_name.into_iter().collect()
    }

    fn check(&self, number: DescriptionId, _: &Snapshot, faults: &mut Faults) {
        pieces::check(number, &self.unread, self.capacity, faults);
    }

    fn each_path(&mut self, f: &mut dyn FnMut(&mut PathBuf)) {
        f(&mut self.path);
    }

    fn each_inode(&mut self, f: &mut dyn FnMut(&mut u64)) {
        f(&mut self.inode);
    }

    fn make_comparable(&mut self, _: &mut u32) {
        self.device = (0, 0);
    }

    fn substitute(&mut self, _: &mut u32, by: &mut dyn Substitutes) -> Result<(), Error> {
        match self.deleted {
            true => by.parent(&self.path),
            false => by.fifo(&self.path, self.mode),
        }
    }

    fn opened(&self) -> Opened {
        Opened::WithNoAtime
    }

    fn open(&self, place: &Place, plan: &mut Builder) -> Result<(), Vec<Obstacle>> {
        rebuild(self, place, plan).map_err(|obstacle| vec![*obstacle])
    }
}

/// Opens all ends of a FIFO, at the first of them.
///
/// One end for both directions is open meanwhile: it keeps other opens from waiting, and unread data is written
/// through it.
fn rebuild(end: &FifoEnd, place: &Place, plan: &mut Builder) -> Result<(), Box<Obstacle>> {
    let Place {
        index,
        snapshot,
        staging,
        ..
    } = *place;
    let all = DescriptionId::each(&snapshot.descriptions);
    let ends: Vec<(DescriptionId, &Description, &FifoEnd)> = all
        .filter_map(|(i, d)| Some((i, d, d.kind.get::<FifoEnd>()?)))
        .filter(|(i, _, other)| {
            (other.device, other.inode) == (end.device, end.inode)
                && super::named(*i, snapshot, place.options).is_none()
        })
        .collect();
    if ends.first().map(|(i, ..)| *i) != Some(index) {
        return Ok(());
    }
    let object = || end.object();
    if !end.deleted {
        end.find(plan.host().rights.as_ref())?;
    }
    // A read end keeps the FIFO and its contents.
    let first = staging.of(index);
    plan.inherit(first, Inherited::Fifo(index));
    plan.expect(libc::SYS_dup3, &[first as u64, 0, 0], 0, object);
    let access = (libc::O_RDWR | libc::O_CLOEXEC) as u64;
    let again = plan.path(Path::new("/proc/self/fd/0"));
    let cwd = libc::AT_FDCWD as u64;
    plan.expect(libc::SYS_openat, &[cwd, again, access], 1, object);
    let unread = ends.iter().map(|(.., f)| &f.unread).find(|u| !u.is_empty());
    pipe::fill(end.capacity, unread, plan, object);
    let open =
        |at: u64, (i, d, _): &(DescriptionId, &Description, &FifoEnd), plan: &mut Builder| {
            let access = d.flags as i32 & libc::O_ACCMODE | libc::O_NONBLOCK | libc::O_CLOEXEC;
            plan.expect(libc::SYS_openat, &[cwd, again, access as u64], at, object);
            let settable = d.flags & (libc::O_NONBLOCK | libc::O_APPEND) as u32;
            set_status(at as i32, d.flags, settable, plan, object);
            super::place(at as i32, staging.of(*i), plan, object);
        };
    for end in ends.iter().filter(|(.., f)| !f.awaits_writer) {
        open(2, end, plan);
    }
    plan.syscall(libc::SYS_close, &[1], object);
    for end in ends.iter().filter(|(.., f)| f.awaits_writer) {
        open(1, end, plan);
    }
    plan.syscall(libc::SYS_close, &[0], object);
    Ok(())
}

impl FifoEnd {
    /// For messages.
    pub fn object(&self) -> String {
        format!("the FIFO {}", self.path.shown())
    }

    /// Opens a read end, by its name or by a temporary one.
    ///
    /// # Errors
    /// When it does not exist, or cannot be created again.
    pub fn read_end(&self, rights: Option<&Rights>) -> Result<File, Error> {
        let (path, opened) = match self.deleted {
            false => {
                let found = self.find(rights).map_err(|o| Error::refuse(*o))?;
                (self.path.clone(), rights::with(rights, || found.read()))
            }
            true => rights::with(rights, || {
                let path = self.free_name();
                let made = self.make(&path);
                (path, made)
            }),
        };
        opened.map_err(Error::file("open the FIFO", path))
    }

    fn make(&self, path: &Path) -> io::Result<File> {
        mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR)?;
        let made = Handle::of(path, Last::IsIt);
        let removed = std::fs::remove_file(path);
        let made = made?;
        removed?;
        if !made.meta().file_type().is_fifo() {
            return Err(io::Error::other("another file has its name by now"));
        }
        let file = made.read()?;
        file.set_permissions(PermissionsExt::from_mode(self.mode))?;
        Ok(file)
    }

    fn find(&self, rights: Option<&Rights>) -> Result<Handle, Box<Obstacle>> {
        rights::with(rights, || {
            let reason = match Handle::of(&self.path, Last::IsIt) {
                Ok(found) if found.meta().file_type().is_fifo() => {
                    // Both ends are open meanwhile.
                    return match rights::may_open(None, &found.link(), libc::O_RDWR) {
                        Ok(()) => Ok(found),
                        Err(errno) => Err(Box::new(Obstacle::new(
                            self.object(),
                            format!(
                                "cannot be opened for reading and writing by the job's user: {}",
                                errno.desc()
                            ),
                            "give that user both permissions (chmod)",
                        ))),
                    };
                }
                Ok(_) => "is something else by now".to_owned(),
                Err(e) => format!("cannot be opened: {e}"),
            };
            let remedy = format!("make it again with: mkfifo {}", self.path.shown());
            Err(Box::new(Obstacle::new(self.object(), reason, remedy)))
        })
    }

    /// A temporary name for the FIFO: its own if that is free.
    fn free_name(&self) -> PathBuf {
        let name = self.path.file_name().unwrap_or_default();
        let pid = std::process::id();
        let mut other = std::ffi::OsString::from(format!(".ckpt.{pid}.{}.", self.inode));
        other.push(name);
        let temp = std::env::temp_dir();
        let places = [self.path.parent().unwrap_or(Path::new("/")), &temp];
        let writable = AccessFlags::W_OK | AccessFlags::X_OK;
        let usable = places
            .into_iter()
            .find(|place| may(place, writable).is_ok());
        let place = usable.unwrap_or(Path::new("/var/tmp"));
        let own = place.join(name);
        if own.symlink_metadata().is_err() {
            own
        } else {
            place.join(other)
        }
    }
}
