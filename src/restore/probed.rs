//! Kernel features, permissions and our own status: independent of any image, so probed once a process.

use std::sync::OnceLock;

use ckpt_tracer::Pid;
use ckpt_tracer::features::KernelFeatures;
use ckpt_tracer::proc::status::{Status, read_status};
use nix::errno::Errno;

use super::run::next_pid;
use crate::error::Result;
use crate::objects::clock::Clocks;
use crate::objects::plan::PidMethod;

/// Probed features. Some are probed on first use. They are valid for the process that probed them, as long as its
/// credentials and namespaces stay the same.
#[derive(Clone, Debug)]
pub struct Probed {
    /// Kernel features, and our capabilities.
    pub kernel: KernelFeatures,
    /// Our own `/proc/PID/status`.
    pub ours: Status,
    last_pid: OnceLock<bool>,
    clocks: OnceLock<Result<(), Errno>>,
}

impl Probed {
    /// Probes this machine for the calling process.
    ///
    /// # Errors
    /// If `/proc/PID/status` cannot be read.
    pub fn here() -> Result<Self> {
        Ok(Self {
            kernel: KernelFeatures::probe(),
            ours: read_status(Pid::own())?,
            last_pid: OnceLock::new(),
            clocks: OnceLock::new(),
        })
    }

    /// The best available way to choose the id of a task. `by_others`: descendants that have executed a program create tasks, too.
    pub fn pid_method(&self, by_others: bool) -> PidMethod {
        if self.kernel.set_tid && (!by_others || next_pid::others_may_choose(&self.ours)) {
            return PidMethod::SetTid;
        }
        match *self.last_pid.get_or_init(next_pid::may_set_last) {
            true => PidMethod::LastPid,
            false => PidMethod::UseUp,
        }
    }

    /// Whether a job can be given these clocks.
    ///
    /// # Errors
    /// The errno of creating the time namespace.
    pub fn may_have(&self, clocks: Clocks) -> Result<(), Errno> {
        (*self.clocks.get_or_init(Clocks::may_be_made))?;
        clocks.are_possible()
    }
}
