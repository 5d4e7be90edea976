//! Whether our seccomp filters kill on a call that we would make in others.
//!
//! Tasks with the same filters get the same verdict for the same operands, so a child of ours tries each call once,
//! in a way that changes nothing. A filter sees the number and the operands, of pointers only the address; so
//! operands that select the operation (options, flags, sizes) are the real ones, and the others are invalid.
#![allow(unsafe_code)]

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use ckpt_sys::helper::Child;

use crate::remote::Call;

/// The calls that the child makes: all, or the one with that index.
static WHICH: AtomicUsize = AtomicUsize::new(ALL);
const ALL: usize = usize::MAX;

/// The name of a call that a filter kills on; `None` when all survive.
#[must_use]
pub fn deadly_call() -> Option<&'static str> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _alone = ONE_AT_A_TIME.lock();
    if survives(ALL) {
        return None;
    }
    let calls = remote_calls();
    let one = (0..calls.len()).find(|which| !survives(*which));
    // If no single call kills, something else killed the child that made all: unknown.
    Some(one.map_or("a call", |which| calls[which].name))
}

fn survives(which: usize) -> bool {
    WHICH.store(which, Ordering::SeqCst);
    let child = Child::start(make);
    child.is_some_and(|child| child.exit_code() == Some(0))
}

fn make() -> ! {
    let which = WHICH.load(Ordering::SeqCst);
    for (number, call) in remote_calls().iter().enumerate() {
        if which == ALL || which == number {
            let [a, b, c, d, e, f] = call.args;
            // SAFETY: the operands name no memory, or none of ours; each call fails or only asks.
            unsafe { libc::syscall(call.nr, a, b, c, d, e, f) };
        }
    }
    // SAFETY: ends the child.
    unsafe { libc::_exit(0) }
}

