//! The flag that makes CPUID fault, which only a task itself can set: sets it by remote calls, in all tasks of a
//! process while they are stopped.

use ckpt_tracer::freeze::leave_stale_cave;
use ckpt_tracer::mem::ProcessMemory;
use ckpt_tracer::proc::maps::read_maps;
use ckpt_tracer::proc::status::read_status;
use ckpt_tracer::remote::{Cave, withdraw_dispatch};
use ckpt_tracer::task::Stopped;
use ckpt_tracer::{Error, Pid, Result, cpuid};

use super::tree::OPTIONS;

/// Whether CPUID faults in a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flag {
    No,
    Yes,
    /// It cannot be set: a 32-bit program, or one with seccomp filters.
    Never,
}

/// Changes it by remote calls, in tasks where it differs.
pub(super) fn change(process: Pid, held: &mut [(Stopped, Flag)], wanted: Flag) -> Result<()> {
    if held
        .iter()
        .all(|(_, flag)| *flag == wanted || *flag == Flag::Never)
    {
        return Ok(());
    }
    let memory = ProcessMemory::open(process)?;
    let mut tasks: Vec<&mut Stopped> = held.iter_mut().map(|(stopped, _)| stopped).collect();
    leave_stale_cave(process, &mut tasks)?;
    for (stopped, _) in held.iter() {
        withdraw_dispatch(std::slice::from_ref(stopped), &memory)?;
    }
    let tasks = held.iter().map(|(stopped, _)| stopped);
    let cave = Cave::dig(&memory, &read_maps(process)?, tasks)?;
    let mut failure = None;
    for (stopped, flag) in held.iter_mut() {
        if *flag == wanted || *flag == Flag::Never {
            continue;
        }
        match change_one(process, stopped, &cave, wanted) {
            Ok(true) => *flag = wanted,
            Ok(false) => *flag = Flag::Never,
            Err(Error::Died { .. }) => {}
            Err(e) => failure = failure.or(Some(e)),
        }
    }
    cave.fill_in()?;
    failure.map_or(Ok(()), Err)
}

/// Returns false if it cannot be changed, because a remote call is not possible or a filter could kill.
fn change_one(process: Pid, task: &mut Stopped, cave: &Cave<'_>, wanted: Flag) -> Result<bool> {
    /// `__USER_CS`, arch/x86/include/asm/segment.h.
    const CODE_64: u64 = 0x33;
    if task.regs()?.cs != CODE_64 && wanted == Flag::Yes {
        return Ok(false);
    }
    let seccomp = read_status((process, task.tid())).map_or(0, |s| s.seccomp.unwrap_or(0));
    // Suspending takes CAP_SYS_ADMIN.
    let suspended = seccomp == 2
        && task
            .set_options(OPTIONS | libc::PTRACE_O_SUSPEND_SECCOMP)
            .is_ok();
    if seccomp != 0 && !suspended {
        return match wanted {
            Flag::Yes => Ok(false),
            _ => Err(Error::UnexpectedStop {
                tid: task.tid(),
                what: "it has seccomp filters now".into(),
            }),
        };
    }
    let done = cpuid::set(task, cave, wanted == Flag::Yes);
    if suspended {
        task.set_options(OPTIONS)?;
    }
    done.map(|()| true)
}
