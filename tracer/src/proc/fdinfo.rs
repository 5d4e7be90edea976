//! Open file descriptions: `/proc/PID/fdinfo/N`, see proc_pid_fdinfo(5).

use super::ProcDir;
pub use super::fdlink::{FdLink, list_fds, read_fd_link};
use super::parse::{dec, device, fields, hex, kernel_device, key_value, lines, oct};
use crate::{Pid, Result};

/// One descriptor. Position, flags and details belong to the open file description, which may be shared;
/// close-on-exec belongs to the descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FdInfo {
    /// Position in bytes; a negative one (`/proc/PID/mem`) in two's complement.
    pub pos: u64,
    /// `O_*` without `O_CLOEXEC`; `O_LARGEFILE` (0100000) shows where the opener set it.
    pub flags: u32,
    /// `O_CLOEXEC`.
    pub cloexec: bool,
    /// Mount, see [`super::mounts::MountTable::mount_of`].
    pub mnt_id: i32,
    /// Inode; 0 before Linux 5.14.
    pub ino: u64,
    /// Locks that this open file description holds, and POSIX locks that this process holds through it.
    pub locks: Vec<LockLine>,
    /// Details of its kind.
    pub detail: FdDetail,
}

/// A line `lock:`, in the format of `/proc/locks`, see proc_locks(5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockLine {
    /// `FLOCK`, `POSIX`, `OFDLCK`, `LEASE`, `DELEG`.
    pub kind: String,
    /// `ADVISORY`, or the state of a lease: `ACTIVE`, `BREAKING`, `BREAKER`.
    pub mode: String,
    /// `READ`, `WRITE`, `UNLCK`.
    pub access: String,
    /// The process that took it; -1 for an open file description lock.
    pub pid: i32,
    /// Device of the file.
    pub dev: (u32, u32),
    /// Inode of the file.
    pub ino: u64,
    /// First byte.
    pub start: u64,
    /// Last byte, `None` for the end of the file.
    pub end: Option<u64>,
}

/// Details of a kind of description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FdDetail {
    /// Nothing.
    Plain,
    /// eventfd(2)
    EventFd {
        /// Counter.
        count: u64,
        /// `EFD_SEMAPHORE`, on newer kernels.
        semaphore: Option<bool>,
    },
    /// signalfd(2)
    SignalFd {
        /// Bit N-1 for signal N.
        mask: u64,
    },
    /// timerfd_create(2)
    TimerFd(TimerFd),
    /// epoll(7)
    Epoll {
        /// Its entries.
        targets: Vec<EpollTarget>,
    },
    /// inotify(7)
    Inotify {
        /// Its watches.
        watches: Vec<InotifyWatch>,
    },
    /// fanotify(7)
    Fanotify(FanotifyGroup),
    /// pidfd_open(2)
    PidFd {
        /// The process; -1 when it has been reaped, 0 when outside our pid namespace.
        pid: Pid,
        /// Its pid from our pid namespace inwards.
        nspid: Vec<i32>,
    },
    /// io_uring(7): its lines as they are.
    IoUring(String),
    /// Lines of a kind not named here (userfaultfd, BPF, perf, tun …), as they are.
    Other(String),
}

/// The timer of a timerfd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimerFd {
    /// `CLOCK_*`.
    pub clockid: i32,
    /// Expirations not yet read.
    pub ticks: u64,
    /// `TFD_TIMER_*` of the last timerfd_settime.
    pub settime_flags: u32,
    /// Time until the next expiration, seconds and nanoseconds, relative even for
    /// `TFD_TIMER_ABSTIME`; 0 when disarmed.
    pub value: (u64, u64),
    /// Period, seconds and nanoseconds; 0 for none.
    pub interval: (u64, u64),
}

