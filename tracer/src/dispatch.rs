//! Syscall user dispatch (prctl(2), `PR_SET_SYSCALL_USER_DISPATCH`): a task's system calls from
//! outside of a range of addresses are answered by SIGSYS, while its selector says so.
//!
//! A remote call is a system call of the task as well, so it is made from where the task may make
//! it: a cave is put into the range. Where no address is allowed at all, the range is made that of
//! the cave for as long as the task is in it, which no code of the program can tell; the way
//! home makes it nothing again.

use std::ops::Range;

use crate::Result;
use crate::task::Stopped;

/// `PR_SET_SYSCALL_USER_DISPATCH`.
pub const PR_SET_SYSCALL_USER_DISPATCH: u64 = 59;
/// `PR_SYS_DISPATCH_EXCLUSIVE_ON`: the range is what is allowed.
const EXCLUSIVE: u64 = 1;
/// `PR_SYS_DISPATCH_INCLUSIVE_ON` (Linux 6.17): the range is what is not allowed.
const INCLUSIVE: u64 = 2;

/// `struct ptrace_sud_config` (linux/ptrace.h) of a task with syscall user dispatch, as
/// `PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG` tells it: an address is allowed if it is less than `len`
/// above `offset`, wrapping around (kernel/entry/syscall_user_dispatch.c).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dispatch {
    mode: u64,
    /// Address of the byte that says whether calls are dispatched; 0 for always.
    pub selector: u64,
    /// Where the range begins.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
}

impl Dispatch {
    /// Dispatch that is on, with an allowed range as the kernel tells it.
    #[must_use]
    pub fn new(selector: u64, offset: u64, len: u64) -> Self {
        Self {
            mode: EXCLUSIVE,
            selector,
            offset,
            len,
        }
    }

    /// Whether it is on.
    pub(crate) fn is_on(&self) -> bool {
        self.mode != 0
    }

    /// Whether every address of a range is allowed.
    pub(crate) fn allows(&self, range: &Range<u64>) -> bool {
        let first = range.start.wrapping_sub(self.offset);
        first < self.len && self.len - first >= range.end - range.start
    }

    /// What of a range is allowed.
    pub(crate) fn allowed_in(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let end = self.offset.wrapping_add(self.len);
        let allowed = match self.wraps() {
            true => [0..end, self.offset..u64::MAX],
            false => [self.offset..end, 0..0],
        };
        let clipped = allowed
            .into_iter()
            .map(|a| a.start.max(range.start)..a.end.min(range.end));
        clipped.filter(|part| !part.is_empty()).collect()
    }

    /// Whether the range goes beyond the last address and on from the first.
    #[must_use]
    pub fn wraps(&self) -> bool {
        self.offset != 0 && self.offset.wrapping_add(self.len) <= self.offset
    }

    /// Whether no address is.
    pub(crate) fn allows_nothing(&self) -> bool {
        self.len == 0
    }

    /// The same with those addresses allowed in place of none.
    pub(crate) fn allowing(&self, range: &Range<u64>) -> Self {
        Self {
            offset: range.start,
            len: range.end - range.start,
            ..*self
        }
    }

    /// The same with no address allowed.
    pub(crate) fn allowing_nothing(&self) -> Self {
        self.allowing(&(0..0))
    }

    /// As the kernel takes it: a range that wraps around is the complement of one that does not.
    pub(crate) fn as_set(&self) -> Self {
        match self.wraps() {
            true => Self {
                mode: INCLUSIVE,
                offset: self.offset.wrapping_add(self.len),
                len: self.len.wrapping_neg(),
                ..*self
            },
            false => *self,
        }
    }
}

/// The ranges from which some of the tasks may make system calls, and from nowhere else.
pub(crate) fn ranges<'t>(tasks: impl IntoIterator<Item = &'t Stopped>) -> Result<Vec<Dispatch>> {
    let all = tasks.into_iter().map(Stopped::dispatch);
    let all = all.filter_map(Result::transpose);
    all.filter(|one| !matches!(one, Ok(dispatch) if dispatch.allows_nothing()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_allowed_as_by_the_kernel() {
        let range = Dispatch::new(0, 0x1000, 0x1000);
        assert!(range.allows(&(0x1000..0x2000)));
        assert!(!range.allows(&(0xfff..0x1001)));
        assert!(!range.allows(&(0x1800..0x2001)));
        let parts = range.allowed_in(&(0x1800..0x3000));
        assert_eq!((parts.len(), &parts[0]), (1, &(0x1800..0x2000)));
        // What the kernel makes of the inclusive range 0x1000..0x2000.
        let inverted = Dispatch::new(0, 0x2000, 0x1000u64.wrapping_neg());
        assert!(inverted.allows(&(0x2000..0x3000)));
        assert!(inverted.allows(&(0..0x1000)));
        assert!(!inverted.allows(&(0xf00..0x1001)));
        let parts = inverted.allowed_in(&(0x800..0x2800));
        assert_eq!(parts, [0x800..0x1000, 0x2000..0x2800]);
        assert!(!Dispatch::new(0, 0, 0).allows(&(0..1)));
    }

    #[test]
    fn a_range_that_wraps_around_is_set_as_its_complement() {
        let inverted = Dispatch::new(7, 0x2000, 0x1000u64.wrapping_neg());
        let set = inverted.as_set();
        assert_eq!((set.mode, set.offset, set.len), (2, 0x1000, 0x1000));
        let plain = Dispatch::new(7, 0x1000, 0x1000);
        assert_eq!(plain.as_set(), plain);
        let from_zero = Dispatch::new(7, 0, u64::MAX);
        assert_eq!(from_zero.as_set(), from_zero);
    }
}
