//! The return path: the data that the cave needs for it, and restoring a task without it.

use super::RemoteCalls;
use super::cave::cave_image;
use super::restart::restarted;
use crate::Result;
use crate::fault::{self, Step};
use crate::task::Regs;

impl RemoteCalls<'_> {
    pub(super) fn write_way_home(&self) -> Result<()> {
        let home = restarted(&self.original);
        let overflow = home.eflags & 0x800 != 0;
        // al becomes 0x80 (overflow) or 1; ah carries SF ZF AF PF CF for sahf.
        let flags = if overflow { 0x7f } else { 0 } | (home.eflags & 0xff) << 8;
        let words = [
            self.scratch.raw(),
            self.scratch_len,
            self.mapped,
            self.mask,
            flags,
            self.cave.owner_at().raw(),
            self.id,
            u64::from(self.dispatch.is_some()),
            self.dispatch.map_or(0, |dispatch| dispatch.selector),
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

    /// Leaves the task in its stop, to continue elsewhere: with other registers and another signal mask. The scratch
    /// memory stays mapped; the caller owns it now.
    pub fn leave_at(mut self, regs: &Regs, mask: u64) -> Result<()> {
        self.entered = false;
        self.owns_scratch = false;
        self.task.set_signal_mask(mask)?;
        self.task.set_regs(regs)
    }

    /// Restores everything: the task is stopped as it was found.
    pub fn finish(mut self) -> Result<()> {
        self.go_home()
    }

    pub(super) fn go_home(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.entered) {
            return Ok(());
        }
        if std::mem::take(&mut self.owns_scratch) {
            let args = [self.scratch.raw(), self.scratch_len, 0, 0, 0, 0];
            let regs = self.call_regs(cave_image().unmap, libc::SYS_munmap, args);
            self.task.set_regs(&regs)?;
            self.run_call("munmap")?;
        }
        // The kernel restarts an interrupted call, and looks for new signals, only on the way out of an event stop or
        // a signal-delivery-stop.
        if self.at_doorbell() {
            return self.set_original();
        }
        self.reach_event_stop()?;
        self.set_original()
    }

    fn set_original(&self) -> Result<()> {
        self.task.set_signal_mask(self.mask)?;
        // The registers are set after any failure: the cave is about to be overwritten.
        let fault = fault::hit(Step::CaveLeaving);
        self.task.set_regs(&self.original)?;
        if let Some(dispatch) = &self.dispatch {
            self.task.set_dispatch(dispatch)?;
        }
        fault
    }
}

impl Drop for RemoteCalls<'_> {
    fn drop(&mut self) {
        let _ = self.go_home();
    }
}
