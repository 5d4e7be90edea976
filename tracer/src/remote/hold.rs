//! Keeps tasks waiting until a batch is done, even if the tracer dies.
//!
//! When a tracer dies, all of its tasks continue at once, while one of them may be executing a batch. If the others
//! must not see the states in between, they have to wait. So their registers are set into the cave too, at a futex
//! wait; they execute it only if the tracer dies, since otherwise they stay in their stops. The last call of the
//! batch wakes them. Each has a block of memory with its registers, from which it returns by iretq, which sets
//! instruction pointer, flags and stack pointer at once.
//!
//! 1. The caller's task gets a batch of one call, the wake-up: from now on it wakes the others in any case.
//! 2. The futex is set to "wait", and the others get their registers.
//! 3. The caller's task gets the batch, which ends with the wake-up, and runs.
//! 4. The others get their own registers back.
//!
//! It is unknown when the last task has left its block, so if the tracer dies the blocks stay mapped.

use super::RemoteCalls;
use super::batch::{CALL_BYTES, Call};
use super::cave::cave_image;
use super::restart::{effective_rip, restarted};
use crate::dispatch::Dispatch;
use crate::task::{Regs, Stopped};
use crate::{RemoteAddr, Result};

/// Bytes for a task: its block is at the end, and a signal frame fits below.
const EACH: u64 = 4096;
/// Bytes of a block.
pub(super) const BLOCK: usize = 16 * 8;
/// `FUTEX_OP(FUTEX_OP_SET, 1, FUTEX_OP_CMP_EQ, 0)`, linux/futex.h.
const SET_ONE: u64 = 1 << 12;

/// Tasks that share the memory of the task that makes the calls.
pub struct Hold<'t> {
    tasks: Vec<&'t mut Stopped>,
    /// Their own registers and syscall user dispatch, while they are replaced.
    original: Vec<(Regs, Option<Dispatch>)>,
    at: RemoteAddr,
    mapped: bool,
}

impl<'t> Hold<'t> {
    /// Holds these tasks, with memory at `at`, a hole of [`room`](Self::room) bytes.
    pub fn new(tasks: Vec<&'t mut Stopped>, at: RemoteAddr) -> Self {
        Self {
            tasks,
            original: Vec::new(),
            at,
            mapped: false,
        }
    }

    /// Bytes of memory for that many tasks.
    pub fn room(tasks: usize) -> u64 {
        match tasks {
            0 => 0,
            some => EACH * (some as u64 + 1),
        }
    }

    /// Maps the memory.
    pub fn map(&mut self, calls: &mut RemoteCalls<'_>) -> Result<()> {
        let len = Self::room(self.tasks.len());
        if len > 0 {
            let flags = libc::MAP_PRIVATE
                | libc::MAP_ANONYMOUS
                | libc::MAP_NORESERVE
                | libc::MAP_FIXED_NOREPLACE;
            let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
            let args = [self.at.raw(), len, prot, flags as u64, u64::MAX, 0];
            calls.call("mmap", libc::SYS_mmap, args)?;
            self.mapped = true;
        }
        Ok(())
    }

    /// Unmaps it.
    pub fn unmap(&mut self, calls: &mut RemoteCalls<'_>) -> Result<()> {
        if std::mem::take(&mut self.mapped) {
            let args = [self.at.raw(), Self::room(self.tasks.len()), 0, 0, 0, 0];
            calls.call("munmap", libc::SYS_munmap, args)?;
        }
        Ok(())
    }

    fn waking(&self) -> Call {
        let word = self.at.raw();
        let op = (libc::FUTEX_WAKE_OP | libc::FUTEX_PRIVATE_FLAG) as u64;
        let all = i32::MAX as u64;
        Call::new(
            "futex",
            libc::SYS_futex,
            &[word, op, all, all, word, SET_ONE],
        )
    }

    fn send_in(&mut self, calls: &RemoteCalls<'_>) -> Result<()> {
        let mem = calls.cave.mem;
        let park = (calls.cave.slot(0) + cave_image().park).raw();
        for (n, task) in self.tasks.iter().enumerate() {
            let original = task.regs()?;
            let mut home = original;
            home.rip = effective_rip(task, mem, &original)?;
            let home = restarted(&home);
            let block = self.at + (EACH * (n as u64 + 2) - BLOCK as u64);
            let dispatch = calls.cave.dispatch_of(task)?;
            let words = [
                self.at.raw(),
                u64::from(dispatch.is_some()),
                dispatch.map_or(0, |dispatch| dispatch.selector),
                home.rdi,
                home.rsi,
                home.rdx,
                home.r10,
                home.rcx,
                home.r11,
                home.rax,
                home.rbx,
                home.rip,
                home.cs,
                home.eflags,
                home.rsp,
                home.ss,
            ];
            mem.write(block, &words.map(u64::to_le_bytes).concat())?;
            let mut regs = original;
            regs.rip = park;
            regs.rbx = block.raw();
            regs.rax = 0;
            // No system call to restart from these registers.
            regs.orig_rax = u64::MAX;
            self.original.push((original, dispatch));
            if let Some(dispatch) = &dispatch {
                task.set_dispatch(&dispatch.allowing(&calls.cave.range()))?;
            }
            task.set_regs(&regs)?;
        }
        Ok(())
    }

    fn bring_back(&mut self) -> Result<()> {
        let mut first = Ok(());
        for (task, (regs, dispatch)) in self.tasks.iter().zip(self.original.drain(..)) {
            first = first.and(task.set_regs(&regs));
            if let Some(dispatch) = &dispatch {
                first = first.and(task.set_dispatch(dispatch));
            }
        }
        first
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let _ = self.bring_back();
    }
}

impl RemoteCalls<'_> {
    /// As [`batch_in_two`](Self::batch_in_two) with any number of parts, and with the other tasks waiting until it is
    /// done. `list` as there, with 192 bytes more.
    pub fn batch_holding(
        &mut self,
        list: u64,
        parts: &[&[Call]],
        hold: &mut Hold<'_>,
        look: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Vec<i64>> {
        if hold.tasks.is_empty() {
            return self.listed(list, self.doorbell, parts)?.run(look);
        }
        let waking = hold.waking();
        self.write_scratch(list, &waking.in_list())?;
        self.stand_before(list, list + CALL_BYTES)?;
        let mem = self.cave.mem;
        mem.write(hold.at, &0u32.to_le_bytes())?;
        let sent = hold.send_in(self);
        let answers = sent.and_then(|()| {
            let mut parts: Vec<Vec<Call>> = parts.iter().map(|part| part.to_vec()).collect();
            parts
                .last_mut()
                .into_iter()
                .for_each(|last| last.push(waking));
            let parts: Vec<&[Call]> = parts.iter().map(Vec::as_slice).collect();
            let listed = self.listed(list + CALL_BYTES, self.doorbell, &parts);
            listed?.run(look)
        });
        // If the wake-up was not reached: no task waits any more.
        let back = hold.bring_back();
        let mut answers = answers?;
        back?;
        answers.pop();
        Ok(answers)
    }
}
