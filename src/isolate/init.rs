//! The first process of a pid namespace while its job runs: it reaps orphans, and reports on the root to the process
//! outside. Signals from inside do not reach it, and from outside only SIGKILL and SIGSTOP do (pid_namespaces(7)).

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd};

use ckpt_sys::process::{self, Status};

use super::link::{Event, Link};
use crate::children;

/// Its name in `ps`.
pub(super) const NAME: &CStr = c"ckpt-init";

/// Reaps until no process is left; ends with the exit code of the root.
pub(super) fn reap(root: i32, link: Link) -> ! {
    let kept = [link.as_fd().as_raw_fd()];
    children::stay(&kept, move || reap_all(root, link))
}

fn reap_all(root: i32, link: Link) -> i32 {
    let mut ended = 0;
    while let Ok(Some((pid, status))) = process::wait(-1, libc::WUNTRACED) {
        if pid != root {
            continue;
        }
        let Some(code) = status.code() else {
            if let Status::Stopped(signal) = status {
                let _ = link.tell(&Event::Stopped(signal));
            }
            continue;
        };
        ended = code;
        let last = loop {
            match process::wait(-1, libc::WNOHANG | libc::WUNTRACED) {
                Ok(Some(_)) => {}
                none => break none.is_err(),
            }
        };
        let _ = link.tell(&Event::Ended { code, last });
    }
    ended
}
