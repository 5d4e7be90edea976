//! Signal actions and pending signals.

use serde::{Deserialize, Serialize};

/// What a process does on a signal (`struct kernel_sigaction`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Action {
    /// The signal.
    pub signal: u32,
    /// `SIG_DFL` (0), `SIG_IGN` (1) or the handler's address.
    pub handler: u64,
    /// `SA_*`.
    pub flags: u64,
    /// Where the handler returns to.
    pub restorer: u64,
    /// Blocked while the handler runs.
    pub mask: u64,
}

/// A signal that waits (`siginfo_t`, 128 bytes).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Pending(#[serde(with = "serde_bytes")] pub Vec<u8>);

impl Pending {
    /// The signal's number, `si_signo`.
    pub fn signal(&self) -> i32 {
        self.0.first_chunk().map_or(0, |b| i32::from_le_bytes(*b))
    }

    /// Where it came from, `si_code`.
    pub fn code(&self) -> i32 {
        self.0.get(8..).and_then(|b| b.first_chunk()).map_or(0, |b| i32::from_le_bytes(*b))
    }
}
