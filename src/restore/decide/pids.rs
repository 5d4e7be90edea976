//! The pids of a restored job: the old ones, in our pid namespace or in a new one.

use std::collections::VecDeque;

use ckpt_tracer::Pid;
use ckpt_tracer::capabilities::Use;
use ckpt_tracer::proc::stat::read_stat;
use ckpt_tracer::proc::status::read_status;

use super::ids;
use super::taken::taken;
use crate::error::{Error, Obstacle, Result};
use crate::isolate::Spec;
use crate::objects::Snapshot;
use crate::objects::clock;
use crate::objects::memory::FileIdentity;
use crate::objects::namespaces::Namespaces;
use crate::objects::plan::PidMethod;
use crate::objects::process_tree::{Body, Creation, Creations, Origin};
use crate::restore::adapted::Adapted;
use crate::restore::placed::Placed;
use crate::restore::probed::Probed;
use crate::restore::run::next_pid;

/// The requested pid namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pids {
    /// Ours if possible, otherwise a new one.
    #[default]
    Auto,
    /// Ours.
    Keep,
    /// A new one.
    Namespace,
}

/// The chosen pid namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Ours.
    Here,
    /// A new one, with the reason if it was not requested.
    Namespace(Option<String>),
}

/// Decides, before anything is created. Also returns obstacles to ids in our pid namespace, if they were looked up.
///
/// # Errors
/// [`Error::Refused`] if neither pid namespace is possible.
pub(in crate::restore) fn decide(
    placed: &Placed<'_>,
    wanted: Pids,
) -> Result<(Place, Option<Vec<Obstacle>>)> {
    let creations = placed.snapshot().creations();
    let creations = creations.map_err(|o| Error::Refused(o.to_vec()))?;
    let mut seen = None;
    let why = match wanted {
        Pids::Keep => return Ok((Place::Here, None)),
        Pids::Namespace => None,
        Pids::Auto => match why_not_here(placed, &mut seen) {
            None => return Ok((Place::Here, seen)),
            // The restore here reports the obstacles.
            _ if !may_have_namespace(placed) => return Ok((Place::Here, seen)),
            why => why,
        },
    };
    let obstacles = why_not_in_namespace(placed.snapshot(), creations, why.as_deref());
    match obstacles.is_empty() {
        true => Ok((Place::Namespace(why), None)),
        false => Err(Error::Refused(obstacles)),
    }
}

/// Whether the job's root was the first process of its pid namespace, and has to be it again.
fn begins_with_the_first(snapshot: &Snapshot) -> bool {
    snapshot.processes.first().is_some_and(|root| root.pid == 1)
}

fn why_not_here(placed: &Placed<'_>, seen: &mut Option<Vec<Obstacle>>) -> Option<String> {
    let snapshot = placed.snapshot();
    if begins_with_the_first(snapshot) {
        return Some("the job's root was the first process of a pid namespace".into());
    }
    if snapshot.namespaces.pid {
        return Some("the job had a pid namespace to itself".into());
    }
    if placed.pid_method == PidMethod::UseUp {
        return Some(format!("choosing pids takes {}", Use::ChoosePids));
    }
    let taken = seen.insert(taken(&snapshot.ids, placed.leaving()));
    let first = taken.first()?;
    Some(format!("{} {}", first.object, first.reason))
}

/// Whether a pid namespace can be created, or the job requires one.
fn may_have_namespace(placed: &Placed<'_>) -> bool {
    placed.probed().kernel.pid_namespace || placed.snapshot().namespaces.pid
}

/// How the ids of the job are chosen in our pid namespace.
pub(in crate::restore) fn pid_method(snapshot: &Adapted, probed: &Probed) -> PidMethod {
    probed.pid_method(snapshot.ids.len() > 1)
}

/// Number of ids assigned before the job's, if that takes noticeable time.
pub(in crate::restore) fn awaited(snapshot: &Adapted, pid_method: PidMethod) -> Option<u64> {
    const SOON: u64 = 100_000;
    if pid_method != PidMethod::UseUp {
        return None;
    }
    let creations = snapshot.creations().ok()?;
    let turns = next_pid::ids_before(&order(snapshot, creations)).ok()?;
    (turns > SOON && next_pid::is_bearable(turns)).then_some(turns)
}

/// The note on it before the restore.
pub fn note_of_waiting(placed: &Placed<'_>) -> Option<String> {
    let turns = awaited(placed.snapshot(), placed.pid_method)?;
    Some(format!(
        "pids may not be chosen here, and no pid namespace can be made: waiting for the old pids, which \
         come after {turns} others"
    ))
}

