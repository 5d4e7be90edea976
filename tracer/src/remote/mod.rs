//! System calls executed in a stopped task, from outside.
//!
//! # Why a cave
//!
//! The task must survive the loss of its tracer at any moment: when a tracer dies the kernel
//! resumes its tasks where they are, with the registers they have then. So a task is only
//! ever sent to a piece of code that finds its own way home. That piece (the *cave*, some
//! 300 bytes) makes the wanted system call; behind it stands the way home: unmap the scratch
//! memory, put back the signal mask, the registers that were touched and the flags, and
//! jump to where the task was. In the ordinary course the way home is never walked: the tracer
//! stops the task at the system call's exit and sets the next call, or the original registers.
//!
//! It needs no stack, no SSE register and no `rt_sigreturn`, so the extended state and the
//! task's restart block stay as they are (`rt_sigreturn` would end a sleep with EINTR).
//!
//! The cave is put into unused bytes at the end of the vDSO, or of another executable mapping.
//! Nothing executes there, and the kernel gives the process a private copy of that page.
//!
//! # Why a doorbell
//!
//! Waiting for each call by its entry and exit stops costs two switches to the tracer and
//! back; with many threads, or on a busy machine, that is most of the pause. So calls are made
//! in batches, the last of which sends the task a signal that the program ignores. A traced
//! task stops for it all the same (`sig_ignored`, kernel/signal.c), once; if the tracer is gone
//! nothing happens. Where the program catches every such signal, calls are made one by one.
//!
//! # Order of events, and what a dead tracer leaves at each point
//!
//! 1. Cave written. No task is in it: nothing happens; a later attach finds and clears it.
//! 2. Registers set into the cave. The task makes the first call (an mmap of scratch memory, or an mremap)
//!    and walks home. A signal that comes meanwhile runs its handler on the task's own stack.
//! 3. All signals blocked. The same; the way home restores the mask.
//! 4. Calls. The same.
//! 5. Scratch memory unmapped: the entry behind the unmapping is used, so that nothing that
//!    another thread mapped there since can be hit.
//! 6. Mask restored, then registers. The same as 2, then the original state.
//!
//! At 2 and 6, and at the end of the way home, a signal's handler may return into the cave long after. What is done
//! about that, and about tasks that a next tracer meets in a cave, stands in `stale`.
//!
//! # What is where
//!
//! * `calls`: [`RemoteCalls`], a task made ready: the way in, one call after the other, the scratch memory.
//! * `scratch`: where the scratch memory comes from.
//! * `home`: the way home, and back to where the task was.
//! * `hand_over`: from one task of an address space to the next.
//! * `batch`: lists of calls, [`Call`].
//! * `doorbell`: the signal at which a batch ends.
//! * `wait`: letting the task go on to a stop.
//! * `cave`: the code itself, and where it is put.
//! * `restart`: where a task goes on that was stopped inside of something.
//! * `stale`: what tracers have left that were killed.
//! * `hold`: keeping the other tasks away from what a batch does.
//! * [`lend`]: having descriptors handed out.

mod batch;
mod calls;
mod cave;
mod doorbell;
mod hand_over;
mod hold;
mod home;
pub mod lend;
mod restart;
mod scratch;
mod stale;
mod wait;

pub use batch::Call;
pub use calls::RemoteCalls;
pub use cave::Cave;
pub use doorbell::may_ring;
pub use hold::Hold;
pub use restart::{effective_rip, hide_interruption};
pub use scratch::Scratch;
pub(crate) use stale::holds;
pub use stale::withdraw_dispatch;
