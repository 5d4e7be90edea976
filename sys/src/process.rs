//! Our own processes: creation, end and wait.
//!
//! There are three ways to create one. [`fork`] is the C library's; its child may do whatever we may. [`fork_bare`]
//! and [`fork_under`] are the bare system call, without the C library's preparations: in a multithreaded process the
//! child should make system calls only, since it would wait forever for a lock that another thread holds. A
//! [helper](crate::helper) is a bare fork that completes its work.
//!
//! # Why this is not `unsafe`
//!
//! The child is a copy of us in which only the calling thread continues. To it all other threads have stopped for
//! good: a lock that one of them holds stays locked, and what it guards is never seen half changed. So a child may
//! wait forever, but it cannot corrupt memory, as long as nothing borrows memory shared by both processes
//! (`MAP_SHARED`), which nothing here hands out. Its descriptor table is its own. Children that share the table or
//! the memory with us (`CLONE_FILES`, `CLONE_VM`) are created in this crate only, completely.
#![allow(unsafe_code)]

use std::arch::asm;
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::helper::{Undisturbed, close_others};
use crate::{Errno, Result};

/// The two sides of a fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fork {
    /// In the new process.
    Child,
    /// In the calling process, with the pid of the child.
    Parent(i32),
}

impl Fork {
    fn of(answer: libc::c_long) -> Result<Self> {
        Ok(match Errno::result(answer)? {
            0 => Fork::Child,
            pid => Fork::Parent(pid as i32),
        })
    }
}

/// fork(2) of the C library.
///
/// # Errors
/// `EAGAIN` and `ENOMEM`, when no process can be created.
pub fn fork() -> Result<Fork> {
    // SAFETY: see the head of this file.
    Fork::of(unsafe { libc::fork() }.into())
}

/// The bare system call, with SIGCHLD as the exit signal.
///
/// # Errors
/// As for [`fork`].
pub fn fork_bare() -> Result<Fork> {
    // SAFETY: without CLONE_VM and CLONE_FILES.
    Fork::of(unsafe { clone(libc::SIGCHLD) })
}

/// clone(2) on the current stack: without `CLONE_VM` it is a fork. The lowest byte of the flags is the exit signal.
///
/// # Safety
/// With `CLONE_VM` the child would run on our stack; with `CLONE_FILES` it must not drop owners of descriptors.
pub(crate) unsafe fn clone(flags: i32) -> libc::c_long {
    // SAFETY: our caller promises it.
    unsafe { libc::syscall(libc::SYS_clone, libc::c_long::from(flags), 0, 0, 0, 0) }
}

/// `struct clone_args` of clone3(2).
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

/// A bare fork with that pid (`set_tid` of clone3(2), Linux 5.5).
///
/// # Errors
/// `EEXIST` when the pid is taken, `EPERM` without CAP_CHECKPOINT_RESTORE, `EINVAL` for an invalid pid; `ENOSYS`
/// where the call is not available.
pub fn fork_under(pid: i32) -> Result<Fork> {
    let mut args = CloneArgs {
        exit_signal: libc::SIGCHLD as u64,
        set_tid: (&raw const pid) as u64,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    // SAFETY: live arguments of that size; without CLONE_VM this is a fork.
    Fork::of(unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) })
}

/// Whether we may choose pids. Asks for a fork with our own pid, which always fails: with `EEXIST` only if the choice
/// is permitted.
pub fn may_choose_pids() -> bool {
    match fork_under(std::process::id() as i32) {
        Ok(Fork::Child) => leave(0),
        answer => answer == Err(Errno::EEXIST),
    }
}

/// _exit(2): ends this process without running exit handlers, which are the parent's.
pub fn leave(code: i32) -> ! {
    // SAFETY: a call without pointers, from which nothing returns.
    unsafe { libc::_exit(code) }
}

/// Ends this process with that wait status: exits with the code, or dies of the signal, without a core file.
pub fn end_as(status: i32) -> ! {
    let signal = status & 0x7f;
    if signal != 0 {
        let none = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        let (default, mask) = ([0u64; 4], 0u64);
        // SAFETY: system calls on live structures of the sizes that they read; the default action runs no code.
        unsafe {
            libc::setrlimit(libc::RLIMIT_CORE, &raw const none);
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), 0, 8);
            let set = libc::SIG_SETMASK;
            libc::syscall(libc::SYS_rt_sigprocmask, set, &raw const mask, 0, 8);
            libc::syscall(libc::SYS_kill, libc::syscall(libc::SYS_getpid), signal);
        }
    }
    leave(status >> 8 & 0xff)
}

