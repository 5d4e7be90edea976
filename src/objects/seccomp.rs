//! Seccomp filters.

use serde::{Deserialize, Serialize};

/// One installed filter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// The classic BPF program, 8 bytes an instruction.
    #[serde(with = "serde_bytes")]
    pub program: Vec<u8>,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub flags: u64,
}

/// A task's seccomp state, oldest filter first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seccomp {
    /// 0 off, 1 strict, 2 filters.
    pub mode: u32,
    /// With mode 2.
    pub filters: Vec<Filter>,
}
