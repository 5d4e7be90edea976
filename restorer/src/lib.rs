//! The plan: the operations that the restorer executes inside a process that is being restored.
//!
//! A plan is a flat list of operations, most of them one system call with its operands. The planner fixes every
//! number beforehand (addresses, descriptors, ids), so operations do not use results of earlier ones; where the
//! kernel returns a number, the plan has the expected one. The exception is the address that io_setup(2) chooses: the
//! kernel writes it to memory, where a later operation finds it ([`LOAD`]).
//!
//! The freestanding program `restorer` reads all structures in place. The tracer puts it into a hole of the target's
//! address space together with the plan. Pointers are addresses of the target.
#![cfg_attr(not(test), no_std)]

use core::mem::{offset_of, size_of};

/// Kinds of operation.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// The system call `nr` with `args`.
    Syscall = 0,
    /// Breakpoint trap; the tracer does its part and continues the task.
    Trap = 1,
    /// Create a thread: `args[0]` is a [`ThreadPlan`]. With clone3(2) as `nr`, `args[1]` is a kernel
    /// `struct clone_args` and `args[2]` its size; with clone(2) they are flags and the end of the stack.
    Thread = 2,
    /// Wait until every thread created so far has executed its operations and parked.
    Join = 3,
    /// Create a process: operands as for [`OpKind::Thread`]. It executes its operations in the creator's memory, on a
    /// stack of its own, and then ends as [`ThreadPlan::end`] says; the tracer sets other registers in a forked one
    /// before it executes anything.
    Process = 4,
    /// If the envoy whose [`Plan`] is at `args[0]` has completed, skip the next `args[1]` operations; otherwise fail
    /// with `ECANCELED`.
    Unless = 5,
    /// Load the components `args[1]` of the processor's state from the XSAVE area at `args[0]`.
    LoadState = 6,
}

/// An error is allowed; it is kept in `result`, and the plan continues.
pub const MAY_FAIL: u32 = 1;
/// The result must be `expect`, not any success.
pub const EXPECT: u32 = 2;

/// `args[0]` is the address of the first operand, which an earlier operation has stored.
pub const LOAD: u32 = 4;

/// One operation.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Op {
    /// An [`OpKind`].
    pub kind: u32,
    /// [`MAY_FAIL`], [`EXPECT`], [`LOAD`].
    pub flags: u32,
    /// System call number.
    pub nr: u64,
    /// Operands.
    pub args: [u64; 6],
    /// The required result, with [`EXPECT`].
    pub expect: u64,
    /// The actual result; written by the restorer.
    pub result: i64,
}

/// A list of operations for a thread other than the first, or for a process without memory of its own (yet).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadPlan {
    /// Address of its operations.
    pub ops: u64,
    /// Their number.
    pub count: u64,
    /// The [`Plan`] of its process: a thread's is its creator's, a process has its own.
    pub plan: u64,
    /// How it ends: [`PARKS`], [`TRAPS`], [`EXITS`].
    pub end: u64,
}

/// A thread: it parks, and increments [`Plan::parked`].
pub const PARKS: u64 = 0;
/// A process: it traps with [`DONE`] or [`FAILED`].
pub const TRAPS: u64 = 1;
/// An envoy, an untraced helper process: it exits. When it has completed, [`Plan::parked`] of its own plan is 1.
pub const EXITS: u64 = 2;

/// The operations of one process; its address is the restorer's argument.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Address of the operations of the first thread.
    pub ops: u64,
    /// Their number.
    pub count: u64,
    /// Threads created by [`OpKind::Thread`].
    pub threads: u32,
    /// Threads that have parked; a futex.
    pub parked: u32,
    /// Address of the first operation that failed, 0 for none.
    pub failed: u64,
}

/// `rax` at the trap at the end of the plan; at other traps it is the index of the operation.
pub const DONE: u64 = u64::MAX;
/// `rax` at the trap after a failed operation; [`Plan::failed`] is its address.
pub const FAILED: u64 = u64::MAX - 1;

