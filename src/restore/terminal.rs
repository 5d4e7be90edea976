//! The terminal that `restore` runs in, lent to the job while it is in the foreground.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;

/// The terminal belongs to the job's process group; taken back when dropped.
#[derive(Debug)]
pub struct Foreground {
    terminal: File,
    ours: i32,
}

impl Foreground {
    /// Gives the terminal to `group`, if it is ours to give: we have one and are in its
    /// foreground.
    pub fn give(group: i32) -> Option<Self> {
        let terminal = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/tty")
            .ok()?;
        // SAFETY: calls without pointers.
        let (foreground, ours) =
            unsafe { (libc::tcgetpgrp(terminal.as_raw_fd()), libc::getpgrp()) };
        if foreground != ours || group == ours {
            return None;
        }
        let lent = Self { terminal, ours };
        lent.set(group).then_some(lent)
    }

    fn set(&self, group: i32) -> bool {
        // From the background the kernel answers with SIGTTOU unless that is blocked.
        // SAFETY: the sets are plain integers and live.
        unsafe {
            let mut block: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut block);
            libc::sigaddset(&mut block, libc::SIGTTOU);
            libc::pthread_sigmask(libc::SIG_BLOCK, &block, &mut before);
            let r = libc::tcsetpgrp(self.terminal.as_raw_fd(), group);
            libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
            r == 0
        }
    }
}

impl Drop for Foreground {
    fn drop(&mut self) {
        self.set(self.ours);
    }
}
