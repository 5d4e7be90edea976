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

use nix::errno::Errno;

use crate::fault::{self, Step};
use crate::mem::ProcessMemory;
use crate::task::{Regs, Resume, Stop, Stopped, Waited};
use crate::{Error, Pid, RemoteAddr, Result, Tid};

mod cave;
mod hold;
pub mod lend;
mod restart;

use cave::cave_image;
pub use cave::{Cave, leave_stale_cave};
pub use hold::Hold;
use restart::restarted;
pub use restart::{effective_rip, hide_interruption};

/// Resumes a task in place and waits for its next stop.
fn advance(pid: Pid, task: &mut Stopped, how: Resume, signal: i32) -> Result<Stop> {
    let tid = task.tid();
    task.advance(pid, how, signal)?;
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
/// it is the last choice and none for a stopped one. One that any of the tasks blocks is none
/// either: it may be waiting, to be read from a signalfd, and would be taken with the ring.
fn doorbell(pid: Pid, tasks: &[Stopped], stopped: bool) -> Option<i32> {
    let signals = crate::proc::status::read_status(pid).ok()?.signals;
    let mut taken = signals.caught;
    for task in tasks {
        taken |= task.signal_mask().ok()?;
    }
    let cont = (!stopped).then_some(libc::SIGCONT);
    [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD]
        .into_iter()
        .chain(cont)
        .find(|signal| taken & (1 << (signal - 1)) == 0)
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

    /// Its process's memory.
    pub fn memory(&self) -> &ProcessMemory {
        self.cave.mem
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
            match advance(self.cave.mem.pid(), self.task, Resume::Syscall, signal)? {
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
        self.listed(list, Some(doorbell), &[calls])?
            .run(&mut || Ok(()))
    }

    /// As [`batch`](Self::batch), with a stop between two parts, in which `look` looks around. If the
    /// tracer dies there, or anywhere, the task executes the rest all the same: what the first part did
    /// can be undone in the second. 64 bytes more.
    pub fn batch_in_two(
        &mut self,
        list: u64,
        parts: [&[Call]; 2],
        look: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Vec<i64>> {
        self.listed(list, self.doorbell, &parts)?.run(look)
    }

    /// Writes the list, with a ring behind each part, and sets the task in front of it. Without a doorbell
    /// the tracer waits for each call of the list, and the rings are calls that do nothing.
    fn listed(
        &mut self,
        list: u64,
        doorbell: Option<i32>,
        parts: &[&[Call]],
    ) -> Result<Listed<'_, 'a>> {
        fault::hit(Step::RemoteCall)?;
        let calls: usize = parts.iter().map(|part| part.len() + 1).sum();
        let end = list + calls as u64 * CALL_BYTES;
        // SI_QUEUE from the task itself; the value tells nobody anything.
        let mut info = [0u8; 128];
        let signal = doorbell.unwrap_or(0);
        info[..4].copy_from_slice(&signal.to_le_bytes());
        info[8..12].copy_from_slice(&(-1i32).to_le_bytes());
        let (pid, tid) = (self.pid().raw() as u64, self.task.tid().raw() as u64);
        let ring = [pid, tid, signal as u64, (self.scratch + end).raw()];
        let ring = match doorbell {
            Some(_) => Call::new("doorbell", libc::SYS_rt_tgsigqueueinfo, &ring),
            None => Call::new("gettid", libc::SYS_gettid, &[]),
        };
        let mut bytes = Vec::with_capacity((end - list) as usize + info.len());
        let mut rings = Vec::with_capacity(parts.len());
        for part in parts {
            for call in part.iter().chain([&ring]) {
                bytes.extend_from_slice(&(call.nr as u64).to_le_bytes());
                call.args
                    .iter()
                    .for_each(|a| bytes.extend_from_slice(&a.to_le_bytes()));
                bytes.extend_from_slice(&0u64.to_le_bytes());
            }
            let ring = list + bytes.len() as u64 - CALL_BYTES;
            rings.push((self.scratch + ring).raw());
        }
        bytes.extend_from_slice(&info);
        self.write_scratch(list, &bytes)?;
        let mut regs = self.call_regs(cave_image().batch, 0, [0; 6]);
        regs.rbx = (self.scratch + list).raw();
        regs.rbp = (self.scratch + end).raw();
        self.task.set_regs(&regs)?;
        Ok(Listed {
            calls: self,
            doorbell,
            list,
            rings,
        })
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
            match advance(self.cave.mem.pid(), self.task, Resume::Cont, signal)? {
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
            match advance(self.cave.mem.pid(), self.task, Resume::Cont, signal)? {
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

/// A list of calls in the scratch memory, with the task in front of it.
struct Listed<'r, 'a> {
    calls: &'r mut RemoteCalls<'a>,
    doorbell: Option<i32>,
    list: u64,
    /// Where the calls stand that ring.
    rings: Vec<u64>,
}

impl Listed<'_, '_> {
    /// Lets the task work through the list, with a look at each ring but the last; the raw answers,
    /// without those of the rings.
    fn run(self, look: &mut dyn FnMut() -> Result<()>) -> Result<Vec<i64>> {
        match self.doorbell {
            Some(doorbell) => self.run_to_rings(doorbell, look),
            None => self.run_call_by_call(look),
        }
    }

    fn run_call_by_call(self, look: &mut dyn FnMut() -> Result<()>) -> Result<Vec<i64>> {
        let calls = self.calls;
        let begin = (calls.scratch + self.list).raw();
        let last = self.rings[self.rings.len() - 1];
        let (mut answers, mut seen) = (Vec::new(), Ok(()));
        for at in (begin..=last).step_by(CALL_BYTES as usize) {
            for _entry_then_exit in 0..2 {
                calls.reach_syscall_stop()?;
            }
            if !self.rings.contains(&at) {
                answers.push(calls.task.regs()?.rax as i64);
            } else if at != last {
                // Whatever was seen, the rest of the list is executed.
                seen = look();
            }
        }
        seen.map(|()| answers)
    }

    fn run_to_rings(self, doorbell: i32, look: &mut dyn FnMut() -> Result<()>) -> Result<Vec<i64>> {
        let calls = self.calls;
        let last = self.rings[self.rings.len() - 1];
        let (mut signal, mut seen) = (0, Ok(()));
        loop {
            match advance(calls.cave.mem.pid(), calls.task, Resume::Cont, signal)? {
                Stop::Signal(arrived) if arrived == doorbell => {
                    let at = calls.task.regs()?.rbx;
                    if at == last {
                        break;
                    }
                    if self.rings.contains(&at) {
                        // Whatever was seen, the rest of the list is executed.
                        seen = look();
                    }
                    // Else one from elsewhere, which the program ignores.
                    signal = 0;
                }
                Stop::Signal(arrived) => signal = arrived,
                _ => signal = 0,
            }
        }
        let begin = calls.scratch + self.list;
        let mut bytes = vec![0u8; (last - begin.raw()) as usize];
        calls.cave.mem.read(begin, &mut bytes)?;
        seen?;
        let answers = bytes.chunks_exact(CALL_BYTES as usize).enumerate();
        let is_ring = |number: usize| {
            let at = begin.raw() + number as u64 * CALL_BYTES;
            self.rings.contains(&at)
        };
        Ok(answers
            .filter(|(number, _)| !is_ring(*number))
            .map(|(_, call)| i64::from_le_bytes(call[56..64].try_into().unwrap_or([0; 8])))
            .collect())
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

impl Stopped {
    /// Resumes the task, of that process, and waits for its next stop, in place; every other task
    /// of ours is in a stop. If the process is killed now, a first thread's end is told only when
    /// the others have been waited for, so for that one they are waited for as well. For the
    /// others that would be a walk over all tasks at each stop.
    pub fn advance(&mut self, pid: Pid, how: Resume, signal: i32) -> Result<()> {
        let tid = self.tid();
        let taken = std::mem::replace(self, Stopped::absent(tid));
        let running = taken.resume(how, signal)?;
        let waited = if tid == pid.leader() {
            running.wait_alone()?
        } else {
            running.wait()?
        };
        match waited {
            Waited::Stopped(stopped) => {
                *self = stopped;
                Ok(())
            }
            Waited::Gone(_) => Err(Error::Died { tid }),
        }
    }

    /// Resumes the task and waits for its next stop, in place, and for nothing else: other tasks
    /// may come to their stops meanwhile.
    pub fn advance_among_others(&mut self, how: Resume, signal: i32) -> Result<()> {
        let tid = self.tid();
        let taken = std::mem::replace(self, Stopped::absent(tid));
        *self = taken.resume(how, signal)?.wait_stopped()?;
        Ok(())
    }

    /// Asks for an event stop, to be reached on the next resume.
    pub fn interrupt(&self) -> Result<()> {
        crate::task::Running::auto_attached(self.tid()).interrupt()
    }
}
