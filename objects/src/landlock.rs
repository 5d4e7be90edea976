//! Landlock domains (landlock(7)). What a thread has restricted itself to is told by nothing and cannot
//! be given to another; that it is in a domain shows when it may not look into a process of its
//! own ids ([`Bystander`]).

use ckpt_tracer::Tid;
use ckpt_tracer::bystander::Bystander;
use ckpt_tracer::proc::status::Status;

use super::process::{Process, Statuses};

/// Bystanders of the job's tasks, by user and group.
#[derive(Debug, Default)]
pub struct Bystanders(Vec<((u32, u32), Option<Bystander>)>);

impl Bystanders {
    /// One for each pair of ids among the tasks that could be in a domain, if the kernel has Landlock: a
    /// program enters one with `no_new_privs`, or as root.
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

    /// That of a task.
    pub fn beside(&self, status: &Status) -> Option<&Bystander> {
        let found = self.0.iter().find(|(known, _)| *known == ids(status));
        found.and_then(|(_, bystander)| bystander.as_ref())
    }
}

/// Those by which the kernel judges whether a task may look into another one.
fn ids(status: &Status) -> (u32, u32) {
    (status.uid.real, status.gid.real)
}

/// Whether the kernel has Landlock, switched on.
fn exists() -> bool {
    ckpt_sys::credentials::has_landlock()
}

/// Processes that may be in a domain: while they run nothing tells, but only who has `no_new_privs`, or is root, can
/// enter one, and root hardly does without.
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
            "process {} has no_new_privs and so may be restricted by Landlock, which is told by nothing while it \
             runs: attach finds it out, and a restored process would not be restricted",
            process.pid
        )
    })
}

/// What is to be told of a process with threads in a domain, if it has any.
pub fn warning(process: &Process) -> Option<String> {
    process.threads.iter().any(|t| t.landlocked).then(|| {
        format!(
            "process {} is restricted by Landlock, which is not in the image: a restored one is not restricted",
            process.pid
        )
    })
}
