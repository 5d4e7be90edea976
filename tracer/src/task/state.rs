//! State of a stopped task, by ptrace requests: registers, signals, restartable sequences, filters.
#![allow(unsafe_code)]

use std::ptr;

use nix::errno::Errno;

use super::{Stopped, request};
use crate::abi::{self, PeekSigInfoArgs, RseqConfiguration, SeccompMetadata};
use crate::dispatch::Dispatch;
use crate::{Error, Result};

/// General registers (`struct user_regs_struct`).
pub type Regs = libc::user_regs_struct;
/// `siginfo_t`, 128 bytes.
pub type SigInfo = [u8; 128];

impl Stopped {
    /// General registers, fs and gs bases included.
    pub fn regs(&self) -> Result<Regs> {
        // SAFETY: the structure is plain integers, for which zero is valid.
        let mut regs: Regs = unsafe { std::mem::zeroed() };
        let data = ptr::addr_of_mut!(regs) as usize;
        request("PTRACE_GETREGS", libc::PTRACE_GETREGS, self.tid, 0, data)?;
        Ok(regs)
    }

    /// Sets the general registers. If they show an interrupted system call (`orig_rax` ≥ 0, `rax` an `-ERESTART*`),
    /// the kernel restarts it on the way out of a [`Stop::Event`](super::Stop::Event).
    pub fn set_regs(&self, regs: &Regs) -> Result<()> {
        let data = ptr::from_ref(regs) as usize;
        request("PTRACE_SETREGS", libc::PTRACE_SETREGS, self.tid, 0, data).map(drop)
    }

