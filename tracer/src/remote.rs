//! System calls executed in a stopped task, from outside.
//!
//! # Why a cave
//!
//! The task must survive the loss of its tracer at any moment: when a tracer dies the kernel
//! resumes its tasks where they are, with the registers they have then. So a task is only
//! ever sent to a piece of code that finds its own way home. That piece (the *cave*, some
//! 300 bytes) makes the wanted system call; behind it stands the way home: unmap the scratch
//! memory, put back the signal mask, the registers that were touched and the flags, and
//! jump to where the task was. In the ordinary course the way home is never walked: the tracer
//! stops the task at the system call's exit and sets the next call, or the original registers.
//!
//! It needs no stack, no SSE register and no `rt_sigreturn`, so the extended state and the
//! task's restart block stay as they are (`rt_sigreturn` would end a sleep with EINTR).
//!
//! The cave is put into unused bytes at the end of the vDSO, or of another executable mapping.
//! Nothing executes there, and the kernel gives the process a private copy of that page.
//!
//! # Why a doorbell
//!
//! Waiting for each call by its entry and exit stops costs two switches to the tracer and
//! back; with many threads, or on a busy machine, that is most of the pause. So calls are made
//! in batches, the last of which sends the task a signal that the program ignores. A traced
//! task stops for it all the same (`sig_ignored`, kernel/signal.c), once; if the tracer is gone
//! nothing happens. Where the program catches every such signal, calls are made one by one.
//!
//! # Order of events, and what a dead tracer leaves at each point
//!
//! 1. Cave written. Nobody is in it: nothing happens; a later attach finds and clears it.
//! 2. Registers set into the cave. The task makes the first call (an mmap of scratch memory)
//!    and walks home. A signal that comes meanwhile runs its handler on the task's own stack.
//! 3. All signals blocked. The same; the way home restores the mask.
//! 4. Calls. The same.
//! 5. Scratch memory unmapped: the entry behind the unmapping is used, so that nothing that
//!    another thread mapped there since can be hit.
//! 6. Mask restored, then registers. The same as 2, then the original state.
#![allow(unsafe_code)]

use std::arch::global_asm;

use nix::errno::Errno;

use crate::abi;
use crate::fault::{self, Step};
use crate::mem::ProcessMemory;
use crate::proc::maps::{Vma, VmaName};
use crate::task::{Regs, Resume, Stop, Stopped, Waited};
use crate::{Error, Pid, RemoteAddr, Result, Tid};

global_asm!(
    ".pushsection .rodata.ckpt_cave, \"a\", @progbits",
    ".balign 8",
    "ckpt_cave_start:",
    // First call: mmap of the scratch memory at a chosen address. Only if that worked may
    // the way home unmap it.
    "ckpt_cave_boot:",
    "    syscall",
    "    cmp rax, qword ptr [rip + ckpt_cave_scratch]",
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
    // The way home. Only the owner of the scratch memory unmaps it; nobody else touches it.
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
    "2:  mov edi, 2", // SIG_SETMASK
    "    lea rsi, [rip + ckpt_cave_mask]",
    "    xor edx, edx",
    "    mov r10d, 8",
    "    mov eax, 14", // rt_sigprocmask
    "    syscall",
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
    // Flags without a stack: OF by an addition that overflows or not, the rest by sahf.
    // The direction flag was never changed.
    "    mov rax, qword ptr [rip + ckpt_cave_flags]",
    "    add al, 1",
    "    sahf",
    "    mov rax, qword ptr [rip + ckpt_cave_regs + 64]",
    "    jmp qword ptr [rip + ckpt_cave_regs + 72]",
    ".balign 8",
    "ckpt_cave_magic:",
    ".ascii \"ckptcave\"",
    "ckpt_cave_scratch:",
    ".quad 0",
    "ckpt_cave_scratch_len:",
    ".quad 0",
    "ckpt_cave_mask:",
    ".quad 0",
    "ckpt_cave_flags:",
    ".quad 0",
    "ckpt_cave_owner_at:",
    ".quad 0",
    "ckpt_cave_id:",
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
    static ckpt_cave_magic: u8;
    static ckpt_cave_scratch: u8;
    static ckpt_cave_end: u8;
}

