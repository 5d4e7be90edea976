//! A task made ready for remote calls, and single calls in it.

use nix::errno::Errno;

use super::cave::{Cave, cave_image};
use super::restart::effective_rip;
use super::scratch::Scratch;
use crate::dispatch::Dispatch;
use crate::fault::{self, Step};
use crate::mem::ProcessMemory;
use crate::task::{Regs, Stopped};
use crate::{Error, Pid, RemoteAddr, Result, Tid, abi};

/// What a task has answered; an errno comes back as [`Error::Remote`].
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

/// A task made ready for remote calls. [`finish`](Self::finish) puts everything back; a drop
/// does so as well as it can, and if nothing at all is done the task finds home by itself.
#[derive(Debug)]
pub struct RemoteCalls<'a> {
    pub(super) task: &'a mut Stopped,
    pub(super) cave: &'a Cave<'a>,
    pub(super) slot: RemoteAddr,
    pub(super) id: u64,
    pub(super) original: Regs,
    pub(super) mask: u64,
    /// Its syscall user dispatch, where that is another one in the cave.
    pub(super) dispatch: Option<Dispatch>,
    pub(super) scratch: RemoteAddr,
    pub(super) scratch_len: u64,
    /// What the call that maps it answers.
    pub(super) mapped: u64,
    pub(super) owns_scratch: bool,
    pub(super) entered: bool,
    pub(super) doorbell: Option<i32>,
}

impl<'a> RemoteCalls<'a> {
    /// Makes the task ready and maps the scratch memory (readable and writable, private).
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

    /// Makes a task ready for calls that need no scratch memory.
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

    /// The registers with which the task will go on.
    pub fn original_regs(&self) -> &Regs {
        &self.original
    }

    /// The signals that the task blocks by itself.
    pub fn original_mask(&self) -> u64 {
        self.mask
    }

    /// Its syscall user dispatch.
    pub fn original_dispatch(&self) -> Result<Option<Dispatch>> {
        match self.dispatch {
            Some(dispatch) => Ok(Some(dispatch)),
            None => self.task.dispatch(),
        }
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

    pub(super) fn call_regs(&self, entry: u64, nr: i64, args: [u64; 6]) -> Regs {
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

    pub(super) fn enter(&mut self, regs: &Regs) -> Result<()> {
        if let Some(dispatch) = &self.dispatch {
            // Before it is there, and until it has left.
            self.task
                .set_dispatch(&dispatch.allowing(&self.cave.range()))?;
        }
        self.entered = true;
        self.task.set_regs(regs)?;
        fault::hit(Step::CaveEntered)?;
        let open = self.doorbell.map_or(0, |signal| 1 << (signal - 1));
        self.task.set_signal_mask(!open)
    }

    /// Runs the task from the registers set up to the exit of the system call.
    pub(super) fn run_call(&mut self, call: &'static str) -> Result<u64> {
        for _entry_then_exit in 0..2 {
            self.reach_syscall_stop()?;
        }
        checked(self.tid(), call, self.task.regs()?.rax as i64)
    }

    /// Executes one system call in the task. Its errno comes back as [`Error::Remote`].
    pub fn call(&mut self, name: &'static str, nr: i64, args: [u64; 6]) -> Result<u64> {
        fault::hit(Step::RemoteCall)?;
        let regs = self.call_regs(cave_image().call, nr, args);
        self.task.set_regs(&regs)?;
        self.run_call(name)
    }

    /// Begins a system call and interrupts it before it can wait: what it leaves in the task
    /// (a restart block) stays. Returns the kernel's raw answer, an `-ERESTART*` included; the
    /// task is then in its event stop.
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
}
