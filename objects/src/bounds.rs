//! Bounds of numbers in records: values that no kernel produces are rejected.
//!
//! A field on which work, memory or arithmetic depends has `#[serde(deserialize_with = "bounds::fd")]`, so it is
//! checked once, when it is read. Numbers that need no bound are listed in `tests/numbers.rs` with the reason; a new
//! number in neither place fails there.

use std::ops::RangeInclusive;

use serde::de::{Deserialize, Deserializer, Error};
use serde_bytes::ByteBuf;

/// The numbers in a field: one, or those of an option, a pair, a list.
pub trait Numbers {
    /// The first that is out of range.
    fn outside(&self, range: &RangeInclusive<i128>) -> Option<i128>;
}

macro_rules! numbers {
    ($($of:ty)*) => {
        $(impl Numbers for $of {
            fn outside(&self, range: &RangeInclusive<i128>) -> Option<i128> {
                Some(*self as i128).filter(|number| !range.contains(number))
            }
        })*
    };
}

numbers!(u8 u16 u32 u64 i32 i64);

impl<N: Numbers> Numbers for Option<N> {
    fn outside(&self, range: &RangeInclusive<i128>) -> Option<i128> {
        self.as_ref()?.outside(range)
    }
}

impl<N: Numbers> Numbers for Vec<N> {
    fn outside(&self, range: &RangeInclusive<i128>) -> Option<i128> {
        self.iter().find_map(|number| number.outside(range))
    }
}

impl<N: Numbers, const LEN: usize> Numbers for [N; LEN] {
    fn outside(&self, range: &RangeInclusive<i128>) -> Option<i128> {
        self.iter().find_map(|number| number.outside(range))
    }
}

impl<N: Numbers> Numbers for (N, N) {
    fn outside(&self, range: &RangeInclusive<i128>) -> Option<i128> {
        self.0.outside(range).or_else(|| self.1.outside(range))
    }
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident: $what:literal, $range:expr;)*) => {
        $($(#[$doc])*
        ///
        /// # Errors
        /// The format's error, for a number that is out of range.
        pub fn $name<'de, D, N>(deserializer: D) -> Result<N, D::Error>
        where
            D: Deserializer<'de>,
            N: Deserialize<'de> + Numbers,
        {
            const RANGE: RangeInclusive<i128> = $range;
            let value = N::deserialize(deserializer)?;
            match value.outside(&RANGE) {
                None => Ok(value),
                Some(number) => Err(D::Error::custom(format!(
                    concat!("{} is no ", $what, ", which is {} to {}"),
                    number,
                    RANGE.start(),
                    RANGE.end()
                ))),
            }
        })*
    };
}

kinds! {
    /// The number of a descriptor: `sysctl_nr_open_max` (fs/file.c).
    fd: "number of a descriptor", 0..=0x7fff_ffbf;
    /// The id of a task, a group or a session; 0 is none: `PID_MAX_LIMIT` (include/linux/threads.h).
    pid: "id of a task", 0..=4 << 20;
    /// A signal; 0 is none.
    signal: "signal", 0..=64;
    /// An error number (errno(3)); 0 is none: `MAX_ERRNO`.
    errno: "error number", 0..=4095;
    /// A wait status (wait(2)).
    status: "status of a process that has ended", 0..=0xffff;
    /// Bytes of a file or object, or an offset among them: `MAX_LFS_FILESIZE` (include/linux/fs.h).
    bytes: "number of bytes", 0..=i64::MAX as i128;
    /// Bytes of memory, or an offset among them: no address space is larger.
    memory: "number of bytes of memory", 0..=1 << 56;
    /// Bytes of a page; 0 is the base size.
    page: "size of a page", 0..=1 << 34;
    /// Bytes of a processor's extended state.
    state: "number of bytes of a processor's state", 0..=65536;
    /// The number of a state component.
    component: "component of a processor's state", 0..=63;
    /// pkeys(7).
    protection_key: "protection key", 0..=15;
    /// Type and permissions of a file.
    mode: "mode of a file", 0..=0o177_777;
    /// umask(2).
    umask: "umask", 0..=0o777;
    /// Nanoseconds of a clock.
    clock: "time of a clock", 0..=i64::MAX as i128;
    /// Seconds, or a part of a second, of a timer: `KTIME_SEC_MAX` (include/linux/ktime.h).
    timer: "time of a timer", 0..=9_223_372_036;
    /// `CLOCK_*`.
    clock_id: "clock", 0..=15;
    /// The id of a timer or of an object of IPC.
    id: "id of an object", 0..=i32::MAX as i128;
    /// The number of a watch of inotify(7).
    watch: "number of a watch", 1..=i32::MAX as i128;
    /// getrlimit(2).
    resource: "limited resource", 0..=15;
    /// nice(2).
    nice: "nice value", -20..=19;
    /// ioprio_get(2).
    io_priority: "priority of input and output", 0..=0xffff;
    /// proc_pid_oom_score_adj(5).
    oom_score: "adjustment of the OOM score", -1000..=1000;
    /// A node of memory: `MAX_NUMNODES`.
    node: "node of memory", 0..=1023;
    /// Messages of a queue: `HARD_MSGMAX` (include/linux/ipc_namespace.h).
    messages: "number of messages", 0..=65536;
    /// The limit of a listening socket's backlog, and of what waits there.
    backlog: "limit of a backlog", 0..=i32::MAX as i128;
    /// Bytes of one: `HARD_MSGSIZEMAX`.
    message: "size of a message", 0..=16 << 20;
    /// An entry of a local descriptor table, modify_ldt(2).
    segment: "segment", 0..=8191;
    /// Small bit sets and enumerations (dumpability, seccomp(2), shutdown(2), fcntl(2)).
    choice: "choice", 0..=15;
    /// eventfd(2).
    count: "count of an eventfd", 0..=0xffff_ffff_ffff_fffe;
}

/// A list of at most `MOST` elements.
///
/// # Errors
/// The format's error, for more elements.
pub fn few<'de, D, T, const MOST: usize>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    let list = Vec::deserialize(deserializer)?;
    match list.len() <= MOST {
        true => Ok(list),
        false => Err(D::Error::custom(format!(
            "{} elements, of {MOST} at most",
            list.len()
        ))),
    }
}

/// At most `MOST` bytes.
///
/// # Errors
/// The format's error, for more bytes.
pub fn at_most<'de, D: Deserializer<'de>, const MOST: usize>(
    deserializer: D,
) -> Result<Vec<u8>, D::Error> {
    let bytes = ByteBuf::deserialize(deserializer)?.into_vec();
    match bytes.len() <= MOST {
        true => Ok(bytes),
        false => Err(D::Error::custom(format!(
            "{} bytes, of {MOST} at most",
            bytes.len()
        ))),
    }
}
