//! Attributes of our own process: prctl(2), arch_prctl(2).
#![allow(unsafe_code)]

use std::ffi::CStr;

use crate::{Errno, Result};

/// prctl(2) with a number and no address.
fn set(option: i32, value: u64) {
    // SAFETY: called with options that take no pointer. With the values given here it cannot fail, or failure does no
    // harm.
    unsafe { libc::prctl(option, value, 0u64, 0u64, 0u64) };
}

/// `PR_SET_NAME`: the comm of this thread, 15 bytes at most.
pub fn set_name(name: &CStr) {
    // SAFETY: a C string.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// `PR_SET_PDEATHSIG`: whether the kernel kills us when our parent ends.
pub fn die_with_parent(yes: bool) {
    set(
        libc::PR_SET_PDEATHSIG,
        if yes { libc::SIGKILL as u64 } else { 0 },
    );
}

/// `PR_SET_CHILD_SUBREAPER`: orphaned descendants become our children.
pub fn adopt_orphans() {
    set(libc::PR_SET_CHILD_SUBREAPER, 1);
}

/// `PR_SET_DUMPABLE`: our files in `/proc` stay ours after a change of ids.
pub fn make_dumpable() {
    set(libc::PR_SET_DUMPABLE, 1);
}

/// `PR_SET_PTRACER`: lets a process and its descendants trace us where Yama allows that to ancestors only. Kernels
/// without Yama refuse it and do not need it.
pub fn let_trace(pid: u32) {
    set(libc::PR_SET_PTRACER, pid.into());
}

/// Get operations with numeric operands only: the call (prctl(2) or arch_prctl(2)) and its option.
const NUMBERS_ONLY: [(libc::c_long, i32); 6] = [
    (libc::SYS_prctl, libc::PR_MCE_KILL_GET),
    (libc::SYS_prctl, libc::PR_GET_THP_DISABLE),
    (libc::SYS_prctl, PR_GET_SPECULATION_CTRL),
    (libc::SYS_prctl, PR_GET_MDWE),
    (libc::SYS_prctl, PR_GET_MEMORY_MERGE),
    (libc::SYS_arch_prctl, ARCH_GET_CPUID),
];
// include/uapi/linux/prctl.h, arch/x86/include/uapi/asm/prctl.h
const PR_GET_SPECULATION_CTRL: i32 = 52;
const PR_GET_MDWE: i32 = 66;
const PR_GET_MEMORY_MERGE: i32 = 68;
const ARCH_GET_CPUID: i32 = 0x1011;

/// The result of one of these get operations.
///
/// # Errors
/// `EINVAL` where the kernel does not know it, and for an operation not listed above.
pub fn get_number(call: libc::c_long, option: u64, which: u64) -> Result<i64> {
    if !NUMBERS_ONLY
        .iter()
        .any(|&(nr, known)| (nr, known as u64) == (call, option))
    {
        return Err(Errno::EINVAL);
    }
    // SAFETY: a get call without pointers.
    Errno::result(unsafe { libc::syscall(call, option, which, 0, 0, 0) })
}

/// `PR_GET_TSC`: whether this thread may read the time stamp counter, `PR_TSC_ENABLE` or `PR_TSC_SIGSEGV`.
///
/// # Errors
/// `EINVAL` where the kernel does not know it.
pub fn tsc() -> Result<i32> {
    let mut written = 0i32;
    // SAFETY: the kernel writes an int.
    let answer = unsafe { libc::prctl(libc::PR_GET_TSC, &raw mut written, 0, 0, 0) };
    Errno::result(answer).map(|_| written)
}
