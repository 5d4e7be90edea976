//! Kernel ABI that neither `libc` nor `nix` carries, with the layouts asserted.

use std::mem::{offset_of, size_of};

/// `PTRACE_GETSIGMASK` (linux/ptrace.h): the blocked signals of a stopped task, 8 bytes.
pub const PTRACE_GETSIGMASK: u32 = 0x420a;
/// `PTRACE_SETSIGMASK`.
pub const PTRACE_SETSIGMASK: u32 = 0x420b;
/// `PTRACE_PEEKSIGINFO`: pending signals without taking them.
pub const PTRACE_PEEKSIGINFO: u32 = 0x4209;
/// Flag of [`PeekSigInfoArgs`]: the queue shared by the process instead of the task's own.
pub const PTRACE_PEEKSIGINFO_SHARED: u32 = 1;
/// `PTRACE_SECCOMP_GET_FILTER`: one classic BPF program of the task, 0 is the oldest.
pub const PTRACE_SECCOMP_GET_FILTER: u32 = 0x420c;
/// `PTRACE_SECCOMP_GET_METADATA`: the flags a filter was installed with.
pub const PTRACE_SECCOMP_GET_METADATA: u32 = 0x420d;
/// `PTRACE_GET_RSEQ_CONFIGURATION` (Linux 5.13).
pub const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
/// `PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG` (Linux 6.4).
pub const PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4210;
/// `PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG`.
pub const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4211;
/// `NT_X86_XSTATE` (elf.h): the xsave area, standard format.
pub const NT_X86_XSTATE: u32 = 0x202;
/// `PTRACE_EVENT_STOP`: a seized task stopped by `PTRACE_INTERRUPT` or by a group stop.
pub const PTRACE_EVENT_STOP: i32 = 128;

/// `NT_386_IOPERM` (elf.h): the I/O permission bitmap.
pub const NT_386_IOPERM: u32 = 0x201;
/// `PTRACE_GET_THREAD_AREA` (asm/ptrace-abi.h): a thread-local entry of the global descriptor table.
pub const PTRACE_GET_THREAD_AREA: u32 = 25;
/// The first of the three thread-local entries of a 64-bit kernel (`GDT_ENTRY_TLS_MIN`, asm/segment.h).
pub const TLS_ENTRIES: std::ops::Range<u32> = 12..15;
/// `__USER_CS` (asm/segment.h): the code segment of 64-bit programs.
pub const USER_CS: u64 = 0x33;

/// io_pgetevents(2), which `libc` lacks for this target.
pub const SYS_IO_PGETEVENTS: i64 = 333;

/// `ERESTART*` (include/linux/errno.h): an interrupted system call is to be restarted; programs never see them.
pub const ERESTARTSYS: i64 = 512;
/// Restart always.
pub const ERESTARTNOINTR: i64 = 513;
/// Restart unless a handler runs.
pub const ERESTARTNOHAND: i64 = 514;
/// Restart by `restart_syscall(2)` from the task's restart block.
pub const ERESTART_RESTARTBLOCK: i64 = 516;

/// Argument of `PTRACE_PEEKSIGINFO`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PeekSigInfoArgs {
    /// First entry of the queue wanted.
    pub off: u64,
    /// [`PTRACE_PEEKSIGINFO_SHARED`] or 0.
    pub flags: u32,
    /// How many at the most.
    pub nr: i32,
}

/// Result of `PTRACE_GET_RSEQ_CONFIGURATION`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct RseqConfiguration {
    /// Address of `struct rseq`, 0 when none is registered.
    pub rseq_abi_pointer: u64,
    /// Its registered size.
    pub rseq_abi_size: u32,
    /// The signature in front of each abort handler.
    pub signature: u32,
    /// Flags of the registration.
    pub flags: u32,
    pad: u32,
}

/// `struct seccomp_metadata`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SeccompMetadata {
    /// Which filter, 0 is the oldest.
    pub filter_off: u64,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub flags: u64,
}

/// `struct rseq_cs` (linux/rseq.h): one critical section.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct RseqCs {
    /// 0.
    pub version: u32,
    /// Flags.
    pub flags: u32,
    /// First instruction.
    pub start_ip: u64,
    /// Length in bytes from there.
    pub post_commit_offset: u64,
    /// Where a task continues that was interrupted inside.
    pub abort_ip: u64,
}

/// Offset of `rseq_cs` in `struct rseq`.
pub const RSEQ_CS_OFFSET: u64 = 8;

const _: () = {
    assert!(size_of::<PeekSigInfoArgs>() == 16);
    assert!(offset_of!(PeekSigInfoArgs, nr) == 12);
    assert!(size_of::<RseqConfiguration>() == 24);
    assert!(size_of::<SeccompMetadata>() == 16);
    assert!(size_of::<crate::dispatch::Dispatch>() == 32);
    assert!(size_of::<RseqCs>() == 32);
    assert!(offset_of!(RseqCs, abort_ip) == 24);
    assert!(size_of::<libc::siginfo_t>() == 128);
};
