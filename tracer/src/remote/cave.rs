//! The cave: code that makes system calls and then returns to where the task was, without a tracer. The parent module
//! explains why.
#![allow(unsafe_code)]

use std::arch::global_asm;
use std::ops::Range;

use super::doorbell::doorbell;
use super::stale;
use crate::dispatch::{self, Dispatch};
use crate::fault::{self, Step};
use crate::mem::ProcessMemory;
use crate::proc::maps::{Vma, VmaName};
use crate::task::Stopped;
use crate::{Error, RemoteAddr, Result};

global_asm!(
    ".pushsection .rodata.ckpt_cave, \"a\", @progbits",
    // Global, since code elsewhere refers to it.
    ".globl ckpt_cave_start",
    ".hidden ckpt_cave_start",
    ".globl ckpt_cave_boot",
    ".hidden ckpt_cave_boot",
    ".globl ckpt_cave_call",
    ".hidden ckpt_cave_call",
    ".globl ckpt_cave_batch",
    ".hidden ckpt_cave_batch",
    ".globl ckpt_cave_home",
    ".hidden ckpt_cave_home",
    ".globl ckpt_cave_unmap",
    ".hidden ckpt_cave_unmap",
    ".globl ckpt_cave_last",
    ".hidden ckpt_cave_last",
    ".globl ckpt_cave_park",
    ".hidden ckpt_cave_park",
    ".globl ckpt_cave_left",
    ".hidden ckpt_cave_left",
    ".globl ckpt_cave_magic",
    ".hidden ckpt_cave_magic",
    ".globl ckpt_cave_scratch",
    ".hidden ckpt_cave_scratch",
    ".globl ckpt_cave_end",
    ".hidden ckpt_cave_end",
    ".balign 8",
    "ckpt_cave_start:",
    // First call: maps the scratch memory at a chosen address. Only if that succeeded may the return path unmap it.
    "ckpt_cave_boot:",
    "    syscall",
    "    cmp rax, qword ptr [rip + ckpt_cave_mapped]",
    "    jne 2f",
    "    jmp 1f",
    // Every further call.
    "ckpt_cave_call:",
    "    syscall",
    "    jmp 1f",
    // A list of calls in the scratch memory, from rbx up to rbp, 64 bytes each: number, six
    // operands, answer.
    "ckpt_cave_batch:",
    "    mov rax, qword ptr [rbx]",
    "    mov rdi, qword ptr [rbx + 8]",
    "    mov rsi, qword ptr [rbx + 16]",
    "    mov rdx, qword ptr [rbx + 24]",
    "    mov r10, qword ptr [rbx + 32]",
    "    mov r8,  qword ptr [rbx + 40]",
    "    mov r9,  qword ptr [rbx + 48]",
    "    syscall",
    "    mov qword ptr [rbx + 56], rax",
    "    add rbx, 64",
    "    cmp rbx, rbp",
    "    jb ckpt_cave_batch",
    // The return path. Only the owner of the scratch memory unmaps it.
    "ckpt_cave_home:",
    "1:  mov rsi, qword ptr [rip + ckpt_cave_owner_at]",
    "    mov rsi, qword ptr [rsi]",
    "    cmp rsi, qword ptr [rip + ckpt_cave_id]",
    "    jne 2f",
    "    mov rdi, qword ptr [rip + ckpt_cave_scratch]",
    "    mov rsi, qword ptr [rip + ckpt_cave_scratch_len]",
    "    mov eax, 11", // munmap
    // The last call: munmap of the scratch memory.
    "ckpt_cave_unmap:",
    "    syscall",
    "ckpt_cave_last:",
    "2:  mov edi, 2", // SIG_SETMASK
    "    lea rsi, [rip + ckpt_cave_mask]",
    "    xor edx, edx",
    "    mov r10d, 8",
    "    mov eax, 14", // rt_sigprocmask
    "    syscall",
    // Last, a syscall user dispatch that allows no address, not even that of this call.
    "    mov esi, dword ptr [rip + ckpt_cave_dispatch]",
    "    test esi, esi",
    "    jz 3f",
    "    mov edi, 59", // PR_SET_SYSCALL_USER_DISPATCH
    "    xor edx, edx",
    "    xor r10d, r10d",
    "    mov r8,  qword ptr [rip + ckpt_cave_selector]",
    "    mov eax, 157", // prctl
    "    syscall",
    "3:",
    "    mov rdi, qword ptr [rip + ckpt_cave_regs + 0]",
    "    mov rsi, qword ptr [rip + ckpt_cave_regs + 8]",
    "    mov rdx, qword ptr [rip + ckpt_cave_regs + 16]",
    "    mov r10, qword ptr [rip + ckpt_cave_regs + 24]",
    "    mov r8,  qword ptr [rip + ckpt_cave_regs + 32]",
    "    mov r9,  qword ptr [rip + ckpt_cave_regs + 40]",
    "    mov rcx, qword ptr [rip + ckpt_cave_regs + 48]",
    "    mov r11, qword ptr [rip + ckpt_cave_regs + 56]",
    "    mov rbx, qword ptr [rip + ckpt_cave_regs + 80]",
    "    mov rbp, qword ptr [rip + ckpt_cave_regs + 88]",
    // Flags without a stack: OF by an addition that does or does not overflow, the rest by sahf. The direction flag
    // was never changed.
    "    mov rax, qword ptr [rip + ckpt_cave_flags]",
    "    add al, 1",
    "    sahf",
    "    mov rax, qword ptr [rip + ckpt_cave_regs + 64]",
    "    jmp qword ptr [rip + ckpt_cave_regs + 72]",
    // Other tasks wait here until a batch is done; rbx is a block of memory (hold.rs). A futex that is not 0 ends the
    // wait.
    "ckpt_cave_park:",
    "    mov rdi, qword ptr [rbx]",
    "    mov esi, 128", // FUTEX_WAIT | FUTEX_PRIVATE_FLAG
    "    xor edx, edx",
    "    xor r10d, r10d",
    "    mov eax, 202", // futex
    "    syscall",
    "    mov rdi, qword ptr [rbx]",
    "    cmp dword ptr [rdi], 0",
    "    je ckpt_cave_park",
    "    mov esi, dword ptr [rbx + 8]", // as on the return path
    "    test esi, esi",
    "    jz 4f",
    "    mov edi, 59",
    "    xor edx, edx",
    "    xor r10d, r10d",
    "    mov r8,  qword ptr [rbx + 16]",
    "    mov eax, 157",
    "    syscall",
    "4:  lea rsp, [rbx + 24]",
    "    pop rdi",
    "    pop rsi",
    "    pop rdx",
    "    pop r10",
    "    pop rcx",
    "    pop r11",
    "    pop rax",
    "    pop rbx",
    "ckpt_cave_left:",
    "    iretq",
    ".balign 8",
    "ckpt_cave_magic:",
    ".ascii \"ckptcave\"",
    "ckpt_cave_scratch:",
    ".quad 0",
    "ckpt_cave_scratch_len:",
    ".quad 0",
    "ckpt_cave_mapped:", // result of the first call
    ".quad 0",
    "ckpt_cave_mask:",
    ".quad 0",
    "ckpt_cave_flags:",
    ".quad 0",
    "ckpt_cave_owner_at:",
    ".quad 0",
    "ckpt_cave_id:",
    ".quad 0",
    "ckpt_cave_dispatch:",
    ".quad 0",
    "ckpt_cave_selector:",
    ".quad 0",
    "ckpt_cave_regs:", // rdi rsi rdx r10 r8 r9 rcx r11 rax rip rbx rbp
    ".fill 12, 8, 0",
    "ckpt_cave_end:",
    ".popsection",
);

