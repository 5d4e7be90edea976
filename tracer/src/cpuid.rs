//! CPUID faulting: the tracer answers the CPUID instruction of a program (`ARCH_SET_CPUID` of arch_prctl(2)).
//!
//! The kernel's side (arch/x86/kernel/process.c, traps.c):
//!
//! 1. A task sets the flag for itself. Its children inherit it; an exec clears it.
//! 2. CPUID then raises #GP, which becomes SIGSEGV with `SI_KERNEL` and no address.
//! 3. The tracer sees the signal stop, with the instruction not yet executed.
//! 4. The signal is *forced*: if it was blocked or ignored, it is unblocked and its action reset to the default
//!    (`force_sig_info_to_task`, kernel/signal.c). The previous mask is lost.
//!
//! Without a tracer the signal is delivered: a task must not have the flag while it is untraced.
#![allow(unsafe_code)]

use std::arch::x86_64::{__cpuid_count, CpuidResult};

use crate::mem::{ProcessMemory, read_vm};
use crate::remote::{Cave, RemoteCalls};
use crate::task::{Stop, Stopped};
use crate::{Pid, RemoteAddr, Result, Tid};

/// `asm/prctl.h`.
const ARCH_GET_CPUID: i64 = 0x1011;
const ARCH_SET_CPUID: i64 = 0x1012;

/// CPUID, and in tests an instruction that raises the same signal on every processor (hlt, nop).
const CPUID: [u8; 2] = [0x0f, 0xa2];
const STAND_IN: [u8; 2] = [0xf4, 0x90];

/// Whether this processor and kernel support it (Intel since 2012, newer AMD; few virtual machines).
#[must_use]
pub fn can_fault() -> bool {
    if stands_in() {
        return true;
    }
    let ask = |code: i64| {
        // SAFETY: a system call without pointers; it allows us what we are allowed already.
        unsafe { libc::syscall(libc::SYS_arch_prctl, code, 1) }
    };
    // A task whose CPUID faults runs on a processor that supports it; the question must not change its flag.
    ask(ARCH_GET_CPUID) == 0 || ask(ARCH_SET_CPUID) == 0
}

/// Whether a test replaces CPUID by another instruction, without the flag (feature `faults`).
fn stands_in() -> bool {
    cfg!(feature = "faults") && std::env::var_os("CKPT_FAULT_CPUID").is_some_and(|v| v == "hlt")
}

/// Sets whether CPUID of a stopped task faults. All tasks of its process are stopped, or in the kernel.
pub fn set(task: &mut Stopped, cave: &Cave<'_>, faulting: bool) -> Result<()> {
    let (code, allowed) = match stands_in() {
        true => (ARCH_GET_CPUID, 0),
        false => (ARCH_SET_CPUID, u64::from(!faulting)),
    };
    let mut calls = RemoteCalls::begin_without_scratch(task, cave)?;
    let args = [code as u64, allowed, 0, 0, 0, 0];
    let done = calls.call("arch_prctl", libc::SYS_arch_prctl, args);
    calls.finish()?;
    done.map(drop)
}

/// If the task has stopped at CPUID, emulates it: `shown` gets leaf, subleaf and the processor's own result. The
/// caller then resumes the task without the signal.
pub fn answer(
    task: &Stopped,
    pid: Pid,
    shown: impl FnOnce(u32, u32, CpuidResult) -> CpuidResult,
) -> Result<bool> {
    if task.stop() != Stop::Signal(libc::SIGSEGV) {
        return Ok(false);
    }
    let info = task.signal_info()?;
    let code = i32::from_le_bytes([info[8], info[9], info[10], info[11]]);
    if code != libc::SI_KERNEL {
        return Ok(false);
    }
    let mut regs = task.regs()?;
    let wanted = if stands_in() { STAND_IN } else { CPUID };
    if instruction(pid, RemoteAddr(regs.rip)) != Some(wanted) {
        return Ok(false);
    }
    let (leaf, subleaf) = (regs.rax as u32, regs.rcx as u32);
    let answer = shown(leaf, subleaf, ask(leaf, subleaf, processor_of(task.tid())));
    // CPUID clears the upper halves of the 64-bit registers.
    regs.rax = answer.eax.into();
    regs.rbx = answer.ebx.into();
    regs.rcx = answer.ecx.into();
    regs.rdx = answer.edx.into();
    regs.rip += 2;
    task.set_regs(&regs)?;
    Ok(true)
}

/// The two bytes at that address; execute-only memory is read through `/proc/PID/mem`.
fn instruction(pid: Pid, at: RemoteAddr) -> Option<[u8; 2]> {
    let mut bytes = [0; 2];
    match read_vm(pid, at, &mut bytes) {
        Ok(2) => Some(bytes),
        _ => ProcessMemory::open(pid).ok()?.read_array(at).ok(),
    }
}

/// Field 39 of proc_pid_stat(5): the processor on which it last ran.
fn processor_of(tid: Tid) -> Option<usize> {
    let stat = std::fs::read_to_string(format!("/proc/{tid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(36)?.parse().ok()
}

/// Executes CPUID on the processor with that number, since processors differ, at least in their ids. Without
/// permission to run there, any processor will do.
fn ask(leaf: u32, subleaf: u32, number: Option<usize>) -> CpuidResult {
    let before = number.and_then(move_to);
    #[allow(unused_unsafe)]
    // SAFETY: every x86-64 processor has cpuid.
    let answer = unsafe { __cpuid_count(leaf, subleaf) };
    if let Some(before) = before {
        // SAFETY: a set that the kernel gave us.
        unsafe { libc::sched_setaffinity(0, size_of_val(&before), &before) };
    }
    answer
}

/// Moves this thread to a processor; returns the previous affinity.
fn move_to(number: usize) -> Option<libc::cpu_set_t> {
    if number >= libc::CPU_SETSIZE as usize {
        return None;
    }
    // SAFETY: sets of plain bits, for which zero is valid, with their sizes; the number is one of theirs.
    unsafe {
        let mut before: libc::cpu_set_t = std::mem::zeroed();
        let mut there: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(number, &mut there);
        let size = size_of_val(&there);
        let moved = libc::sched_getaffinity(0, size, &mut before) == 0
            && libc::sched_setaffinity(0, size, &there) == 0;
        moved.then_some(before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_asked_is_the_one_of_the_task() {
        let me = Tid(nix::unistd::gettid().as_raw());
        let number = processor_of(me).expect("we run somewhere");
        let before = move_to(number).expect("we may run where we run");
        // SAFETY: a call without pointers, then a set that the kernel gave us.
        let at = unsafe { libc::sched_getcpu() };
        assert_eq!(at, number as i32);
        // SAFETY: as above.
        unsafe { libc::sched_setaffinity(0, size_of_val(&before), &before) };
        assert_eq!(ask(0, 0, Some(number)), ask(0, 0, None));
        assert_eq!(move_to(usize::MAX).map(drop), None);
    }
}
