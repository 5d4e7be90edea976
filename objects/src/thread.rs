//! One thread: registers and all other state of a task.

use ckpt_tracer::bystander::Bystander;
use ckpt_tracer::proc::status::Status;
use ckpt_tracer::remote::{Call, RemoteCalls};
use ckpt_tracer::task::Stopped;
use ckpt_tracer::{Pid, RemoteAddr, Result, Tid};
use serde::{Deserialize, Serialize};

use super::bounds;
use super::core_scheduling;
use super::credentials::Credentials;
use super::dispatch::Dispatch;
use super::dynamic_state;
use super::memory_policy::{self, MemoryPolicy};
use super::process::Process;
use super::scheduling::{self, Scheduling};
use super::seccomp::{self, Seccomp};
use super::security::{self, Label};
use super::segments::{self, Segment};
use super::signals::{self, Pending};
use super::switches::{self, Scope, Switch};
use crate::plan::Builder;
use crate::source::Source;

/// A thread.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Thread {
    /// Its id.
    #[serde(deserialize_with = "bounds::pid")]
    pub tid: i32,
    /// `PR_GET_NAME`, at most 15 bytes.
    #[serde(with = "serde_bytes")]
    pub name: Vec<u8>,
    /// General registers. `rax` and `orig_rax` show an interrupted system call.
    pub regs: GeneralRegisters,
    /// Extended state in the standard xsave format; below 64 KiB on every processor.
    #[serde(
        serialize_with = "serde_bytes::serialize",
        deserialize_with = "bounds::at_most::<_, 65536>"
    )]
    pub xstate: Vec<u8>,
    /// Blocked signals, bit n-1 for signal n.
    pub signal_mask: u64,
    /// Signals pending for this thread.
    pub pending: Vec<Pending>,
    /// sigaltstack(2): address, flags, size.
    pub alternate_stack: (u64, u32, u64),
    /// Restartable sequences.
    pub rseq: Option<Rseq>,
    /// get_robust_list(2): head, length.
    pub robust_list: (u64, u64),
    /// `PR_GET_TID_ADDRESS`.
    pub clear_child_tid: u64,
    /// Its scheduling.
    pub scheduling: Scheduling,
    /// Its credentials.
    pub credentials: Credentials,
    /// `PR_GET_PDEATHSIG`.
    #[serde(deserialize_with = "bounds::signal")]
    pub parent_death_signal: u32,
    /// Its seccomp state.
    pub seccomp: Seccomp,
    /// Its switches.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[serde(deserialize_with = "bounds::few::<_, _, 64>")]
    pub switches: Vec<Switch>,
    /// Its memory policy (set_mempolicy(2)), unless it is the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_policy: Option<MemoryPolicy>,
    /// Its thread-local segments (set_thread_area(2)).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[serde(deserialize_with = "bounds::few::<_, _, 3>")]
    pub thread_areas: Vec<Segment>,
    /// I/O ports that it may use: first, number.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[serde(deserialize_with = "bounds::few::<_, _, 65536>")]
    pub io_ports: Vec<(u16, u32)>,
    /// It is in a Landlock domain.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub landlocked: bool,
    /// Its security contexts.
    #[serde(default)]
    #[serde(deserialize_with = "bounds::few::<_, _, 64>")]
    pub security: Vec<Label>,
    /// Its syscall user dispatch.
    #[serde(default)]
    pub dispatch: Option<Dispatch>,
    /// Its core scheduling cookie, meaningful for equality only; 0 for none.
    #[serde(default, skip_serializing_if = "core_scheduling::is_none")]
    pub core_cookie: u64,
}

/// A registered restartable sequence area.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rseq {
    /// Its address.
    pub address: u64,
    /// Its registered length.
    pub length: u32,
    /// The signature in front of abort handlers.
    pub signature: u32,
    /// Flags of the registration.
    pub flags: u32,
}