unsafe extern "C" {
    static ckpt_cave_start: u8;
    static ckpt_cave_boot: u8;
    static ckpt_cave_call: u8;
    static ckpt_cave_batch: u8;
    static ckpt_cave_home: u8;
    static ckpt_cave_unmap: u8;
    static ckpt_cave_last: u8;
    static ckpt_cave_park: u8;
    static ckpt_cave_left: u8;
    static ckpt_cave_magic: u8;
    static ckpt_cave_scratch: u8;
    static ckpt_cave_end: u8;
}

/// The cave's code and the offsets in it.
pub(super) struct CaveImage {
    pub(super) bytes: &'static [u8],
    pub(super) boot: u64,
    pub(super) call: u64,
    pub(super) batch: u64,
    pub(super) home: u64,
    pub(super) unmap: u64,
    /// After the unmapping: mask and registers.
    pub(super) last: u64,
    pub(super) park: u64,
    /// The last instruction of waiting tasks, which pops the rest from the stack.
    pub(super) left: u64,
    pub(super) magic: u64,
    pub(super) data: u64,
}

pub(super) fn cave_image() -> CaveImage {
    let start = (&raw const ckpt_cave_start) as u64;
    let len = (&raw const ckpt_cave_end) as u64 - start;
    // SAFETY: the assembler laid out `len` initialised, immutable bytes from that symbol on.
    let bytes = unsafe { std::slice::from_raw_parts(&raw const ckpt_cave_start, len as usize) };
    CaveImage {
        bytes,
        boot: (&raw const ckpt_cave_boot) as u64 - start,
        call: (&raw const ckpt_cave_call) as u64 - start,
        batch: (&raw const ckpt_cave_batch) as u64 - start,
        home: (&raw const ckpt_cave_home) as u64 - start,
        unmap: (&raw const ckpt_cave_unmap) as u64 - start,
        last: (&raw const ckpt_cave_last) as u64 - start,
        park: (&raw const ckpt_cave_park) as u64 - start,
        left: (&raw const ckpt_cave_left) as u64 - start,
        magic: (&raw const ckpt_cave_magic) as u64 - start,
        data: (&raw const ckpt_cave_scratch) as u64 - start,
    }
}

