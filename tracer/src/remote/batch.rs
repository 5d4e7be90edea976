//! Lists of calls that the cave executes, with one stop at the end.

use super::RemoteCalls;
use super::calls::checked;
use super::cave::cave_image;
use super::wait::advance;
use crate::fault::{self, Step};
use crate::task::{Resume, Stop};
use crate::{Error, Result};

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

    /// Its entry in a list: number, operands, and room for the result.
    pub(super) fn in_list(&self) -> [u8; CALL_BYTES as usize] {
        let mut bytes = [0; CALL_BYTES as usize];
        let words = [self.nr as u64].into_iter().chain(self.args);
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// Bytes of a list entry.
pub(super) const CALL_BYTES: u64 = 64;

impl<'a> RemoteCalls<'a> {
    /// Executes several system calls, in order, with one stop at the end; returns the raw results. `list` is the
    /// offset of the list in the scratch memory, above everything that the calls use; it takes 64 bytes a call and
    /// 192 more.
    pub fn batch(&mut self, list: u64, calls: &[Call]) -> Result<Vec<i64>> {
        let Some(doorbell) = self.doorbell else {
            return calls.iter().map(|c| self.raw_call(c)).collect();
        };
        self.listed(list, Some(doorbell), &[calls])?
            .run(&mut || Ok(()))
    }

    /// As [`batch`](Self::batch), with a stop between two parts, in which `look` is called. If the tracer dies there,
    /// or anywhere, the task still executes the rest, so the second part can undo the first. Takes 64 bytes more.
    pub fn batch_in_two(
        &mut self,
        list: u64,
        parts: [&[Call]; 2],
        look: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Vec<i64>> {
        self.listed(list, self.doorbell, &parts)?.run(look)
    }

    /// Writes the list, with a doorbell call after each part, and sets the task's registers to its start. Without a
    /// doorbell the tracer waits for each call of the list, and the doorbell calls do nothing.
    pub(super) fn listed(
        &mut self,
        list: u64,
        doorbell: Option<i32>,
        parts: &[&[Call]],
    ) -> Result<Listed<'_, 'a>> {
        fault::hit(Step::RemoteCall)?;
        let calls: usize = parts.iter().map(|part| part.len() + 1).sum();
        let end = list + calls as u64 * CALL_BYTES;
        // SI_QUEUE from the task itself; the value is unused.
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
                bytes.extend_from_slice(&call.in_list());
            }
            let ring = list + bytes.len() as u64 - CALL_BYTES;
            rings.push((self.scratch + ring).raw());
        }
        bytes.extend_from_slice(&info);
        self.write_scratch(list, &bytes)?;
        self.stand_before(list, end)?;
        Ok(Listed {
            calls: self,
            doorbell,
            list,
            rings,
        })
    }

    /// Sets the registers such that the task executes the calls of the list, then the return path.
    pub(super) fn stand_before(&mut self, list: u64, end: u64) -> Result<()> {
        let mut regs = self.call_regs(cave_image().batch, 0, [0; 6]);
        regs.rbx = (self.scratch + list).raw();
        regs.rbp = (self.scratch + end).raw();
        self.task.set_regs(&regs)
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
        let answers = answers.into_iter().zip(calls);
        answers
            .map(|(answer, call)| checked(tid, call.name, answer))
            .collect()
    }
}

/// A list of calls in the scratch memory, with the task at its start.
pub(super) struct Listed<'r, 'a> {
    calls: &'r mut RemoteCalls<'a>,
    doorbell: Option<i32>,
    list: u64,
    /// Addresses of the doorbell calls.
    rings: Vec<u64>,
}

impl Listed<'_, '_> {
    /// Runs the list, and calls `look` at each doorbell but the last. Returns the raw results, without those of the
    /// doorbell calls.
    pub(super) fn run(self, look: &mut dyn FnMut() -> Result<()>) -> Result<Vec<i64>> {
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
                // The rest of the list is executed in any case.
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
                        // The rest of the list is executed in any case.
                        seen = look();
                    }
                    // A signal from elsewhere, which the program ignores.
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
