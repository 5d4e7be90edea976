//! A probe process for Landlock: it has the ids of a task and is otherwise unrelated. The task may ptrace it, unless
//! something beyond ids and capabilities forbids that: a Landlock domain, which no file shows, denies access to every
//! process outside (`hook_ptrace_access_check`, security/landlock/task.c).
#![allow(unsafe_code)]

use ckpt_sys::helper::{Child, die_with};

use crate::remote::Call;

/// The stopped process, killed when dropped.
#[derive(Debug)]
pub struct Bystander(Child);

impl Bystander {
    /// Creates one with these ids and no capabilities; `None` without permission to set the ids.
    #[must_use]
    pub fn with_ids(uid: u32, gid: u32) -> Option<Self> {
        let us = std::process::id();
        let child = Child::start_with(|| become_one(us, uid, gid))?;
        child.is_stopped().then_some(Self(child))
    }

    /// A call by which the task accesses the bystander: `EPERM` if that is denied. Its result goes to two words at
    /// that address.
    #[must_use]
    pub fn look(&self, at: u64) -> Call {
        let pid = self.0.pid() as u64;
        let args = [pid, at, at + 8];
        Call::new("get_robust_list", libc::SYS_get_robust_list, &args)
    }
}

/// Main function of the bystander: system calls only, since it is a copy of one of our threads.
fn become_one(parent: u32, uid: u32, gid: u32) -> ! {
    /// `_LINUX_CAPABILITY_VERSION_3`.
    const VERSION: u32 = 0x2008_0522;
    let (header, none) = ([VERSION, 0], [0u32; 6]);
    // SAFETY: system calls on values, and on arrays of the sizes that capset(2) reads.
    unsafe {
        let given = libc::syscall(libc::SYS_setresgid, gid, gid, gid) == 0
            && libc::syscall(libc::SYS_setresuid, uid, uid, uid) == 0
            && libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) == 0
            // A change of ids makes it undumpable and clears the parent death signal.
            && libc::syscall(libc::SYS_prctl, libc::PR_SET_DUMPABLE, 1, 0, 0, 0) == 0;
        die_with(parent);
        if !given {
            libc::_exit(1);
        }
        loop {
            let me = libc::syscall(libc::SYS_getpid);
            libc::syscall(libc::SYS_kill, me, libc::SIGSTOP);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The result of the call, made in one of our threads.
    fn looked(bystander: &Bystander) -> i64 {
        let mut words = [0u64; 2];
        let [pid, head, len, ..] = bystander.look(words.as_mut_ptr() as u64).args;
        // SAFETY: the kernel writes the two words.
        unsafe { libc::syscall(libc::SYS_get_robust_list, pid, head, len) }
    }

    #[test]
    fn we_may_look_into_one_of_ours() {
        // SAFETY: calls without operands.
        let (uid, gid) = unsafe { (libc::getuid(), libc::getgid()) };
        let bystander = Bystander::with_ids(uid, gid).expect("they are ours");
        assert_eq!(looked(&bystander), 0);
    }
}
