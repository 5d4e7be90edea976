//! The few system calls on descriptors of ours that tell about a description of the job's.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ckpt_tracer::child::Helper;
use nix::errno::Errno;

use super::epoll::BusyPoll;

/// fstat(2).
pub fn fstat(fd: &impl AsRawFd) -> Result<libc::stat, Errno> {
    // SAFETY: plain integers, for which zero is valid.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` is live and of the size that the kernel writes.
    let r = unsafe { libc::fstat(fd.as_raw_fd(), &mut stat) };
    Errno::result(r).map(|_| stat)
}

/// What is to be said of a directory that tells nothing.
pub fn unknown_directory() -> libc::stat {
    // SAFETY: plain integers, for which zero is valid.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    stat.st_mode = libc::S_IFDIR;
    stat
}

/// A handle of what a path leads to, which opens nothing (`O_PATH`).
pub fn handle(path: &Path) -> Result<OwnedFd, Errno> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: `path` is a C string.
    let fd = unsafe { libc::open(path.as_ptr(), libc::O_PATH | libc::O_CLOEXEC) };
    // SAFETY: the kernel just gave us this descriptor.
    Errno::result(fd).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `EPIOCSPARAMS` and `EPIOCGPARAMS`, include/uapi/linux/eventpoll.h.
pub const EPIOCSPARAMS: u64 = 0x4008_8a01;
const EPIOCGPARAMS: libc::c_ulong = 0x8008_8a02;

/// `EPIOCGPARAMS`; `None` before Linux 6.9 and where there is no busy polling.
pub fn busy_poll(set: &OwnedFd) -> Option<BusyPoll> {
    let mut params = [0u8; 8];
    // SAFETY: the kernel writes a `struct epoll_params`, eight bytes.
    let r = unsafe { libc::ioctl(set.as_raw_fd(), EPIOCGPARAMS, params.as_mut_ptr()) };
    let [a, b, c, d, e, f, preferred, _] = params;
    (r == 0).then_some(BusyPoll {
        microseconds: u32::from_ne_bytes([a, b, c, d]),
        budget: u16::from_ne_bytes([e, f]),
        preferred,
    })
}

/// `F_GETOWN_EX`: kind and id of who gets SIGIO.
pub fn owner(fd: &OwnedFd) -> Option<(i32, i32)> {
    const F_GETOWN_EX: i32 = 16;
    let mut owner = [0i32; 2];
    // SAFETY: the kernel writes two ints (`struct f_owner_ex`).
    let r = unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, owner.as_mut_ptr()) };
    (r == 0).then_some((owner[0], owner[1]))
}

/// `F_GETSIG`.
pub fn owner_signal(fd: &OwnedFd) -> i32 {
    const F_GETSIG: i32 = 11;
    // SAFETY: a call without pointers.
    unsafe { libc::fcntl(fd.as_raw_fd(), F_GETSIG) }.max(0)
}

/// isatty(3).
pub fn is_terminal(fd: &OwnedFd) -> bool {
    // SAFETY: a call without pointers of ours.
    unsafe { libc::isatty(fd.as_raw_fd()) == 1 }
}

/// A fcntl without a pointer; `None` when it fails.
pub fn fcntl(fd: &impl AsRawFd, command: i32) -> Option<i32> {
    // SAFETY: only called with commands that take no argument.
    let r = unsafe { libc::fcntl(fd.as_raw_fd(), command) };
    (r >= 0).then_some(r)
}

/// `FIONREAD`: bytes that can be read at once.
pub fn unread(fd: &impl AsRawFd) -> usize {
    let mut n = 0i32;
    // SAFETY: the kernel writes one int.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &mut n) };
    if r == 0 { n.max(0) as usize } else { 0 }
}

/// inotify_init1(2).
pub fn inotify(flags: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: a call without pointers.
    let fd = Errno::result(unsafe { libc::inotify_init1(flags | libc::IN_CLOEXEC) })?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// inotify_add_watch(2): the watch's number.
pub fn inotify_watch(fd: &impl AsRawFd, path: &Path, mask: u32) -> Result<i32, Errno> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: `path` is a C string.
    let watch = unsafe { libc::inotify_add_watch(fd.as_raw_fd(), path.as_ptr(), mask) };
    Errno::result(watch)
}

/// inotify_rm_watch(2).
pub fn inotify_remove(fd: &impl AsRawFd, watch: i32) -> Result<(), Errno> {
    // SAFETY: a call without pointers.
    let r = unsafe { libc::inotify_rm_watch(fd.as_raw_fd(), watch) };
    Errno::result(r).map(drop)
}

