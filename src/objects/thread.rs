//! One thread: registers and everything that the kernel keeps a task.

use serde::{Deserialize, Serialize};

use super::credentials::Credentials;
use super::scheduling::Scheduling;
use super::seccomp::Seccomp;
use super::signals::Pending;

/// A thread.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Thread {
    /// Its id.
    pub tid: i32,
    /// `PR_GET_NAME`, at most 15 bytes.
    #[serde(with = "serde_bytes")]
    pub name: Vec<u8>,
    /// General registers. `rax` and `orig_rax` tell of an interrupted system call.
    pub regs: GeneralRegisters,
    /// Extended state in the standard xsave format.
    #[serde(with = "serde_bytes")]
    pub xstate: Vec<u8>,
    /// Blocked signals, bit n-1 for signal n.
    pub signal_mask: u64,
    /// Signals waiting for this thread.
    pub pending: Vec<Pending>,
    /// sigaltstack(2): address, flags, size.
    pub alternate_stack: (u64, u32, u64),
    /// Restartable sequences.
    pub rseq: Option<Rseq>,
    /// get_robust_list(2): head, length.
    pub robust_list: (u64, u64),
    /// `PR_GET_TID_ADDRESS`.
    pub clear_child_tid: u64,
    /// How it is scheduled.
    pub scheduling: Scheduling,
    /// Who it is.
    pub credentials: Credentials,
    /// `PR_GET_PDEATHSIG`.
    pub parent_death_signal: u32,
    /// Its seccomp state.
    pub seccomp: Seccomp,
}

/// A registered restartable sequence area.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rseq {
    /// Where it is.
    pub address: u64,
    /// Its registered length.
    pub length: u32,
    /// What stands before abort handlers.
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