macro_rules! registers {
    ($($name:ident),*) => {
        /// General registers, under the names of `struct user_regs_struct`.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[allow(missing_docs)]
        pub struct GeneralRegisters { $(pub $name: u64,)* }

        impl From<&ckpt_tracer::task::Regs> for GeneralRegisters {
            fn from(r: &ckpt_tracer::task::Regs) -> Self {
                Self { $($name: r.$name,)* }
            }
        }

        impl From<&GeneralRegisters> for ckpt_tracer::task::Regs {
            fn from(r: &GeneralRegisters) -> Self {
                Self { $($name: r.$name,)* }
            }
        }
    };
}

registers!(
    r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, orig_rax, rip, cs,
    eflags, rsp, ss, fs_base, gs_base, ds, es, fs, gs
);

/// State that only a call made in the thread can read.
struct Asked {
    alternate_stack: (u64, u32, u64),
    clear_child_tid: u64,
    parent_death_signal: u32,
    timer_slack: u64,
    securebits: u32,
    switches: Vec<Switch>,
    memory_policy: Option<MemoryPolicy>,
    /// Whether it may not access its bystander.
    kept_out: bool,
}

/// Offsets of results in the scratch memory: those of switches, a memory policy, the access to a bystander; then the
/// list.
const SWITCHES: u64 = 40;
const POLICY: u64 = (SWITCHES + switches::Questions::ROOM).next_multiple_of(8);
const LOOK: u64 = POLICY + memory_policy::ROOM;
const LIST: u64 = (LOOK + 16).next_multiple_of(64);

/// `PR_GET_TID_ADDRESS` (CONFIG_CHECKPOINT_RESTORE).
const PR_GET_TID_ADDRESS: u64 = 40;
/// `SS_ONSTACK`: the present state, not an attribute of the alternate stack.
const SS_ONSTACK: u32 = 1;

fn ask(calls: &mut RemoteCalls<'_>, bystander: Option<&Bystander>) -> Result<Asked> {
    let out = calls.scratch().raw();
    let prctl = |name, option: u64, arg: u64| Call::new(name, libc::SYS_prctl, &[option, arg]);
    let tid = calls.tid();
    let always = [
        Call::new("sigaltstack", libc::SYS_sigaltstack, &[0, out]),
        prctl("prctl(PR_GET_TID_ADDRESS)", PR_GET_TID_ADDRESS, out + 24),
        prctl(
            "prctl(PR_GET_PDEATHSIG)",
            libc::PR_GET_PDEATHSIG as u64,
            out + 32,
        ),
        prctl(
            "prctl(PR_GET_TIMERSLACK)",
            libc::PR_GET_TIMERSLACK as u64,
            0,
        ),
        prctl(
            "prctl(PR_GET_SECUREBITS)",
            libc::PR_GET_SECUREBITS as u64,
            0,
        ),
    ];
    let questions = switches::Questions::new(false, SWITCHES);
    let mut list = always.to_vec();
    list.push(memory_policy::question(out + POLICY));
    list.extend(questions.calls(calls.scratch()));
    list.extend(bystander.map(|b| b.look(out + LOOK)));
    let answers = calls.batch(LIST, &list)?;
    let (checked, others) = answers.split_at(always.len());
    for (answer, call) in checked.iter().zip(&always) {
        if *answer < 0 {
            return Err(ckpt_tracer::Error::Remote {
                tid,
                call: call.name,
                errno: nix::errno::Errno::from_raw(-*answer as i32),
            });
        }
    }
    let (slack, bits) = (checked[3] as u64, checked[4]);
    let answer: [u8; 36] = calls.read_scratch(0)?;
    let word = |i: usize| u64::from_le_bytes(answer[i..][..8].try_into().unwrap_or([0; 8]));
    let half = |i: usize| u32::from_le_bytes(answer[i..][..4].try_into().unwrap_or([0; 4]));
    Ok(Asked {
        alternate_stack: (word(0), half(8) & !SS_ONSTACK, word(16)),
        clear_child_tid: word(24),
        parent_death_signal: half(32),
        timer_slack: slack,
        securebits: bits as u32,
        switches: questions.read(calls, &others[1..])?,
        kept_out: bystander.is_some() && others.last() == Some(&-i64::from(libc::EPERM)),
        memory_policy: memory_policy::read(calls, POLICY, others[0])?,
    })
}

