//! Children of our own, copies of one of our threads that make system calls only. A [`Child`] tries things that would
//! change us, and never outlives us. A [`Helper`] does what must not be left half done, and does outlive us. Why this
//! is not `unsafe`: see [`process`](crate::process). A child that allocates or takes a lock may wait forever, and so
//! does its waiter.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use crate::process::{LeaveOnUnwind, Status, clone, end_of, leave};
use crate::{Errno, Result};

/// A child that is killed and reaped when dropped.
#[derive(Debug)]
pub struct Child(libc::pid_t);

impl Child {
    /// `main` runs in a copy of one of our threads and may make system calls only. The child has no descriptors:
    /// locks that we hold must be released when we are killed, even if the child ends later.
    pub fn start(main: fn() -> !) -> Option<Self> {
        Self::start_with(|| main())
    }

    /// The same with a closure; when it returns, the child ends.
    pub fn start_with(main: impl FnOnce()) -> Option<Self> {
        let parent = std::process::id();
        match split() {
            Ok(0) => {
                let _ends = LeaveOnUnwind;
                die_with(parent);
                // SAFETY: a plain system call; what owns a descriptor here is never dropped.
                unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) };
                main();
                leave(1)
            }
            Ok(pid) => Some(Self(pid)),
            Err(_) => None,
        }
    }

    /// Its pid.
    pub fn pid(&self) -> libc::pid_t {
        self.0
    }

    /// Waits until it stops itself or ends; whether it has stopped.
    pub fn is_stopped(&self) -> bool {
        let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
        let options = libc::WSTOPPED | libc::WEXITED | libc::WNOWAIT | libc::__WALL;
        // SAFETY: the kernel fills the structure, of which zero is a valid value.
        unsafe {
            while libc::waitid(libc::P_PID, self.0 as u32, info.as_mut_ptr(), options) < 0 {
                if Errno::last() != Errno::EINTR {
                    return false;
                }
            }
            info.assume_init().si_code == libc::CLD_STOPPED
        }
    }

    /// Its exit code, when it exits.
    pub fn exit_code(self) -> Option<i32> {
        let pid = self.0;
        std::mem::forget(self);
        exit_code(pid).ok()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: the child has not been waited for, so the pid is still its own.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), libc::__WALL);
        }
    }
}

/// A child that completes its work even if we are killed: it is in a session of its own, so that a signal to our
/// group does not reach it, and blocks every signal. It ends by itself, even if it is not waited for.
#[derive(Debug)]
#[must_use]
pub struct Helper(libc::pid_t);

impl Helper {
    /// `work` returns the exit code. It runs in a copy of one of our threads and may make system calls only; it must
    /// not allocate or lock. A panic ends it with 101.
    ///
    /// # Errors
    /// Those of clone(2).
    pub fn start(work: impl FnOnce() -> i32) -> Result<Self> {
        let _undisturbed = Undisturbed::begin();
        match split()? {
            0 => {
                let _ends = LeaveOnUnwind;
                // SAFETY: a call without pointers.
                unsafe { libc::setsid() };
                leave(work())
            }
            pid => Ok(Self(pid)),
        }
    }

    /// The same with no descriptors but `kept`: our others are then closed when we end, not when the helper does.
    ///
    /// # Errors
    /// As for [`start`](Self::start).
    pub fn start_with(kept: &[BorrowedFd<'_>], work: impl FnOnce() -> i32) -> Result<Self> {
        let kept = sorted(kept);
        Self::start(|| {
            // SAFETY: nothing that the helper drops owns a descriptor.
            unsafe { close_others(&kept) };
            work()
        })
    }

    /// Waits for its end. Returns its exit code.
    ///
    /// # Errors
    /// `EINTR` when it was killed.
    pub fn wait(self) -> Result<i32> {
        exit_code(self.0)
    }

    /// Starts a helper and waits for it, with our own signals blocked.
    ///
    /// # Errors
    /// As for [`start`](Self::start) and [`wait`](Self::wait).
    pub fn run(work: impl FnOnce() -> i32) -> Result<i32> {
        let _undisturbed = Undisturbed::begin();
        Self::start(work)?.wait()
    }
}

impl Helper {
    /// The same with a value to fill in: it takes the helper's value when the helper has exited regularly. The helper
    /// works on a copy and hands it over at its end.
    ///
    /// # Errors
    /// As for [`run`](Self::run), and `ENOMEM`.
    pub fn run_with<T: Copy>(value: &mut T, work: impl FnOnce(&mut T) -> i32) -> Result<i32> {
        let shared = Shared::<T>::new()?;
        let code = Self::run(|| {
            let code = work(value);
            shared.put(value);
            code
        })?;
        *value = shared.take().unwrap_or(*value);
        Ok(code)
    }
}

/// Memory shared with a helper, for one value that it hands over.
struct Shared<T>(NonNull<Handed<T>>);

#[repr(C)]
struct Handed<T> {
    value: MaybeUninit<T>,
    is_there: bool,
}

impl<T: Copy> Shared<T> {
    fn new() -> Result<Self> {
        let (prot, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
        );
        // SAFETY: a new mapping; zero is valid for what is in it.
        let at = unsafe {
            let len = size_of::<Handed<T>>();
            libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0)
        };
        let found = NonNull::new(at.cast()).filter(|_| at != libc::MAP_FAILED);
        found.map(Self).ok_or_else(Errno::last)
    }

