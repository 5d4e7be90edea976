//! Children of our own, copies of one thread of us that make system calls and nothing else: a `Child`
//! to try things on that would change us, which never outlives us, and a [`Helper`] to do something
//! that must not be left half done, which does.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;

use nix::errno::Errno;

/// A child that is killed and waited for when dropped.
#[derive(Debug)]
pub(crate) struct Child(libc::pid_t);

impl Child {
    /// `main` runs in a copy of one thread of us: it may make system calls and nothing else.
    pub(crate) fn start(main: fn() -> !) -> Option<Self> {
        Self::start_with(|| main())
    }

    /// The same with something to take along; when it returns the child ends.
    pub(crate) fn start_with(main: impl FnOnce()) -> Option<Self> {
        let parent = std::process::id();
        // SAFETY: the child makes only system calls: no allocation, no lock, no destructor.
        match unsafe { split() } {
            0 => {
                die_with(parent);
                // What we have locked is to be free when we are killed, before this one is.
                // SAFETY: a plain system call; the child uses no descriptor.
                unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) };
                main();
                // SAFETY: ends the child.
                unsafe { libc::_exit(1) }
            }
            pid if pid > 0 => Some(Self(pid)),
            _ => None,
        }
    }

    pub(crate) fn pid(&self) -> libc::pid_t {
        self.0
    }

    /// Waits until it has stopped itself; whether it has not ended instead.
    pub(crate) fn is_stopped(&self) -> bool {
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

    /// What it exited with, when it does.
    pub(crate) fn exit_code(self) -> Option<i32> {
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

/// A child that does its work to the end, whatever becomes of us: it is in a session of its own, so that
/// what kills our group does not reach it, and has every signal blocked. It ends by itself, also when
/// nobody waits for it.
#[derive(Debug)]
#[must_use]
pub struct Helper(libc::pid_t);

impl Helper {
    /// `work` answers the exit code.
    ///
    /// # Errors
    /// When there can be no process.
    ///
    /// # Safety
    /// `work` runs in a copy of one thread of us: it may make system calls, and nothing that allocates,
    /// locks or panics.
    pub unsafe fn start(work: impl FnOnce() -> i32) -> Result<Self, Errno> {
        let _undisturbed = Undisturbed::begin();
        // SAFETY: the child makes only system calls, as our caller promises, and leaves by _exit.
        unsafe {
            match split() {
                0 => {
                    libc::setsid();
                    libc::_exit(work())
                }
                pid => Errno::result(pid).map(Self),
            }
        }
    }

    /// Waits for its end; what it exited with.
    ///
    /// # Errors
    /// `EINTR` when something killed it.
    pub fn wait(self) -> Result<i32, Errno> {
        exit_code(self.0)
    }

    /// Starts one and waits for it, while our own signals wait too.
    ///
    /// # Errors
    /// As of the two.
    ///
    /// # Safety
    /// As for [`start`](Self::start).
    pub unsafe fn run(work: impl FnOnce() -> i32) -> Result<i32, Errno> {
        let _undisturbed = Undisturbed::begin();
        // SAFETY: our caller promises it.
        unsafe { Self::start(work) }?.wait()
    }
}

/// All signals of this thread wait while it lives.
pub struct Undisturbed(libc::sigset_t);

impl Undisturbed {
    /// From now on.
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
        // SAFETY: the mask that there was.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut())
        };
    }
}

/// fork(2), but for the exit signal, which is none: where SIGCHLD is ignored the kernel would reap the
/// child before it can be asked. Nor are there the C library's preparations, which let a child allocate.
///
/// # Safety
/// In the child only system calls may be made.
unsafe fn split() -> libc::pid_t {
    // SAFETY: without flags clone changes nothing of ours.
    unsafe { libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) as libc::pid_t }
}

/// Waits for a child of ours that nobody else waits for.
fn exit_code(pid: libc::pid_t) -> Result<i32, Errno> {
    let mut what = 0;
    // SAFETY: `what` lives on.
    while unsafe { libc::waitpid(pid, &raw mut what, libc::__WALL) } < 0 {
        if Errno::last() != Errno::EINTR {
            return Err(Errno::last());
        }
    }
    match libc::WIFEXITED(what) {
        true => Ok(libc::WEXITSTATUS(what)),
        false => Err(Errno::EINTR),
    }
}

/// Ends the child when the parent ends, or has ended before this could be said.
pub(crate) fn die_with(parent: u32) {
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

/// Does nothing until it is killed.
pub(crate) fn pause_forever() -> ! {
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
        // SAFETY: the helpers make system calls only.
        let (own, killed) = unsafe {
            let own = Helper::run(|| i32::from(libc::getsid(0) == libc::getpid() && blocked()));
            let killed = Helper::run(|| libc::kill(libc::getpid(), libc::SIGKILL));
            (own, killed)
        };
        assert_eq!((own, killed), (Ok(1), Err(Errno::EINTR)));
        assert!(!blocked(), "our own mask is as it was");
    }
}
