//! signalfd(2).

use serde::{Deserialize, Serialize};

/// A descriptor for signals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalFd {
    /// The signals that it reads, bit n-1 for signal n.
    pub mask: u64,
}
