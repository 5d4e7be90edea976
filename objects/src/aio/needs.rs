//! Requirements of AIO contexts on a machine.

use crate::Snapshot;
use crate::error::{Error, Obstacle, Result};
use crate::memory::Backing;

use super::{EVENT, Ring, capacity, places};

const POSSIBLE: &str = "/sys/devices/system/cpu/possible";

/// The possible CPUs, ascending (`num_possible_cpus`).
pub(super) fn possible_cpus() -> Result<Vec<u32>> {
    let error = Error::file("read", POSSIBLE);
    let text = std::fs::read_to_string(POSSIBLE).map_err(&error)?;
    let bad = || error(std::io::Error::other("it is no list of CPUs"));
    cpus(text.trim())
        .filter(|cpus| !cpus.is_empty())
        .ok_or_else(bad)
}

/// The CPU on which most of the tasks with these affinities may run, if possible one of the `preferred`. The last CPU on
/// which a context was filled keeps free places in reserve, which are out of reach of tasks that may not run there.
pub(super) fn home(cpus: &[u32], affinities: &[&[u8]], preferred: &[u8]) -> Option<u32> {
    let within = |mask: &[u8], cpu: u32| {
        mask.get(cpu as usize / 8)
            .is_some_and(|byte| byte >> (cpu % 8) & 1 == 1)
    };
    cpus.iter().copied().max_by_key(|cpu| {
        let tasks = affinities.iter().filter(|mask| within(mask, *cpu));
        (tasks.count(), within(preferred, *cpu))
    })
}

/// `0-3,8`
fn cpus(text: &str) -> Option<Vec<u32>> {
    let mut all = Vec::new();
    for range in text.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        all.extend(first..=last.min(8191));
    }
    Some(all)
}

/// The least number for io_setup(2) that makes a ring of that many bytes: the kernel doubles it, adds two, and rounds
/// up to whole pages (`ioctx_alloc`, `aio_setup_ring`). The program's own number is not visible; it only counts
/// against fs.aio-max-nr.
pub(super) fn requests(len: u64) -> u64 {
    let beyond = places(len.saturating_sub(4096));
    (beyond.saturating_sub(1) / 2).max(1)
}

/// Bytes of the smallest ring on a machine with that many CPUs.
fn smallest(cpus: u64) -> u64 {
    ((cpus * 4 * 2 + 2 + 1) * EVENT).next_multiple_of(4096)
}

fn rings(snapshot: &Snapshot) -> impl Iterator<Item = (i32, u64, u64, &Ring)> {
    let owners = snapshot.processes.iter().filter(|p| !p.shares.memory);
    owners.flat_map(|p| {
        p.memory.mappings.iter().filter_map(|m| match &m.backing {
            Backing::AioRing(ring) => Some((p.pid, m.start, m.end - m.start, ring)),
            _ => None,
        })
    })
}

/// Number of contexts of a job, and their share of fs.aio-max-nr.
pub fn wanted(snapshot: &Snapshot) -> (usize, u64) {
    let of_each = rings(snapshot).map(|(_, _, len, _)| requests(len));
    of_each.fold((0, 0), |(count, sum), one| (count + 1, sum + one))
}

/// Why this machine cannot create the contexts of a job; if it is `leaving`, it will have released its share of the
/// limits.
pub fn in_the_way(snapshot: &Snapshot, leaving: bool) -> Vec<Obstacle> {
    let (count, wanted) = wanted(snapshot);
    if count == 0 {
        return Vec::new();
    }
    let cpus = possible_cpus().map_or(1, |cpus| cpus.len() as u64);
    let mut obstacles: Vec<Obstacle> = rings(snapshot)
        .filter_map(|(pid, at, len, ring)| {
            let reason = does_not_fit(len, ring.waiting(places(len)), cpus)?;
            let object = format!("the AIO context {at:#x} of process {pid}");
            Some(Obstacle::new(
                object,
                reason,
                "restore it on a machine with fewer CPUs, or boot with possible_cpus=",
            ))
        })
        .collect();
    let number = |name: &str| {
        let text = std::fs::read_to_string(format!("/proc/sys/fs/{name}")).ok()?;
        text.trim().parse::<u64>().ok()
    };
    match (number("aio-nr"), number("aio-max-nr")) {
        (Some(now), Some(most)) if !leaving && now + wanted > most => {
            obstacles.push(Obstacle::new(
                "the job's AIO contexts",
                format!(
                    "need {wanted} of the requests that fs.aio-max-nr allows, and {} are left",
                    most.saturating_sub(now)
                ),
                format!(
                    "raise it: sysctl fs.aio-max-nr={}",
                    (now + wanted).next_power_of_two()
                ),
            ))
        }
        (Some(_), Some(_)) => {}
        _ => obstacles.push(Obstacle::new(
            "the job's AIO contexts",
            "need AIO, which this kernel does not have",
            "restore it on a kernel with CONFIG_AIO",
        )),
    }
    obstacles
}

fn does_not_fit(len: u64, waiting: u64, cpus: u64) -> Option<String> {
    let (has, least) = (places(len), places(smallest(cpus)));
    if has < least {
        return Some(format!(
            "has a ring of {has} events, and with {cpus} possible CPUs the kernel makes none below {least}"
        ));
    }
    let most = capacity(has, cpus);
    (waiting > most).then(|| {
        format!("has {waiting} unread events, and with {cpus} possible CPUs it holds {most}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_number_makes_the_same_ring() {
        for pages in 1..40 {
            let len = pages * 4096;
            let bytes = |requests: u64| ((requests * 2 + 2 + 1) * EVENT).next_multiple_of(4096);
            let least = requests(len);
            assert_eq!(bytes(least), len, "{pages} pages");
            assert!(least == 1 || bytes(least - 1) < len, "{pages} pages");
        }
    }

    #[test]
    fn home_is_where_most_tasks_may_run() {
        let cpus = [0, 1, 2, 9];
        assert_eq!(home(&cpus, &[&[1, 0]], &[2, 0]), Some(0));
        assert_eq!(home(&cpus, &[&[1, 0], &[4, 2], &[0, 2]], &[7, 0]), Some(9));
        assert_eq!(home(&cpus, &[&[7, 2]], &[2]), Some(1));
        assert_eq!(home(&[], &[&[7]], &[2]), None);
    }

    #[test]
    fn many_cpus_make_large_rings() {
        assert_eq!(smallest(2), 4096);
        assert_eq!(smallest(15), 4096);
        assert_eq!(smallest(16), 8192);
        assert!(does_not_fit(4096, 0, 16).is_some());
        assert!(does_not_fit(4096, 0, 2).is_none());
        assert!(does_not_fit(4096, 121, 2).is_some());
        assert!(does_not_fit(4096, 120, 2).is_none());
    }

    #[test]
    fn a_list_of_cpus() {
        assert_eq!(cpus("0-2,5"), Some(vec![0, 1, 2, 5]));
        assert_eq!(cpus("0"), Some(vec![0]));
        assert_eq!(cpus("none"), None);
    }
}