    /// The extended state (x87, SSE, AVX …) in the standard xsave format.
    pub fn xstate(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0u8; 16 * 1024];
        let n = self.regset(libc::PTRACE_GETREGSET, &mut bytes)?;
        bytes.truncate(n);
        bytes.shrink_to_fit();
        Ok(bytes)
    }

    /// Sets the extended state.
    pub fn set_xstate(&self, xstate: &[u8]) -> Result<()> {
        self.regset(libc::PTRACE_SETREGSET, &mut xstate.to_vec())
            .map(drop)
    }

    /// The thread-local entries of the global descriptor table, `struct user_desc` as four words each; empty without
    /// `CONFIG_IA32_EMULATION`.
    pub fn thread_areas(&self) -> Result<Vec<[u32; 4]>> {
        let mut areas = Vec::new();
        for entry in abi::TLS_ENTRIES {
            let mut area = [0u32; 4];
            let data = area.as_mut_ptr() as usize;
            let name = "PTRACE_GET_THREAD_AREA";
            let get = abi::PTRACE_GET_THREAD_AREA;
            match request(name, get, self.tid, entry as usize, data) {
                Ok(_) => areas.push(area),
                Err(Error::Kernel { .. }) => break,
                Err(e) => return Err(e),
            }
        }
        Ok(areas)
    }

    /// The I/O permission bitmap; empty if the task has none, or the kernel lacks it.
    pub fn io_bitmap(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0u8; 8192];
        match self.regset_of(libc::PTRACE_GETREGSET, abi::NT_386_IOPERM, &mut bytes) {
            Ok(len) => bytes.truncate(len),
            Err(Error::Kernel { .. }) => bytes.clear(),
            Err(e) => return Err(e),
        }
        Ok(bytes)
    }

    fn regset(&self, req: u32, bytes: &mut [u8]) -> Result<usize> {
        self.regset_of(req, abi::NT_X86_XSTATE, bytes)
    }

    fn regset_of(&self, req: u32, which: u32, bytes: &mut [u8]) -> Result<usize> {
        let mut iov = libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        let data = ptr::addr_of_mut!(iov) as usize;
        request("PTRACE_GETREGSET", req, self.tid, which as usize, data)?;
        Ok(iov.iov_len)
    }

    /// Blocked signals, bit n-1 for signal n.
    pub fn signal_mask(&self) -> Result<u64> {
        let mut mask = 0u64;
        let data = ptr::addr_of_mut!(mask) as usize;
        request(
            "PTRACE_GETSIGMASK",
            abi::PTRACE_GETSIGMASK,
            self.tid,
            8,
            data,
        )?;
        Ok(mask)
    }

    /// Sets the blocked signals.
    pub fn set_signal_mask(&self, mask: u64) -> Result<()> {
        let data = ptr::from_ref(&mask) as usize;
        request(
            "PTRACE_SETSIGMASK",
            abi::PTRACE_SETSIGMASK,
            self.tid,
            8,
            data,
        )
        .map(drop)
    }

    /// Pending signals in the order of the queue: the task's own, or the shared ones of the process.
    pub fn pending_signals(&self, shared: bool) -> Result<Vec<SigInfo>> {
        const BATCH: usize = 32;
        let mut all = Vec::new();
        loop {
            let args = PeekSigInfoArgs {
                off: all.len() as u64,
                flags: if shared {
                    abi::PTRACE_PEEKSIGINFO_SHARED
                } else {
                    0
                },
                nr: BATCH as i32,
            };
            let mut batch: [SigInfo; BATCH] = [[0; 128]; BATCH];
            let n = request(
                "PTRACE_PEEKSIGINFO",
                abi::PTRACE_PEEKSIGINFO,
                self.tid,
                ptr::from_ref(&args) as usize,
                batch.as_mut_ptr() as usize,
            )? as usize;
            all.extend_from_slice(&batch[..n.min(BATCH)]);
            if n < BATCH {
                return Ok(all);
            }
        }
    }

    /// The `siginfo_t` of a [`Stop::Signal`](super::Stop::Signal).
    pub fn signal_info(&self) -> Result<SigInfo> {
        let mut info: SigInfo = [0; 128];
        let data = info.as_mut_ptr() as usize;
        request(
            "PTRACE_GETSIGINFO",
            libc::PTRACE_GETSIGINFO,
            self.tid,
            0,
            data,
        )?;
        Ok(info)
    }

    /// The registered restartable sequence area; `None` where the kernel has no such request
    /// (before Linux 5.13) or none is registered.
    pub fn rseq(&self) -> Result<Option<RseqConfiguration>> {
        let mut conf = RseqConfiguration::default();
        let size = size_of::<RseqConfiguration>();
        let data = ptr::addr_of_mut!(conf) as usize;
        match request(
            "PTRACE_GET_RSEQ",
            abi::PTRACE_GET_RSEQ_CONFIGURATION,
            self.tid,
            size,
            data,
        ) {
            Ok(_) if conf.rseq_abi_pointer == 0 => Ok(None),
            Ok(_) => Ok(Some(conf)),
            Err(Error::Kernel {
                errno: Errno::EIO | Errno::EINVAL,
                ..
            }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Its syscall user dispatch; `None` when it is off, or before Linux 6.4.
    pub fn dispatch(&self) -> Result<Option<Dispatch>> {
        let mut dispatch = Dispatch::default();
        let asked = request(
            "PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG",
            abi::PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG,
            self.tid,
            size_of::<Dispatch>(),
            ptr::addr_of_mut!(dispatch) as usize,
        );
        match asked {
            Ok(_) => Ok(Some(dispatch).filter(Dispatch::is_on)),
            Err(Error::Kernel {
                errno: Errno::EIO | Errno::EINVAL,
                ..
            }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Turns syscall user dispatch on.
    pub fn set_dispatch(&self, dispatch: &Dispatch) -> Result<()> {
        let dispatch = dispatch.as_set();
        request(
            "PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG",
            abi::PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG,
            self.tid,
            size_of::<Dispatch>(),
            ptr::from_ref(&dispatch) as usize,
        )
        .map(drop)
    }

    /// The task's seccomp filters, oldest first: the BPF program (8 bytes an instruction) and
    /// the flags it was installed with. Needs CAP_SYS_ADMIN.
    pub fn seccomp_filters(&self) -> Result<Vec<(Vec<u8>, u64)>> {
        let mut filters = Vec::new();
        loop {
            let index = filters.len();
            let len = match request(
                "PTRACE_SECCOMP_GET_FILTER",
                abi::PTRACE_SECCOMP_GET_FILTER,
                self.tid,
                index,
                0,
            ) {
                Ok(n) => n as usize,
                Err(Error::Kernel {
                    errno: Errno::ENOENT,
                    ..
                }) => return Ok(filters),
                Err(e) => return Err(e),
            };
            let mut program = vec![0u8; len * 8];
            let data = program.as_mut_ptr() as usize;
            request(
                "PTRACE_SECCOMP_GET_FILTER",
                abi::PTRACE_SECCOMP_GET_FILTER,
                self.tid,
                index,
                data,
            )?;
            let mut meta = SeccompMetadata {
                filter_off: index as u64,
                flags: 0,
            };
            let data = ptr::addr_of_mut!(meta) as usize;
            request(
                "PTRACE_SECCOMP_GET_METADATA",
                abi::PTRACE_SECCOMP_GET_METADATA,
                self.tid,
                size_of::<SeccompMetadata>(),
                data,
            )?;
            filters.push((program, meta.flags));
        }
    }
}
