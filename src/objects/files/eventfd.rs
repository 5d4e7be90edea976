//! eventfd(2).

use serde::{Deserialize, Serialize};

use crate::restore::plan::Builder;

/// An event counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventFd {
    /// The counter.
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
