//! What the kernel tells of an open file description: `/proc/PID/fdinfo/N`, see proc_pid_fdinfo(5).

use super::ProcDir;
pub use super::fdlink::{FdLink, list_fds, read_fd_link};
use super::parse::{dec, device, fields, hex, kernel_device, key_value, lines, oct};
use crate::{Pid, Result};

/// One descriptor. Position, flags and details belong to the open file description, which others may
/// share; close-on-exec is the descriptor's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FdInfo {
    /// Position in bytes; a negative one (`/proc/PID/mem`) as its two's complement.
    pub pos: u64,
    /// `O_*` without `O_CLOEXEC`; `O_LARGEFILE` (0100000) shows where the opener set it.
    pub flags: u32,
    /// `O_CLOEXEC`.
    pub cloexec: bool,
    /// Mount, see [`super::mounts::MountTable::mount_of`].
    pub mnt_id: i32,
    /// Inode; 0 before Linux 5.14, which does not say it.
    pub ino: u64,
    /// Locks that this open file description holds, and POSIX locks that this process holds through it.
    pub locks: Vec<LockLine>,
    /// What is particular to its kind.
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
    /// Who took it; -1 for an open file description's lock.
    pub pid: i32,
    /// Device of the file.
    pub dev: (u32, u32),
    /// Inode of the file.
    pub ino: u64,
    /// First byte.
    pub start: u64,
    /// Last byte, `None` for the end of the file wherever that is.
    pub end: Option<u64>,
}

/// What is particular to a kind of description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FdDetail {
    /// Nothing.
    Plain,
    /// eventfd(2)
    EventFd {
        /// Counter.
        count: u64,
        /// `EFD_SEMAPHORE`, which newer kernels tell.
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
        /// What it watches.
        targets: Vec<EpollTarget>,
    },
    /// inotify(7)
    Inotify {
        /// What it watches.
        watches: Vec<InotifyWatch>,
    },
    /// fanotify(7): its lines as they are.
    Fanotify(String),
    /// pidfd_open(2)
    PidFd {
        /// The process; -1 when it has been waited for, 0 when outside our pid namespace.
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

/// An entry of an epoll set. It names the number that the watched description had when it was added;
/// that number may be closed or mean another file by now.
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
    /// Length of the file handle, 0 when the file system gives none.
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
        (FdDetail::Plain, _) => *detail = unparsed(line),
        (FdDetail::Fanotify(text) | FdDetail::IoUring(text) | FdDetail::Other(text), _) => {
            text.push('\n');
            text.push_str(&String::from_utf8_lossy(line));
        }
        // A line that a newer kernel adds to a kind known here.
        _ => {}
    }
    Some(())
}

