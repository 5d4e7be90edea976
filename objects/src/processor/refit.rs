//! Adapts processor state to another processor: the state of threads, and state saved by the kernel in signal frames.

use ckpt_tracer::Pid;
use ckpt_tracer::features::Cpu;

use super::{COMPONENTS, Component, HEADER, Processor, in_use};
use crate::error::{Error, Obstacle, Result};
use crate::process::Process;
use crate::{Host, frames};

/// The layout of the components there, and here.
#[derive(Clone, Debug, Default)]
pub struct Refit {
    was: Vec<Component>,
    now: Vec<Component>,
    /// Enabled components there.
    xcr0: u64,
    /// Bytes of a state there.
    size: usize,
}

impl Refit {
    /// To the processor on which we run.
    pub fn to_here(host: &Host, here: &Cpu) -> Self {
        Self::to(host, &Processor::from(here))
    }

    /// To any processor.
    pub(super) fn to(host: &Host, now: &Processor) -> Self {
        Self {
            was: host.processor.components.clone(),
            now: now.components.clone(),
            xcr0: host.xcr0,
            size: host.xstate_size as usize,
        }
    }

    /// A component with another offset here.
    pub(super) fn moved(&self) -> Option<(&Component, &Component)> {
        let pairs = self.was.iter().filter_map(|old| {
            let new = self.now.iter().find(|new| new.number == old.number)?;
            Some((old, new))
        });
        pairs.into_iter().find(|(old, new)| old != new)
    }

    /// A thread's state in the size that this kernel requires (`xstateregs_set`, arch/x86/kernel/fpu/regset.c).
    /// `present` is the initial state of a new thread here; components that the old machine did not have are taken
    /// from it.
    pub fn fit(&self, xstate: &[u8], present: &[u8]) -> Vec<u8> {
        let same = xstate.len() == present.len() && self.moved().is_none();
        if same || present.len() < COMPONENTS || xstate.len() < COMPONENTS {
            return xstate.to_vec();
        }
        let mut fitted = present.to_vec();
        fitted[..HEADER].copy_from_slice(&xstate[..HEADER]);
        // A component that is missing here is not needed, see `state_missing`.
        let here = self.now.iter().fold(0b11, |all, c| all | 1 << c.number);
        let used = in_use(xstate) & self.xcr0 & here | in_use(present) & !self.xcr0;
        fitted[HEADER..HEADER + 8].copy_from_slice(&used.to_le_bytes());
        for old in &self.was {
            let new = self.now.iter().find(|new| new.number == old.number);
            let Some(new) = new.filter(|new| new.size == old.size) else {
                continue;
            };
            let range = |c: &Component| c.offset as usize..(c.offset + c.size) as usize;
            if let (Some(from), Some(to)) = (xstate.get(range(old)), fitted.get_mut(range(new))) {
                to.copy_from_slice(from);
            }
        }
        fitted
    }

    /// Whether the kernel would not restore all of a frame of the old machine: it uses the present layout, and takes
    /// only x87 and SSE from a frame that is larger than its own (`check_xstate_in_sigframe`,
    /// arch/x86/kernel/fpu/signal.c).
    fn spoils_frames(&self) -> bool {
        let end = |c: &Component| c.offset + c.size;
        let here = self
            .now
            .iter()
            .map(end)
            .max()
            .unwrap_or(0)
            .max(COMPONENTS as u32) as usize;
        self.moved().is_some() || self.size > here
    }

    /// Refuses a process, whose memory is filled, if one of its signal handlers is running on a frame that cannot be
    /// adapted.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub fn check_frames(&self, process: &Process, pid: Pid) -> Result<()> {
        if !self.spoils_frames() {
            return Ok(());
        }
        for thread in &process.threads {
            if frames::any(thread.regs.rsp, &process.memory.mappings, pid) {
                return Err(Error::refuse(Obstacle::new(
                    format!(
                        "a signal handler of thread {} of process {}",
                        thread.tid, process.pid
                    ),
                    "is running, and its frame on the stack has processor state in another layout than this \
                     processor's",
                    "take another checkpoint, or restore it on the same kind of processor",
                )));
            }
        }
        Ok(())
    }
}
