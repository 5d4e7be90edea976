//! The first process of a pid namespace while its job runs: it reaps whom nobody else waits for,
//! and tells the process outside about the root. No signal from inside reaches it, and none from
//! outside but SIGKILL and SIGSTOP (pid_namespaces(7)).
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd};

use super::link::{Event, Link};
use super::work::leave;
use crate::children::let_go;

/// What it is called in `ps`.
pub(super) const NAME: &CStr = c"ckpt-init";

/// Reaps until nobody is left; ends with the exit code of the root.
pub(super) fn reap(root: i32, link: Link) -> ! {
    let_go(&[link.as_fd().as_raw_fd()]);
    let mut link = link;
    let mut ended = 0;
    while let Some((pid, status)) = wait(0) {
        if pid != root {
            continue;
        }
        if libc::WIFSTOPPED(status) {
            let _ = link.tell(&Event::Stopped(libc::WSTOPSIG(status)));
            continue;
        }
        let code = match libc::WIFEXITED(status) {
            true => libc::WEXITSTATUS(status),
            false => 128 + libc::WTERMSIG(status),
        };
        ended = code;
        let mut last = false;
        loop {
            match wait(libc::WNOHANG) {
                Some((0, _)) => break,
                Some(_) => {}
                None => {
                    last = true;
                    break;
                }
            }
        }
        let _ = link.tell(&Event::Ended { code, last });
    }
    leave(ended)
}

/// A change of some child; `None` when there is no child.
fn wait(options: i32) -> Option<(i32, i32)> {
    loop {
        let mut status = 0;
        // SAFETY: `status` is live.
        let pid = unsafe { libc::waitpid(-1, &mut status, options | libc::WUNTRACED) };
        match pid {
            0.. => return Some((pid, status)),
            _ if nix::errno::Errno::last() == nix::errno::Errno::EINTR => {}
            _ => return None,
        }
    }
}
