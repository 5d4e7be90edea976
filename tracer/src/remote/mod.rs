//! System calls executed in a stopped task, from outside.
//!
//! # Why a cave
//!
//! The task must survive the loss of its tracer at any moment: when a tracer dies the kernel resumes its tasks where
//! they are, with the registers they have then. So a task only ever runs code that returns by itself. This code (the
//! *cave*, some 300 bytes) makes the system call; after it comes the return path: unmap the scratch memory, restore
//! the signal mask, the registers that were changed and the flags, and jump to where the task was. Normally the
//! return path is not executed: the tracer stops the task at the system call's exit and sets the next call, or the
//! original registers.
//!
//! It needs no stack, no SSE register and no `rt_sigreturn`, so the extended state and the
//! task's restart block stay as they are (`rt_sigreturn` would end a sleep with EINTR).
//!
//! The cave is written to unused bytes at the end of the vDSO, or of another executable mapping. The program executes
//! nothing there, and the kernel gives the process a private copy of that page.
//!
//! # Why a doorbell
//!
//! Waiting for each call by its entry and exit stops costs two switches to the tracer and back; with many threads, or
//! on a busy machine, that is most of the pause. So calls are made in batches, the last of which sends the task a
//! signal that the program ignores. A traced task stops for it nevertheless (`sig_ignored`, kernel/signal.c), once;
//! without a tracer nothing happens. If the program catches every such signal, calls are made one by one.
//!
//! # Order of events, and the effect of a dying tracer at each point
//!
//! 1. Cave written. No task is in it: no effect; a later attach finds and clears it.
//! 2. Registers set into the cave. The task makes the first call (an mmap of scratch memory, or an mremap) and takes
//!    the return path. A signal that arrives meanwhile runs its handler on the task's own stack.
//! 3. All signals blocked. The same; the return path restores the mask.
//! 4. Calls. The same.
//! 5. Scratch memory unmapped: the entry after the unmapping is used, so that a mapping that another thread has made
//!    there since cannot be hit.
//! 6. Mask restored, then registers. The same as 2, then the original state.
//!
//! At 2 and 6, and at the end of the return path, a signal's handler may return into the cave long after. `stale`
//! deals with that, and with tasks that a later tracer finds in a cave.
//!
//! # Modules
//!
//! * `calls`: [`RemoteCalls`], a prepared task: entering the cave, single calls, the scratch memory.
//! * `scratch`: placement of the scratch memory.
//! * `home`: the return path, and restoring the task without it.
//! * `hand_over`: from one task of an address space to the next.
//! * `batch`: lists of calls, [`Call`].
//! * `doorbell`: the signal at the end of a batch.
//! * `wait`: resuming the task up to a stop.
//! * `cave`: the code, and its placement.
//! * `restart`: where a task continues that was stopped inside a system call or a restartable sequence.
//! * `stale`: remains of killed tracers.
//! * `hold`: keeps other tasks waiting during a batch.
//! * [`lend`]: descriptors sent by the process itself.

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
