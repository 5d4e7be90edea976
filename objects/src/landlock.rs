//! Landlock domains (landlock(7)). The restrictions of a thread are not visible and cannot be transferred. That it is
//! in a domain shows when it may not ptrace a process with its own ids ([`Bystander`]).

use ckpt_tracer::Tid;
use ckpt_tracer::bystander::Bystander;
use ckpt_tracer::proc::status::Status;

use super::process::{Process, Statuses};

/// Probe processes for the job's tasks, by user and group.
#[derive(Debug, Default)]
pub struct Bystanders(Vec<((u32, u32), Option<Bystander>)>);

impl Bystanders {
    /// Creates one for each pair of ids among the tasks that could be in a domain, if the kernel has Landlock:
    /// entering one needs `no_new_privs` or root.
    pub fn of<'a>(tasks: impl Iterator<Item = &'a Status>) -> Self {
        let mut all = Self::default();
        if !exists() {
            return all;
        }
        for status in tasks.filter(|s| s.no_new_privs || s.uid.real == 0) {
            let ids = ids(status);
            if all.0.iter().all(|(known, _)| *known != ids) {
                all.0.push((ids, Bystander::with_ids(ids.0, ids.1)));
            }
        }
        all
    }

    /// The one for a task.
    pub fn beside(&self, status: &Status) -> Option<&Bystander> {
        let found = self.0.iter().find(|(known, _)| *known == ids(status));
        found.and_then(|(_, bystander)| bystander.as_ref())
    }
}

/// The ids that the kernel compares when the task accesses another one.
fn ids(status: &Status) -> (u32, u32) {
    (status.uid.real, status.gid.real)
}

/// Whether the kernel has Landlock enabled.
fn exists() -> bool {
    ckpt_sys::credentials::has_landlock()
}

/// Processes that may be in a domain. While they run this is not visible, but entering one needs `no_new_privs` or
/// root, and root usually sets it too.
pub fn hints<'a>(
    processes: &'a [Process],
    statuses: &'a Statuses,
) -> impl Iterator<Item = String> + 'a {
    let hinted = |process: &&Process| {
        let tids = process.threads.iter().map(|t| Tid(t.tid));
        let mut statuses = tids.filter_map(|tid| statuses.get(&tid));
        statuses.any(|status| status.no_new_privs)
    };
    let all: &[Process] = if exists() { processes } else { &[] };
    all.iter().filter(hinted).map(|process| {
        format!(
            "process {} has no_new_privs and so may be restricted by Landlock, which the kernel does not \
             show while it runs: attach detects it, and a restored process would not be restricted",
            process.pid
        )
    })
}

/// The warning for a process with threads in a domain.
pub fn warning(process: &Process) -> Option<String> {
    process.threads.iter().any(|t| t.landlocked).then(|| {
        format!(
            "process {} is restricted by Landlock, which is not in the image: a restored one is not restricted",
            process.pid
        )
    })
}
