//! Resource limits.

use serde::{Deserialize, Serialize};

/// One limit (getrlimit(2)); `u64::MAX` is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// `RLIMIT_*`.
    pub resource: u32,
    /// The limit in force.
    pub soft: u64,
    /// As far as an unprivileged process may raise it.
    pub hard: u64,
}
