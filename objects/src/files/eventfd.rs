//! eventfd(2).

use std::os::fd::OwnedFd;

use ckpt_sys::events::{eventfd_add, eventfd_take};
use ckpt_sys::helper::Helper;
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
    let work = || match try_out(fd, count) {
        Some(semaphore) => semaphore.into(),
        None => 2,
    };
    match Helper::run(work) {
        Ok(answer @ (0 | 1)) => Some(answer == 1),
        _ => None,
    }
}

fn try_out(fd: &OwnedFd, count: u64) -> Option<bool> {
    if count > 1 {
        let taken = eventfd_take(fd)?;
        let _ = eventfd_add(fd, taken);
        return Some(taken == 1);
    }
    // With less than two both kinds read the same.
    if eventfd_take(fd)? != count {
        return None;
    }
    let _ = eventfd_add(fd, 2);
    let taken = eventfd_take(fd)?;
    eventfd_take(fd);
    if count == 1 {
        let _ = eventfd_add(fd, 1);
    }
    Some(taken == 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn both_kinds_are_told_apart_and_left_as_they_were() {
        for (flags, semaphore) in [(0, false), (libc::EFD_SEMAPHORE, true)] {
            for count in [0, 1, 2, 3, 7, u64::MAX - 1] {
                let fd = ckpt_sys::events::eventfd(0, flags).unwrap();
                if count > 0 {
                    eventfd_add(&fd, count).unwrap();
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