/// An entry of an epoll set. Its number is that of the watched description when it was added; that number may be
/// closed by now, or refer to another file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EpollTarget {
    /// The number.
    pub tfd: i32,
    /// `EPOLL*`; the kernel adds `EPOLLERR | EPOLLHUP`, and clears all but the private bits once an
    /// `EPOLLONESHOT` has fired.
    pub events: u32,
    /// The user's data.
    pub data: u64,
    /// Position of the watched file.
    pub pos: u64,
    /// Inode of the watched file.
    pub ino: u64,
    /// Device of the watched file.
    pub sdev: (u32, u32),
}

/// A group of fanotify(7).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FanotifyGroup {
    /// `FAN_*` of fanotify_init(2).
    pub flags: u32,
    /// `O_*` of its descriptors.
    pub event_flags: u32,
    /// Its marks.
    pub marks: Vec<FanotifyMark>,
}

/// A mark of such a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FanotifyMark {
    /// What is marked.
    pub on: MarkOn,
    /// `FAN_MARK_*` that stay with it.
    pub flags: u32,
    /// Reported events.
    pub mask: u64,
    /// Ignored events.
    pub ignored: u64,
}

/// The object of a mark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MarkOn {
    /// A file; the watch has neither number nor mask.
    File(InotifyWatch),
    /// The mount of that id.
    Mount(i32),
    /// The file system of that device.
    FileSystem((u32, u32)),
    /// An object of a newer kernel (a mount namespace).
    Other,
}

/// A watch of an inotify instance.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InotifyWatch {
    /// Watch descriptor.
    pub wd: i32,
    /// Inode of the watched file.
    pub ino: u64,
    /// Device of the watched file.
    pub sdev: (u32, u32),
    /// `IN_*` asked for.
    pub mask: u32,
    /// `IN_*` ignored; always 0 in newer kernels.
    pub ignored_mask: u32,
    /// Length of the file handle, 0 when the file system has none.
    pub handle_bytes: u32,
    /// Type of the file handle.
    pub handle_type: i32,
    /// File handle for open_by_handle_at(2).
    pub handle: Vec<u8>,
}

/// Reads fdinfo of descriptor `fd`.
///
/// # Errors
/// See [`ProcDir::read`]; [`crate::Error::Proc`] with `NotFound` when it is not open.
pub fn read_fdinfo(process: impl Into<ProcDir>, fd: i32) -> Result<FdInfo> {
    let dir = process.into();
    let name = format!("fdinfo/{fd}");
    let text = dir.read(&name)?;
    parse(&text).map_err(|line| dir.syntax(name, line))
}

fn parse(text: &[u8]) -> Result<FdInfo, &[u8]> {
    let mut info = FdInfo {
        pos: 0,
        flags: 0,
        cloexec: false,
        mnt_id: 0,
        ino: 0,
        locks: Vec::new(),
        detail: FdDetail::Plain,
    };
    for line in lines(text).filter(|line| !line.is_empty()) {
        // Continuation lines of io_uring have no key.
        let (key, value) = key_value(line, b':').unwrap_or((b"", line));
        field(&mut info, key, value, line).ok_or(line)?;
    }
    Ok(info)
}

fn field(info: &mut FdInfo, key: &[u8], value: &[u8], line: &[u8]) -> Option<()> {
    const CLOEXEC: u32 = libc::O_CLOEXEC as u32;
    match key {
        b"pos" if matches!(info.detail, FdDetail::Plain) => info.pos = position(value)?,
        b"flags" if matches!(info.detail, FdDetail::Plain) => {
            let flags: u32 = oct(value)?.try_into().ok()?;
            info.cloexec = flags & CLOEXEC != 0;
            info.flags = flags & !CLOEXEC;
        }
        b"mnt_id" => info.mnt_id = dec(value)?,
        b"ino" => info.ino = dec(value)?,
        b"lock" => info.locks.push(lock(value)?),
        _ => detail(&mut info.detail, key, value, line)?,
    }
    Some(())
}