/// Captures the thread in which remote calls are being made.
pub fn capture(
    calls: &mut RemoteCalls<'_>,
    source: &Source,
    status: &Status,
    bystander: Option<&Bystander>,
) -> crate::Result<Thread> {
    let asked = ask(calls, bystander)?;
    let task = calls.task();
    let tid = task.tid();
    let mut regs = calls.original_regs().into();
    unveil_restarted(&mut regs, source)?;
    let seen = seen(source.pid, tid, status);
    Ok(Thread {
        regs,
        xstate: task.xstate()?,
        signal_mask: calls.original_mask(),
        pending: signals::capture_pending(task, false)?,
        alternate_stack: asked.alternate_stack,
        rseq: task.rseq()?.map(|r| Rseq {
            address: r.rseq_abi_pointer,
            length: r.rseq_abi_size,
            signature: r.signature,
            flags: r.flags,
        }),
        robust_list: robust_list(tid)?,
        clear_child_tid: asked.clear_child_tid,
        scheduling: Scheduling {
            timer_slack: asked.timer_slack,
            ..seen.scheduling
        },
        credentials: Credentials::of(status, asked.securebits),
        parent_death_signal: asked.parent_death_signal,
        seccomp: seccomp_of(task, status, source)?,
        switches: asked.switches,
        memory_policy: asked.memory_policy,
        thread_areas: segments::capture_thread_areas(task)?,
        io_ports: segments::capture_ports(task)?,
        // Otherwise the policy of another module may deny it.
        landlocked: asked.kept_out && seen.security.iter().all(Label::is_unconfined),
        dispatch: calls.original_dispatch()?.map(Dispatch::from),
        ..seen
    })
}

/// The record of a running thread as seen from outside; state that only a call in it can read has common values.
pub fn seen(pid: Pid, tid: Tid, status: &Status) -> Thread {
    /// The default of the first process (prctl(2)).
    const TIMER_SLACK: u64 = 50_000;
    Thread {
        tid: tid.raw(),
        name: status.name.0.clone(),
        regs: GeneralRegisters::default(),
        xstate: Vec::new(),
        signal_mask: 0,
        pending: Vec::new(),
        alternate_stack: (0, 0, 0),
        rseq: None,
        robust_list: (0, 0),
        clear_child_tid: 0,
        scheduling: scheduling::capture(tid, TIMER_SLACK),
        credentials: Credentials::of(status, 0),
        parent_death_signal: 0,
        seccomp: Seccomp::seen(status),
        switches: Vec::new(),
        memory_policy: None,
        thread_areas: Vec::new(),
        io_ports: Vec::new(),
        landlocked: false,
        security: security::capture(pid, tid),
        dispatch: None,
        core_cookie: core_scheduling::cookie(tid),
    }
}

/// Its seccomp state; refuses a filter with a listener.
fn seccomp_of(task: &Stopped, status: &Status, source: &Source) -> crate::Result<Seccomp> {
    let seccomp = seccomp::capture(task, status)?;
    if seccomp.filters.iter().any(seccomp::Filter::notifies) {
        let obstacle = crate::Obstacle::new(
            source.title(),
            "has a seccomp filter that passes calls to a listener (SECCOMP_RET_USER_NOTIF), which is not \
             supported",
            "start it without that listener",
        );
        return Err(crate::Error::refuse(obstacle));
    }
    Ok(seccomp)
}