fn unparsed(line: &[u8]) -> FdDetail {
    let text = String::from_utf8_lossy(line).into_owned();
    if line.starts_with(b"fanotify ") {
        FdDetail::Fanotify(text)
    } else if line.starts_with(b"SqMask:") {
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

/// `inotify wd:1 ino:3c4a7 sdev:fe00000 mask:100 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:a7c4…`
fn inotify_watch(line: &[u8]) -> Option<InotifyWatch> {
    let mut watch = InotifyWatch::default();
    for (key, value) in pairs(line.strip_prefix(b"inotify ")?) {
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
mod tests {
    use super::*;

    const HEAD: &str = "pos:\t0\nflags:\t02000002\nmnt_id:\t17\nino:\t1038\n";

    fn detail_of(lines: &str) -> FdDetail {
        parse(format!("{HEAD}{lines}").as_bytes()).unwrap().detail
    }

    #[test]
    fn common_fields_and_locks() {
        let text = "pos:\t-4096\nflags:\t02100001\nmnt_id:\t27\nino:\t10010660\n\
            lock:\t1: FLOCK  ADVISORY  WRITE 5626 fe:00:10010660 0 EOF\n\
            lock:\t2: POSIX  ADVISORY  READ  5626 00:2a:10010660 5 14\n\
            lock:\t3: OFDLCK ADVISORY  WRITE -1 fe:00:10010660 9 18446744073709551615\n";
        let info = parse(text.as_bytes()).unwrap();
        assert_eq!(info.pos, -4096i64 as u64);
        assert_eq!((info.flags, info.cloexec), (0o100001, true));
        assert_eq!((info.mnt_id, info.ino), (27, 10_010_660));
        assert_eq!(info.detail, FdDetail::Plain);
        let [flock, posix, ofd] = info.locks.as_slice() else {
            panic!("{:?}", info.locks)
        };
        assert_eq!(
            (flock.kind.as_str(), flock.access.as_str(), flock.end),
            ("FLOCK", "WRITE", None)
        );
        assert_eq!(
            (flock.mode.as_str(), flock.dev, flock.ino),
            ("ADVISORY", (254, 0), 10_010_660)
        );
        assert_eq!((posix.dev, posix.start, posix.end), ((0, 42), 5, Some(14)));
        assert_eq!(
            (ofd.kind.as_str(), ofd.pid, ofd.end),
            ("OFDLCK", -1, Some(u64::MAX))
        );
    }

    #[test]
    fn counters_signals_and_timers() {
        assert_eq!(
            detail_of("eventfd-count:               2a\neventfd-id: 1\neventfd-semaphore: 1\n"),
            FdDetail::EventFd {
                count: 42,
                semaphore: Some(true)
            }
        );
        assert_eq!(
            detail_of("eventfd-count: ffffffffffffffff\n"),
            FdDetail::EventFd {
                count: u64::MAX,
                semaphore: None
            }
        );
        let mask = FdDetail::SignalFd { mask: 0x200 };
        assert_eq!(detail_of("sigmask:\t0000000000000200\n"), mask);
        let timer = "clockid: 7\nticks: 3\nsettime flags: 03\nit_value: (99, 997717465)\n\
            it_interval: (3, 5)\n";
        let expected = TimerFd {
            clockid: 7,
            ticks: 3,
            settime_flags: 3,
            value: (99, 997_717_465),
            interval: (3, 5),
        };
        assert_eq!(detail_of(timer), FdDetail::TimerFd(expected));
        let pidfd = FdDetail::PidFd {
            pid: Pid(-1),
            nspid: vec![],
        };
        assert_eq!(detail_of("Pid:\t-1\nNSpid:\t\n"), pidfd);
        let nested = FdDetail::PidFd {
            pid: Pid(7),
            nspid: vec![7, 1],
        };
        assert_eq!(detail_of("Pid:\t7\nNSpid:\t7\t1\n"), nested);
    }

    #[test]
    fn sets_of_watched_things() {
        let text = "tfd:        3 events:       19 data:     deadbeef0003  pos:0 ino:40e sdev:10\n\
            tfd:      200 events: c000001d data: ffffffffffffffff  pos:-1 ino:3c4a7 sdev:fe00003\n";
        let FdDetail::Epoll { targets } = detail_of(text) else {
            panic!("no epoll")
        };
        let first = EpollTarget {
            tfd: 3,
            events: 0x19,
            data: 0xdead_beef_0003,
            pos: 0,
            ino: 0x40e,
            sdev: (0, 16),
        };
        assert_eq!(targets[0], first);
        assert_eq!(
            (targets[1].tfd, targets[1].events, targets[1].sdev),
            (200, 0xc000_001d, (254, 3))
        );
        assert_eq!((targets[1].data, targets[1].pos), (u64::MAX, u64::MAX));
        let text = "inotify wd:1f ino:3c4a7 sdev:fe00000 mask:100 ignored_mask:0 fhandle-bytes:8 \
            fhandle-type:81 f_handle:a7c40300000000ff\n\
            inotify wd:2 ino:1 sdev:0 mask:fff ignored_mask:0 \n";
        let FdDetail::Inotify { watches } = detail_of(text) else {
            panic!("no inotify")
        };
        let first = InotifyWatch {
            wd: 0x1f,
            ino: 0x3c4a7,
            sdev: (254, 0),
            mask: 0x100,
            ignored_mask: 0,
            handle_bytes: 8,
            handle_type: 0x81,
            handle: vec![0xa7, 0xc4, 3, 0, 0, 0, 0, 0xff],
        };
        assert_eq!(watches[0], first);
        assert_eq!((watches[1].wd, watches[1].handle.len()), (2, 0));
    }

    #[test]
    fn kinds_that_stay_text() {
        let ring = "SqMask:\t0x7\nSqHead:\t0\nPollList:\n  op=6, task_works=0\nNAPI:\tdisabled\n";
        let FdDetail::IoUring(text) = detail_of(ring) else {
            panic!("no io_uring")
        };
        assert!(text.starts_with("SqMask:") && text.ends_with("NAPI:\tdisabled"));
        let fanotify = detail_of("fanotify flags:0 event-flags:8000\n");
        assert_eq!(
            fanotify,
            FdDetail::Fanotify("fanotify flags:0 event-flags:8000".into())
        );
        // A program's own fields must not pass for the common ones.
        let other = detail_of("pending:\t0\nflags:\t07\npos:\t9\n");
        assert_eq!(
            other,
            FdDetail::Other("pending:\t0\nflags:\t07\npos:\t9".into())
        );
    }

    #[test]
    fn odd_text_is_an_error_that_names_the_line() {
        let odd = [
            "flags:\t9",
            "pos:\tfar",
            "lock:\t1: FLOCK  ADVISORY  WRITE 5626 <none>:0 0 EOF",
            "eventfd-count: x",
            "tfd: 1 events: zz",
            "inotify wd:1 f_handle:a7c4é",
        ];
        for line in odd {
            assert_eq!(parse(line.as_bytes()).unwrap_err(), line.as_bytes());
        }
    }
}
