//! Syscall user dispatch (prctl(2), `PR_SET_SYSCALL_USER_DISPATCH`).

use ckpt_tracer::Result;
use ckpt_tracer::dispatch;
use ckpt_tracer::task::Stopped;
use serde::{Deserialize, Serialize};

/// System calls from outside a range raise SIGSYS while the selector says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dispatch {
    /// Address of the selector byte; 0 dispatches always.
    pub selector: u64,
    /// Start of the allowed range.
    pub offset: u64,
    /// Its length in bytes; it may wrap around.
    pub len: u64,
}

impl From<dispatch::Dispatch> for Dispatch {
    fn from(now: dispatch::Dispatch) -> Self {
        Self {
            selector: now.selector,
            offset: now.offset,
            len: now.len,
        }
    }
}

impl From<Dispatch> for dispatch::Dispatch {
    fn from(then: Dispatch) -> Self {
        Self::new(then.selector, then.offset, then.len)
    }
}

impl Dispatch {
    /// Whether its range wraps around, as the complement of a range does.
    pub fn is_inclusive(&self) -> bool {
        dispatch::Dispatch::from(*self).wraps()
    }

    /// Enables it, when no more calls are made in the task.
    pub fn rebuild(&self, task: &Stopped) -> Result<()> {
        task.set_dispatch(&(*self).into())
    }
}
