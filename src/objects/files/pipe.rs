//! Pipes with both ends inside the job.

use serde::{Deserialize, Serialize};

/// One end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PipeEnd {
    /// Inode number; the ends of one pipe share it.
    pub inode: u64,
    /// `F_GETPIPE_SZ`, bytes.
    pub capacity: u32,
    /// What was written and not yet read, one entry a packet for `O_DIRECT` pipes; held by
    /// the first end of the pipe in the snapshot.
    pub unread: Vec<serde_bytes::ByteBuf>,
}
