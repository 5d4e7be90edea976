//! Core scheduling (Documentation/admin-guide/hw-vuln/core-scheduling.rst): a task with a cookie shares a core with
//! those of the same cookie only. The kernel shows a hash of it, so that only equality means something.
#![allow(unsafe_code)]

use std::collections::BTreeMap;

use ckpt_tracer::Tid;
use nix::errno::Errno;

use super::Snapshot;
use super::forked::in_a_child;

// include/uapi/linux/prctl.h
const PR_SCHED_CORE: libc::c_int = 62;
const PR_SCHED_CORE_GET: libc::c_ulong = 0;
const PR_SCHED_CORE_CREATE: libc::c_ulong = 1;
const PR_SCHED_CORE_SHARE_TO: libc::c_ulong = 2;
const PR_SCHED_CORE_SHARE_FROM: libc::c_ulong = 3;
/// `PR_SCHED_CORE_SCOPE_THREAD`: one task.
const ONE_TASK: libc::c_ulong = 0;

fn sched_core(operation: libc::c_ulong, tid: Tid, answer: *mut u64) -> Result<(), Errno> {
    // SAFETY: `answer` is null, or leads to a number for PR_SCHED_CORE_GET, which alone writes there.
    let r = unsafe { libc::prctl(PR_SCHED_CORE, operation, tid.raw(), ONE_TASK, answer) };
    Errno::result(r).map(drop)
}

/// The cookie of a task as the kernel shows it; 0 for none, also where there is no core scheduling.
pub fn cookie(tid: Tid) -> u64 {
    let mut cookie = 0;
    match sched_core(PR_SCHED_CORE_GET, tid, &raw mut cookie) {
        Ok(()) => cookie,
        Err(_) => 0,
    }
}

/// For serde.
pub fn is_none(cookie: &u64) -> bool {
    *cookie == 0
}

/// Makes a new cookie for each that the job had and gives it to the same tasks, which all exist and run nothing
/// yet. Cookies go from task to task by way of the calling one, so that a child does it, which ends with the last.
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
    // Not in a thread: before Linux 6.2 there may be none where children have clocks of their own (`copy_process`, kernel/fork.c).
    let error = in_a_child(|| groups.values().try_for_each(|tasks| share(tasks))).err()?;
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

/// One new cookie for all of them.
fn share(tasks: &[Tid]) -> Result<(), Errno> {
    let null = std::ptr::null_mut();
    sched_core(PR_SCHED_CORE_CREATE, tasks[0], null)?;
    sched_core(PR_SCHED_CORE_SHARE_FROM, tasks[0], null)?;
    let others = tasks[1..].iter();
    others
        .copied()
        .try_for_each(|task| sched_core(PR_SCHED_CORE_SHARE_TO, task, null))
}