/// The ids in the order of their creation: each process with those that it creates, then their threads, the last
/// process's first (see `driver`).
fn order(snapshot: &Snapshot, creations: &[Creations]) -> Vec<i32> {
    let mut ids = vec![snapshot.processes[0].pid];
    let mut next = VecDeque::from([0]);
    while let Some(index) = next.pop_front() {
        in_turn(creations[index].all(), creations, &mut ids, &mut next);
    }
    for process in snapshot.processes.iter().rev() {
        ids.extend(process.threads[1..].iter().map(|t| t.tid));
    }
    ids
}

fn in_turn<'a>(
    created: impl Iterator<Item = &'a Creation>,
    creations: &'a [Creations],
    ids: &mut Vec<i32>,
    next: &mut VecDeque<usize>,
) {
    for creation in created {
        ids.push(creation.pid);
        match &creation.body {
            Body::Phantom(phantom) => in_turn(phantom.creations.iter(), creations, ids, next),
            // In its creator's memory it runs at once.
            Body::Process(index) if creations[*index].origin == Origin::Sharing => {
                let all: Vec<&Creation> = creations[*index].all().collect();
                in_turn(all.into_iter(), creations, ids, next);
            }
            Body::Process(index) => next.push_back(*index),
        }
    }
}

/// The job's first process at the checkpoint, if it still runs: with its pid, the same program, and an earlier start.
pub fn still_runs(placed: &Placed<'_>) -> Option<i32> {
    let snapshot = placed.snapshot();
    let root = snapshot.processes.first()?;
    let program = root.memory.executable.find(&snapshot.mapped_files)?;
    let stat = read_stat(Pid(root.pid)).ok()?;
    let begun = clock::unix_time_of_ticks(stat.starttime);
    let meta = std::fs::metadata(format!("/proc/{}/exe", root.pid)).ok()?;
    let same = FileIdentity::of(&meta).is_same_file(&program.identity);
    let taken_at = (snapshot.host.realtime_ns / 1_000_000_000) as i64;
    (same && !stat.state.has_ended() && begun <= taken_at).then_some(root.pid)
}

fn why_not_in_namespace(
    snapshot: &Adapted,
    creations: &[Creations],
    why: Option<&str>,
) -> Vec<Obstacle> {
    let mut obstacles = Vec::new();
    let reason = |what: &str| match why {
        Some(why) => format!("{what}, and {why}"),
        None => what.to_owned(),
    };
    const REMEDY: &str = "restore it where its pids are free and may be chosen, with --pids keep";
    if snapshot.ids.contains(&1) && !begins_with_the_first(snapshot) {
        obstacles.push(Obstacle::new(
            "the job",
            reason("has the id 1 for a group of processes, which is that of ckpt-init there"),
            REMEDY,
        ));
    }
    for (process, creations) in snapshot.processes.iter().zip(creations) {
        if creations.joins_ours {
            obstacles.push(Obstacle::new(
                format!("process {}", process.pid),
                reason(
                    "has joined the process group that the job was started in, which it cannot do \
                     from inside a pid namespace",
                ),
                REMEDY,
            ));
        }
    }
    obstacles
}

/// The namespaces to create for the job: a user namespace if we lack privilege without one, or if the job had its
/// own.
///
/// # Errors
/// When its user namespace cannot be created again.
pub(in crate::restore) fn namespaces(placed: &Placed<'_>) -> Result<Spec> {
    let snapshot = placed.snapshot();
    let builder = match begins_with_the_first(snapshot) {
        true => Some(last_of_the_job(placed)? + 1),
        false => None,
    };
    let spec = match &snapshot.namespaces.user {
        None => Spec::own(),
        Some(user) => ids::decide(user, snapshot)?,
    };
    let others = Namespaces {
        user: None,
        ..snapshot.namespaces.clone()
    };
    Ok(Spec {
        builder,
        others,
        ..spec
    })
}

