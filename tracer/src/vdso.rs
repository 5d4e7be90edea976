//! Whether a task is executing the vDSO, whose code works with the data of this kernel only.

use std::cell::OnceCell;
use std::ops::Range;

use crate::proc::maps::{VmaName, read_maps};
use crate::task::Stopped;
use crate::{Pid, Result};

/// Calls that functions of the vDSO make as a fallback.
const ITS_CALLS: &[i64] = &[
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_time,
    libc::SYS_getcpu,
    libc::SYS_getrandom,
];

/// The vDSO of a process, located on first use.
#[derive(Debug)]
pub(crate) struct Vdso {
    pid: Pid,
    range: OnceCell<Range<u64>>,
}

impl Vdso {
    pub(crate) fn of(pid: Pid) -> Self {
        Self {
            pid,
            range: OnceCell::new(),
        }
    }

    /// Whether the task is inside. A task in a system call that the vDSO does not make is outside, which saves
    /// reading the mappings of most processes.
    pub(crate) fn holds(&self, task: &Stopped) -> Result<bool> {
        let regs = task.regs()?;
        let call = regs.orig_rax as i64;
        if call >= 0 && !ITS_CALLS.contains(&call) {
            return Ok(false);
        }
        if self.range.get().is_none() {
            let _ = self.range.set(self.find()?);
        }
        Ok(self.range.get().is_some_and(|r| r.contains(&regs.rip)))
    }

    fn find(&self) -> Result<Range<u64>> {
        let maps = read_maps(self.pid)?;
        let vdso = maps.iter().find(|v| v.name == VmaName::Vdso);
        Ok(vdso.map_or(0..0, |v| v.start..v.end))
    }
}