fn detail(detail: &mut FdDetail, key: &[u8], value: &[u8], line: &[u8]) -> Option<()> {
    match (&mut *detail, key) {
        (FdDetail::Plain, b"eventfd-count") => {
            *detail = FdDetail::EventFd {
                count: hex(value)?,
                semaphore: None,
            };
        }
        (FdDetail::EventFd { semaphore, .. }, b"eventfd-semaphore") => {
            *semaphore = Some(dec::<u32>(value)? != 0);
        }
        (FdDetail::EventFd { .. }, _) => {}
        (FdDetail::Plain, b"sigmask") => *detail = FdDetail::SignalFd { mask: hex(value)? },
        (FdDetail::Plain, b"clockid") => {
            *detail = FdDetail::TimerFd(TimerFd {
                clockid: dec(value)?,
                ..TimerFd::default()
            });
        }
        (FdDetail::TimerFd(timer), b"ticks") => timer.ticks = dec(value)?,
        (FdDetail::TimerFd(timer), b"settime flags") => timer.settime_flags = oct(value)? as u32,
        (FdDetail::TimerFd(timer), b"it_value") => timer.value = time(value)?,
        (FdDetail::TimerFd(timer), b"it_interval") => timer.interval = time(value)?,
        (FdDetail::Plain, b"tfd") => {
            *detail = FdDetail::Epoll {
                targets: vec![epoll_target(line)?],
            };
        }
        (FdDetail::Epoll { targets }, b"tfd") => targets.push(epoll_target(line)?),
        (FdDetail::Plain, b"Pid") => {
            *detail = FdDetail::PidFd {
                pid: Pid(dec(value)?),
                nspid: Vec::new(),
            };
        }
        (FdDetail::PidFd { nspid, .. }, b"NSpid") => {
            *nspid = fields(value).map(dec).collect::<Option<_>>()?;
        }
        (FdDetail::Plain, _) if line.starts_with(b"inotify ") => {
            *detail = FdDetail::Inotify {
                watches: vec![inotify_watch(line)?],
            };
        }
        (FdDetail::Inotify { watches }, _) if line.starts_with(b"inotify ") => {
            watches.push(inotify_watch(line)?);
        }
        (FdDetail::Plain, _) if line.starts_with(b"fanotify ") => {
            *detail = FdDetail::Fanotify(fanotify_group(line)?);
        }
        (FdDetail::Fanotify(group), _) if line.starts_with(b"fanotify ") => {
            group.marks.push(fanotify_mark(line)?);
        }
        (FdDetail::Plain, _) => *detail = unparsed(line),
        (FdDetail::IoUring(text) | FdDetail::Other(text), _) => {
            text.push('\n');
            text.push_str(&String::from_utf8_lossy(line));
        }
        // A line that a newer kernel adds to a known kind.
        _ => {}
    }
    Some(())
}

fn unparsed(line: &[u8]) -> FdDetail {
    let text = String::from_utf8_lossy(line).into_owned();
    if line.starts_with(b"SqMask:") {
        FdDetail::IoUring(text)
    } else {
        FdDetail::Other(text)
    }
}

fn position(value: &[u8]) -> Option<u64> {
    dec::<i64>(value)
        .map(|pos| pos as u64)
        .or_else(|| dec(value))
}

/// `(99, 997717465)`
fn time(value: &[u8]) -> Option<(u64, u64)> {
    let inside = value.strip_prefix(b"(")?.strip_suffix(b")")?;
    let (seconds, nanoseconds) = key_value(inside, b',')?;
    Some((dec(seconds)?, dec(nanoseconds)?))
}

/// `1: POSIX  ADVISORY  WRITE 5626 fe:00:10010660 5 14`
fn lock(value: &[u8]) -> Option<LockLine> {
    let mut parts = fields(value).skip(1);
    let mut word = || Some(String::from_utf8_lossy(parts.next()?).into_owned());
    let (kind, mode, access) = (word()?, word()?, word()?);
    let pid = dec(parts.next()?)?;
    let file = parts.next()?;
    let colon = file.iter().rposition(|&byte| byte == b':')?;
    let (dev, ino) = (device(&file[..colon], 16)?, dec(&file[colon + 1..])?);
    let start = dec(parts.next()?)?;
    let end = match parts.next()? {
        b"EOF" => None,
        number => Some(dec(number)?),
    };
    Some(LockLine {
        kind,
        mode,
        access,
        pid,
        dev,
        ino,
        start,
        end,
    })
}

