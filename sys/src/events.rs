//! Event descriptors: poll(2), epoll(7), inotify(7), eventfd(2), timerfd_create(2), pidfds.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use crate::files::given;
use crate::helper::Helper;
use crate::{Errno, Result, errno};

/// poll(2) without waiting: the current events.
pub fn poll_now(fd: impl AsFd, events: i16) -> i16 {
    poll_for(fd, events, 0)
}

/// poll(2): waits that many milliseconds at most and returns the events; -1 waits without limit.
pub fn poll_for(fd: impl AsFd, events: i16, milliseconds: i32) -> i16 {
    let mut p = libc::pollfd {
        fd: fd.as_fd().as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: one live entry.
    unsafe { libc::poll(&raw mut p, 1, milliseconds) };
    p.revents
}

/// Waits until the other end of a pipe or socket is closed.
pub fn wait_for_hangup(fd: impl AsFd) {
    let fd = fd.as_fd();
    while poll_for(fd, 0, -1) == 0 {}
}

/// `EPIOCSPARAMS`, include/uapi/linux/eventpoll.h: sets what [`busy_poll`] returns.
pub const EPIOCSPARAMS: u64 = 0x4008_8a01;
const EPIOCGPARAMS: libc::c_ulong = 0x8008_8a02;

/// `EPIOCGPARAMS`: a `struct epoll_params`; `None` before Linux 6.9 and where there is no busy polling.
pub fn busy_poll(set: impl AsFd) -> Option<[u8; 8]> {
    let mut params = [0u8; 8];
    // SAFETY: the kernel writes a `struct epoll_params`, eight bytes.
    let r = unsafe { libc::ioctl(set.as_fd().as_raw_fd(), EPIOCGPARAMS, params.as_mut_ptr()) };
    (r == 0).then_some(params)
}

/// Whether an epoll set watches that description under that number. Tries to add it: `EEXIST` means yes; otherwise
/// the new entry is removed again. A helper does both, so that they complete even if we are killed.
///
/// # Errors
/// Those of epoll_ctl(2), and of creating the helper.
pub fn epoll_has(set: impl AsFd, description: impl AsFd, number: i32) -> Result<bool> {
    const ADDED: i32 = 0;
    const HAD: i32 = 1;
    const FAILED: i32 = 100;
    let (set, description) = (set.as_fd().as_raw_fd(), description.as_fd().as_raw_fd());
    // SAFETY: system calls on the helper's own descriptor table; nothing in it is dropped there.
    let answer = Helper::run(|| unsafe {
        // Neither of the two may have that number.
        let above = number.saturating_add(1);
        let set = libc::fcntl(set, libc::F_DUPFD_CLOEXEC, above);
        let watched = libc::dup2(description, number);
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        let event = &raw mut event;
        match () {
            () if set < 0 || watched != number => FAILED + *libc::__errno_location(),
            () if libc::epoll_ctl(set, libc::EPOLL_CTL_ADD, number, event) == 0 => {
                libc::epoll_ctl(set, libc::EPOLL_CTL_DEL, number, event);
                ADDED
            }
            () if *libc::__errno_location() == libc::EEXIST => HAD,
            () => FAILED + *libc::__errno_location(),
        }
    });
    match answer? {
        ADDED => Ok(false),
        HAD => Ok(true),
        code => Err(Errno::from_raw(code - FAILED)),
    }
}

/// inotify_init1(2).
///
/// # Errors
/// `EMFILE` above the user's limit of queues.
pub fn inotify(flags: i32) -> Result<OwnedFd> {
    use rustix::fs::inotify::{CreateFlags, init};
    init(CreateFlags::from_bits_retain(flags as u32) | CreateFlags::CLOEXEC).map_err(errno)
}

/// inotify_add_watch(2): the watch's number.
///
/// # Errors
/// `ENOSPC` above the user's limit of watches, `EACCES` and `ENOENT` of the path.
pub fn inotify_watch(queue: impl AsFd, path: &Path, mask: u32) -> Result<i32> {
    use rustix::fs::inotify::{WatchFlags, add_watch};
    add_watch(queue, path, WatchFlags::from_bits_retain(mask)).map_err(errno)
}

/// inotify_rm_watch(2).
///
/// # Errors
/// `EINVAL` when there is no such watch.
pub fn inotify_remove(queue: impl AsFd, watch: i32) -> Result<()> {
    rustix::fs::inotify::remove_watch(queue, watch).map_err(errno)
}

/// eventfd(2) with `EFD_*`.
///
/// # Errors
/// `EINVAL` for flags that the kernel does not know.
pub fn eventfd(count: u32, flags: i32) -> Result<OwnedFd> {
    use rustix::event::EventfdFlags;
    let flags = EventfdFlags::from_bits_retain(flags as u32) | EventfdFlags::CLOEXEC;
    rustix::event::eventfd(count, flags).map_err(errno)
}

/// Reads an eventfd without waiting: 0 when it is 0, `None` where the kernel has no such read (preadv2(2) with
/// `RWF_NOWAIT`).
pub fn eventfd_take(fd: impl AsFd) -> Option<u64> {
    let mut value = 0u64;
    let part = libc::iovec {
        iov_base: (&raw mut value).cast(),
        iov_len: 8,
    };
    let (fd, now) = (fd.as_fd().as_raw_fd(), libc::RWF_NOWAIT);
    // SAFETY: room for the eight bytes of an eventfd.
    let n = unsafe { libc::preadv2(fd, &raw const part, 1, -1, now) };
    match n {
        8 => Some(value),
        _ if Errno::last() == Errno::EAGAIN => Some(0),
        _ => None,
    }
}

/// Adds to an eventfd.
///
/// # Errors
/// `EAGAIN` when the counter would overflow and the descriptor does not block.
pub fn eventfd_add(fd: impl AsFd, value: u64) -> Result<()> {
    rustix::io::write(fd, &value.to_ne_bytes())
        .map(drop)
        .map_err(errno)
}

/// timerfd_gettime(2), for its side effect: an expired periodic timerfd does not run until it is read or queried, and
/// only then counts its later expirations.
pub fn count_expirations(timer: impl AsFd) {
    let _ = rustix::time::timerfd_gettime(timer);
}

/// pidfd_open(2) with `PIDFD_*`.
///
/// # Errors
/// `ESRCH` when there is no such process, `EINVAL` for flags that the kernel does not know.
pub fn pidfd(pid: i32, flags: u32) -> Result<OwnedFd> {
    // SAFETY: a call without pointers, which makes a descriptor.
    unsafe { given(libc::syscall(libc::SYS_pidfd_open, pid, flags)) }
}

/// `PIDFD_GET_INFO` into a `struct pidfd_info` of the first version.
///
/// # Errors
/// `ENOTTY` before Linux 6.13, `ESRCH` for a reaped process.
pub fn pidfd_info(fd: impl AsFd, info: &mut [u8; 64]) -> Result<()> {
    /// `_IOWR(0xff, 11, struct pidfd_info)` with the size of the first version.
    const PIDFD_GET_INFO: u64 = 0xc040_ff0b;
    // SAFETY: the request holds the size that the kernel reads and writes.
    let r = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), PIDFD_GET_INFO, info.as_mut_ptr()) };
    Errno::result(r).map(drop)
}
