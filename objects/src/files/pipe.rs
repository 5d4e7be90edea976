//! Pipes with both ends inside the job.

use std::collections::HashMap;
use std::path::Path;

use ckpt_tracer::capabilities::Use;
use ckpt_tracer::proc::fdlink::FdLink;
use serde::{Deserialize, Serialize};

use super::kind::{Captured, OpenFile, Place, Sight};
use super::pieces::{self, Piece};
use super::{Kind, Look, outside};
use crate::Snapshot;
use crate::error::Obstacle;
use crate::index::DescriptionId;
use crate::plan::Builder;
use crate::references::Faults;
use crate::source::{Collector, Source};

/// One end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PipeEnd {
    /// Inode number; the ends of one pipe share it.
    pub inode: u64,
    /// `F_GETPIPE_SZ`, bytes.
    pub capacity: u32,
    /// Unread data, the same for every read end.
    pub unread: Vec<Piece>,
}

/// The ends of pipes and FIFOs that the job holds.
pub struct Ends {
    /// By device and inode: whether there is a read end, and a write end.
    ends: HashMap<(u64, u64), (bool, bool)>,
}

impl Ends {
    /// From all descriptors of the job.
    pub fn of(looks: &[Look]) -> Self {
        let mut ends: HashMap<(u64, u64), (bool, bool)> = HashMap::new();
        let is_pipe = |look: &&Look| {
            look.stat.st_mode & libc::S_IFMT == libc::S_IFIFO
                && look.info.flags as i32 & libc::O_PATH == 0
        };
        for look in looks.iter().filter(is_pipe) {
            let key = (look.stat.st_dev, look.stat.st_ino);
            let (read, write) = ends.entry(key).or_default();
            *read |= look.access() != libc::O_WRONLY;
            *write |= look.access() != libc::O_RDONLY;
        }
        Self { ends }
    }

    fn of_pipe(&self, look: &Look) -> (bool, bool) {
        let key = (look.stat.st_dev, look.stat.st_ino);
        self.ends.get(&key).copied().unwrap_or_default()
    }

    /// Whether the job holds a read end.
    pub fn has_reader(&self, look: &Look) -> bool {
        self.of_pipe(look).0
    }

    /// Whether the job holds a write end.
    pub fn has_writer(&self, look: &Look) -> bool {
        self.of_pipe(look).1
    }

    /// Whether no process outside the job can have the other end: the job holds both ends, or no process holds the
    /// other one.
    pub fn inside(&self, look: &Look) -> bool {
        match self.of_pipe(look) {
            (true, true) => true,
            (true, false) => !has_writer(look),
            (false, true) => {
                ckpt_sys::events::poll_now(&look.copy, libc::POLLOUT) & libc::POLLERR != 0
            }
            (false, false) => false,
        }
    }
}

/// Whether the pipe of this read end has a writer. poll(2) reports that all have gone, but not, for a FIFO, that
/// there has been none; tee(2) from an empty one then reports end of file (`ipipe_prep`, fs/splice.c).
fn has_writer(look: &Look) -> bool {
    if ckpt_sys::events::poll_now(&look.copy, libc::POLLIN) & libc::POLLHUP != 0 {
        return false;
    }
    let empty = ckpt_sys::files::unread(&look.copy) == 0;
    let none = || {
        let (_read, write) = ckpt_sys::pipes::pipe_of(4096)?;
        ckpt_sys::pipes::tee(&look.copy, &write, 1)
    };
    !(empty && none() == Ok(0))
}

/// Bytes of room. While the job runs it is not asked for: a thread that waits in splice(2) holds the pipe's lock.
pub(super) fn capacity(look: &Look, frozen: bool) -> i32 {
    let asked = frozen.then(|| ckpt_sys::pipes::capacity(&look.copy));
    asked.flatten().unwrap_or(65536) as i32
}

/// Captures one end; the contents are copied without being consumed.
fn capture(source: &Source, look: &Look, ends: &Ends, frozen: bool) -> Result<Kind, Box<Obstacle>> {
    if !ends.inside(look) {
        return Ok(outside::capture(look, outside::Surroundings::Pipe));
    }
    let capacity = capacity(look, frozen);
    let mut unread = Vec::new();
    if frozen && look.access() != libc::O_WRONLY {
        unread = pieces::capture(look, capacity).map_err(|trouble| {
            Box::new(Obstacle::new(
                look.object(source),
                format!("is a pipe {}", trouble.reason()),
                "let the program read from it first",
            ))
        })?;
    }
    Ok(Kind::from(PipeEnd {
        inode: look.stat.st_ino,
        capacity: capacity as u32,
        unread,
    }))
}

