//! epoll(7).

use serde::{Deserialize, Serialize};

/// An interest list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Epoll {
    /// Its entries.
    pub entries: Vec<Entry>,
}

/// One entry: an open file description under the number with which it was added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The number; it may be closed or used for another file by now.
    pub fd: i32,
    /// Index in the snapshot's descriptions.
    pub description: usize,
    /// `EPOLL*`.
    pub events: u32,
    /// The program's word.
    pub data: u64,
}