const _: () = {
    assert!(size_of::<Op>() == 80);
    assert!(offset_of!(Op, args) == 16);
    assert!(size_of::<ThreadPlan>() == 32);
    assert!(size_of::<Plan>() == 32);
    assert!(offset_of!(Plan, parked) == 20);
    assert!(offset_of!(Plan, failed) == 24);
};

impl Op {
    /// A system call that must not fail.
    pub const fn syscall(nr: i64, args: [u64; 6]) -> Self {
        Self {
            kind: OpKind::Syscall as u32,
            flags: 0,
            nr: nr as u64,
            args,
            expect: 0,
            result: 0,
        }
    }

    /// An operation of another kind.
    pub const fn other(kind: OpKind, args: [u64; 6]) -> Self {
        Self {
            kind: kind as u32,
            flags: 0,
            nr: 0,
            args,
            expect: 0,
            result: 0,
        }
    }

    /// One that creates a task: the address of its plan, the first two operands of the call, and for clone(2) the
    /// address for its id, if the flags request it.
    pub const fn create(kind: OpKind, nr: i64, args: [u64; 4]) -> Self {
        let mut op = Self::other(kind, [args[0], args[1], args[2], args[3], 0, 0]);
        op.nr = nr as u64;
        op
    }

    /// The same with a required result.
    pub const fn expecting(mut self, answer: u64) -> Self {
        self.flags |= EXPECT;
        self.expect = answer;
        self
    }

    /// The same, allowed to fail.
    pub const fn may_fail(mut self) -> Self {
        self.flags |= MAY_FAIL;
        self
    }

    /// The same with the address of its first operand instead of the operand.
    pub const fn loading(mut self) -> Self {
        self.flags |= LOAD;
        self
    }

    /// Whether the operation accepts this result.
    pub const fn accepts(&self, answer: i64) -> bool {
        if self.flags & MAY_FAIL != 0 {
            return true;
        }
        let error = answer < 0 && answer >= -4095;
        !error && (self.flags & EXPECT == 0 || answer as u64 == self.expect)
    }

    /// The operation as bytes, in the layout that the restorer reads.
    pub fn to_bytes(&self) -> [u8; size_of::<Op>()] {
        let mut bytes = [0; size_of::<Op>()];
        bytes[0..4].copy_from_slice(&self.kind.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.flags.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.nr.to_le_bytes());
        let mut at = 16;
        for arg in self.args {
            bytes[at..at + 8].copy_from_slice(&arg.to_le_bytes());
            at += 8;
        }
        bytes[64..72].copy_from_slice(&self.expect.to_le_bytes());
        bytes[72..80].copy_from_slice(&self.result.to_le_bytes());
        bytes
    }
}

/// Stack of a thread that executes operations, in bytes.
pub const THREAD_STACK: u64 = 2048;
/// Stack of the first thread, in bytes.
pub const MAIN_STACK: u64 = 16 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_refused_unless_allowed() {
        let op = Op::syscall(1, [0; 6]);
        assert!(op.accepts(7));
        assert!(!op.accepts(-1));
        assert!(!op.accepts(-4095));
        // Addresses in the upper half are no errors.
        assert!(op.accepts(-4096));
        assert!(op.may_fail().accepts(-22));
        assert!(op.expecting(7).accepts(7));
        assert!(!op.expecting(7).accepts(8));
    }

    #[test]
    fn bytes_are_the_layout() {
        let op = Op::syscall(9, [1, 2, 3, 4, 5, 6]).expecting(77);
        let bytes = op.to_bytes();
        // SAFETY is not needed: compare field by field.
        assert_eq!(bytes[8], 9);
        assert_eq!(bytes[offset_of!(Op, args) + 40], 6);
        assert_eq!(bytes[offset_of!(Op, expect)], 77);
        assert_eq!(bytes[offset_of!(Op, flags)], EXPECT as u8);
    }
}
