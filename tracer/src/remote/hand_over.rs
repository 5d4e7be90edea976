//! Hand-over from one task of an address space to the next.

use super::RemoteCalls;
use super::cave::cave_image;
use crate::Result;
use crate::task::Stopped;

impl<'a> RemoteCalls<'a> {
    /// Prepares the next task of the same address space and restores this one.
    ///
    /// The scratch memory changes its owner with both tasks in the cave: if the tracer dies, exactly one of them
    /// unmaps it on its return path, and the other does not touch it.
    pub fn hand_over(mut self, task: &'a mut Stopped) -> Result<Self> {
        let mut next = Self::prepare(task, self.cave, 1 - self.id)?;
        next.scratch = self.scratch;
        next.scratch_len = self.scratch_len;
        next.mapped = self.mapped;
        next.write_way_home()?;
        let home = cave_image().home;
        let regs = next.call_regs(home, libc::SYS_gettid, [0; 6]);
        next.enter(&regs)?;
        // This one may be at an instruction that still stores a result.
        let regs = self.call_regs(home, libc::SYS_gettid, [0; 6]);
        self.task.set_regs(&regs)?;
        self.cave.set_owner(next.id)?;
        self.owns_scratch = false;
        next.owns_scratch = true;
        self.go_home()?;
        Ok(next)
    }
}
