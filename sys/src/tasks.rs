//! Attributes of any task, not only our own: scheduling (sched(7)), futexes, core scheduling. 0 means the calling
//! thread.
#![allow(unsafe_code)]

use crate::{Errno, Result};

/// sched_getattr(2): a `struct sched_attr` of the kernel's size; empty on failure.
pub fn scheduling(tid: i32) -> Vec<u8> {
    /// Room for `struct sched_attr` of later kernels; its first four bytes are the size.
    const ROOM: usize = 128;
    let mut attr = vec![0u8; ROOM];
    let at = attr.as_mut_ptr();
    // SAFETY: the kernel writes at most ROOM bytes.
    let r = unsafe { libc::syscall(libc::SYS_sched_getattr, tid, at, ROOM, 0) };
    let size = attr
        .first_chunk()
        .map_or(0, |b| u32::from_le_bytes(*b) as usize);
    attr.truncate(if r == 0 { size.min(ROOM) } else { 0 });
    attr
}

/// sched_getaffinity(2): a bit for each CPU; empty on failure.
pub fn affinity(tid: i32) -> Vec<u8> {
    /// Room for 8,192 CPUs.
    const ROOM: usize = 1024;
    let mut affinity = vec![0u8; ROOM];
    let at = affinity.as_mut_ptr();
    // SAFETY: the kernel writes at most ROOM bytes and returns how many.
    let n = unsafe { libc::syscall(libc::SYS_sched_getaffinity, tid, ROOM, at) };
    affinity.truncate(n.max(0) as usize);
    affinity
}

/// `IOPRIO_WHO_PROCESS`, which selects one task.
pub const IOPRIO_WHO_PROCESS: u64 = 1;

/// ioprio_get(2): class and data; 0 follows the nice value.
pub fn io_priority(tid: i32) -> i32 {
    // SAFETY: a system call without pointers.
    let io = unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, tid) };
    io.max(0) as i32
}

/// ioprio_set(2) of this thread.
///
/// # Errors
/// `EPERM` for a real-time class without CAP_SYS_NICE.
pub fn set_io_priority(priority: i32) -> Result<()> {
    // SAFETY: a system call without pointers.
    let r = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, priority) };
    Errno::result(r).map(drop)
}

/// The nice value, -20 to 19; 0 on failure.
pub fn nice(tid: i32) -> i32 {
    // SAFETY: a call without pointers. The raw call answers 20 minus the nice value.
    let nice = unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, tid) };
    if nice > 0 { 20 - nice as i32 } else { 0 }
}

/// Drops a real-time policy and a negative nice value of this thread, which needs no privilege.
pub fn become_ordinary() {
    let other = libc::sched_param { sched_priority: 0 };
    // SAFETY: one live structure; the other call has no pointers.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_OTHER, &raw const other) };
    if nice(0) < 0 {
        // SAFETY: a call without pointers.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 0) };
    }
}

/// get_robust_list(2): address and length of the list head.
///
/// # Errors
/// `EPERM` without permission to trace the task, `ESRCH` when there is none.
pub fn robust_list(tid: i32) -> Result<(u64, u64)> {
    let (mut head, mut len) = (0u64, 0u64);
    let (to, to_len) = (&raw mut head, &raw mut len);
    // SAFETY: the kernel writes one word each.
    let r = unsafe { libc::syscall(libc::SYS_get_robust_list, tid, to, to_len) };
    Errno::result(r).map(|_| (head, len))
}

/// prlimit(2): the soft and the hard limit of a process (`RLIMIT_*`), in the resource's unit.
///
/// # Errors
/// `EPERM` for a process of another user, `EINVAL` for a resource that the kernel does not know.
pub fn limit(pid: i32, resource: i32) -> Result<(u64, u64)> {
    let mut old = libc::rlimit64 {
        rlim_cur: 0,
        rlim_max: 0,
    };
    let none = std::ptr::null();
    // SAFETY: no new limit is passed; `old` is a live rlimit64 that the kernel fills.
    let r = unsafe { libc::prlimit64(pid, resource as _, none, &raw mut old) };
    Errno::result(r).map(|_| (old.rlim_cur, old.rlim_max))
}

// include/uapi/linux/prctl.h
const PR_SCHED_CORE: libc::c_int = 62;
const PR_SCHED_CORE_GET: libc::c_ulong = 0;
const PR_SCHED_CORE_CREATE: libc::c_ulong = 1;
const PR_SCHED_CORE_SHARE_TO: libc::c_ulong = 2;
const PR_SCHED_CORE_SHARE_FROM: libc::c_ulong = 3;

fn sched_core(operation: libc::c_ulong, tid: i32, answer: *mut u64) -> Result<()> {
    /// `PR_SCHED_CORE_SCOPE_THREAD`: one task.
    const ONE_TASK: libc::c_ulong = 0;
    // SAFETY: `answer` is null, or points to a number for PR_SCHED_CORE_GET, the only operation that writes there.
    let r = unsafe { libc::prctl(PR_SCHED_CORE, operation, tid, ONE_TASK, answer) };
    Errno::result(r).map(drop)
}

/// `PR_SCHED_CORE_GET`: a hash of the cookie; 0 without a cookie or without core scheduling.
pub fn core_cookie(tid: i32) -> u64 {
    let mut cookie = 0;
    match sched_core(PR_SCHED_CORE_GET, tid, &raw mut cookie) {
        Ok(()) => cookie,
        Err(_) => 0,
    }
}

/// `PR_SCHED_CORE_CREATE`: a new cookie.
///
/// # Errors
/// `EINVAL` where the kernel has no core scheduling, `ENODEV` where the cores run one thread each.
pub fn new_core_cookie(tid: i32) -> Result<()> {
    sched_core(PR_SCHED_CORE_CREATE, tid, std::ptr::null_mut())
}

/// `PR_SCHED_CORE_SHARE_FROM`: this thread takes the cookie of `tid`.
///
/// # Errors
/// As for [`new_core_cookie`]; `EPERM` without permission to trace the task.
pub fn take_core_cookie(tid: i32) -> Result<()> {
    sched_core(PR_SCHED_CORE_SHARE_FROM, tid, std::ptr::null_mut())
}

/// `PR_SCHED_CORE_SHARE_TO`: `tid` gets the cookie of this thread.
///
/// # Errors
/// As for [`take_core_cookie`].
pub fn give_core_cookie(tid: i32) -> Result<()> {
    sched_core(PR_SCHED_CORE_SHARE_TO, tid, std::ptr::null_mut())
}
