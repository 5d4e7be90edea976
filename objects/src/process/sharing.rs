//! Tasks that share memory.

use ckpt_tracer::Pid;
use ckpt_tracer::freeze::Frozen;
use ckpt_tracer::task::Stopped;

use crate::source::{Collector, Source};

/// All tasks of a job that share the memory of a process, its own first.
pub fn tasks_with_memory_of<'j>(
    index: usize,
    job: &'j mut [&mut Frozen],
    sources: &[&Source],
    collector: &Collector,
) -> Vec<&'j mut Stopped> {
    let memory = memory_of(sources[index].pid, sources, collector);
    let (mut own, mut others) = (Vec::new(), Vec::new());
    for (at, frozen) in job.iter_mut().enumerate() {
        if at == index {
            own.extend(frozen.tasks_mut());
        } else if memory_of(sources[at].pid, sources, collector) == memory {
            others.extend(frozen.tasks_mut());
        }
    }
    own.append(&mut others);
    own
}

/// The process that owns the memory of a process.
fn memory_of(pid: Pid, sources: &[&Source], collector: &Collector) -> Pid {
    let source = sources.iter().find(|s| s.pid == pid);
    match source.filter(|_| collector.shares(pid).memory) {
        Some(source) => memory_of(source.status.ppid, sources, collector),
        None => pid,
    }
}