/// Every call made in a job that is checkpointed and continues. Built in a child, without a heap.
#[must_use]
pub fn remote_calls() -> [Call; 45] {
    const PRIVATE: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    const FIXED: u64 = PRIVATE | libc::MAP_FIXED_NOREPLACE as u64;
    const READ_WRITE: u64 = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    const STOPPED: u64 = (libc::WSTOPPED | libc::WNOHANG | libc::WNOWAIT | libc::__WALL) as u64;
    const NONE: u64 = u64::MAX;
    let unmapped = [0, 0, READ_WRITE, FIXED, NONE, 0];
    let pair = (libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) as u64;
    let prctl = |name, option: i32| Call::new(name, libc::SYS_prctl, &[option as u64]);
    // The address comes first: 1 is invalid, where 0 would have an effect.
    let prctl_to = |name, option: i32| Call::new(name, libc::SYS_prctl, &[option as u64, 1]);
    let speculation = |which| {
        let args = [libc::PR_GET_SPECULATION_CTRL as u64, which];
        Call::new("prctl(PR_GET_SPECULATION_CTRL)", libc::SYS_prctl, &args)
    };
    [
        // Entering and leaving the cave; see `remote`.
        Call::new("mmap", libc::SYS_mmap, &unmapped),
        Call::new("mremap", libc::SYS_mremap, &[0, 0, 0, 0]),
        Call::new("munmap", libc::SYS_munmap, &[0, 0]),
        Call::new("rt_sigprocmask", libc::SYS_rt_sigprocmask, &[2, 0, 0, 8]),
        Call::new("gettid", libc::SYS_gettid, &[]),
        Call::new(
            "rt_tgsigqueueinfo",
            libc::SYS_rt_tgsigqueueinfo,
            &[0, 0, libc::SIGURG as u64],
        ),
        Call::new(
            "rt_tgsigqueueinfo",
            libc::SYS_rt_tgsigqueueinfo,
            &[0, 0, libc::SIGWINCH as u64],
        ),
        Call::new(
            "rt_tgsigqueueinfo",
            libc::SYS_rt_tgsigqueueinfo,
            &[0, 0, libc::SIGCHLD as u64],
        ),
        Call::new(
            "rt_tgsigqueueinfo",
            libc::SYS_rt_tgsigqueueinfo,
            &[0, 0, libc::SIGCONT as u64],
        ),
        // The address space.
        Call::new("brk", libc::SYS_brk, &[0]),
        prctl("prctl(PR_GET_DUMPABLE)", libc::PR_GET_DUMPABLE),
        prctl("prctl(PR_GET_THP_DISABLE)", 42),
        Call::new("membarrier", libc::SYS_membarrier, &[1 << 9]),
        prctl("prctl(PR_GET_MEMORY_MERGE)", 68),
        prctl("prctl(PR_GET_MDWE)", 66),
        Call::new("get_mempolicy", libc::SYS_get_mempolicy, &[1, 0, 0, 0, 2]),
        Call::new("modify_ldt", libc::SYS_modify_ldt, &[0, 1, 0]),
        // The process.
        Call::new(
            "rt_sigaction",
            libc::SYS_rt_sigaction,
            &[libc::SIGUSR1 as u64, 0, 0, 8],
        ),
        Call::new("getitimer", libc::SYS_getitimer, &[0, 1]),
        Call::new("getitimer", libc::SYS_getitimer, &[1, 1]),
        Call::new("getitimer", libc::SYS_getitimer, &[2, 1]),
        Call::new("timer_gettime", libc::SYS_timer_gettime, &[0, 1]),
        Call::new("timer_getoverrun", libc::SYS_timer_getoverrun, &[0]),
        prctl_to("prctl(PR_GET_CHILD_SUBREAPER)", 37),
        Call::new(
            "waitid",
            libc::SYS_waitid,
            &[libc::P_PID.into(), 0, 1, STOPPED],
        ),
        Call::new("semop", libc::SYS_semop, &[NONE, 0, 0]),
        // A thread.
        Call::new("sigaltstack", libc::SYS_sigaltstack, &[0, 0]),
        prctl_to("prctl(PR_GET_TID_ADDRESS)", 40),
        prctl_to("prctl(PR_GET_PDEATHSIG)", libc::PR_GET_PDEATHSIG),
        prctl("prctl(PR_GET_TIMERSLACK)", libc::PR_GET_TIMERSLACK),
        prctl("prctl(PR_GET_SECUREBITS)", libc::PR_GET_SECUREBITS),
        Call::new("get_mempolicy", libc::SYS_get_mempolicy, &[1, 0, 0, 0, 0]),
        prctl_to("prctl(PR_GET_TSC)", libc::PR_GET_TSC),
        Call::new("arch_prctl", libc::SYS_arch_prctl, &[0x1011, 0]),
        prctl("prctl(PR_MCE_KILL_GET)", libc::PR_MCE_KILL_GET),
        speculation(0),
        speculation(1),
        speculation(2),
        Call::new("get_robust_list", libc::SYS_get_robust_list, &[0, 1, 1]),
        // Sending descriptors, see `lend`.
        Call::new(
            "socketpair",
            libc::SYS_socketpair,
            &[libc::AF_UNIX as u64, pair, 0, 1],
        ),
        Call::new(
            "process_vm_readv",
            libc::SYS_process_vm_readv,
            &[0, 0, 0, 0, 0, 0],
        ),
        Call::new(
            "sendmsg",
            libc::SYS_sendmsg,
            &[0xffff_ffff, 1, libc::MSG_NOSIGNAL as u64],
        ),
        Call::new("umask", libc::SYS_umask, &[0o077]),
        Call::new("close", libc::SYS_close, &[0xffff_ffff]),
        // ARCH_GET_XCOMP_PERM
        Call::new("arch_prctl", libc::SYS_arch_prctl, &[0x1022, 0]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadly_call_is_named() {
        assert_eq!(deadly_call(), None);
        // In a thread of its own, which keeps the filter.
        let found = std::thread::spawn(|| {
            kill_on(libc::SYS_getitimer as u32);
            deadly_call()
        });
        assert_eq!(found.join().expect("it ends"), Some("getitimer"));
    }

    fn kill_on(nr: u32) {
        let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
        let mut program = [
            op(0x20, 0, 0, 0),
            op(0x15, 0, 1, nr),
            op(0x06, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
            op(0x06, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let fprog = libc::sock_fprog {
            len: program.len() as u16,
            filter: program.as_mut_ptr(),
        };
        // SAFETY: the kernel copies the program; only this thread has it.
        unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            let r = libc::syscall(libc::SYS_seccomp, 1, 0, &raw const fprog);
            assert_eq!(r, 0, "the kernel has seccomp filters");
        }
    }
}
