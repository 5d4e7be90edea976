//! Character devices that keep no state between calls.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// An open character device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Where it was opened.
    pub path: PathBuf,
    /// Device number, major and minor.
    pub number: (u32, u32),
}

/// The devices that are known to keep no state: null, zero, full, random, urandom.
pub const STATELESS: &[(u32, u32)] = &[(1, 3), (1, 5), (1, 7), (1, 8), (1, 9)];
