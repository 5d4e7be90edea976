//! The open file descriptions of a job, and their numbers in each process.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};

use ckpt_tracer::kcmp::{KcmpType, kcmp, same_description};
use ckpt_tracer::proc::fdinfo::{self, FdInfo};
use ckpt_tracer::proc::fdlink::{self, FdLink};
use ckpt_tracer::{Error, Pid, Result};
use nix::errno::Errno;

use super::Owner;
use super::lock::{Lock, LockKind};
use crate::error::Obstacle;
use crate::sockets;
use crate::source::{Copies, Source};
use crate::text::Shown;

/// All descriptors of a job.
pub struct Survey {
    /// One for each open file description, in the order in which they are found.
    pub looks: Vec<Look>,
    /// The descriptors of each process, ascending.
    pub seen: Vec<Vec<Seen>>,
}

/// A descriptor of a process.
pub struct Seen {
    /// Its number.
    pub fd: i32,
    /// Index of its description in [`Survey::looks`].
    pub look: usize,
    /// `FD_CLOEXEC`.
    pub close_on_exec: bool,
    /// POSIX locks of this process on the file; they belong to the process, not to the description.
    pub locks: Vec<Lock>,
}

/// An open file description as seen from outside, through the first descriptor found.
pub struct Look {
    /// Index of the process.
    pub process: usize,
    /// The descriptor's number there.
    pub fd: i32,
    /// The target of its link.
    pub link: FdLink,
    /// Its fdinfo.
    pub info: FdInfo,
    /// Our duplicate of it.
    pub copy: OwnedFd,
    /// `fstat` of it.
    pub stat: libc::stat,
}

/// Necessary for two descriptors to share a description: equal device, inode, flags and offset. The kernel is queried
/// only among those.
type Alike = (u64, u64, u32, u64);

impl Survey {
    /// Reads every descriptor of every process.
    ///
    /// # Errors
    /// [`Error::Kernel`] of pidfd_getfd(2) or kcmp(2), above all EPERM; [`Error::Proc`]. A refusal if it is unknown
    /// which descriptors share a description.
    pub fn of(sources: &[&Source], copies: &Copies) -> crate::Result<Self> {
        let mut survey = Self {
            looks: Vec::new(),
            seen: Vec::with_capacity(sources.len()),
        };
        // Candidates for sharing, sorted by the kernel's order of descriptions.
        let mut alike: HashMap<Alike, Vec<usize>> = HashMap::new();
        for (process, source) in sources.iter().enumerate() {
            let mut seen = Vec::new();
            for fd in fdlink::list_fds(source.dir.clone())? {
                match Look::by(copies, source, process, fd) {
                    Ok(look) => seen.push(survey.enter(look, copies, sources, &mut alike)?),
                    // Closed meanwhile, by a running process (`ckpt check`).
                    Err(Error::Kernel {
                        errno: Errno::EBADF,
                        ..
                    }) => {}
                    Err(Error::Proc { source: e, .. })
                        if e.kind() == std::io::ErrorKind::NotFound => {}
                    Err(e) => return Err(e.into()),
                }
            }
            survey.seen.push(seen);
        }
        Ok(survey)
    }

    /// The numbers of each description.
    pub fn numbers(&self) -> Vec<Vec<i32>> {
        let mut all = vec![Vec::new(); self.looks.len()];
        for seen in self.seen.iter().flatten() {
            all[seen.look].push(seen.fd);
        }
        all
    }

    fn enter(
        &mut self,
        mut look: Look,
        copies: &Copies,
        sources: &[&Source],
        alike: &mut HashMap<Alike, Vec<usize>>,
    ) -> crate::Result<Seen> {
        let (posix, others) = std::mem::take(&mut look.info.locks)
            .into_iter()
            .partition(|l| l.kind == "POSIX");
        look.info.locks = others;
        let locks: Vec<fdinfo::LockLine> = posix;
        let mut seen = Seen {
            fd: look.fd,
            look: self.looks.len(),
            close_on_exec: look.info.cloexec,
            locks: locks
                .iter()
                .map(|lock| Lock::of(LockKind::Posix, lock))
                .collect(),
        };
        let key = (
            look.stat.st_dev,
            look.stat.st_ino,
            look.info.flags,
            look.info.pos,
        );
        let candidates = alike.entry(key).or_default();
        let (mut low, mut high) = match copies {
            Copies::Taken => (0, candidates.len()),
            // For an inspection each counts as separate.
            Copies::None => (0, 0),
            Copies::Lent(_) => {
                for &candidate in candidates.iter() {
                    let other = &self.looks[candidate];
                    if same(&look, other).ok_or_else(|| untold(&look, other, sources))? {
                        seen.look = candidate;
                        return Ok(seen);
                    }
                }
                (0, 0)
            }
        };
        // By our duplicates: a running process (`ckpt check`) may have closed its descriptors since.
        let me = Pid::own().leader();
        while low < high {
            let middle = low + (high - low) / 2;
            let other = &self.looks[candidates[middle]];
            let both = KcmpType::File(look.copy.as_raw_fd(), other.copy.as_raw_fd());
            match kcmp(me, me, both) {
                Ok(Ordering::Equal) => {
                    seen.look = candidates[middle];
                    return Ok(seen);
                }
                Ok(Ordering::Less) => high = middle,
                Ok(Ordering::Greater) => low = middle + 1,
                Err(e) => return Err(e.into()),
            }
        }
        candidates.insert(low, self.looks.len());
        self.looks.push(look);
        Ok(seen)
    }
}

