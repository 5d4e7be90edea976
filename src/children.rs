//! Children of this process: their creation under a chosen pid, what has become of them, and what one that
//! stays lets go of.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::os::fd::RawFd;

use nix::errno::Errno;

#[repr(C, align(8))]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// A fork under that pid; 0 in the child.
///
/// # Safety
/// As for fork(2), which is without conditions only where there is one thread.
pub unsafe fn clone_under(pid: i32) -> nix::Result<i32> {
    let mut args = CloneArgs {
        exit_signal: libc::SIGCHLD as u64,
        set_tid: (&raw const pid) as u64,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    let size = std::mem::size_of::<CloneArgs>();
    // SAFETY: live arguments of that size; without CLONE_VM this is a fork.
    let r = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size) };
    Errno::result(r as i32)
}

/// What has become of a child, or of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It has ended, with this exit code or 128 plus this signal.
    Ended(i32),
    /// It was stopped by this signal.
    Stopped(i32),
}

/// Makes orphans among the descendants of this process its children (prctl(2)).
pub fn adopt_orphans() {
    // SAFETY: a call without pointers.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
}

/// Waits for children that have ended and are none of `known`: orphans that we have adopted.
pub fn reap_adopted(known: &[i32]) {
    loop {
        let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
        let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        // SAFETY: the kernel writes one siginfo; it stays zero when there is nothing to tell.
        let pid = unsafe {
            if libc::waitid(libc::P_ALL, 0, info.as_mut_ptr(), options) != 0 {
                return;
            }
            info.assume_init().si_pid()
        };
        // The first one that can be told hides others; it is waited for soon.
        if pid == 0 || known.contains(&pid) {
            return;
        }
        // SAFETY: the status is not asked for.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::WNOHANG) };
    }
}

/// Asks what has become of a child of ours, without waiting.
pub fn changed(pid: i32) -> nix::Result<Option<Change>> {
    let mut status = 0;
    // SAFETY: `status` outlives the call. nix's own waitpid fails on children that a real-time
    // signal ended, after having reaped them.
    let waited = unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG | libc::WUNTRACED) };
    if Errno::result(waited)? == 0 {
        return Ok(None);
    }
    Ok(Some(if libc::WIFEXITED(status) {
        Change::Ended(libc::WEXITSTATUS(status))
    } else if libc::WIFSIGNALED(status) {
        Change::Ended(128 + libc::WTERMSIG(status))
    } else {
        Change::Stopped(libc::WSTOPSIG(status))
    }))
}

/// Lets go of directory, standard streams and every other descriptor but those `kept`: what a process that
/// stays with a job held open would seem to be in use.
pub fn let_go(kept: &[RawFd]) {
    let _ = std::env::set_current_dir("/");
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null");
    if let Ok(null) = &null {
        let _ = nix::unistd::dup2_stdin(null);
        let _ = nix::unistd::dup2_stdout(null);
        let _ = nix::unistd::dup2_stderr(null);
    }
    drop(null);
    let mut kept: Vec<u32> = kept.iter().map(|fd| *fd as u32).collect();
    kept.sort_unstable();
    let mut from = 3;
    for fd in kept.into_iter().chain([u32::MAX]) {
        if from < fd {
            // SAFETY: nothing is left in this process that owns another descriptor.
            unsafe { libc::close_range(from, fd - 1, 0) };
        }
        from = fd.saturating_add(1);
    }
    // SAFETY: memory that was freed is given back.
    unsafe { libc::malloc_trim(0) };
}
