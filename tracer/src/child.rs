//! Children of our own, to try things on that would change us.
#![allow(unsafe_code)]

/// A child that is killed and waited for when dropped.
pub(crate) struct Child(libc::pid_t);

impl Child {
    /// `main` runs in a copy of one thread of us: it may make system calls and nothing else.
    pub(crate) fn start(main: fn() -> !) -> Option<Self> {
        let parent = std::process::id();
        // SAFETY: without flags clone is fork, but for the exit signal, which is none here. The
        // child makes only system calls: no allocation, no lock, no destructor.
        match unsafe { libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) } {
            0 => {
                die_with(parent);
                // What we have locked is to be free when we are killed, before this one is.
                // SAFETY: a plain system call; the child uses no descriptor.
                unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) };
                main()
            }
            pid if pid > 0 => Some(Self(pid as libc::pid_t)),
            _ => None,
        }
    }

    pub(crate) fn pid(&self) -> libc::pid_t {
        self.0
    }

    /// What it exited with, when it does.
    pub(crate) fn exit_code(self) -> Option<i32> {
        let mut what = 0;
        let pid = self.0;
        std::mem::forget(self);
        // SAFETY: a child of ours that nobody else waits for; `what` lives on.
        let waited = unsafe { libc::waitpid(pid, &mut what, libc::__WALL) };
        (waited == pid && libc::WIFEXITED(what)).then(|| libc::WEXITSTATUS(what))
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

/// Ends the child when the parent ends, or has ended before this could be said.
fn die_with(parent: u32) {
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