/// All ids of the job, and of temporary processes; ascending.
pub(in crate::restore) fn ids(snapshot: &Snapshot, creations: &[Creations]) -> Vec<i32> {
    let tids = snapshot.processes.iter().flat_map(|p| &p.threads);
    let tids = tids.map(|t| t.tid);
    let zombies = snapshot.zombies.iter().map(|z| z.pid);
    let helpers = creations
        .iter()
        .flat_map(Creations::all)
        .flat_map(Creation::ids);
    let mut ids: Vec<i32> = tids.chain(zombies).chain(helpers).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Obstacles to the ids of the job in our pid namespace. `with_first`: the first process becomes the root.
pub(in crate::restore) fn in_the_way(placed: &Placed<'_>, with_first: bool) -> Vec<Obstacle> {
    let taken = match &placed.taken {
        Some(taken) => taken.clone(),
        None => {
            let ids = placed.snapshot().ids.iter().copied();
            let ids: Vec<i32> = ids.filter(|id| *id != 1 || !with_first).collect();
            taken(&ids, placed.leaving())
        }
    };
    further_in_the_way(placed, taken)
}

/// The same, looked up again after an attempt in which another process was given an id.
pub(in crate::restore) fn in_the_way_now(placed: &Placed<'_>) -> Vec<Obstacle> {
    further_in_the_way(placed, taken(&placed.snapshot().ids, placed.leaving()))
}

fn further_in_the_way(placed: &Placed<'_>, taken: Vec<Obstacle>) -> Vec<Obstacle> {
    let (snapshot, kernel) = (placed.snapshot(), &placed.probed().kernel);
    let Ok(creations) = snapshot.creations() else {
        return Vec::new();
    };
    let mut obstacles = taken;
    if obstacles.is_empty() && placed.pid_method == PidMethod::UseUp {
        // If a namespace is possible, other processes need not be kept from taking ids.
        obstacles.extend(match kernel.pid_namespace {
            true => Some(not_permitted(snapshot.processes[0].pid, "")),
            false => out_of_reach(&order(snapshot, creations)),
        });
    }
    let mut ids = snapshot.ids.iter();
    let above = ids.find(|id| **id as u64 >= kernel.pid_max);
    obstacles.extend(above.map(|id| above_the_highest(*id)));
    obstacles
}

/// Ids that we may not choose and that are not reached in an acceptable time.
fn out_of_reach(order: &[i32]) -> Option<Obstacle> {
    match next_pid::ids_before(order) {
        Ok(turns) if next_pid::is_bearable(turns) => None,
        Ok(turns) => {
            let why = format!(", and it comes only after {turns} others");
            Some(not_permitted(order[0], &why))
        }
        Err((pid, last)) => {
            let why = format!(
                ", and it will not come by itself: ids below 300 are given only once, and {last} was \
                 given already"
            );
            Some(not_permitted(pid, &why))
        }
    }
}

/// The obstacle of a missing permission to choose pids.
pub(in crate::restore) fn not_permitted(pid: i32, why: &str) -> Obstacle {
    let reason = format!(
        "cannot get its old pid: choosing a pid needs {}{why}",
        Use::ChoosePids
    );
    let filtered = read_status(Pid::own()).is_ok_and(|s| s.seccomp == Some(2));
    let remedy = match filtered {
        true => {
            "restore it as the first in a new container, or in one with --cap-add SYS_ADMIN, or with \
             --cap-add CHECKPOINT_RESTORE --security-opt systempaths=unconfined"
        }
        false => "run restore as root, or with --pids namespace",
    };
    Obstacle::new(format!("process {pid}"), reason, remedy)
}

/// The obstacle of a pid above the maximum here.
pub(in crate::restore) fn above_the_highest(pid: i32) -> Obstacle {
    Obstacle::new(
        format!("process {pid}"),
        "cannot get its old pid: it is above this system's kernel.pid_max",
        "raise that setting",
    )
}

/// Makes the kernel assign other pids than the job's to processes created without a choice: our own helpers are
/// created while the job is rebuilt.
///
/// # Errors
/// When the kernel refuses.
pub(in crate::restore) fn keep_clear(placed: &Placed<'_>) -> Result<()> {
    const FILE: &str = "/proc/sys/kernel/ns_last_pid";
    let after = last_of_the_job(placed)?;
    std::fs::write(FILE, after.to_string()).map_err(Error::file("write to", FILE))
}

/// The id after which those of our helpers follow.
fn last_of_the_job(placed: &Placed<'_>) -> Result<i32> {
    let snapshot = placed.snapshot();
    let possible = snapshot.creations().map(drop);
    possible.map_err(|o| Error::Refused(o.to_vec()))?;
    let pid_max = placed.probed().kernel.pid_max.try_into();
    Ok(clear_after(&snapshot.ids, pid_max.unwrap_or(i32::MAX)))
}

/// An id followed by free ones, usually after the last one.
fn clear_after(ids: &[i32], pid_max: i32) -> i32 {
    const ROOM: i32 = 1024;
    /// Smaller ids are assigned only once (`RESERVED_PIDS`, kernel/pid.c).
    const RESERVED: i32 = 300;
    let starts = [RESERVED].into_iter().chain(ids.iter().copied());
    let ends = ids.iter().copied().chain([pid_max]);
    let gaps = starts.zip(ends).filter(|(start, _)| *start >= RESERVED);
    let gaps: Vec<(i32, i32)> = gaps.map(|(start, end)| (start, end - start)).collect();
    let last = gaps.last().filter(|(_, len)| *len > ROOM);
    let largest = gaps.iter().max_by_key(|(_, len)| *len);
    last.or(largest).map_or(RESERVED, |(start, _)| *start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn helpers_get_ids_that_the_job_does_not_have() {
        assert_eq!(clear_after(&[2, 3], 32768), 300);
        assert_eq!(clear_after(&[2, 3, 4242, 4250], 32768), 4250);
        assert_eq!(clear_after(&[500, 32000], 32768), 500);
        assert_eq!(clear_after(&[31000, 32000], 32768), 300);
    }
}