/// The cave's code and where things are in it.
struct CaveImage {
    bytes: &'static [u8],
    boot: u64,
    call: u64,
    batch: u64,
    home: u64,
    unmap: u64,
    magic: u64,
    data: u64,
}

fn cave_image() -> CaveImage {
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
        magic: (&raw const ckpt_cave_magic) as u64 - start,
        data: (&raw const ckpt_cave_scratch) as u64 - start,
    }
}

/// How many tasks may be in a cave at once: one, and the next while the first hands over.
const SLOTS: u64 = 2;
/// Behind the slots stands the number of the one whose task owns the scratch memory.
const OWNER_BYTES: usize = 16;

/// Room in the target that remote calls execute in; empty of tasks except during
/// [`RemoteCalls`].
#[derive(Debug)]
pub struct Cave<'m> {
    mem: &'m ProcessMemory,
    addr: RemoteAddr,
    before: Vec<u8>,
    doorbell: Option<i32>,
}

impl<'m> Cave<'m> {
    /// Finds unused room and writes the cave there. All tasks must be stopped.
    pub fn dig(mem: &'m ProcessMemory, maps: &[Vma]) -> Result<Self> {
        let image = cave_image();
        let slot = image.bytes.len().next_multiple_of(16);
        let need = slot * SLOTS as usize + OWNER_BYTES;
        let addr = find_room(mem, maps, need)?.ok_or(Error::NoCodeCave {
            pid: mem.pid(),
            need,
        })?;
        let mut before = vec![0; need];
        mem.read(addr, &mut before)?;
        if before[image.magic as usize..].starts_with(b"ckptcave") {
            // A tracer died here; what was below it was unused.
            before.fill(0);
        }
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

    /// Looks for a signal that can be the doorbell of batches; `stopped` says that the process
    /// is in a group stop.
    pub fn with_doorbell(mut self, stopped: bool) -> Self {
        self.doorbell = doorbell(self.mem.pid(), stopped);
        self
    }

    fn slot(&self, index: u64) -> RemoteAddr {
        let slots = (self.before.len() - OWNER_BYTES) as u64;
        self.addr + index * (slots / SLOTS)
    }

    /// Where the number of the slot stands whose task owns the scratch memory.
    fn owner_at(&self) -> RemoteAddr {
        self.addr + (self.before.len() - OWNER_BYTES) as u64
    }

    /// Makes the task in that slot the owner of the scratch memory, and the other one not, in
    /// one step.
    fn set_owner(&self, slot: u64) -> Result<()> {
        self.mem.write(self.owner_at(), &slot.to_le_bytes())
    }

    /// Puts back what stood there.
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
/// vDSO first, or for a cave that a dead tracer left.
fn find_room(mem: &ProcessMemory, maps: &[Vma], need: usize) -> Result<Option<RemoteAddr>> {
    let image = cave_image();
    let mut executable: Vec<&Vma> = maps
        .iter()
        .filter(|v| v.exec && !v.shared && v.name != VmaName::Vsyscall)
        .collect();
    executable.sort_by_key(|v| v.name != VmaName::Vdso);
    for vma in executable {
        let mut offset = 0;
        let len = (vma.end - vma.start) as usize;
        while offset < len {
            // The pieces overlap so that no run is cut.
            let piece = (len - offset).min(1 << 20);
            let mut bytes = vec![0; piece];
            let base = RemoteAddr(vma.start + offset as u64);
            if mem.read(base, &mut bytes).is_err() {
                break;
            }
            if let Some(at) = find_stale(&bytes, &image).or_else(|| find_filler(&bytes, need)) {
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

fn find_stale(bytes: &[u8], image: &CaveImage) -> Option<usize> {
    let code = &image.bytes[..image.magic as usize + 8];
    bytes
        .windows(code.len())
        .step_by(16)
        .position(|w| w == code)
        .map(|i| i * 16)
}

fn find_filler(bytes: &[u8], need: usize) -> Option<usize> {
    // 64 bytes of distance to what stands before: a table may end in zeros that count.
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

/// Moves tasks out of a cave that a dead tracer left them in. All tasks must be stopped; a
/// task inside runs home instruction by instruction.
pub fn leave_stale_cave(tasks: &mut [Stopped], mem: &ProcessMemory) -> Result<()> {
    let image = cave_image();
    let slot = image.bytes.len() as u64;
    for task in tasks {
        for _ in 0..256 {
            let rip = RemoteAddr(task.regs()?.rip);
            // The code before the magic, wherever in it the task is.
            let mut around = vec![0u8; 2 * slot as usize];
            let from = RemoteAddr(rip.raw().saturating_sub(slot));
            if mem.read(from, &mut around).is_err() {
                // Too close to the border of a mapping to be the middle of a cave, or not
                // readable: look at the bytes from the page's start instead.
                let page = RemoteAddr(rip.raw() & !0xfff);
                around = vec![0u8; 4096];
                if mem.read(page, &mut around).is_err() {
                    break;
                }
                if !inside_stale(&around, rip.raw() - page.raw(), &image) {
                    break;
                }
            } else if !inside_stale(&around, rip.raw() - from.raw(), &image) {
                break;
            }
            step_once(task)?;
        }
    }
    Ok(())
}

fn inside_stale(bytes: &[u8], rip: u64, image: &CaveImage) -> bool {
    let code = &image.bytes[..image.magic as usize + 8];
    bytes
        .windows(code.len())
        .position(|w| w == code)
        .is_some_and(|at| (at as u64..at as u64 + image.magic).contains(&rip))
}

/// One instruction, passing on signals that arrive.
fn step_once(task: &mut Stopped) -> Result<()> {
    let mut signal = 0;
    loop {
        match advance(task, Resume::Step, signal)? {
            Stop::Signal(libc::SIGTRAP) => return Ok(()),
            Stop::Signal(other) => signal = other,
            _ => signal = 0,
        }
    }
}

/// Resumes a task in place and waits for its next stop.
fn advance(task: &mut Stopped, how: Resume, signal: i32) -> Result<Stop> {
    let tid = task.tid();
    task.advance(how, signal)?;
    match task.stop() {
        Stop::Exec | Stop::Clone | Stop::Other(_) => Err(Error::UnexpectedStop {
            tid,
            what: format!("{:?}", task.stop()),
        }),
        stop => Ok(stop),
    }
}

/// A task made ready for remote calls. [`finish`](Self::finish) puts everything back; a drop
/// does so as well as it can, and if nothing at all is done the task finds home by itself.
#[derive(Debug)]
pub struct RemoteCalls<'a> {
    task: &'a mut Stopped,
    cave: &'a Cave<'a>,
    slot: RemoteAddr,
    id: u64,
    original: Regs,
    mask: u64,
    scratch: RemoteAddr,
    scratch_len: u64,
    owns_scratch: bool,
    entered: bool,
    doorbell: Option<i32>,
}

/// One call of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// For messages.
    pub name: &'static str,
    /// Its number.
    pub nr: i64,
    /// Its operands.
    pub args: [u64; 6],
}

impl Call {
    /// A call with up to six operands.
    pub fn new(name: &'static str, nr: i64, args: &[u64]) -> Self {
        Self {
            name,
            nr,
            args: std::array::from_fn(|i| args.get(i).copied().unwrap_or(0)),
        }
    }
}

/// Bytes of a call in the list that the cave works through.
const CALL_BYTES: u64 = 64;

/// A signal that the process ignores, to be the doorbell. SIGCONT wakes a stopped process, so
/// it is the last choice and none for a stopped one.
fn doorbell(pid: Pid, stopped: bool) -> Option<i32> {
    let signals = crate::proc::status::read_status(pid).ok()?.signals;
    let cont = (!stopped).then_some(libc::SIGCONT);
    [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD]
        .into_iter()
        .chain(cont)
        .find(|signal| signals.caught & (1 << (signal - 1)) == 0)
}

impl<'a> RemoteCalls<'a> {
    /// Makes the task ready and maps `scratch_len` bytes of scratch memory (readable and
    /// writable, private) at `scratch`, a hole that the caller found. `resume_at` is where the
    /// task goes on (see [`effective_rip`]).
    pub fn begin(
        task: &'a mut Stopped,
        cave: &'a Cave<'a>,
        scratch: RemoteAddr,
        scratch_len: u64,
    ) -> Result<Self> {
        let mut calls = Self::prepare(task, cave, 0)?;
        calls.scratch = scratch;
        calls.scratch_len = scratch_len;
        cave.set_owner(0)?;
        calls.write_way_home()?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let args = [
            scratch.raw(),
            scratch_len,
            (libc::PROT_READ | libc::PROT_WRITE) as u64,
            flags as u64,
            u64::MAX,
            0,
        ];
        let image = cave_image();
        let regs = calls.call_regs(image.boot, libc::SYS_mmap, args);
        calls.enter(&regs)?;
        let answer = calls.run_call("mmap")?;
        if answer != scratch.raw() {
            let _ = calls.go_home();
            return Err(Error::Remote {
                tid: calls.task.tid(),
                call: "mmap",
                errno: Errno::EEXIST,
            });
        }
        calls.owns_scratch = true;
        Ok(calls)
    }

    /// Makes the next task of the same address space ready and puts this one back as it was.
    ///
    /// The scratch memory changes hands, with both tasks in the cave and neither near it: if the
    /// tracer dies, exactly one of them unmaps it on its way home, and the other does not touch
    /// it.
    pub fn hand_over(mut self, task: &'a mut Stopped) -> Result<Self> {
        let mut next = Self::prepare(task, self.cave, 1 - self.id)?;
        next.scratch = self.scratch;
        next.scratch_len = self.scratch_len;
        next.write_way_home()?;
        let home = cave_image().home;
        let regs = next.call_regs(home, libc::SYS_gettid, [0; 6]);
        next.enter(&regs)?;
        // This one may stand where it would still store an answer.
        let regs = self.call_regs(home, libc::SYS_gettid, [0; 6]);
        self.task.set_regs(&regs)?;
        self.cave.set_owner(next.id)?;
        self.owns_scratch = false;
        next.owns_scratch = true;
        self.go_home()?;
        Ok(next)
    }

    /// Makes a task ready for calls that need no scratch memory.
    pub fn begin_without_scratch(task: &'a mut Stopped, cave: &'a Cave<'a>) -> Result<Self> {
        let mut calls = Self::prepare(task, cave, 1)?;
        cave.set_owner(0)?;
        calls.write_way_home()?;
        let regs = calls.call_regs(cave_image().home, libc::SYS_gettid, [0; 6]);
        calls.enter(&regs)?;
        Ok(calls)
    }

    fn prepare(task: &'a mut Stopped, cave: &'a Cave<'a>, slot: u64) -> Result<Self> {
        let mut original = task.regs()?;
        original.rip = effective_rip(task, cave.mem, &original)?;
        let mask = task.signal_mask()?;
        Ok(Self {
            slot: cave.slot(slot),
            id: slot,
            task,
            cave,
            original,
            mask,
            scratch: RemoteAddr(0),
            scratch_len: 0,
            owns_scratch: false,
            entered: false,
            doorbell: cave.doorbell,
        })
    }

    /// The task.
    pub fn tid(&self) -> Tid {
        self.task.tid()
    }

    /// Its process.
    pub fn pid(&self) -> Pid {
        self.cave.mem.pid()
    }

    /// The registers with which the task will go on.
    pub fn original_regs(&self) -> &Regs {
        &self.original
    }

    /// The signals that the task blocks by itself.
    pub fn original_mask(&self) -> u64 {
        self.mask
    }

    /// The stopped task, to be looked into. Its registers and its signal mask are those of the
    /// remote calls.
    pub fn task(&self) -> &Stopped {
        self.task
    }

    /// Where the scratch memory is.
    pub fn scratch(&self) -> RemoteAddr {
        self.scratch
    }

    fn write_way_home(&self) -> Result<()> {
        let home = restarted(&self.original);
        let overflow = home.eflags & 0x800 != 0;
        // al becomes 0x80 (overflow) or 1; ah carries SF ZF AF PF CF for sahf.
        let flags = if overflow { 0x7f } else { 0 } | (home.eflags & 0xff) << 8;
        let words = [
            self.scratch.raw(),
            self.scratch_len,
            self.mask,
            flags,
            self.cave.owner_at().raw(),
            self.id,
            home.rdi,
            home.rsi,
            home.rdx,
            home.r10,
            home.r8,
            home.r9,
            home.rcx,
            home.r11,
            home.rax,
            home.rip,
            home.rbx,
            home.rbp,
        ];
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        self.cave.mem.write(self.slot + cave_image().data, &bytes)
    }

    fn call_regs(&self, entry: u64, nr: i64, args: [u64; 6]) -> Regs {
        let mut regs = self.original;
        regs.rip = (self.slot + entry).raw();
        regs.rax = nr as u64;
        // No system call to restart in the state that we set.
        regs.orig_rax = u64::MAX;
        regs.rdi = args[0];
        regs.rsi = args[1];
        regs.rdx = args[2];
        regs.r10 = args[3];
        regs.r8 = args[4];
        regs.r9 = args[5];
        regs
    }

    fn enter(&mut self, regs: &Regs) -> Result<()> {
        self.task.set_regs(regs)?;
        self.entered = true;
        fault::hit(Step::CaveEntered)?;
        let open = self.doorbell.map_or(0, |signal| 1 << (signal - 1));
        self.task.set_signal_mask(!open)
    }

    /// Runs the task from the registers set up to the exit of the system call.
    fn run_call(&mut self, call: &'static str) -> Result<u64> {
        for _entry_then_exit in 0..2 {
            self.reach_syscall_stop()?;
        }
        let answer = self.task.regs()?.rax;
        if (-4095..0).contains(&(answer as i64)) {
            let errno = Errno::from_raw(-(answer as i64) as i32);
            return Err(Error::Remote {
                tid: self.task.tid(),
                call,
                errno,
            });
        }
        Ok(answer)
    }

    fn reach_syscall_stop(&mut self) -> Result<()> {
        let mut signal = 0;
        loop {
            match advance(self.task, Resume::Syscall, signal)? {
                Stop::Syscall => return Ok(()),
                // Only SIGSTOP comes through a full mask. It takes effect when the task is
                // let go; in between the tracer's word counts.
                Stop::Signal(arrived) => signal = arrived,
                _ => signal = 0,
            }
        }
    }

    /// Executes one system call in the task. Its errno comes back as [`Error::Remote`].
    pub fn call(&mut self, name: &'static str, nr: i64, args: [u64; 6]) -> Result<u64> {
        fault::hit(Step::RemoteCall)?;
        let regs = self.call_regs(cave_image().call, nr, args);
        self.task.set_regs(&regs)?;
        self.run_call(name)
    }

    /// Executes several system calls, in order, with one stop at the end; returns the raw
    /// answers. `list` is where in the scratch memory the list may stand, behind everything that
    /// the calls use; it takes 64 bytes a call and 192 more.
    pub fn batch(&mut self, list: u64, calls: &[Call]) -> Result<Vec<i64>> {
        let Some(doorbell) = self.doorbell else {
            return calls.iter().map(|c| self.raw_call(c)).collect();
        };
        fault::hit(Step::RemoteCall)?;
        let end = list + (calls.len() as u64 + 1) * CALL_BYTES;
        // SI_QUEUE from the task itself; the value tells nobody anything.
        let mut info = [0u8; 128];
        info[..4].copy_from_slice(&doorbell.to_le_bytes());
        info[8..12].copy_from_slice(&(-1i32).to_le_bytes());
        let (pid, tid) = (self.pid().raw() as u64, self.task.tid().raw() as u64);
        let ring = [pid, tid, doorbell as u64, (self.scratch + end).raw(), 0, 0];
        let ring = Call {
            name: "doorbell",
            nr: libc::SYS_rt_tgsigqueueinfo,
            args: ring,
        };
        let mut bytes = Vec::with_capacity((end - list) as usize + info.len());
        for call in calls.iter().chain([&ring]) {
            bytes.extend_from_slice(&(call.nr as u64).to_le_bytes());
            call.args
                .iter()
                .for_each(|a| bytes.extend_from_slice(&a.to_le_bytes()));
            bytes.extend_from_slice(&0u64.to_le_bytes());
        }
        bytes.extend_from_slice(&info);
        self.write_scratch(list, &bytes)?;

        let mut regs = self.call_regs(cave_image().batch, 0, [0; 6]);
        regs.rbx = (self.scratch + list).raw();
        regs.rbp = (self.scratch + end).raw();
        self.task.set_regs(&regs)?;
        let mut signal = 0;
        loop {
            match advance(self.task, Resume::Cont, signal)? {
                Stop::Signal(arrived) if arrived == doorbell => {
                    if self.task.regs()?.rbx == regs.rbp - CALL_BYTES {
                        break;
                    }
                    // One from elsewhere, which the program ignores.
                    signal = 0;
                }
                Stop::Signal(arrived) => signal = arrived,
                _ => signal = 0,
            }
        }
        let mut answers = vec![0u8; (end - list) as usize];
        self.cave.mem.read(self.scratch + list, &mut answers)?;
        let answers = answers.chunks_exact(CALL_BYTES as usize).take(calls.len());
        Ok(answers
            .map(|call| i64::from_le_bytes(call[56..64].try_into().unwrap_or([0; 8])))
            .collect())
    }

    fn raw_call(&mut self, call: &Call) -> Result<i64> {
        match self.call(call.name, call.nr, call.args) {
            Ok(answer) => Ok(answer as i64),
            Err(Error::Remote { errno, .. }) => Ok(-(errno as i64)),
            Err(e) => Err(e),
        }
    }

    /// As [`batch`](Self::batch), where every call must succeed.
    pub fn batch_ok(&mut self, list: u64, calls: &[Call]) -> Result<Vec<u64>> {
        let tid = self.task.tid();
        let answers = self.batch(list, calls)?;
        answers
            .into_iter()
            .zip(calls)
            .map(|(answer, call)| match answer {
                -4095..0 => {
                    let errno = Errno::from_raw(-answer as i32);
                    Err(Error::Remote {
                        tid,
                        call: call.name,
                        errno,
                    })
                }
                _ => Ok(answer as u64),
            })
            .collect()
    }

    /// Writes into the scratch memory.
    pub fn write_scratch(&self, offset: u64, bytes: &[u8]) -> Result<RemoteAddr> {
        let at = self.scratch + offset;
        self.cave.mem.write(at, bytes)?;
        Ok(at)
    }

    /// Reads from the scratch memory.
    pub fn read_scratch<const N: usize>(&self, offset: u64) -> Result<[u8; N]> {
        self.cave.mem.read_array(self.scratch + offset)
    }

    /// Leaves the task in its stop, to go on elsewhere: with other registers and another
    /// signal mask. The scratch memory stays mapped; it is the caller's now.
    pub fn leave_at(mut self, regs: &Regs, mask: u64) -> Result<()> {
        self.entered = false;
        self.owns_scratch = false;
        self.task.set_signal_mask(mask)?;
        self.task.set_regs(regs)
    }

    /// Begins a system call and interrupts it before it can wait: what it leaves in the task
    /// (a restart block) stays. Returns the kernel's raw answer, an `-ERESTART*` included; the
    /// task is then in its event stop.
    pub fn begin_and_interrupt(mut self, nr: i64, args: [u64; 6]) -> Result<i64> {
        let regs = self.call_regs(cave_image().call, nr, args);
        self.task.set_regs(&regs)?;
        self.reach_syscall_stop()?;
        self.task.interrupt()?;
        let mut signal = 0;
        loop {
            match advance(self.task, Resume::Cont, signal)? {
                Stop::Event(_) => break,
                Stop::Signal(arrived) => signal = arrived,
                _ => signal = 0,
            }
        }
        let answer = self.task.regs()?.rax as i64;
        self.entered = false;
        self.task.set_regs(&self.original)?;
        self.task.set_signal_mask(self.mask)?;
        Ok(answer)
    }

    /// Puts everything back: the task is stopped as it was found.
    pub fn finish(mut self) -> Result<()> {
        self.go_home()
    }

    fn go_home(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.entered) {
            return Ok(());
        }
        if std::mem::take(&mut self.owns_scratch) {
            let args = [self.scratch.raw(), self.scratch_len, 0, 0, 0, 0];
            let regs = self.call_regs(cave_image().unmap, libc::SYS_munmap, args);
            self.task.set_regs(&regs)?;
            self.run_call("munmap")?;
        }
        // Only on the way out of an event stop, or of the stop for a signal, does the kernel
        // restart an interrupted call, and look at signals that came in meanwhile.
        if self.at_doorbell() {
            return self.set_original();
        }
        self.task.interrupt()?;
        let mut signal = 0;
        while !matches!(self.task.stop(), Stop::Event(_)) {
            match advance(self.task, Resume::Cont, signal)? {
                Stop::Signal(arrived) => signal = arrived,
                _ => signal = 0,
            }
        }
        self.set_original()
    }

    fn set_original(&self) -> Result<()> {
        self.task.set_signal_mask(self.mask)?;
        // Whatever fails, the registers are set: the cave is about to be filled in.
        let fault = fault::hit(Step::CaveLeaving);
        self.task.set_regs(&self.original)?;
        fault
    }
}

impl RemoteCalls<'_> {
    fn at_doorbell(&self) -> bool {
        matches!((self.task.stop(), self.doorbell), (Stop::Signal(at), Some(bell)) if at == bell)
    }
}

impl Drop for RemoteCalls<'_> {
    fn drop(&mut self) {
        let _ = self.go_home();
    }
}

/// Where a task really goes on: a task stopped inside a restartable sequence (rseq(2)) goes
/// on at the sequence's abort handler, as the kernel would have it after a preemption. After
/// any detour the kernel no longer knows, so it is decided here.
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
fn restarted(regs: &Regs) -> Regs {
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

/// Calls that answer an interruption without a handler with EINTR instead of being restarted
/// (signal(7), "Interruption of system calls … by stop signals"), and that had no effect then.
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
];

/// Makes a stopped task unaware of the interruption: a call that came back with EINTR only
/// because we interrupted it is marked for a restart "unless a handler runs", which is what
/// the kernel itself does for most calls.
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

impl Stopped {
    /// Resumes the task and waits for its next stop, in place.
    pub fn advance(&mut self, how: Resume, signal: i32) -> Result<()> {
        let tid = self.tid();
        let taken = std::mem::replace(self, Stopped::absent(tid));
        match taken.resume(how, signal)?.wait_alone()? {
            Waited::Stopped(stopped) => {
                *self = stopped;
                Ok(())
            }
            Waited::Gone(_) => Err(Error::Died { tid }),
        }
    }

    /// Asks for an event stop, to be reached on the next resume.
    pub fn interrupt(&self) -> Result<()> {
        crate::task::Running::auto_attached(self.tid()).interrupt()
    }
}
