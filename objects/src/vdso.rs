//! The vDSO: code of the kernel mapped into every process, for calls that need not enter the kernel (vdso(7)).
//!
//! Programs keep the addresses of its functions, and its code depends on the data beside it (`[vvar]`), which only
//! its own kernel maintains. On a kernel with the same vDSO both are moved to the job's addresses. On another one the
//! old code stays at its address as ordinary memory, but each of its functions jumps on: to the function of the same
//! name in the present kernel's vDSO, which is mapped at a free address with its data, or to the equivalent system
//! call. Only the beginnings of the old functions are executed; a task inside one, or a signal handler that will
//! return there, is refused.

mod redirect;

use std::ops::Range;

use ckpt_tracer::mem::{self, ProcessMemory};
use ckpt_tracer::proc::maps::{Vma, VmaName, read_maps};
use ckpt_tracer::{Pid, RemoteAddr};

use super::Snapshot;
use super::memory::{Backing, KernelMapping, Mapping, MappingFlags};
use super::process::Process;
use crate::error::{Error, Obstacle, Result};
use crate::holes;
use redirect::Present;

/// Bytes left below a stack for its growth when a permanent address is chosen.
const STACK_GROWTH: u64 = 8 << 30;

/// The bytes of this kernel's vDSO; empty without one. All 64-bit processes have the same.
pub fn code() -> Vec<u8> {
    Lent::now().code
}

/// The mappings that this kernel provides to each process, as in our own.
struct Lent {
    code: Vec<u8>,
    /// vDSO and data, ascending.
    pieces: Vec<Vma>,
}

impl Lent {
    fn now() -> Self {
        let me = Pid::own();
        let mut pieces = read_maps(me).unwrap_or_default();
        pieces.retain(|v| KernelMapping::of(v).is_some());
        let mut code = Vec::new();
        if let Some(vdso) = pieces.iter().find(|v| v.name == VmaName::Vdso) {
            code = vec![0; vdso.len() as usize];
            let read = mem::read_vm(me, RemoteAddr(vdso.start), &mut code);
            if !read.is_ok_and(|n| n == code.len()) {
                code.clear();
            }
        }
        if code.is_empty() {
            pieces.clear();
        }
        Self { code, pieces }
    }

    /// Bytes from the first to the last mapping; their distances are fixed.
    fn len(&self) -> u64 {
        let start = self.pieces.first().map_or(0, |v| v.start);
        self.pieces.last().map_or(0, |v| v.end) - start
    }

    /// The mappings with the first one at that address.
    fn at(&self, base: u64) -> impl Iterator<Item = Mapping> + '_ {
        let start = self.pieces.first().map_or(0, |v| v.start);
        self.pieces.iter().filter_map(move |v| {
            let exec = if v.exec { libc::PROT_EXEC } else { 0 };
            Some(Mapping {
                start: v.start - start + base,
                end: v.end - start + base,
                prot: (libc::PROT_READ | exec) as u32,
                backing: Backing::Kernel(KernelMapping::of(v)?),
                flags: MappingFlags::empty(),
                name: None,
                protection_key: 0,
                guards: Vec::new(),
                policy: None,
            })
        })
    }
}

/// The replacement of the job's vDSO on a kernel with another one.
#[derive(Debug, Default)]
pub struct Replaced {
    /// For each process of the snapshot; `None` if it has no vDSO. Empty if nothing changes.
    processes: Vec<Option<Old>>,
    /// The kernel of the checkpoint.
    kernel: String,
}

/// The old code of one process.
#[derive(Clone, Debug)]
struct Old {
    range: Range<u64>,
    /// The new contents.
    code: Vec<u8>,
}

/// Adds this kernel's vDSO to the snapshot.
///
/// # Errors
/// The obstacles: an image without the old code, a function without an equivalent, a thread that was stopped inside.
/// thread that was stopped inside.
pub fn adapt(snapshot: &mut Snapshot) -> Result<Replaced, Vec<Obstacle>> {
    let lent = Lent::now();
    let old = &snapshot.host.vdso;
    if !snapshot.processes.iter().any(|p| vdso_of(p).is_some()) || *old == lent.code {
        return Ok(Replaced::default());
    }
    let mut adapted = Vec::with_capacity(snapshot.processes.len());
    let mut obstacles = Vec::new();
    for process in &snapshot.processes {
        let Some(vdso) = vdso_of(process) else {
            adapted.push(None);
            continue;
        };
        let base = place(&snapshot.processes, vdso.start, lent.len());
        let code = lead_on(old, vdso, &lent, base).map_err(|why| unfit(snapshot, why));
        match code.map_err(|o| vec![o]) {
            Ok(code) => {
                let old = Old {
                    range: vdso.start..vdso.end,
                    code,
                };
                obstacles.extend(stopped_inside(process, &old, snapshot));
                adapted.push(base.map(|base| (old, base)));
            }
            // The same for all.
            Err(obstacle) => return Err(obstacle),
        }
    }
    if !obstacles.is_empty() {
        return Err(obstacles);
    }
    let kernel = snapshot.host.kernel.clone();
    let mut processes = Vec::with_capacity(adapted.len());
    for (process, adapted) in snapshot.processes.iter_mut().zip(adapted) {
        processes.push(adapted.map(|(old, base)| {
            replace(&mut process.memory.mappings, &lent, base);
            old
        }));
    }
    Ok(Replaced { processes, kernel })
}

