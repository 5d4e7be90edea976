//! The ids of a job: whether it can have them again.

use std::path::Path;
use std::time::{Duration, Instant};

use ckpt_tracer::features::KernelFeatures;
use ckpt_tracer::proc::status::read_status;
use ckpt_tracer::proc::tasks;
use ckpt_tracer::{Pid, Tid};

use super::births::Births;
use crate::error::Obstacle;
use crate::objects::Snapshot;

/// All ids that the job has, and those of processes that help for a while; ascending.
pub(super) fn ids(snapshot: &Snapshot, births: &[Births]) -> Vec<i32> {
    let tids = snapshot.processes.iter().flat_map(|p| &p.threads);
    let tids = tids.map(|t| t.tid);
    let zombies = snapshot.zombies.iter().map(|z| z.pid);
    let helpers = births.iter().flat_map(Births::all).map(|b| b.pid);
    let mut ids: Vec<i32> = tids.chain(zombies).chain(helpers).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Ids that somebody else has. Those of processes that have just been killed are free
/// when their parent has taken note, so that is waited for.
pub(super) fn taken(ids: &[i32]) -> Vec<Obstacle> {
    const PATIENCE: Duration = Duration::from_secs(2);
    let begun = Instant::now();
    loop {
        let exists = |id: &&i32| Path::new(&format!("/proc/{id}")).exists();
        let taken: Vec<i32> = ids.iter().filter(exists).copied().collect();
        // One that is gone by now has ended as well.
        let ended = |id: &i32| read_status(Tid(*id)).map_or(true, |s| s.state.has_ended());
        if taken.is_empty() || !taken.iter().all(ended) || begun.elapsed() > PATIENCE {
            return taken.into_iter().map(pid_taken).collect();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Ids that may not be chosen: by us, or by anybody.
pub(super) fn not_to_be_had(
    snapshot: &Snapshot,
    ids: &[i32],
    kernel: &KernelFeatures,
) -> Option<Obstacle> {
    if !kernel.set_tid {
        return Some(not_permitted(snapshot.processes[0].pid));
    }
    let above = ids.iter().find(|id| **id as u64 >= kernel.pid_max);
    above.map(|id| above_the_highest(*id))
}

/// The obstacle that we may not choose pids.
pub(super) fn not_permitted(pid: i32) -> Obstacle {
    Obstacle::new(
        format!("process {pid}"),
        "cannot get its old pid: choosing a pid needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN",
        "run restore as root, or in a user namespace of its own: unshare --user --map-current-user \
         --keep-caps --pid --fork --mount-proc restore IMAGE",
    )
}

/// The obstacle that no process here has such a pid.
pub(super) fn above_the_highest(pid: i32) -> Obstacle {
    Obstacle::new(
        format!("process {pid}"),
        "cannot get its old pid: it is above this system's kernel.pid_max",
        "raise that setting",
    )
}

/// The obstacle that somebody else has the pid.
pub(super) fn pid_taken(pid: i32) -> Obstacle {
    let name = tasks::comm(Pid(pid)).map_or_else(|_| "?".into(), |c| c.to_string());
    let leader = read_status(Tid(pid)).map_or(pid, |s| s.tgid.raw());
    let who = if leader == pid {
        format!("process {pid} ({name})")
    } else {
        format!("a thread of process {leader} ({name})")
    };
    // A zombie cannot be ended again; its parent has to take note of its end.
    if let Ok(status) = read_status(Tid(pid))
        && status.state.has_ended()
    {
        let parent = status.ppid;
        return Obstacle::new(
            format!("the pid {pid}"),
            format!(
                "is taken by {who}, which has ended but which its parent {parent} has not waited for"
            ),
            "let the parent wait for it or end the parent, or restore in a pid namespace of its own: \
             unshare --pid --fork --mount-proc restore IMAGE",
        );
    }
    Obstacle::new(
        format!("the pid {pid}"),
        format!("is taken by {who}"),
        "end that one first, or restore in a pid namespace of its own: unshare --pid --fork \
         --mount-proc restore IMAGE",
    )
}
