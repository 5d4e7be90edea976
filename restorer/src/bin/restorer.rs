//! The freestanding program that executes a plan inside a process that is being restored.
//!
//! It is entered with the address of a [`Plan`](ckpt_restorer::Plan) in `rdi`, on a stack of its own, with all
//! signals blocked, in an address space that it unmaps and rebuilds around itself. It makes no decisions: all of them
//! are in the plan.
#![cfg_attr(ckpt_blob, no_std, no_main)]
#![allow(unsafe_code)]

#[cfg(not(ckpt_blob))]
fn main() {
    eprintln!("restorer: this is a stub; the real one is built into ckpt (see tracer/build.rs)");
    std::process::exit(1);
}

#[cfg(ckpt_blob)]
mod blob {
    use core::arch::{asm, global_asm};
    use core::ptr::{read_volatile, write_volatile};
    use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

    use ckpt_restorer::{DONE, EXITS, FAILED, LOAD, Op, OpKind, PARKS, Plan, ThreadPlan};

    const SYS_PAUSE: u64 = 34;
    const SYS_NANOSLEEP: u64 = 35;
    const SYS_EXIT: u64 = 60;
    const SYS_FUTEX: u64 = 202;
    const FUTEX_WAIT: u64 = 0;
    const FUTEX_WAKE: u64 = 1;
    const EEXIST: i64 = -17;

    /// Pause between attempts, seconds and nanoseconds. The id of a thread that has ended is freed shortly after the
    /// parent's wait has returned (`release_task`, kernel/exit.c, since Linux 6.15): for that time an unused id is
    /// not available.
    const PAUSE: [u64; 2] = [0, 1_000_000];
    const MOST_PAUSES: u32 = 200;

    global_asm!(
        ".section .text._start, \"ax\", @progbits",
        ".globl _start",
        "_start:",
        "    and rsp, -16",
        "    call {main}",
        "    ud2",
        // A new thread starts here: its stack holds only the address of its plan.
        "ckpt_thread_start:",
        "    pop rdi",
        "    and rsp, -16",
        "    call {thread}",
        "    ud2",
        main = sym main,
        thread = sym thread,
    );

    /// SAFETY: the caller is responsible for the system call's effect on memory; the plan never touches the
    /// restorer's own pages.
    #[inline(always)]
    unsafe fn syscall(nr: u64, a: &[u64; 6]) -> i64 {
        let r: i64;
        // SAFETY: the kernel preserves all registers but rax, rcx and r11.
        unsafe {
            asm!("syscall", inlateout("rax") nr => r, in("rdi") a[0], in("rsi") a[1],
                 in("rdx") a[2], in("r10") a[3], in("r8") a[4], in("r9") a[5],
                 lateout("rcx") _, lateout("r11") _, options(nostack));
        }
        r
    }

    /// Creates a thread that starts at `ckpt_thread_start`; only the parent returns.
    ///
    /// SAFETY: `nr` is clone or clone3. Its first two operands give the thread a stack with the address of its plan
    /// on top; `id_at` receives the id if clone's flags request it, and they request no other operand.
    #[inline(always)]
    unsafe fn create(nr: u64, first: u64, second: u64, id_at: u64) -> i64 {
        let r: i64;
        // SAFETY: in the child rax is 0 and the stack is another one; it leaves by the jump
        // and never uses anything of this frame.
        unsafe {
            asm!("syscall", "test rax, rax", "jz ckpt_thread_start",
                 inlateout("rax") nr => r, in("rdi") first, in("rsi") second,
                 in("rdx") 0, in("r10") id_at, in("r8") 0,
                 lateout("rcx") _, lateout("r11") _, options(nostack));
        }
        r
    }

    /// Traps to the tracer with a word in `rax`.
    #[inline(always)]
    fn trap(word: u64) {
        // SAFETY: int3 stops the task for its tracer, which continues it behind.
        unsafe { asm!("int3", in("rax") word, options(nostack)) }
    }

    /// Executes operations; false if one failed.
    ///
    /// SAFETY: `ops` points to `count` operations, and `plan` to their plan.
    unsafe fn run(plan: *mut Plan, ops: *mut Op, count: u64) -> bool {
        let mut i = 0;
        while i < count {
            // SAFETY: i < count.
            let at = unsafe { ops.add(i as usize) };
            // SAFETY: `at` is valid, and only this thread writes to it.
            let op = unsafe { read_volatile(at) };
            let result = if op.kind == OpKind::Syscall as u32 {
                let mut args = op.args;
                if op.flags & LOAD != 0 {
                    // SAFETY: the planner gave the address of a word of the plan's data.
                    args[0] = unsafe { read_volatile(args[0] as *const u64) };
                }
                // SAFETY: the plan's business.
                unsafe { syscall(op.nr, &args) }
            } else if op.kind == OpKind::Trap as u32 {
                trap(i);
                0
            } else if op.kind == OpKind::Thread as u32 || op.kind == OpKind::Process as u32 {
                let mut pauses = 0;
                loop {
                    // SAFETY: the planner made the stack and the arguments.
                    let r = unsafe { create(op.nr, op.args[1], op.args[2], op.args[3]) };
                    if r != EEXIST || pauses == MOST_PAUSES {
                        break r;
                    }
                    pauses += 1;
                    let pause = PAUSE;
                    // SAFETY: it reads the time, which is live.
                    unsafe { syscall(SYS_NANOSLEEP, &[&raw const pause as u64, 0, 0, 0, 0, 0]) };
                }
            } else if op.kind == OpKind::Unless as u32 {
                // SAFETY: the planner gave the address of the envoy's plan.
                let parked =
                    unsafe { read_volatile(&raw const (*(op.args[0] as *mut Plan)).parked) };
                if parked == 1 {
                    i += op.args[1];
                    0
                } else {
                    -125 // ECANCELED
                }
            } else if op.kind == OpKind::LoadState as u32 {
                // SAFETY: the planner gave the address of an aligned area; it uses none of these components.
                unsafe { load_state(op.args[0], op.args[1]) };
                0
            } else {
                // SAFETY: `plan` is valid.
                unsafe { join(plan) }
            };
            // SAFETY: as above; `result` is only read by the tracer.
            unsafe { write_volatile(&raw mut (*at).result, result) };
            if !op.accepts(result) {
                // SAFETY: `plan` is valid; the field is shared between threads.
                let failed = unsafe { AtomicU64::from_ptr(&raw mut (*plan).failed) };
                let _ = failed.compare_exchange(0, at as u64, Ordering::SeqCst, Ordering::SeqCst);
                return false;
            }
            i += 1;
        }
        true
    }

