//! The first process of a pid namespace while its job runs: it reaps whom nobody else waits for,
//! and tells the process outside about the root. No signal from inside reaches it, and none from
//! outside but SIGKILL and SIGSTOP (pid_namespaces(7)).

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd};

use ckpt_sys::process::{self, Status};

use super::link::{Event, Link};
use crate::children;

/// What it is called in `ps`.
pub(super) const NAME: &CStr = c"ckpt-init";

/// Reaps until nobody is left; ends with the exit code of the root.
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