/// Tasks that may be in a cave at once: one, and the next one during a hand-over.
const SLOTS: u64 = 2;
/// The number of the slot whose task owns the scratch memory stands behind the slots.
pub(super) const OWNER_BYTES: usize = 16;

/// Bytes of a cave.
pub(super) fn size() -> usize {
    cave_image().bytes.len().next_multiple_of(16) * SLOTS as usize + OWNER_BYTES
}

/// Room in the target in which remote calls execute; tasks are there only during [`RemoteCalls`](super::RemoteCalls).
#[derive(Debug)]
pub struct Cave<'m> {
    pub(super) mem: &'m ProcessMemory,
    addr: RemoteAddr,
    before: Vec<u8>,
    pub(super) doorbell: Option<i32>,
}

impl<'m> Cave<'m> {
    /// Finds unused room from which all of `tasks` may make system calls, and writes the cave there. All tasks of the
    /// process must be stopped.
    pub fn dig<'t>(
        mem: &'m ProcessMemory,
        maps: &[Vma],
        tasks: impl IntoIterator<Item = &'t Stopped>,
    ) -> Result<Self> {
        let image = cave_image();
        let (pid, need) = (mem.pid(), size());
        let ranges = dispatch::ranges(tasks)?;
        stale::clear(mem, maps)?;
        let addr = find_room(mem, maps, &ranges, need)?;
        let addr = addr.ok_or(match ranges.is_empty() {
            true => Error::NoCodeCave { pid, need },
            false => Error::NoAllowedCave { pid, need },
        })?;
        let mut before = vec![0; need];
        mem.read(addr, &mut before)?;
        let cave = Cave {
            mem,
            addr,
            before,
            doorbell: None,
        };
        for i in 0..SLOTS {
            mem.write(cave.slot(i), image.bytes)?;
        }
        cave.set_owner(0)?;
        fault::hit(Step::CaveWritten)?;
        Ok(cave)
    }

    /// Whether batches are atomic: without a doorbell the calls are made one by one, and the rest is not made if we
    /// are killed.
    pub fn has_doorbell(&self) -> bool {
        self.doorbell.is_some()
    }

    /// Selects a signal as the doorbell of batches; `tasks` are all of the process.
    pub fn with_doorbell(mut self, tasks: &[Stopped]) -> Self {
        self.doorbell = doorbell(self.mem.pid(), tasks);
        self
    }

    /// Its addresses.
    pub(super) fn range(&self) -> Range<u64> {
        self.addr.raw()..self.addr.raw() + size() as u64
    }

    /// Syscall user dispatch of a task that is about to enter. If it allows no address, the cave must be allowed
    /// meanwhile.
    ///
    /// # Errors
    /// [`Error::NoAllowedCave`] where the task may not make system calls.
    pub(super) fn dispatch_of(&self, task: &Stopped) -> Result<Option<Dispatch>> {
        match task.dispatch()? {
            Some(dispatch) if dispatch.allows_nothing() => Ok(Some(dispatch)),
            Some(dispatch) if !dispatch.allows(&self.range()) => Err(Error::NoAllowedCave {
                pid: self.mem.pid(),
                need: size(),
            }),
            _ => Ok(None),
        }
    }

    pub(super) fn slot(&self, index: u64) -> RemoteAddr {
        let slots = (self.before.len() - OWNER_BYTES) as u64;
        self.addr + index * (slots / SLOTS)
    }

    /// Address of the number of the slot whose task owns the scratch memory.
    pub(super) fn owner_at(&self) -> RemoteAddr {
        self.addr + (self.before.len() - OWNER_BYTES) as u64
    }

    /// Makes the task in that slot the only owner of the scratch memory, atomically.
    pub(super) fn set_owner(&self, slot: u64) -> Result<()> {
        self.mem.write(self.owner_at(), &slot.to_le_bytes())
    }

    /// Restores the previous bytes.
    pub fn fill_in(self) -> Result<()> {
        self.mem.write(self.addr, &self.before)
    }
}

