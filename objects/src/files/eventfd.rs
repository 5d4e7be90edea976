//! eventfd(2).
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, OwnedFd};

use ckpt_tracer::child::Helper;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::bounds;
use crate::plan::Builder;

/// An event counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventFd {
    /// The counter.
    #[serde(deserialize_with = "bounds::count")]
    pub count: u64,
    /// `EFD_SEMAPHORE`.
    pub semaphore: bool,
}

impl EventFd {
    /// Creates it at its staging number.
    pub fn rebuild(&self, flags: u32, at: i32, plan: &mut Builder) {
        let object = || "an eventfd".to_owned();
        let semaphore = if self.semaphore {
            libc::EFD_SEMAPHORE
        } else {
            0
        };
        let flags = semaphore | flags as i32 & libc::O_NONBLOCK;
        plan.expect(libc::SYS_eventfd2, &[0, flags as u64], 0, object);
        if self.count != 0 {
            let data = plan.data(&self.count.to_le_bytes());
            plan.expect(libc::SYS_write, &[0, data, 8], 8, object);
        }
        super::place(0, at, plan, object);
    }
}

/// Whether it counts as a semaphore, by how much a read takes; `count` is what it holds. For kernels
/// that do not tell (fs/eventfd.c), and while nobody uses it. `None` where that cannot be found out.
///
/// A helper does it and puts all back, also if we are killed. Who waits for the count may be woken once more than it was written.
pub fn is_semaphore(fd: &OwnedFd, count: u64) -> Option<bool> {
    let fd = fd.as_raw_fd();
    let work = || match try_out(fd, count) {
        Some(semaphore) => semaphore.into(),
        None => 2,
    };
    // SAFETY: it makes only system calls on values of its own stack.
    match unsafe { Helper::run(work) } {
        Ok(answer @ (0 | 1)) => Some(answer == 1),
        _ => None,
    }
}

fn try_out(fd: i32, count: u64) -> Option<bool> {
    if count > 1 {
        let taken = take(fd)?;
        add(fd, taken);
        return Some(taken == 1);
    }
    // With less than two both kinds read the same.
    if take(fd)? != count {
        return None;
    }
    add(fd, 2);
    let taken = take(fd)?;
    take(fd);
    if count == 1 {
        add(fd, 1);
    }
    Some(taken == 1)
}

/// Reads what is there, without waiting; `None` where the kernel has no such read.
fn take(fd: i32) -> Option<u64> {
    let mut value = 0u64;
    let part = libc::iovec {
        iov_base: (&raw mut value).cast(),
        iov_len: 8,
    };
    // SAFETY: room for what an eventfd answers.
    let n = unsafe { libc::preadv2(fd, &raw const part, 1, -1, libc::RWF_NOWAIT) };
    match n {
        8 => Some(value),
        _ if Errno::last() == Errno::EAGAIN => Some(0),
        _ => None,
    }
}

fn add(fd: i32, value: u64) {
    // SAFETY: the kernel reads eight bytes.
    unsafe { libc::write(fd, (&raw const value).cast(), 8) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::FromRawFd;

    #[test]
    fn both_kinds_are_told_apart_and_left_as_they_were() {
        for (flags, semaphore) in [(0, false), (libc::EFD_SEMAPHORE, true)] {
            for count in [0, 1, 2, 3, 7, u64::MAX - 1] {
                // SAFETY: a new descriptor that nobody else owns.
                let fd = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, flags)) };
                if count > 0 {
                    add(fd.as_raw_fd(), count);
                }
                assert_eq!(is_semaphore(&fd, count), Some(semaphore), "{count}");
                let info = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
                let info = std::fs::read_to_string(info).unwrap();
                let line = info.lines().find(|l| l.starts_with("eventfd-count"));
                let left = line.unwrap().rsplit(' ').next().unwrap();
                assert_eq!(u64::from_str_radix(left, 16), Ok(count));
            }
        }
    }
}
