//! A task prepared for remote calls, and single calls in it.

use nix::errno::Errno;

use super::cave::{Cave, cave_image};
use super::restart::effective_rip;
use super::scratch::Scratch;
use crate::dispatch::Dispatch;
use crate::fault::{self, Step};
use crate::mem::ProcessMemory;
use crate::task::{Regs, Stopped};
use crate::{Error, Pid, RemoteAddr, Result, Tid, abi};

/// The result of a call; an errno becomes [`Error::Remote`].
pub(super) fn checked(tid: Tid, call: &'static str, answer: i64) -> Result<u64> {
    match answer {
        -4095..0 => Err(Error::Remote {
            tid,
            call,
            errno: Errno::from_raw(-answer as i32),
        }),
        _ => Ok(answer as u64),
    }
}

/// A task prepared for remote calls. [`finish`](Self::finish) restores everything; a drop does so as far as possible,
/// and otherwise the task takes the return path by itself.
#[derive(Debug)]
pub struct RemoteCalls<'a> {
    pub(super) task: &'a mut Stopped,
    pub(super) cave: &'a Cave<'a>,
    pub(super) slot: RemoteAddr,
    pub(super) id: u64,
    pub(super) original: Regs,
    pub(super) mask: u64,
    /// Its own syscall user dispatch, where the cave needs another one.
    pub(super) dispatch: Option<Dispatch>,
    pub(super) scratch: RemoteAddr,
    pub(super) scratch_len: u64,
    /// The successful result of the mapping call.
    pub(super) mapped: u64,
    pub(super) owns_scratch: bool,
    pub(super) entered: bool,
    pub(super) doorbell: Option<i32>,
}

impl<'a> RemoteCalls<'a> {
    /// Prepares the task and maps the scratch memory (readable and writable, private).
    pub fn begin(task: &'a mut Stopped, cave: &'a Cave<'a>, scratch: Scratch) -> Result<Self> {
        let mut calls = Self::prepare(task, cave, 0)?;
        let mapping = scratch.mapping();
        calls.scratch = scratch.at;
        calls.scratch_len = scratch.len;
        calls.mapped = mapping.answer;
        cave.set_owner(0)?;
        calls.write_way_home()?;
        let regs = calls.call_regs(cave_image().boot, mapping.nr, mapping.args);
        calls.enter(&regs)?;
        if calls.run_call(mapping.name)? != mapping.answer {
            let _ = calls.go_home();
            return Err(Error::Remote {
                tid: calls.task.tid(),
                call: mapping.name,
                errno: Errno::EEXIST,
            });
        }
        calls.owns_scratch = true;
        Ok(calls)
    }

    /// Prepares a task for calls that need no scratch memory.
    pub fn begin_without_scratch(task: &'a mut Stopped, cave: &'a Cave<'a>) -> Result<Self> {
        let mut calls = Self::prepare(task, cave, 1)?;
        cave.set_owner(0)?;
        calls.write_way_home()?;
        let regs = calls.call_regs(cave_image().home, libc::SYS_gettid, [0; 6]);
        calls.enter(&regs)?;
        Ok(calls)
    }

    pub(super) fn prepare(task: &'a mut Stopped, cave: &'a Cave<'a>, slot: u64) -> Result<Self> {
        let mut original = task.regs()?;
        if original.cs != abi::USER_CS {
            return Err(Error::OtherCode {
                tid: task.tid(),
                selector: original.cs,
            });
        }
        original.rip = effective_rip(task, cave.mem, &original)?;
        let mask = task.signal_mask()?;
        let dispatch = cave.dispatch_of(task)?;
        Ok(Self {
            slot: cave.slot(slot),
            id: slot,
            task,
            cave,
            original,
            mask,
            dispatch,
            scratch: RemoteAddr(0),
            scratch_len: 0,
            mapped: 0,
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

    /// The registers with which the task will continue.
    pub fn original_regs(&self) -> &Regs {
        &self.original
    }

    /// The task's own signal mask.
    pub fn original_mask(&self) -> u64 {
        self.mask
    }

    /// The task's own syscall user dispatch.
    pub fn original_dispatch(&self) -> Result<Option<Dispatch>> {
        match self.dispatch {
            Some(dispatch) => Ok(Some(dispatch)),
            None => self.task.dispatch(),
        }
    }

    /// The stopped task, for inspection. Its registers and signal mask are those of the remote calls.
    pub fn task(&self) -> &Stopped {
        self.task
    }

    /// Address of the scratch memory.
    pub fn scratch(&self) -> RemoteAddr {
        self.scratch
    }

    pub(super) fn call_regs(&self, entry: u64, nr: i64, args: [u64; 6]) -> Regs {
        let mut regs = self.original;
        regs.rip = (self.slot + entry).raw();
        regs.rax = nr as u64;
        // No system call to restart from these registers.
        regs.orig_rax = u64::MAX;
        regs.rdi = args[0];
        regs.rsi = args[1];
        regs.rdx = args[2];
        regs.r10 = args[3];
        regs.r8 = args[4];
        regs.r9 = args[5];
        regs
    }

    pub(super) fn enter(&mut self, regs: &Regs) -> Result<()> {
        if let Some(dispatch) = &self.dispatch {
            // Before it enters the cave, until it has left.
            self.task
                .set_dispatch(&dispatch.allowing(&self.cave.range()))?;
        }
        self.entered = true;
        self.task.set_regs(regs)?;
        fault::hit(Step::CaveEntered)?;
        let open = self.doorbell.map_or(0, |signal| 1 << (signal - 1));
        self.task.set_signal_mask(!open)
    }

    /// Runs the task with the given registers up to the exit of the system call.
    pub(super) fn run_call(&mut self, call: &'static str) -> Result<u64> {
        for _entry_then_exit in 0..2 {
            self.reach_syscall_stop()?;
        }
        checked(self.tid(), call, self.task.regs()?.rax as i64)
    }

    /// Executes one system call in the task. Its errno becomes [`Error::Remote`].
    pub fn call(&mut self, name: &'static str, nr: i64, args: [u64; 6]) -> Result<u64> {
        fault::hit(Step::RemoteCall)?;
        let regs = self.call_regs(cave_image().call, nr, args);
        self.task.set_regs(&regs)?;
        self.run_call(name)
    }

    /// Starts a system call and interrupts it before it can wait: its effect on the task (a restart block) remains.
    /// Returns the raw result, also an `-ERESTART*`; the task is then in its event stop.
    pub fn begin_and_interrupt(mut self, nr: i64, args: [u64; 6]) -> Result<i64> {
        let regs = self.call_regs(cave_image().call, nr, args);
        self.task.set_regs(&regs)?;
        self.reach_syscall_stop()?;
        self.reach_event_stop()?;
        let answer = self.task.regs()?.rax as i64;
        self.entered = false;
        self.task.set_regs(&self.original)?;
        self.task.set_signal_mask(self.mask)?;
        Ok(answer)
    }

    /// Writes to the scratch memory.
    pub fn write_scratch(&self, offset: u64, bytes: &[u8]) -> Result<RemoteAddr> {
        let at = self.scratch + offset;
        self.cave.mem.write(at, bytes)?;
        Ok(at)
    }

    /// Reads from the scratch memory.
    pub fn read_scratch<const N: usize>(&self, offset: u64) -> Result<[u8; N]> {
        self.cave.mem.read_array(self.scratch + offset)
    }
}