fn same(look: &Look, other: &Look) -> Option<bool> {
    same_description(look.copy.as_raw_fd(), other.copy.as_raw_fd())
}

fn untold(look: &Look, other: &Look, sources: &[&Source]) -> crate::Error {
    crate::Error::refuse(Obstacle::new(
        look.object(sources[look.process]),
        format!(
            "may be a duplicate of fd {} of process {} or may have been opened separately: kcmp(2), which \
             tells, is not permitted, and Linux is older than 6.10",
            other.fd, sources[other.process].pid
        ),
        WITHHELD_REMEDY,
    ))
}

/// How to permit kcmp(2) and pidfd_getfd(2) in a container.
pub const WITHHELD_REMEDY: &str =
    "start the container with --cap-add SYS_PTRACE, or run ckpt as root outside of its filters";

impl Look {
    /// Reads a descriptor by the duplicate, if there is one.
    fn by(copies: &Copies, source: &Source, process: usize, fd: i32) -> Result<Self> {
        match copies {
            Copies::Taken => Self::at(source, process, fd),
            Copies::None => {
                let copy = source.dir.join("fd").join(fd.to_string());
                let copy = ckpt_sys::files::handle(&copy).map_err(|e| Error::Proc {
                    path: copy,
                    source: e.into(),
                })?;
                Self::with(copy, source, process, fd)
            }
            Copies::Lent(all) => {
                let copy = all.get(&(source.pid, fd)).map(OwnedFd::try_clone);
                let gone = || std::io::Error::from_raw_os_error(libc::EBADF);
                let copy = copy.unwrap_or_else(|| Err(gone()));
                let copy = copy.map_err(|e| Error::Kernel {
                    call: "recvmsg",
                    object: format!("fd {fd} of process {}", source.pid),
                    errno: Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)),
                })?;
                Self::with(copy, source, process, fd)
            }
        }
    }

    pub(super) fn at(source: &Source, process: usize, fd: i32) -> Result<Self> {
        Self::with(source.pidfd.get_fd(fd)?, source, process, fd)
    }

    pub(super) fn with(copy: OwnedFd, source: &Source, process: usize, fd: i32) -> Result<Self> {
        let stat = match ckpt_sys::files::fstat(&copy) {
            // Only for `/proc/PID/fd` of a process that has ended, whose descriptors it counts.
            Err(Errno::ENOENT) => ckpt_sys::files::unknown_directory(),
            other => other.map_err(|errno| Error::Kernel {
                call: "fstat",
                object: format!("fd {fd} of process {}", source.pid),
                errno,
            })?,
        };
        let link = fdlink::read_fd_link(source.dir.clone(), fd)?;
        if matches!(&link, FdLink::AnonInode(name) if name == "timerfd") {
            ckpt_sys::events::count_expirations(&copy);
        }
        Ok(Self {
            process,
            fd,
            link,
            info: fdinfo::read_fdinfo(source.dir.clone(), fd)?,
            copy,
            stat,
        })
    }

    /// The text of its link.
    pub fn name(&self) -> String {
        match &self.link {
            FdLink::File {
                path,
                deleted: false,
            } => path.shown(),
            FdLink::File {
                path,
                deleted: true,
            } => format!("{} (deleted)", path.shown()),
            FdLink::Pipe(inode) => format!("pipe:[{inode}]"),
            FdLink::Socket(inode) => format!("socket:[{inode}]"),
            FdLink::AnonInode(name) => format!("anon_inode:[{name}]"),
            FdLink::Memfd(name) => format!("/memfd:{}", crate::text::of(name)),
            FdLink::PidFd => "a pidfd".into(),
            FdLink::Namespace(kind, inode) => format!("{kind}:[{inode}]"),
            FdLink::Other(name) => crate::text::of(name),
        }
    }

    /// Its description in messages: for an internet socket the addresses, otherwise the link.
    pub fn told(&self) -> String {
        let addresses = match self.link {
            FdLink::Socket(_) => sockets::inet::describe(&self.copy),
            _ => None,
        };
        addresses.unwrap_or_else(|| self.name())
    }

    /// `fd 3 of process 12 (name)`, for messages.
    pub fn object(&self, source: &Source) -> String {
        format!("fd {} of {}", self.fd, source.title())
    }

    /// Access mode: `O_RDONLY`, `O_WRONLY` or `O_RDWR`.
    pub fn access(&self) -> i32 {
        self.info.flags as i32 & libc::O_ACCMODE
    }

    /// `O_PATH`.
    pub(crate) fn is_path(&self) -> bool {
        self.info.flags as i32 & libc::O_PATH != 0
    }

    pub(crate) fn file_type(&self) -> u32 {
        self.stat.st_mode & libc::S_IFMT
    }

    /// See [`Description::made_by`](super::Description).
    pub(super) fn made_by(&self) -> Option<(u32, u32)> {
        let kinds = [libc::S_IFIFO, libc::S_IFSOCK];
        let nameless = kinds.contains(&self.file_type()) && !self.is_path();
        nameless.then_some((self.stat.st_uid, self.stat.st_gid))
    }

    pub(super) fn owner(&self) -> Option<Owner> {
        if self.info.flags as i32 & libc::O_PATH != 0 {
            return None;
        }
        let (kind, id) = ckpt_sys::files::owner(&self.copy)?;
        let signal = ckpt_sys::files::owner_signal(&self.copy);
        (id != 0 || signal != 0).then_some(Owner { kind, id, signal })
    }
}