/// Status that wait(2) reports of a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Exited with this code.
    Exited(i32),
    /// Killed by this signal.
    Killed(i32),
    /// Stopped by this signal.
    Stopped(i32),
    /// Continued by SIGCONT.
    Continued,
}

impl Status {
    fn of(status: i32) -> Self {
        if libc::WIFEXITED(status) {
            Status::Exited(libc::WEXITSTATUS(status))
        } else if libc::WIFSIGNALED(status) {
            Status::Killed(libc::WTERMSIG(status))
        } else if libc::WIFSTOPPED(status) {
            Status::Stopped(libc::WSTOPSIG(status))
        } else {
            Status::Continued
        }
    }

    /// The exit code, or 128 plus the signal as in a shell; `None` while it lives.
    pub fn code(self) -> Option<i32> {
        match self {
            Status::Exited(code) => Some(code),
            Status::Killed(signal) => Some(128 + signal),
            Status::Stopped(_) | Status::Continued => None,
        }
    }
}

/// waitpid(2), restarted after a signal: pid and status (-1 waits for any child); `None` with `WNOHANG` when there is
/// nothing to report. nix's own fails on children killed by a real-time signal, after having reaped them.
///
/// # Errors
/// `ECHILD` when there is no such child.
pub fn wait(pid: i32, options: i32) -> Result<Option<(i32, Status)>> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is live.
        match Errno::result(unsafe { libc::waitpid(pid, &raw mut status, options) }) {
            Ok(0) => return Ok(None),
            Ok(pid) => return Ok(Some((pid, Status::of(status)))),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Waits for the end of a child, also of one without an exit signal (`__WALL`).
///
/// # Errors
/// As for [`wait`].
pub fn end_of(pid: i32) -> Result<Status> {
    match wait(pid, libc::__WALL)? {
        Some((_, status)) => Ok(status),
        None => Err(Errno::ECHILD),
    }
}

/// A child that has ended and is not reaped (`WNOWAIT` of waitid(2)); it stays a zombie. Other zombies are hidden
/// behind the first.
pub fn some_ended() -> Option<i32> {
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: plain integers and pointers, for which zero is valid.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one siginfo; it stays zero when there is nothing to report.
    let pid = unsafe {
        match libc::waitid(libc::P_ALL, 0, &raw mut info, options) {
            0 => info.si_pid(),
            _ => 0,
        }
    };
    (pid > 0).then_some(pid)
}

/// Runs `work` in a child made by [`fork`] and returns its result.
///
/// # Errors
/// Those of `work` and [`fork`]; `EINTR` when the child was killed.
pub fn in_a_child(work: impl FnOnce() -> Result<()>) -> Result<()> {
    match fork()? {
        Fork::Child => {
            let _ends = LeaveOnUnwind;
            leave(work().err().map_or(0, |errno| errno as i32))
        }
        Fork::Parent(child) => match end_of(child)? {
            Status::Exited(0) => Ok(()),
            Status::Exited(errno) => Err(Errno::from_raw(errno)),
            _ => Err(Errno::EINTR),
        },
    }
}

/// A panic in a child must not unwind into frames of its parent.
pub(crate) struct LeaveOnUnwind;

impl Drop for LeaveOnUnwind {
    fn drop(&mut self) {
        leave(101)
    }
}

/// kill(2). Signal 0 only checks whether it could be sent.
///
/// # Errors
/// `ESRCH` when there is no such process or group, `EPERM` without permission.
pub fn kill(pid: i32, signal: i32) -> Result<()> {
    // SAFETY: a call without pointers.
    Errno::result(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// tgkill(2): a signal for one thread.
///
/// # Errors
/// As for [`kill`].
pub fn kill_thread(process: i32, thread: i32, signal: i32) -> Result<()> {
    // SAFETY: a call without pointers.
    let sent = unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) };
    Errno::result(sent).map(drop)
}

/// sigqueue(3): a signal with a value.
///
/// # Errors
/// As for [`kill`].
pub fn queue_signal(pid: i32, signal: i32, value: u64) -> Result<()> {
    let sival_ptr = value as *mut libc::c_void;
    // SAFETY: the value is handed on and not used as an address.
    Errno::result(unsafe { libc::sigqueue(pid, signal, libc::sigval { sival_ptr }) }).map(drop)
}

/// Registers a function to run in the child of a command between fork and exec, where it should make system calls
/// only if we are multithreaded. Its error becomes that of `spawn`. The standard library turns a panic into an abort
/// of the child.
pub fn before_exec(
    command: &mut Command,
    call: impl FnMut() -> std::io::Result<()> + Send + Sync + 'static,
) {
    // SAFETY: see the head of this file.
    unsafe { command.pre_exec(call) };
}

/// Closes every descriptor but the standard streams and `kept`, runs `main`, and ends this process: inherited
/// descriptors would look as if they were in use. Nothing of the caller's is dropped; `main` must not use more than
/// is kept.
pub fn stay(kept: &[RawFd], main: impl FnOnce() -> i32) -> ! {
    let mut kept: Vec<u32> = kept.iter().map(|fd| *fd as u32).chain([0, 1, 2]).collect();
    kept.sort_unstable();
    // SAFETY: this process ends here, with the result of `main`.
    unsafe { close_others(&kept) };
    drop(kept);
    // SAFETY: returns freed memory to the kernel.
    unsafe { libc::malloc_trim(0) };
    let _ends = LeaveOnUnwind;
    leave(main())
}

/// Creates a child that ends at once, in our memory and without a signal. Returns its pid, which is free again. Takes
/// some 25 µs.
///
/// # Errors
/// As for [`fork`].
pub fn take_pid() -> Result<i32> {
    const FLAGS: u64 = (libc::CLONE_VM | libc::CLONE_VFORK) as u64;
    let _undisturbed = Undisturbed::begin();
    let answer: i64;
    // SAFETY: in the child rax is 0; it makes one more system call, exit, with registers of its own, and uses no
    // memory. We wait meanwhile (CLONE_VFORK). All its signals are blocked, and it has no exit signal.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor edi, edi",
            "mov eax, 60",
            "syscall",
            "2:",
            inlateout("rax") libc::SYS_clone => answer,
            in("rdi") FLAGS, in("rsi") 0, in("rdx") 0, in("r10") 0, in("r8") 0,
            lateout("rcx") _, lateout("r11") _,
        );
    }
    if answer < 0 {
        return Err(Errno::from_raw(-answer as i32));
    }
    end_of(answer as i32).map(|_| answer as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_answers() {
        assert_eq!(in_a_child(|| Ok(())), Ok(()));
        assert_eq!(in_a_child(|| Err(Errno::EXDEV)), Err(Errno::EXDEV));
        assert_eq!(
            in_a_child(|| panic!("in a child")),
            Err(Errno::from_raw(101))
        );
        let killed = in_a_child(|| kill(std::process::id() as i32, libc::SIGKILL));
        assert_eq!(killed, Err(Errno::EINTR));
    }

    #[test]
    fn a_status_is_told_as_a_shell_does() {
        let Fork::Parent(child) = fork().unwrap() else {
            leave(7)
        };
        assert_eq!(end_of(child), Ok(Status::Exited(7)));
        assert_eq!(Status::Killed(9).code(), Some(137));
        assert_eq!(Status::Stopped(19).code(), None);
        assert_eq!(wait(child, 0), Err(Errno::ECHILD));
    }
    #[test]
    fn a_taken_pid_leaves_no_child() {
        let id = take_pid().expect("a process can be created");
        assert!(id > 0);
        assert_eq!(kill(id, 0), Err(Errno::ESRCH));
        assert_eq!(end_of(id), Err(Errno::ECHILD));
    }

    #[test]
    fn what_fails_before_an_exec_is_told() {
        let mut command = Command::new("/bin/true");
        before_exec(&mut command, || Err(Errno::EXDEV.into()));
        let failed = command.spawn().unwrap_err();
        assert_eq!(failed.raw_os_error(), Some(libc::EXDEV));
        let mut command = Command::new("/bin/true");
        before_exec(&mut command, || panic!("before an exec"));
        assert!(!command.status().unwrap().success());
    }
}