/// Splits `key:value` and `key: value` pairs on one line.
fn pairs(line: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let mut words = fields(line);
    std::iter::from_fn(move || {
        let word = words.next()?;
        let (key, value) = key_value(word, b':').unwrap_or((word, b""));
        let value = if value.is_empty() {
            words.next().unwrap_or_default()
        } else {
            value
        };
        Some((key, value))
    })
}

/// `tfd:        3 events:       19 data:                3  pos:0 ino:40e sdev:10`
fn epoll_target(line: &[u8]) -> Option<EpollTarget> {
    let mut target = EpollTarget::default();
    for (key, value) in pairs(line) {
        match key {
            b"tfd" => target.tfd = dec(value)?,
            b"events" => target.events = hex(value)? as u32,
            b"data" => target.data = hex(value)?,
            b"pos" => target.pos = position(value)?,
            b"ino" => target.ino = hex(value)?,
            b"sdev" => target.sdev = kernel_device(hex(value)?),
            _ => {}
        }
    }
    Some(target)
}

/// `fanotify flags:200 event-flags:8000`
fn fanotify_group(line: &[u8]) -> Option<FanotifyGroup> {
    let mut group = FanotifyGroup::default();
    for (key, value) in pairs(line.strip_prefix(b"fanotify ")?) {
        match key {
            b"flags" => group.flags = hex(value)? as u32,
            b"event-flags" => group.event_flags = hex(value)? as u32,
            _ => {}
        }
    }
    Some(group)
}

/// `fanotify ino:3c4a7 sdev:fe00000 mflags:0 mask:2 ignored_mask:0 fhandle-bytes:8 …`, or with `mnt_id` or `sdev` alone.
fn fanotify_mark(line: &[u8]) -> Option<FanotifyMark> {
    let rest = line.strip_prefix(b"fanotify ")?;
    let mut mark = FanotifyMark {
        on: MarkOn::Other,
        flags: 0,
        mask: 0,
        ignored: 0,
    };
    for (key, value) in pairs(rest) {
        match key {
            b"ino" => mark.on = MarkOn::File(watched(rest)?),
            b"mnt_id" => mark.on = MarkOn::Mount(hex(value)? as i32),
            b"sdev" if mark.on == MarkOn::Other => {
                mark.on = MarkOn::FileSystem(kernel_device(hex(value)?));
            }
            b"mflags" => mark.flags = hex(value)? as u32,
            b"mask" => mark.mask = hex(value)?,
            b"ignored_mask" => mark.ignored = hex(value)?,
            _ => {}
        }
    }
    if let MarkOn::File(watch) = &mut mark.on {
        (watch.mask, watch.ignored_mask) = (0, 0);
    }
    Some(mark)
}

/// `inotify wd:1 ino:3c4a7 sdev:fe00000 mask:100 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:a7c4…`
fn inotify_watch(line: &[u8]) -> Option<InotifyWatch> {
    watched(line.strip_prefix(b"inotify ")?)
}

fn watched(text: &[u8]) -> Option<InotifyWatch> {
    let mut watch = InotifyWatch::default();
    for (key, value) in pairs(text) {
        match key {
            b"wd" => watch.wd = hex(value)? as i32,
            b"ino" => watch.ino = hex(value)?,
            b"sdev" => watch.sdev = kernel_device(hex(value)?),
            b"mask" => watch.mask = hex(value)? as u32,
            b"ignored_mask" => watch.ignored_mask = hex(value)? as u32,
            b"fhandle-bytes" => watch.handle_bytes = hex(value)? as u32,
            b"fhandle-type" => watch.handle_type = hex(value)? as i32,
            b"f_handle" => {
                watch.handle = value
                    .chunks(2)
                    .map(|pair| hex(pair).map(|byte| byte as u8))
                    .collect::<Option<_>>()?;
            }
            _ => {}
        }
    }
    Some(watch)
}

#[cfg(test)]
mod tests;