/// memfd_create(2).
pub fn memfd(name: &str) -> Result<OwnedFd, Errno> {
    let name = CString::new(name).map_err(|_| Errno::EINVAL)?;
    // SAFETY: `name` is a C string.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    // SAFETY: the kernel just gave us this descriptor.
    Errno::result(fd).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// poll(2) without waiting: the events that hold now.
pub fn poll_now(fd: &OwnedFd, events: i16) -> i16 {
    poll_for(fd, events, 0)
}

/// poll(2): the events that hold within so many milliseconds.
pub fn poll_for(fd: &OwnedFd, events: i16, milliseconds: i32) -> i16 {
    let mut p = libc::pollfd {
        fd: fd.as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: one live entry.
    unsafe { libc::poll(&mut p, 1, milliseconds) };
    p.revents
}

/// tee(2): copies up to `len` bytes between pipes without consuming them.
pub fn tee(from: &OwnedFd, to: &OwnedFd, len: usize) -> Result<usize, Errno> {
    // SAFETY: a call without pointers.
    let r = unsafe {
        libc::tee(
            from.as_raw_fd(),
            to.as_raw_fd(),
            len,
            libc::SPLICE_F_NONBLOCK,
        )
    };
    Errno::result(r).map(|n| n as usize)
}

/// splice(2): moves bytes of as many buffers as have room, up to `len`, between pipes.
pub fn splice(from: &OwnedFd, to: &OwnedFd, len: usize) -> Result<usize, Errno> {
    let none = std::ptr::null_mut();
    // SAFETY: without offsets, a call without pointers.
    let r = unsafe {
        libc::splice(
            from.as_raw_fd(),
            none,
            to.as_raw_fd(),
            none,
            len,
            libc::SPLICE_F_NONBLOCK,
        )
    };
    Errno::result(r).map(|n| n as usize)
}

/// A pipe of our own with at least that capacity.
pub fn pipe(capacity: i32) -> Result<(OwnedFd, OwnedFd), Errno> {
    let mut fds = [0; 2];
    // SAFETY: the kernel writes two ints.
    let r = unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) };
    Errno::result(r)?;
    // SAFETY: the kernel just gave us these descriptors.
    let ends = unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) };
    // SAFETY: a call without pointers.
    let r = unsafe { libc::fcntl(ends.1.as_raw_fd(), libc::F_SETPIPE_SZ, capacity) };
    Errno::result(r)?;
    Ok(ends)
}

/// fstatfs(2): type and block size of the file system.
pub fn fstatfs(fd: &OwnedFd) -> Option<(i64, u64)> {
    // SAFETY: plain integers, for which zero is valid.
    let mut s: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `s` is live and of the size that the kernel writes.
    let r = unsafe { libc::fstatfs(fd.as_raw_fd(), &mut s) };
    (r == 0).then_some((s.f_type, s.f_bsize as u64))
}

/// open_by_handle_at(2): an `O_PATH` descriptor for a file handle, given any descriptor on its
/// mount.
pub fn open_by_handle(mount: &impl AsRawFd, kind: i32, handle: &[u8]) -> Result<OwnedFd, Errno> {
    let mut buffer = Vec::with_capacity(8 + handle.len());
    buffer.extend_from_slice(&(handle.len() as u32).to_ne_bytes());
    buffer.extend_from_slice(&kind.to_ne_bytes());
    buffer.extend_from_slice(handle);
    // SAFETY: `buffer` is a `struct file_handle` with its bytes behind it.
    let r = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_raw_fd(),
            buffer.as_ptr(),
            libc::O_PATH | libc::O_CLOEXEC,
        )
    };
    let fd = Errno::result(r)?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// name_to_handle_at(2) with `AT_HANDLE_FID` (Linux 6.6): the type and bytes of a handle that names a file and need not
/// be one that can be opened. Symbolic links are followed.
pub fn handle_of(path: &Path) -> Result<(i32, Vec<u8>), Errno> {
    const AT_HANDLE_FID: i32 = libc::AT_REMOVEDIR;
    /// `MAX_HANDLE_SZ`.
    const MOST: usize = 128;
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    let mut buffer = [0u8; 8 + MOST];
    buffer[..4].copy_from_slice(&(MOST as u32).to_ne_bytes());
    let mut mount = 0i32;
    // SAFETY: the path ends in a zero byte; `buffer` is a `struct file_handle` that says how much room is behind it.
    let r = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            libc::AT_FDCWD,
            path.as_ptr(),
            buffer.as_mut_ptr(),
            &raw mut mount,
            AT_HANDLE_FID | libc::AT_SYMLINK_FOLLOW,
        )
    };
    Errno::result(r)?;
    let word = |at: usize| i32::from_ne_bytes(buffer[at..at + 4].try_into().unwrap_or_default());
    let bytes = (word(0).max(0) as usize).min(MOST);
    Ok((word(4), buffer[8..8 + bytes].to_vec()))
}

/// timerfd_gettime(2), for its effect: an expired periodic timer is stopped until somebody looks
/// at it, and its later expirations are counted only then.
pub fn count_expirations(timer: &OwnedFd) {
    // SAFETY: plain integers, for which zero is valid.
    let mut value: libc::itimerspec = unsafe { std::mem::zeroed() };
    // SAFETY: `value` is live and of the size that the kernel writes.
    unsafe { libc::timerfd_gettime(timer.as_raw_fd(), &mut value) };
}