fn vdso_of(process: &Process) -> Option<&Mapping> {
    let mut mappings = process.memory.mappings.iter();
    mappings.find(|m| m.backing == Backing::Kernel(KernelMapping::Vdso))
}

/// A permanent address, the same in all processes with the old vDSO at the same address: those related by forks.
fn place(processes: &[Process], old: u64, len: u64) -> Option<u64> {
    let alike = processes
        .iter()
        .filter(|p| vdso_of(p).is_some_and(|v| v.start == old));
    let taken = alike.flat_map(|p| &p.memory.mappings).map(|m| {
        let grows = m.flags.contains(MappingFlags::GROWS_DOWN);
        let room = if grows { STACK_GROWTH } else { 0 };
        (m.start.saturating_sub(room), m.end)
    });
    holes::find(taken, len.max(1))
}

/// The old code with redirected functions.
fn lead_on(old: &[u8], at: &Mapping, lent: &Lent, base: Option<u64>) -> Result<Vec<u8>, String> {
    if old.is_empty() {
        return Err("is not in the image".into());
    }
    if old.len() as u64 != at.end - at.start {
        return Err("is not what the image has mapped".into());
    }
    let base = base.ok_or("leaves no free room in the address space for another one")?;
    let vdso = lent
        .at(base)
        .find(|m| m.backing == Backing::Kernel(KernelMapping::Vdso));
    let present = match vdso {
        Some(vdso) => Present::of(&lent.code, vdso.start)?,
        None => Present::default(),
    };
    redirect::lead_on(old, &present)
}

fn unfit(snapshot: &Snapshot, why: String) -> Obstacle {
    Obstacle::new(
        format!("the vDSO of kernel {}", snapshot.host.kernel),
        format!("{why}, and this kernel has another one"),
        "restore the job on a machine with the kernel of the checkpoint",
    )
}

fn stopped_inside(process: &Process, old: &Old, snapshot: &Snapshot) -> Vec<Obstacle> {
    let starts = redirect::functions(&snapshot.host.vdso).unwrap_or_default();
    let is_start = |rip: u64| {
        let mut starts = starts.iter();
        starts.any(|f| f.offset == rip - old.range.start)
    };
    let inside = |rip: u64| old.range.contains(&rip) && !is_start(rip);
    let threads = process.threads.iter().filter(|t| inside(t.regs.rip));
    let object = |tid| format!("thread {tid} of process {}", process.pid);
    threads
        .map(|t| in_the_middle(object(t.tid), "was stopped", &snapshot.host.kernel))
        .collect()
}

fn in_the_middle(object: String, how: &str, kernel: &str) -> Obstacle {
    Obstacle::new(
        object,
        format!(
            "{how} in the middle of a function of the vDSO of kernel {kernel}, and this kernel has another \
             one"
        ),
        "take another checkpoint, or restore the job on a machine with the kernel of the checkpoint",
    )
}

/// Turns the old code into ordinary memory, drops its data, and adds this kernel's mappings.
fn replace(mappings: &mut Vec<Mapping>, lent: &Lent, base: u64) {
    mappings.retain(|m| match m.backing {
        Backing::Kernel(kind) => kind == KernelMapping::Vdso,
        _ => true,
    });
    for m in mappings.iter_mut() {
        if let Backing::Kernel(_) = m.backing {
            m.backing = Backing::Anonymous;
            m.flags = MappingFlags::empty();
        }
    }
    mappings.extend(lent.at(base));
    mappings.sort_by_key(|m| m.start);
}

impl Replaced {
    /// Writes the old code of a process whose memory is filled.
    ///
    /// # Errors
    /// [`Error::Refused`] if a running signal handler will return into the middle of it.
    pub fn fill(&self, index: usize, process: &Process, mem: &ProcessMemory) -> Result<()> {
        let Some(Some(old)) = self.processes.get(index) else {
            return Ok(());
        };
        mem.write(RemoteAddr(old.range.start), &old.code)?;
        for thread in &process.threads {
            let mappings = &process.memory.mappings;
            if super::frames::lead_into(&old.range, thread.regs.rsp, mappings, mem.pid()) {
                let object = format!(
                    "a signal handler of thread {} of process {}",
                    thread.tid, process.pid
                );
                let how = "has interrupted it and will return to where it was,";
                return Err(Error::refuse(in_the_middle(object, how, &self.kernel)));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