/// Recovers the number of a call that was interrupted and restarted before: it shows restart_syscall(2) instead, and
/// only the kernel's restart block has the original. The same holds for one that is about to be restarted, with the
/// instruction pointer at the call; it is turned into an interrupted one. There are four such calls. The program
/// shows which it is: by the instruction that loads the number, shortly before the system call or before the call of
/// the library's `syscall`, or by operands that fit only one of them.
/// operands fit only one of them.
fn unveil_restarted(regs: &mut GeneralRegisters, source: &Source) -> crate::Result<()> {
    /// `mov eax, imm32`
    const LOAD_EAX: u8 = 0xb8;
    /// `mov edi, imm32`
    const LOAD_EDI: u8 = 0xbf;
    const RESTART: u64 = libc::SYS_restart_syscall as u64;
    let interrupted = (-ckpt_tracer::abi::ERESTART_RESTARTBLOCK) as u64;
    if regs.rax == RESTART && is_call(source, regs.rip) {
        *regs = interrupted_again(regs);
    }
    if regs.rax != interrupted || regs.orig_rax != RESTART {
        return Ok(());
    }
    let caller = source.mem.read_u64(RemoteAddr(regs.rsp)).unwrap_or(0);
    let number = loaded_before(source, regs.rip, LOAD_EAX)
        .or_else(|| loaded_before(source, caller, LOAD_EDI))
        .or_else(|| fitting_call(regs));
    let number = number.ok_or_else(|| {
        let obstacle = crate::Obstacle::new(
            source.title(),
            format!(
                "has a thread that waits at {:#x} in a restarted system call, of which the kernel does not \
                 show the number",
                regs.rip
            ),
            "try again in a moment",
        );
        crate::Error::refuse(obstacle.passing())
    })?;
    regs.orig_rax = number as u64;
    Ok(())
}

/// The `syscall` instruction.
const CALL: [u8; 2] = [0x0f, 0x05];

fn is_call(source: &Source, at: u64) -> bool {
    let code = source.mem.read_array(RemoteAddr(at));
    code.is_ok_and(|code: [u8; CALL.len()]| code == CALL)
}

/// The registers of a task that is about to make restart_syscall(2), as they were before the kernel changed them
/// (`arch_do_signal_or_restart`, arch/x86/kernel/signal.c). The number is still there unless another interruption
/// followed.
fn interrupted_again(regs: &GeneralRegisters) -> GeneralRegisters {
    let known = (regs.orig_rax as i64) >= 0;
    GeneralRegisters {
        rax: (-ckpt_tracer::abi::ERESTART_RESTARTBLOCK) as u64,
        orig_rax: if known {
            regs.orig_rax
        } else {
            libc::SYS_restart_syscall as u64
        },
        rip: regs.rip + CALL.len() as u64,
        ..*regs
    }
}

/// The number of a restartable call that an instruction shortly before `address` loads.
fn loaded_before(source: &Source, address: u64, opcode: u8) -> Option<i64> {
    const RESTARTABLE: &[i64] = &[
        libc::SYS_nanosleep,
        libc::SYS_clock_nanosleep,
        libc::SYS_poll,
        libc::SYS_futex,
    ];
    const WINDOW: usize = 64;
    let from = RemoteAddr(address.wrapping_sub(WINDOW as u64));
    let code: [u8; WINDOW] = source.mem.read_array(from).ok()?;
    let loads = code.windows(5).rev().filter(|w| w[0] == opcode);
    let mut numbers = loads.map(|w| i64::from(u32::from_le_bytes([w[1], w[2], w[3], w[4]])));
    numbers.find(|nr| RESTARTABLE.contains(nr))
}

/// The only restartable call that the operands fit.
fn fitting_call(regs: &GeneralRegisters) -> Option<i64> {
    let pointer = |word: u64| word >= 0x1_0000;
    let futex_wait = matches!(regs.rsi & 0x7f, 0 | 9) && regs.rsi != 0 && regs.rsi < 0x200;
    if regs.rdi < 16 && regs.rsi == 0 && pointer(regs.rdx) {
        Some(libc::SYS_clock_nanosleep)
    } else if pointer(regs.rdi) && futex_wait && pointer(regs.r10) {
        Some(libc::SYS_futex)
    } else if pointer(regs.rdi) && pointer(regs.rsi) {
        Some(libc::SYS_nanosleep)
    } else {
        None
    }
}

