//! signalfd(2).

use serde::{Deserialize, Serialize};

use crate::plan::Builder;

/// A descriptor for signals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalFd {
    /// The signals that it reads, bit n-1 for signal n.
    pub mask: u64,
}

impl SignalFd {
    /// Creates it at its staging number.
    pub fn rebuild(&self, flags: u32, at: i32, plan: &mut Builder) {
        let object = || "a signalfd".to_owned();
        let mask = plan.data(&self.mask.to_le_bytes());
        let flags = flags & libc::O_NONBLOCK as u32;
        plan.expect(
            libc::SYS_signalfd4,
            &[u64::MAX, mask, 8, flags.into()],
            0,
            object,
        );
        super::place(0, at, plan, object);
    }
}
