//! Syscall user dispatch (prctl(2), `PR_SET_SYSCALL_USER_DISPATCH`): while the selector says so, system calls of a
//! task from outside an address range raise SIGSYS.
//!
//! A remote call is a system call of the task, so the cave is put into the allowed range. If the range is empty, it
//! is set to the cave's while the task is there, which code of the program cannot observe; the return path makes it
//! empty again.

use std::ops::Range;

use crate::Result;
use crate::task::Stopped;

/// `PR_SET_SYSCALL_USER_DISPATCH`.
pub const PR_SET_SYSCALL_USER_DISPATCH: u64 = 59;
/// `PR_SYS_DISPATCH_EXCLUSIVE_ON`: the range is allowed.
const EXCLUSIVE: u64 = 1;
/// `PR_SYS_DISPATCH_INCLUSIVE_ON` (Linux 6.17): the range is dispatched.
const INCLUSIVE: u64 = 2;

/// `struct ptrace_sud_config` (linux/ptrace.h), as `PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG` reports it: an address
/// is allowed if it is less than `len` above `offset`, wrapping around (kernel/entry/syscall_user_dispatch.c).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dispatch {
    mode: u64,
    /// Address of the selector byte; 0 dispatches always.
    pub selector: u64,
    /// Start of the range.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
}

impl Dispatch {
    /// Enabled dispatch with an allowed range as the kernel reports it.
    #[must_use]
    pub fn new(selector: u64, offset: u64, len: u64) -> Self {
        Self {
            mode: EXCLUSIVE,
            selector,
            offset,
            len,
        }
    }

    /// Whether it is enabled.
    pub(crate) fn is_on(&self) -> bool {
        self.mode != 0
    }

    /// Whether every address of a range is allowed.
    pub(crate) fn allows(&self, range: &Range<u64>) -> bool {
        let first = range.start.wrapping_sub(self.offset);
        first < self.len && self.len - first >= range.end - range.start
    }

    /// The allowed parts of a range.
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

    /// Whether the range wraps around the end of the address space.
    #[must_use]
    pub fn wraps(&self) -> bool {
        self.offset != 0 && self.offset.wrapping_add(self.len) <= self.offset
    }

    /// Whether no address is allowed.
    pub(crate) fn allows_nothing(&self) -> bool {
        self.len == 0
    }

    /// The same with those addresses allowed instead of none.
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

    /// As it is passed to the kernel: a range that wraps around becomes the complement of one that does not.
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

/// The ranges outside which some of the tasks must not make system calls.
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
        // The kernel's form of the inclusive range 0x1000..0x2000.
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
