//! eventfd(2).

use std::os::fd::OwnedFd;

use ckpt_sys::events::{eventfd_add, eventfd_take};
use ckpt_sys::helper::Helper;
use ckpt_tracer::proc::fdinfo::FdDetail;
use ckpt_tracer::proc::fdlink::FdLink;
use ckpt_tracer::proc::status::read_status;
use serde::{Deserialize, Serialize};

use super::kind::{Captured, OpenFile, Place, Sight};
use super::left;
use crate::bounds;
use crate::error::Obstacle;
use crate::plan::Builder;
use crate::sockets;
use crate::source::Collector;

/// An eventfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventFd {
    /// The counter.
    #[serde(deserialize_with = "bounds::count")]
    pub count: u64,
    /// `EFD_SEMAPHORE`.
    pub semaphore: bool,
}

impl OpenFile for EventFd {
    fn capture(sight: &Sight, _: &mut Collector) -> Captured {
        let (FdLink::AnonInode(_), FdDetail::EventFd { count, semaphore }) =
            (&sight.look.link, &sight.look.info.detail)
        else {
            return None;
        };
        let held = || read_status(sight.source.pid).is_ok_and(|s| sockets::is_held(&s));
        let semaphore = match semaphore {
            Some(semaphore) => Some(*semaphore),
            None if held() => is_semaphore(&sight.look.copy, *count),
            // Determined when the job is frozen.
            None => Some(false),
        };
        Some(match semaphore {
            Some(semaphore) => Ok(EventFd {
                count: *count,
                semaphore,
            }
            .into()),
            None => {
                let what =
                    "an eventfd of which this kernel does not show whether it is a semaphore";
                Err(Box::new(left::droppable(sight.look, sight.source, what)))
            }
        })
    }

    fn anon_inode() -> Option<&'static str> {
        Some("eventfd")
    }

    fn class(&self) -> &'static str {
        "eventfd"
    }

    fn shown(&self) -> String {
        format!("eventfd:{}", self.count)
    }

    fn open(&self, place: &Place, plan: &mut Builder) -> Result<(), Vec<Obstacle>> {
        let object = || "an eventfd".to_owned();
        let semaphore = if self.semaphore {
            libc::EFD_SEMAPHORE
        } else {
            0
        };
        let flags = semaphore | place.flags as i32 & libc::O_NONBLOCK;
        plan.expect(libc::SYS_eventfd2, &[0, flags as u64], 0, object);
        if self.count != 0 {
            let data = plan.data(&self.count.to_le_bytes());
            plan.expect(libc::SYS_write, &[0, data, 8], 8, object);
        }
        super::place(0, place.at, plan, object);
        Ok(())
    }
}

/// Whether it is a semaphore, by the effect of a read; `count` is its value. For kernels that do not report it
/// (fs/eventfd.c), and while no process uses it. `None` if unknown.
///
/// A helper does this and restores the value, even if we are killed. A process that waits for the eventfd may get a
/// spurious wakeup.
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
    // Below two, both kinds read the same.
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