    fn put(&self, value: &T) {
        // SAFETY: the mapping has room for it; nothing borrows from it, here or in the other process.
        unsafe {
            let at = self.0.as_ptr();
            (&raw mut (*at).value).write(MaybeUninit::new(*value));
            (&raw mut (*at).is_there).write(true);
        }
    }

    fn take(self) -> Option<T> {
        // SAFETY: as above; the process that wrote it has ended, and the flag says that it wrote all of it.
        unsafe {
            let at = self.0.as_ptr();
            let is_there = (&raw const (*at).is_there).read();
            is_there.then(|| (&raw const (*at).value).read().assume_init())
        }
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: our mapping, of that size, from which nothing borrows.
        unsafe { libc::munmap(self.0.as_ptr().cast(), size_of::<Handed<T>>()) };
    }
}

/// Blocks all signals of this thread while it lives.
pub struct Undisturbed(libc::sigset_t);

impl Undisturbed {
    /// Blocks them now.
    #[must_use]
    pub fn begin() -> Self {
        // SAFETY: sets of ours; the first is filled in before it is used.
        unsafe {
            let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            Self(before)
        }
    }
}

impl Drop for Undisturbed {
    fn drop(&mut self) {
        // SAFETY: the previous mask.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut())
        };
    }
}

/// fork(2) without an exit signal: where SIGCHLD is ignored, the kernel would reap the child before we can wait for
/// it.
fn split() -> Result<libc::pid_t> {
    // SAFETY: without flags clone changes nothing of ours.
    Errno::result(unsafe { clone(0) }).map(|pid| pid as libc::pid_t)
}

/// Waits for a child of ours that nothing else waits for.
fn exit_code(pid: libc::pid_t) -> Result<i32> {
    match end_of(pid)? {
        Status::Exited(code) => Ok(code),
        _ => Err(Errno::EINTR),
    }
}

/// Their numbers, ascending.
pub(crate) fn sorted(fds: &[BorrowedFd<'_>]) -> Vec<u32> {
    let mut numbers: Vec<u32> = fds.iter().map(|fd| fd.as_raw_fd() as u32).collect();
    numbers.sort_unstable();
    numbers
}

/// Closes all descriptors but those, by close_range(2).
///
/// # Safety
/// No owner of another descriptor may be used afterwards.
pub(crate) unsafe fn close_others(kept: &[u32]) {
    let mut from = 0;
    for fd in kept.iter().copied().chain([u32::MAX]) {
        if from < fd {
            // SAFETY: our caller promises it.
            unsafe { libc::syscall(libc::SYS_close_range, from, fd - 1, 0) };
        }
        from = fd.saturating_add(1);
    }
}

/// `PR_SET_PDEATHSIG`: kills the child when the parent ends, also if it has already ended.
pub fn die_with(parent: u32) {
    // SAFETY: plain system calls.
    unsafe {
        libc::syscall(
            libc::SYS_prctl,
            libc::PR_SET_PDEATHSIG,
            libc::SIGKILL,
            0,
            0,
            0,
        );
        // 0 is a parent in an outer pid namespace.
        if ![0, i64::from(parent)].contains(&libc::syscall(libc::SYS_getppid)) {
            libc::_exit(0);
        }
    }
}

/// pause(2) until it is killed.
pub fn pause_forever() -> ! {
    loop {
        // SAFETY: a plain system call.
        unsafe { libc::syscall(libc::SYS_pause) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_helper_is_out_of_reach_of_signals() {
        const TERM: u64 = 1 << (libc::SIGTERM - 1);
        let blocked = || {
            let mut mask = 0u64;
            let to = &raw mut mask;
            // SAFETY: asks for the mask, eight bytes.
            unsafe { libc::syscall(libc::SYS_rt_sigprocmask, 0, 0, to, 8) };
            mask & TERM != 0
        };
        // SAFETY: calls without pointers.
        let leads = || unsafe { libc::getsid(0) == libc::getpid() };
        let own = Helper::run(|| i32::from(leads() && blocked()));
        let killed = Helper::run(|| {
            let _ = crate::process::kill(std::process::id() as i32, libc::SIGKILL);
            0
        });
        assert_eq!((own, killed), (Ok(1), Err(Errno::EINTR)));
        assert_eq!(Helper::run(|| panic!("in a helper")), Ok(101));
        assert!(!blocked(), "our own mask is as it was");
    }

    #[test]
    fn a_helper_hands_over_what_it_filled() {
        let mut value = [1u64; 3000];
        let fill = |value: &mut [u64; 3000]| {
            value.fill(7);
            5
        };
        assert_eq!(Helper::run_with(&mut value, fill), Ok(5));
        assert_eq!(value, [7; 3000]);
        let spoil = |value: &mut [u64; 3000]| {
            value.fill(8);
            panic!("in a helper")
        };
        assert_eq!(Helper::run_with(&mut value, spoil), Ok(101));
        assert_eq!(value, [7; 3000]);
    }
}
