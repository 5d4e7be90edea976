//! Pipes with both ends inside the job.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::{Kind, Look, Staging, outside, sys};
use crate::capture::source::Source;
use crate::error::Obstacle;
use crate::objects::Snapshot;
use crate::restore::Request;
use crate::restore::plan::Builder;

/// One end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PipeEnd {
    /// Inode number; the ends of one pipe share it.
    pub inode: u64,
    /// `F_GETPIPE_SZ`, bytes.
    pub capacity: u32,
    /// What was written and not yet read, one entry a packet for `O_DIRECT` pipes; held by
    /// the first end of the pipe in the snapshot.
    pub unread: Vec<ByteBuf>,
}

/// Which ends of which pipes and FIFOs the job holds.
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

    /// Whether the job holds a read end of it.
    pub fn has_reader(&self, look: &Look) -> bool {
        self.of_pipe(look).0
    }

    /// Whether the job holds a write end of it.
    pub fn has_writer(&self, look: &Look) -> bool {
        self.of_pipe(look).1
    }

    /// Whether nobody outside the job can be at the other end: the job holds both, or nobody
    /// holds the other one.
    pub fn inside(&self, look: &Look) -> bool {
        match self.of_pipe(look) {
            (true, true) => true,
            (true, false) => !has_writer(look),
            (false, true) => sys::poll_now(&look.copy, libc::POLLOUT) & libc::POLLERR != 0,
            (false, false) => false,
        }
    }
}

/// Whether anybody can write into what this read end reads. poll(2) tells when they have all
/// gone, but not, for a FIFO, when none has ever come; tee(2) from an empty one then answers that
/// there is nothing to wait for (`ipipe_prep`, fs/splice.c).
fn has_writer(look: &Look) -> bool {
    if sys::poll_now(&look.copy, libc::POLLIN) & libc::POLLHUP != 0 {
        return false;
    }
    let empty = sys::unread(&look.copy) == 0;
    let none = || {
        let (_read, write) = sys::pipe(4096)?;
        sys::tee(&look.copy, &write, 1)
    };
    !(empty && none() == Ok(0))
}

/// Captures one end; what is in the pipe is copied without being consumed.
pub fn capture(
    source: &Source,
    look: &Look,
    ends: &Ends,
    frozen: bool,
) -> Result<Kind, Box<Obstacle>> {
    if !ends.inside(look) {
        return Ok(outside::capture(look, outside::Surroundings::Pipe));
    }
    let capacity = sys::fcntl(&look.copy, libc::F_GETPIPE_SZ).unwrap_or(65536);
    let mut unread = Vec::new();
    if frozen && look.access() != libc::O_WRONLY {
        unread = contents(look, capacity).map_err(|errno| {
            Box::new(Obstacle::without_remedy(
                look.object(source),
                format!(
                    "is a pipe whose contents cannot be copied: {}",
                    errno.desc()
                ),
            ))
        })?;
    }
    Ok(Kind::Pipe(PipeEnd {
        inode: look.stat.st_ino,
        capacity: capacity as u32,
        unread,
    }))
}

/// What is in a pipe, copied without being consumed.
pub fn contents(look: &Look, capacity: i32) -> Result<Vec<ByteBuf>, Errno> {
    let unread = sys::unread(&look.copy);
    if unread == 0 {
        return Ok(Vec::new());
    }
    let (read, write) = sys::pipe(capacity)?;
    let mut left = sys::tee(&look.copy, &write, unread)?;
    if left < unread {
        return Err(Errno::EAGAIN);
    }
    let mut read = File::from(read);
    let mut pieces = Vec::new();
    let mut buffer = vec![0; 65536];
    while left > 0 {
        // From a pipe in packet mode a read takes one packet.
        let n = read.read(&mut buffer).map_err(|_| Errno::EIO)?;
        pieces.push(ByteBuf::from(&buffer[..n]));
        left = left.saturating_sub(n.max(1));
    }
    Ok(pieces)
}

/// Makes the pipe when the first of its ends comes, and opens the others anew through
/// `/proc/self/fd`, since each end is an open file description of its own.
pub fn rebuild(
    end: &PipeEnd,
    index: usize,
    snapshot: &Snapshot,
    request: &Request<'_>,
    staging: Staging,
    plan: &mut Builder,
) {
    let object = || format!("pipe:[{}]", end.inode);
    let ends: Vec<(usize, u32, &PipeEnd)> = snapshot
        .descriptions
        .iter()
        .enumerate()
        .filter_map(|(i, d)| match &d.kind {
            Kind::Pipe(p) if p.inode == end.inode => Some((i, d.flags, p)),
            _ => None,
        })
        .filter(|(i, ..)| super::named(*i, snapshot, request).is_none())
        .collect();
    if ends.first().map(|(i, ..)| *i) != Some(index) {
        return;
    }
    // O_DIRECT is packet mode, a property of the write end.
    let packets = ends
        .iter()
        .any(|(_, flags, _)| flags & libc::O_DIRECT as u32 != 0);
    let out = plan.reserve(8);
    let direct = if packets { libc::O_DIRECT } else { 0 };
    plan.expect(libc::SYS_pipe2, &[out, direct as u64], 0, object);
    if end.capacity != 65536 {
        let args = [1, libc::F_SETPIPE_SZ as u64, end.capacity.into()];
        plan.syscall(libc::SYS_fcntl, &args, object);
    }
    for piece in ends
        .iter()
        .flat_map(|(_, _, p)| &p.unread)
        .take_while(|p| !p.is_empty())
    {
        let data = plan.data(piece);
        let len = piece.len() as u64;
        plan.expect(libc::SYS_write, &[1, data, len], len, object);
    }
    let mut used = [false; 2];
    for (i, flags, _) in &ends {
        let access = *flags as i32 & libc::O_ACCMODE;
        let slot = access as usize;
        let at = staging.of(*i);
        if slot < 2 && !used[slot] {
            used[slot] = true;
            let args = [slot as u64, at as u64, 0];
            plan.expect(libc::SYS_dup3, &args, at as u64, object);
            continue;
        }
        let path = plan.path(Path::new("/proc/self/fd/0"));
        let flags = *flags & (libc::O_ACCMODE | libc::O_NONBLOCK) as u32;
        let flags = flags | libc::O_CLOEXEC as u32;
        plan.expect(
            libc::SYS_openat,
            &[libc::AT_FDCWD as u64, path, flags.into(), 0],
            2,
            object,
        );
        super::place(2, at, plan, object);
    }
    plan.syscall(libc::SYS_close, &[0], object);
    plan.syscall(libc::SYS_close, &[1], object);
}