impl Drop for Cave<'_> {
    fn drop(&mut self) {
        let _ = self.mem.write(self.addr, &self.before);
    }
}

/// Looks for a run of `need` equal filler bytes (0x00 or 0xcc) in executable memory, in the
/// vDSO first.
fn find_room(
    mem: &ProcessMemory,
    maps: &[Vma],
    ranges: &[Dispatch],
    need: usize,
) -> Result<Option<RemoteAddr>> {
    let executable = candidates(maps);
    let whole = |vma: &Vma| std::iter::once(vma.start..vma.end).collect();
    let allowed = executable.into_iter().flat_map(|vma| {
        ranges
            .iter()
            .fold(whole(vma), |parts: Vec<Range<u64>>, range| {
                parts.iter().flat_map(|p| range.allowed_in(p)).collect()
            })
    });
    for part in allowed {
        let mut offset = 0;
        let len = (part.end - part.start) as usize;
        while offset < len {
            // The pieces overlap so that no run is cut.
            let piece = (len - offset).min(1 << 20);
            let mut bytes = vec![0; piece];
            let base = RemoteAddr(part.start + offset as u64);
            if mem.read(base, &mut bytes).is_err() {
                break;
            }
            if let Some(at) = find_filler(&bytes, need) {
                return Ok(Some(base + at as u64));
            }
            if piece < 1 << 20 {
                break;
            }
            offset += piece - 4096;
        }
    }
    Ok(None)
}

/// Mappings that a cave may be in, in the order of preference. Memory without a file, in which a program writes code
/// of its own, comes last.
pub(super) fn candidates(maps: &[Vma]) -> Vec<&Vma> {
    let fits = |v: &&Vma| v.exec && !v.shared && v.name != VmaName::Vsyscall;
    let mut executable: Vec<&Vma> = maps.iter().filter(fits).collect();
    executable.sort_by_key(|v| (v.name != VmaName::Vdso, v.is_private_anonymous()));
    executable
}

fn find_filler(bytes: &[u8], need: usize) -> Option<usize> {
    // 64 bytes of distance to the preceding data: a table may end in significant zeros.
    const MARGIN: usize = 64;
    let mut run = 0;
    for i in 0..bytes.len() {
        let filler = bytes[i] == 0 || bytes[i] == 0xcc;
        run = match (filler, run > 0 && bytes[i] == bytes[i - 1]) {
            (true, true) => run + 1,
            (true, false) => 1,
            _ => 0,
        };
        let start = (i + 1 - run + MARGIN).next_multiple_of(16);
        if run > 0 && i + 1 >= start + need {
            return Some(start);
        }
    }
    None
}
