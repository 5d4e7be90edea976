//! System calls without a safe form in the standard library.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

fn check(result: i64) -> Result<i64> {
    if result == -1 {
        Err(Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Nanoseconds of the monotonic clock, which all processes of the machine share.
pub(crate) fn now() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes one timespec into ours.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A shared view of a file, never unmapped.
pub(crate) fn map_shared<T>(file: &File) -> Result<&'static T> {
    assert!(align_of::<T>() <= 4096);
    if file.metadata()?.len() < size_of::<T>() as u64 {
        return Err(Error::other("the file is too short"));
    }
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at = unsafe {
        let fd = file.as_raw_fd();
        libc::mmap(
            ptr::null_mut(),
            size_of::<T>(),
            protection,
            libc::MAP_SHARED,
            fd,
            0,
        )
    };
    if at == libc::MAP_FAILED {
        return Err(Error::last_os_error());
    }
    // SAFETY: the mapping is page-aligned, long enough and stays for ever. `T` is the beat page,
    // which consists of atomics only: all bit patterns are valid and others may write.
    Ok(unsafe { &*at.cast::<T>() })
}

/// Fresh private memory, never unmapped; none of its pages is populated.
pub(crate) fn map_fresh(len: usize) -> Result<&'static mut [u8]> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(Error::last_os_error());
    }
    // SAFETY: `len` zeroed bytes without other references, never unmapped.
    Ok(unsafe { std::slice::from_raw_parts_mut(at.cast(), len) })
}

/// Starts a thread with a small stack and without an alternate signal stack (the standard
/// library's threads have one each, which would double the number of mappings).
pub(crate) fn spawn_small(
    body: extern "C" fn(*mut libc::c_void) -> *mut libc::c_void,
    argument: usize,
) -> Result<()> {
    // SAFETY: the attributes are initialised before use and destroyed after; `body` takes its
    // argument as a number.
    let error = unsafe {
        let mut attributes = std::mem::zeroed();
        libc::pthread_attr_init(&raw mut attributes);
        libc::pthread_attr_setstacksize(&raw mut attributes, 64 << 10);
        libc::pthread_attr_setdetachstate(&raw mut attributes, libc::PTHREAD_CREATE_DETACHED);
        let mut thread = 0;
        let error = libc::pthread_create(
            &raw mut thread,
            &raw const attributes,
            body,
            argument as *mut _,
        );
        libc::pthread_attr_destroy(&raw mut attributes);
        error
    };
    if error == 0 {
        Ok(())
    } else {
        Err(Error::from_raw_os_error(error))
    }
}

/// Starts a process that sleeps, and ends with us. We are single-threaded.
pub(crate) fn fork_small(
    body: extern "C" fn(*mut libc::c_void) -> *mut libc::c_void,
    argument: usize,
) -> Result<()> {
    // SAFETY: with one thread, everything is as usable in the child as it is here.
    unsafe {
        if check(libc::fork().into())? == 0 {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            body(argument as *mut _);
            libc::_exit(0);
        }
    }
    Ok(())
}

/// Waits until no children are left, including adopted ones.
pub(crate) fn reap_all() {
    // SAFETY: the status is not asked for.
    while unsafe { libc::waitpid(-1, ptr::null_mut(), 0) } > 0 {}
}

/// process_vm_readv(2) of one piece.
pub(crate) fn read_other(pid: i32, address: u64, into: &mut [u8]) -> Result<usize> {
    let local = libc::iovec {
        iov_base: into.as_mut_ptr().cast(),
        iov_len: into.len(),
    };
    let remote = libc::iovec {
        iov_base: address as *mut _,
        iov_len: into.len(),
    };
    // SAFETY: `local` is our buffer; `remote` is only interpreted in the other process.
    let n = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    check(n as i64).map(|n| n as usize)
}

/// Result of waiting for a child.
pub(crate) struct Ended {
    /// Wait status.
    pub(crate) status: i32,
    /// Its largest resident set size, bytes.
    pub(crate) memory: u64,
    /// Processor time, in seconds.
    pub(crate) processor: f64,
}

