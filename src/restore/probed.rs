//! What this machine lets us do and what we are, which no image changes: found out once a process.

use std::sync::OnceLock;

use ckpt_tracer::Pid;
use ckpt_tracer::features::KernelFeatures;
use ckpt_tracer::proc::status::{Status, read_status};
use nix::errno::Errno;

use super::run::next_pid;
use crate::error::Result;
use crate::objects::clock::Clocks;
use crate::objects::plan::Means;

/// What was found out, or is when it is asked for first. It holds for the process that found it, as
/// long as that has the same credentials and namespaces.
#[derive(Clone, Debug)]
pub struct Probed {
    /// What the kernel can do, and we with it.
    pub kernel: KernelFeatures,
    /// What the kernel says of us.
    pub ours: Status,
    last_pid: OnceLock<bool>,
    clocks: OnceLock<Result<(), Errno>>,
}

impl Probed {
    /// Finds out.
    ///
    /// # Errors
    /// Without `/proc`.
    pub fn here() -> Result<Self> {
        Ok(Self {
            kernel: KernelFeatures::probe(),
            ours: read_status(Pid::own())?,
            last_pid: OnceLock::new(),
            clocks: OnceLock::new(),
        })
    }

    /// The best way for us to choose the id of a task; `by_others`: also for children that were executed by our children.
    pub fn means(&self, by_others: bool) -> Means {
        if self.kernel.set_tid && (!by_others || next_pid::others_may_choose(&self.ours)) {
            return Means::SetTid;
        }
        match *self.last_pid.get_or_init(next_pid::may_set_last) {
            true => Means::LastPid,
            false => Means::Turns,
        }
    }

    /// Whether a job can have these clocks.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn may_have(&self, clocks: Clocks) -> Result<(), Errno> {
        (*self.clocks.get_or_init(Clocks::may_be_made))?;
        clocks.are_possible()
    }
}