/// get_robust_list(2) of another task.
fn robust_list(tid: Tid) -> Result<(u64, u64)> {
    let found = ckpt_sys::tasks::robust_list(tid.raw());
    found.map_err(|errno| ckpt_tracer::Error::from_errno("get_robust_list", tid, errno))
}

impl Thread {
    /// Appends the operations of the thread itself in the new process, after its memory is complete. The tracer sets
    /// registers, extended state and signal mask. The first `filters` of its seccomp filters are already installed.
    pub fn rebuild(&self, process: &Process, filters: usize, plan: &mut Builder) {
        let tid = self.tid;
        let object = || format!("thread {tid}");
        let prctl = |plan: &mut Builder, option: i32, arg: u64| {
            plan.syscall(libc::SYS_prctl, &[option as u64, arg], object);
        };
        let mut name = self.name.clone();
        name.push(0);
        let name = plan.data(&name);
        prctl(plan, libc::PR_SET_NAME, name);
        plan.syscall(libc::SYS_set_tid_address, &[self.clear_child_tid], object);
        if self.robust_list.0 != 0 {
            let (head, len) = self.robust_list;
            plan.syscall(libc::SYS_set_robust_list, &[head, len], object);
        }
        if let Some(rseq) = self.rseq {
            let Rseq {
                address,
                length,
                signature,
                flags,
            } = rseq;
            let args = [
                address,
                u64::from(length),
                u64::from(flags),
                u64::from(signature),
            ];
            plan.syscall(libc::SYS_rseq, &args, object);
        }
        dynamic_state::load_tiles(&self.xstate, plan);
        let (sp, flags, size) = self.alternate_stack;
        // An execve(2) removes the stack and leaves SS_AUTODISARM.
        if size != 0 || flags != libc::SS_DISABLE as u32 {
            let mut stack = [0u8; 24];
            stack[..8].copy_from_slice(&sp.to_le_bytes());
            stack[8..12].copy_from_slice(&flags.to_le_bytes());
            stack[16..].copy_from_slice(&size.to_le_bytes());
            let at = plan.data(&stack);
            plan.syscall(libc::SYS_sigaltstack, &[at, 0], object);
        }
        let timers = &process.posix_timers;
        signals::rebuild_pending(&self.pending, timers, process.pid, Some(tid), plan);
        let now = plan.host().scheduling.clone();
        self.scheduling.rebuild(&now, plan);
        memory_policy::rebuild(self.memory_policy.as_ref(), plan);
        segments::rebuild_thread_areas(&self.thread_areas, plan);
        segments::rebuild_ports(&self.io_ports, plan);
        switches::rebuild(&self.switches, Scope::Task, plan);
        // Before the credentials, which may not suffice for it.
        let installed = filters..self.seccomp.filters.len();
        self.seccomp.install(installed, plan);
        self.rebuild_privileges(plan);
        // After the credentials, whose change clears it (prctl(2)).
        if self.parent_death_signal != 0 {
            prctl(
                plan,
                libc::PR_SET_PDEATHSIG,
                u64::from(self.parent_death_signal),
            );
        }
        self.seccomp.rebuild_strict(plan);
    }

    /// Credentials, and `no_new_privs` last, since it is irrevocable.
    pub(super) fn rebuild_privileges(&self, plan: &mut Builder) {
        let now = plan.host().credentials.clone();
        self.credentials.rebuild(&now, plan);
        if self.credentials.takes_no_new_privs(&now) {
            security::ask_before_no_new_privs(&self.security, plan);
        }
        self.credentials.rebuild_no_new_privs(&now, plan);
    }
}
