//! Where a task continues that was stopped inside a system call or a restartable sequence.

use crate::mem::ProcessMemory;
use crate::task::{Regs, Stopped};
use crate::{RemoteAddr, Result, abi};

/// The instruction pointer at which a task continues: one that was stopped inside a restartable sequence (rseq(2))
/// continues at the sequence's abort handler, as after a preemption. After a detour through the cave the kernel no
/// longer knows, so it is decided here.
pub fn effective_rip(task: &Stopped, mem: &ProcessMemory, regs: &Regs) -> Result<u64> {
    let Some(conf) = task.rseq()? else {
        return Ok(regs.rip);
    };
    let at = RemoteAddr(conf.rseq_abi_pointer) + abi::RSEQ_CS_OFFSET;
    let Ok(descriptor) = mem.read_u64(at) else {
        return Ok(regs.rip);
    };
    if descriptor == 0 {
        return Ok(regs.rip);
    }
    let Ok(words) = mem.read_array::<32>(RemoteAddr(descriptor)) else {
        return Ok(regs.rip);
    };
    let word = |i: usize| u64::from_le_bytes(words[i..i + 8].try_into().unwrap_or([0; 8]));
    let (start, len, abort) = (word(8), word(16), word(24));
    if regs.rip.wrapping_sub(start) < len {
        return Ok(abort);
    }
    Ok(regs.rip)
}

/// The registers as the kernel would make them to restart an interrupted system call
/// (`arch_do_signal_or_restart`, arch/x86/kernel/signal.c).
pub(super) fn restarted(regs: &Regs) -> Regs {
    let mut home = *regs;
    if (regs.orig_rax as i64) < 0 {
        return home;
    }
    match -(regs.rax as i64) {
        abi::ERESTARTSYS | abi::ERESTARTNOINTR | abi::ERESTARTNOHAND => {
            home.rax = regs.orig_rax;
            home.rip -= 2;
        }
        abi::ERESTART_RESTARTBLOCK => {
            home.rax = libc::SYS_restart_syscall as u64;
            home.rip -= 2;
        }
        _ => {}
    }
    home
}

/// Calls that return EINTR after an interruption without a handler, instead of being restarted (signal(7),
/// "Interruption of system calls … by stop signals"), and that had no effect then.
const EINTR_WITHOUT_HANDLER: &[i64] = &[
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_io_getevents,
    abi::SYS_IO_PGETEVENTS,
    libc::SYS_io_uring_enter,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
    // If the remaining time is not written back: with STICKY_TIMEOUTS (personality(2)), or if the limit is in
    // read-only memory (`poll_select_finish`, fs/select.c).
    libc::SYS_select,
    libc::SYS_pselect6,
    libc::SYS_ppoll,
];

/// Hides our interruption from a stopped task: a call that returned EINTR only because of it is marked for a restart
/// "unless a handler runs" (`ERESTARTNOHAND`), as the kernel does itself for most calls.
pub fn hide_interruption(task: &Stopped) -> Result<()> {
    let mut regs = task.regs()?;
    let nr = regs.orig_rax as i64;
    if nr >= 0 && regs.rax as i64 == -i64::from(libc::EINTR) && EINTR_WITHOUT_HANDLER.contains(&nr)
    {
        regs.rax = (-abi::ERESTARTNOHAND) as u64;
        task.set_regs(&regs)?;
    }
    Ok(())
}