/// `PIDFD_GET_INFO` into a `struct pidfd_info` of the first version.
pub fn pidfd_info(fd: i32, info: &mut [u8; 64]) -> Result<(), Errno> {
    /// `_IOWR(0xff, 11, struct pidfd_info)` with that version's size.
    const PIDFD_GET_INFO: u64 = 0xc040_ff0b;
    // SAFETY: the request holds the size that the kernel reads and writes.
    let r = unsafe { libc::ioctl(fd, PIDFD_GET_INFO, info.as_mut_ptr()) };
    Errno::result(r).map(drop)
}

/// What `open` answers of a child of ours, which has ended and has been waited for then. The child has the
/// pid `wanted` if that is free and we may choose; `open` is told which.
///
/// # Errors
/// Those of `open`, of clone3(2) and pipe(2).
pub fn with_child<T>(
    wanted: i32,
    open: impl FnOnce(i32) -> std::io::Result<T>,
) -> std::io::Result<T> {
    let (wait, go) = pipe(4096)?;
    // struct clone_args: exit_signal is the fifth word, set_tid and its size the ninth and tenth.
    let mut args = [0u64; 11];
    args[4] = libc::SIGCHLD as u64;
    args[8] = &raw const wanted as u64;
    args[9] = 1;
    // SAFETY: the arguments live on; the child makes only system calls, and never returns from here.
    let chosen = unsafe { libc::syscall(libc::SYS_clone3, args.as_ptr(), size_of_val(&args)) };
    let pid = match chosen {
        // SAFETY: as above.
        -1 => unsafe { libc::fork() },
        pid => pid as i32,
    };
    if pid == 0 {
        // SAFETY: as above.
        unsafe {
            libc::close(go.as_raw_fd());
            poll_forever(wait.as_raw_fd());
            libc::_exit(0)
        }
    }
    Errno::result(pid)?;
    let opened = open(pid);
    drop(go);
    // SAFETY: the status is not asked for.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL) };
    opened
}

/// Pidfds of a child of ours that has ended with this wait status and has been waited for, one for each
/// of the flags.
pub fn pidfds_of_nobody(status: i32, flags: &[u32]) -> Result<Vec<OwnedFd>, Errno> {
    // The child waits for its end: where SIGCHLD is ignored its pid is free as soon as it ends.
    let (wait, go) = pipe(4096)?;
    // SAFETY: the child makes only system calls, and never returns from here.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        // SAFETY: as above.
        unsafe {
            libc::close(go.as_raw_fd());
            poll_forever(wait.as_raw_fd());
            end_with(status)
        }
    }
    Errno::result(pid)?;
    let open = |flags: &u32| {
        // SAFETY: a call without pointers; the child still runs, so the pid is its own.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, *flags) };
        // SAFETY: the kernel just gave us this descriptor.
        Errno::result(fd).map(|fd| unsafe { OwnedFd::from_raw_fd(fd as i32) })
    };
    let fds = flags.iter().map(open).collect();
    drop(go);
    // SAFETY: the status is not asked for.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL) };
    fds
}

/// Whether an epoll set watches that description under that number. It is asked by adding it, which the set
/// refuses if it has it; if it does not, what was added is taken out again. That is done by a helper, so
/// that it is done to the end also if we are killed.
pub fn epoll_has(set: &OwnedFd, description: &OwnedFd, number: i32) -> Result<bool, Errno> {
    const ADDED: i32 = 0;
    const HAD: i32 = 1;
    const FAILED: i32 = 100;
    // SAFETY: it makes only system calls, on its own table of descriptors.
    let answer = unsafe {
        Helper::run(|| {
            // Neither of the two may be in the place of the number.
            let above = number.saturating_add(1);
            let set = libc::fcntl(set.as_raw_fd(), libc::F_DUPFD_CLOEXEC, above);
            let watched = libc::dup2(description.as_raw_fd(), number);
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
        })
    };
    match answer? {
        ADDED => Ok(false),
        HAD => Ok(true),
        code => Err(Errno::from_raw(code - FAILED)),
    }
}

/// Waits until every writer of a pipe has gone.
fn poll_forever(fd: i32) {
    let mut p = libc::pollfd {
        fd,
        events: 0,
        revents: 0,
    };
    // SAFETY: one live entry.
    while unsafe { libc::poll(&mut p, 1, -1) } < 1 {}
}

/// SAFETY: only to be called in the child of a fork; makes only system calls.
unsafe fn end_with(status: i32) -> ! {
    // SAFETY: as the function's.
    unsafe {
        let signal = status & 0x7f;
        if signal != 0 {
            let none = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            // No core file beside that of the one that it stands for.
            libc::setrlimit(libc::RLIMIT_CORE, &none);
            let (default, mask) = ([0u64; 4], 0u64);
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), 0, 8);
            let set = libc::SIG_SETMASK;
            libc::syscall(libc::SYS_rt_sigprocmask, set, &raw const mask, 0, 8);
            libc::syscall(libc::SYS_kill, libc::syscall(libc::SYS_getpid), signal);
        }
        libc::_exit(status >> 8 & 0xff)
    }
}
