//! Core scheduling (Documentation/admin-guide/hw-vuln/core-scheduling.rst): tasks share a core only with tasks that
//! have the same cookie. The kernel shows a hash of the cookie, so only equality is meaningful.

use std::collections::BTreeMap;

use ckpt_sys::process::in_a_child;
use ckpt_sys::tasks;
use ckpt_tracer::Tid;
use nix::errno::Errno;

use super::Snapshot;

/// The cookie of a task as the kernel shows it; 0 without one or without core scheduling.
pub fn cookie(tid: Tid) -> u64 {
    tasks::core_cookie(tid.raw())
}

/// For `skip_serializing_if`.
pub fn is_none(cookie: &u64) -> bool {
    *cookie == 0
}

/// Creates a new cookie for each of the job's and gives it to the same tasks, which all exist and run nothing yet.
/// The calling task takes each cookie itself meanwhile, so a child does it.
pub fn rebuild(snapshot: &Snapshot) -> Option<String> {
    let threads = snapshot.processes.iter().flat_map(|p| &p.threads);
    let mut groups: BTreeMap<u64, Vec<Tid>> = BTreeMap::new();
    for thread in threads.filter(|t| t.core_cookie != 0) {
        let tasks = groups.entry(thread.core_cookie).or_default();
        tasks.push(Tid(thread.tid));
    }
    if groups.is_empty() {
        return None;
    }
    // Not in a thread: before Linux 6.2 a process whose children have other clocks cannot create one (`copy_process`,
    // kernel/fork.c).
    let error = in_a_child(|| groups.values().try_for_each(|threads| share(threads))).err()?;
    Some(format!(
        "the job may share processor cores with other programs, from which core scheduling (PR_SCHED_CORE) kept it apart: {}",
        match error {
            // CONFIG_SCHED_CORE; simultaneous multithreading.
            Errno::EINVAL => "this kernel has no core scheduling",
            Errno::ENODEV => "this machine's cores run one thread each",
            _ => error.desc(),
        }
    ))
}

/// Gives all of them one new cookie.
fn share(threads: &[Tid]) -> Result<(), Errno> {
    tasks::new_core_cookie(threads[0].raw())?;
    tasks::take_core_cookie(threads[0].raw())?;
    let mut others = threads[1..].iter();
    others.try_for_each(|thread| tasks::give_core_cookie(thread.raw()))
}