    /// Loads components of the processor's extended state.
    ///
    /// SAFETY: `area` is an XSAVE area of the standard format, and no code uses the components.
    unsafe fn load_state(area: u64, components: u64) {
        // SAFETY: as the caller says.
        unsafe {
            asm!("xrstor64 [{area}]", area = in(reg) area, in("eax") components as u32,
                 in("edx") (components >> 32) as u32, options(nostack));
        }
    }

    /// Waits for all threads to park; fails if one of them failed.
    ///
    /// SAFETY: `plan` is valid.
    unsafe fn join(plan: *mut Plan) -> i64 {
        // SAFETY: as the caller says.
        let (parked, failed, threads) = unsafe {
            (
                AtomicU32::from_ptr(&raw mut (*plan).parked),
                AtomicU64::from_ptr(&raw mut (*plan).failed),
                (*plan).threads,
            )
        };
        loop {
            let seen = parked.load(Ordering::SeqCst);
            if failed.load(Ordering::SeqCst) != 0 {
                return -125; // ECANCELED; the failed operation is recorded already
            }
            if seen == threads {
                return 0;
            }
            let futex = parked.as_ptr() as u64;
            // SAFETY: waits on a word of the plan.
            unsafe { syscall(SYS_FUTEX, &[futex, FUTEX_WAIT, u64::from(seen), 0, 0, 0]) };
        }
    }

    extern "C" fn main(plan: *mut Plan) -> ! {
        // SAFETY: the tracer passed a valid plan.
        let ok = unsafe { run(plan, (*plan).ops as *mut Op, (*plan).count) };
        loop {
            trap(if ok { DONE } else { FAILED });
        }
    }

    extern "C" fn thread(mine: *const ThreadPlan) -> ! {
        // SAFETY: the planner put the address of a valid thread plan on the stack.
        let mine = unsafe { read_volatile(mine) };
        let plan = mine.plan as *mut Plan;
        // SAFETY: as above.
        let ok = unsafe { run(plan, mine.ops as *mut Op, mine.count) };
        // SAFETY: as above.
        let parked = unsafe { AtomicU32::from_ptr(&raw mut (*plan).parked) };
        if mine.end == EXITS {
            parked.store(ok.into(), Ordering::SeqCst);
            loop {
                // SAFETY: a call without pointers.
                unsafe { syscall(SYS_EXIT, &[0; 6]) };
            }
        }
        if mine.end != PARKS {
            loop {
                trap(if ok { DONE } else { FAILED });
            }
        }
        parked.fetch_add(1, Ordering::SeqCst);
        // SAFETY: wakes the first thread; then waits to be taken over by the tracer.
        unsafe {
            syscall(SYS_FUTEX, &[parked.as_ptr() as u64, FUTEX_WAKE, 1, 0, 0, 0]);
            loop {
                syscall(SYS_PAUSE, &[0; 6]);
            }
        }
    }

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        loop {
            trap(FAILED);
        }
    }

    /// Referenced by the precompiled `core`; never called with panic=abort.
    #[unsafe(no_mangle)]
    extern "C" fn rust_eh_personality() {}

    // compiler_builtins has none of these on linux-gnu.
    global_asm!(
        ".globl memcpy",
        "memcpy:",
        "mov rax, rdi",
        "mov rcx, rdx",
        "rep movsb",
        "ret",
        ".globl memset",
        "memset:",
        "mov r8, rdi",
        "mov eax, esi",
        "mov rcx, rdx",
        "rep stosb",
        "mov rax, r8",
        "ret",
        ".globl memmove",
        "memmove:",
        "mov rax, rdi",
        "mov rcx, rdx",
        "cmp rdi, rsi",
        "jbe 1f",
        "std",
        "lea rsi, [rsi + rdx - 1]",
        "lea rdi, [rdi + rdx - 1]",
        "rep movsb",
        "cld",
        "ret",
        "1: rep movsb",
        "ret",
        ".globl memcmp",
        "memcmp:",
        ".globl bcmp",
        "bcmp:",
        "mov rcx, rdx",
        "xor eax, eax",
        "cmp rcx, rcx",
        "repe cmpsb",
        "je 2f",
        "movzx eax, byte ptr [rdi - 1]",
        "movzx ecx, byte ptr [rsi - 1]",
        "sub eax, ecx",
        "2: ret",
    );
}