/// Waits for a child.
pub(crate) fn wait_with_usage(pid: i32) -> Result<Ended> {
    let mut status = 0;
    // SAFETY: the kernel writes one status and one rusage.
    let (done, usage) = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        (libc::wait4(pid, &raw mut status, 0, &raw mut usage), usage)
    };
    check(done.into())?;
    let memory = usage.ru_maxrss as u64 * 1024;
    Ok(Ended {
        status,
        memory,
        processor: processor(&usage),
    })
}

/// Processor time that this process has used, in seconds.
pub(crate) fn own_processor_time() -> f64 {
    // SAFETY: the kernel writes one rusage.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    processor(&usage)
}

fn processor(usage: &libc::rusage) -> f64 {
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// getppid(2), by the system call and nothing else.
pub(crate) fn getppid() -> i64 {
    // SAFETY: a call without arguments.
    unsafe { libc::syscall(libc::SYS_getppid) }
}

/// kill(2) with SIGKILL.
pub(crate) fn kill(pid: i32) -> Result<()> {
    assert!(pid > 1);
    // SAFETY: a call without pointers.
    check(unsafe { libc::kill(pid, libc::SIGKILL) }.into()).map(drop)
}

/// Unshares the pid and mount namespaces for children, in a new user namespace if requested.
pub(crate) fn unshare(user: bool) -> Result<()> {
    // SAFETY: calls without pointers.
    let (uid, gid) = unsafe { (libc::getuid(), libc::getgid()) };
    let flags = libc::CLONE_NEWPID | libc::CLONE_NEWNS | if user { libc::CLONE_NEWUSER } else { 0 };
    // SAFETY: a call without pointers, in a process with one thread.
    check(unsafe { libc::unshare(flags) }.into())?;
    if user {
        std::fs::write("/proc/self/setgroups", "deny")?;
        std::fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
        std::fs::write("/proc/self/gid_map", format!("0 {gid} 1"))?;
    }
    Ok(())
}

/// Mounts the `/proc` of this pid namespace.
pub(crate) fn mount_proc() -> Result<()> {
    let null = ptr::null::<libc::c_char>();
    // SAFETY: all strings are NUL-terminated.
    unsafe {
        let private = libc::MS_REC | libc::MS_PRIVATE;
        check(libc::mount(c"none".as_ptr(), c"/".as_ptr(), null, private, ptr::null()).into())?;
        let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
        let proc = c"proc".as_ptr();
        check(libc::mount(proc, c"/proc".as_ptr(), proc, flags, ptr::null()).into())?;
    }
    Ok(())
}

extern "C" fn leave(_signal: i32) {
    // SAFETY: async-signal-safe. As the first process of a pid namespace we take all others along.
    unsafe { libc::_exit(130) }
}

/// Signal setup of the first process of a pid namespace, which default actions do not end: ends on the usual signals,
/// and with the parent.
pub(crate) fn end_by_signals() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let handler = leave as extern "C" fn(i32);
        // SAFETY: the handler is async-signal-safe.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
    // SAFETY: a call without pointers.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

/// Makes inherited descriptors close-on-exec: the target must not have descriptors of objects outside.
pub(crate) fn keep_descriptors() -> Result<()> {
    let flags = libc::CLOSE_RANGE_CLOEXEC as libc::c_int;
    // SAFETY: a call without pointers; nothing is closed before an exec.
    check(unsafe { libc::close_range(3, u32::MAX, flags) }.into()).map(drop)
}

/// The parent of the measuring process ignores the signals that end that one, to clean up afterwards.
pub(crate) fn ignore_signals() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: a call without pointers.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Whether we are root.
pub(crate) fn is_root() -> bool {
    // SAFETY: a call without arguments.
    unsafe { libc::geteuid() == 0 }
}

/// Bytes free in the file system of a path.
pub(crate) fn free_space(path: &Path) -> Result<u64> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(Error::other)?;
    // SAFETY: the kernel writes one statvfs; the path is NUL-terminated.
    unsafe {
        let mut stat: libc::statvfs = std::mem::zeroed();
        check(libc::statvfs(path.as_ptr(), &raw mut stat).into())?;
        Ok(stat.f_bavail * stat.f_frsize)
    }
}