impl OpenFile for PipeEnd {
    fn capture(sight: &Sight, collector: &mut Collector) -> Captured {
        match sight.look.link {
            FdLink::Pipe(_) => Some(capture(
                sight.source,
                sight.look,
                sight.pipes,
                collector.frozen(),
            )),
            _ => None,
        }
    }

    fn class(&self) -> &'static str {
        "pipe"
    }

    fn label(&self) -> String {
        format!("pipe:[{}]", self.inode)
    }

    fn check(&self, number: DescriptionId, _: &Snapshot, faults: &mut Faults) {
        pieces::check(number, &self.unread, self.capacity, faults);
    }

    fn each_inode(&mut self, f: &mut dyn FnMut(&mut u64)) {
        f(&mut self.inode);
    }

    fn shows_maker(&self) -> bool {
        true
    }

    fn open(&self, place: &Place, plan: &mut Builder) -> Result<(), Vec<Obstacle>> {
        rebuild(self, place, plan);
        Ok(())
    }
}

/// Creates the pipe at the first of its ends, and opens the others anew through `/proc/self/fd`, since each end is an
/// open file description of its own.
fn rebuild(end: &PipeEnd, place: &Place, plan: &mut Builder) {
    let Place {
        snapshot, staging, ..
    } = *place;
    let object = || format!("pipe:[{}]", end.inode);
    let ends: Vec<(DescriptionId, u32, &PipeEnd)> = DescriptionId::each(&snapshot.descriptions)
        .filter_map(|(i, d)| Some((i, d.flags, d.kind.get::<PipeEnd>()?)))
        .filter(|(i, _, other)| {
            other.inode == end.inode && super::named(*i, snapshot, place.options).is_none()
        })
        .collect();
    if ends.first().map(|(i, ..)| *i) != Some(place.index) {
        return;
    }
    let out = plan.reserve(8);
    plan.expect(libc::SYS_pipe2, &[out, 0], 0, object);
    let unread = ends.iter().map(|(.., p)| &p.unread).find(|u| !u.is_empty());
    fill(end.capacity, unread, plan, object);
    let mut used = [false; 2];
    for (i, flags, _) in &ends {
        let access = *flags as i32 & libc::O_ACCMODE;
        let slot = access as usize;
        let at = staging.of(*i);
        if slot < 2 && !used[slot] {
            used[slot] = true;
            let args = [slot as u64, at as u64, 0];
            plan.expect(libc::SYS_dup3, &args, at as u64, object);
        } else {
            let path = plan.path(Path::new("/proc/self/fd/0"));
            let how = (access | libc::O_CLOEXEC) as u64;
            let args = [libc::AT_FDCWD as u64, path, how, 0];
            plan.expect(libc::SYS_openat, &args, 2, object);
            super::place(2, at, plan, object);
        }
        // O_DIRECT, packet mode, belongs to each write end.
        let status = flags & (libc::O_DIRECT | libc::O_NONBLOCK) as u32;
        if status != 0 {
            let args = [at as u64, libc::F_SETFL as u64, status.into()];
            plan.syscall(libc::SYS_fcntl, &args, object);
        }
    }
    plan.syscall(libc::SYS_close, &[0], object);
    plan.syscall(libc::SYS_close, &[1], object);
}

/// Sets capacity and contents of a pipe whose write end is descriptor 1.
pub(super) fn fill(
    capacity: u32,
    unread: Option<&Vec<Piece>>,
    plan: &mut Builder,
    object: impl Fn() -> String,
) {
    /// The default (`PIPE_DEF_BUFFERS`, linux/pipe_fs_i.h).
    const USUAL: u32 = 16 * 4096;
    if capacity != USUAL {
        let args = [1, libc::F_SETPIPE_SZ as u64, capacity.into()];
        let capacity = || {
            let (of, takes) = (object(), Use::LargePipe);
            format!("the capacity of {of}, which needs {takes} above fs.pipe-max-size")
        };
        plan.syscall(libc::SYS_fcntl, &args, capacity);
    }
    if let Some(unread) = unread {
        pieces::rebuild(unread, 1, plan, &object);
    }
}
