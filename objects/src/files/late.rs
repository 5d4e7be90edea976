//! Descriptions that can be opened only when all tasks of the job exist: pidfds, and files of `/proc` of one of the
//! tasks. Until then placeholders hold their numbers in every process; then each process that has one opens it for
//! itself.

use std::collections::BTreeSet;

use super::epoll::{Entry, Epoll};
use super::kind::OpenFile;
use super::procfs::ProcFile;
use super::rebuild::rebuild_status;
use crate::Snapshot;
use crate::error::Obstacle;
use crate::index::DescriptionId;
use crate::plan::Builder;
use crate::process::Process;

/// The file of such a description.
fn waiting(description: DescriptionId, snapshot: &Snapshot) -> Option<&dyn OpenFile> {
    let first = snapshot.processes.first().map(|p| p.pid);
    let file = description.find(&snapshot.descriptions)?.kind.file();
    file.is_late(first).then_some(file)
}

/// Whether a description is late.
pub fn is_late(description: DescriptionId, snapshot: &Snapshot) -> bool {
    waiting(description, snapshot).is_some()
}

/// Warns of late descriptions that processes shared and that each now has for itself.
pub fn warn_of_shared(snapshot: &Snapshot, plan: &mut Builder) {
    for (description, _) in DescriptionId::each(&snapshot.descriptions) {
        // A file that is read sequentially has an offset.
        let Some(file) = waiting(description, snapshot).filter(|file| file.offset().is_some())
        else {
            continue;
        };
        let has =
            |p: &&Process| !p.shares.files && p.fds.iter().any(|e| e.description == description);
        let holders = snapshot.processes.iter().filter(has).count();
        if holders > 1 {
            plan.warn(format!(
                "{}, which {holders} processes shared, is opened by each separately: they no longer share \
                 its offset",
                file.object()
            ));
        }
    }
}

/// Files of `/proc` that a process cannot open for itself, in its root directory.
pub fn out_of_reach(snapshot: &Snapshot) -> Vec<Obstacle> {
    let owners = snapshot.processes.iter().filter(|p| !p.shares.files);
    let of = |process: &Process| {
        let held: BTreeSet<DescriptionId> = process.fds.iter().map(|e| e.description).collect();
        let out = |description: DescriptionId| {
            let kind = &description.find(&snapshot.descriptions)?.kind;
            let file = kind.get::<ProcFile>()?;
            let late = is_late(description, snapshot) && !file.is_below(&process.root);
            late.then(|| {
                Obstacle::new(
                    format!("process {}", process.pid),
                    format!(
                        "holds {}, which is not below its root directory",
                        file.object()
                    ),
                    "let it close that file before the checkpoint",
                )
            })
        };
        held.into_iter().filter_map(out).collect::<Vec<_>>()
    };
    owners.flat_map(of).collect()
}

/// When every task of the job exists: opens the process's late descriptions, and adds them to the epoll sets that
/// watch them. The process has its descriptors under their final numbers, and no others. `index` is that of the
/// process.
pub fn rebuild_late(index: usize, snapshot: &Snapshot, plan: &mut Builder) {
    let Some(process) = snapshot.processes.get(index) else {
        return;
    };
    let taken: BTreeSet<i32> = process.fds.iter().map(|e| e.fd).collect();
    let free = (0..).find(|fd| !taken.contains(fd)).unwrap_or(i32::MAX);
    let held = process.fds.iter().map(|e| e.description);
    let watched = sets(process, snapshot).flat_map(|(_, set)| &set.entries);
    let late: BTreeSet<DescriptionId> = held
        .chain(watched.map(|e| e.description))
        .filter(|d| is_late(*d, snapshot))
        .collect();
    for description in late {
        let Some(file) = waiting(description, snapshot) else {
            continue;
        };
        let own = process.fds.iter().filter(|e| e.description == description);
        let adds: Vec<_> = sets(process, snapshot)
            .filter(|(at, _)| adder(*at, description, snapshot) == Some(index))
            .collect();
        if own.clone().next().is_none() && adds.is_empty() {
            continue;
        }
        let object = || file.object();
        let record = &snapshot.descriptions[description];
        file.open_late(record.flags, free, process, plan);
        rebuild_status(record, free, plan);
        for entry in own {
            let cloexec = if entry.close_on_exec {
                libc::O_CLOEXEC
            } else {
                0
            };
            let args = [free as u64, entry.fd as u64, cloexec as u64];
            plan.expect(libc::SYS_dup3, &args, entry.fd as u64, object);
        }
        for (at, set) in adds {
            let entries = set.entries.iter();
            for entry in entries.filter(|e| e.description == description) {
                watch(process, at, entry, free, plan);
            }
        }
        plan.syscall(libc::SYS_close, &[free as u64], object);
    }
}

/// Adds the file open as `fd` to the epoll set of description `set`, under its number.
fn watch(process: &Process, set: DescriptionId, entry: &Entry, fd: i32, plan: &mut Builder) {
    let Some(set) = process.fds.iter().find(|e| e.description == set) else {
        return;
    };
    let holder = process.fds.iter().find(|e| e.fd == entry.fd);
    match holder.map(|e| e.description) {
        Some(d) if d == entry.description => entry.add(set.fd, entry.fd, plan),
        None if entry.fd == fd => entry.add(set.fd, fd, plan),
        None => {
            let object = || entry.object();
            let number = entry.fd as u64;
            plan.expect(libc::SYS_dup3, &[fd as u64, number, 0], number, object);
            entry.add(set.fd, entry.fd, plan);
            plan.syscall(libc::SYS_close, &[number], object);
        }
        // Closing another file's descriptor would release the process's POSIX locks on it.
        Some(_) => plan.warn(format!(
            "the epoll set of fd {} watches a file that was added as fd {}, which is another file \
             by now, and does not watch it any more",
            set.fd, entry.fd
        )),
    }
}

/// The epoll sets that a process holds, each once.
fn sets<'a>(
    process: &Process,
    snapshot: &'a Snapshot,
) -> impl Iterator<Item = (DescriptionId, &'a Epoll)> {
    let held: BTreeSet<DescriptionId> = process.fds.iter().map(|e| e.description).collect();
    held.into_iter()
        .filter_map(|at| Some((at, at.find(&snapshot.descriptions)?.kind.get::<Epoll>()?)))
}

/// The process that adds a description to a set: the first that has both, otherwise the first that has the set.
fn adder(set: DescriptionId, description: DescriptionId, snapshot: &Snapshot) -> Option<usize> {
    let has = |p: &Process, what: DescriptionId| p.fds.iter().any(|e| e.description == what);
    let all = &snapshot.processes;
    let both = all.iter().position(|p| has(p, set) && has(p, description));
    both.or_else(|| all.iter().position(|p| has(p, set)))
}

#[cfg(test)]
mod tests {
    use super::super::pidfd::PidFd;
    use super::super::{Description, FdEntry, Kind};
    use super::*;
    use crate::fixture;
    use crate::plan::HostState;

    fn entry(fd: i32, description: usize) -> FdEntry {
        FdEntry {
            fd,
            description: DescriptionId(description),
            close_on_exec: false,
        }
    }

    /// Two processes: the first has under 0 an epoll set that watches the second's pidfd, which both have under 1;
    /// under 2 the first has its own.
    fn snapshot() -> Snapshot {
        let mut snapshot = fixture::snapshot();
        let (parent, child) = (snapshot.processes[0].pid, 77);
        let watches = |fd| Entry {
            fd,
            description: DescriptionId(1),
            events: 1,
            data: 9,
        };
        let pidfd = |task| {
            Kind::from(PidFd {
                task: Some(task),
                thread: false,
                status: None,
                inode: None,
            })
        };
        let entries = vec![watches(1), watches(2), watches(5)];
        let kinds = [
            Kind::from(Epoll {
                entries,
                busy_poll: None,
            }),
            pidfd(child),
            pidfd(parent),
        ];
        snapshot.descriptions = kinds
            .map(|kind| Description {
                kind,
                flags: libc::O_RDWR as u32,
                owner: None,
                made_by: None,
                locks: Vec::new(),
            })
            .into();
        let mut second = snapshot.processes[0].clone();
        second.pid = child;
        second.fds = vec![entry(0, 0), entry(1, 1)];
        snapshot.processes[0].fds = vec![entry(0, 0), entry(1, 1), entry(2, 2)];
        snapshot.processes.push(second);
        snapshot
    }

    fn late(index: usize) -> (Vec<String>, Vec<String>) {
        let mut plan = Builder::new(0, HostState::default());
        rebuild_late(index, &snapshot(), &mut plan);
        let plan = plan.finish();
        let text = plan.to_text();
        let calls = text.lines().map(|line| {
            // An address follows.
            let end = line.find(", 0x").or(line.find(" #")).unwrap_or(line.len());
            line[..end].trim_end().to_owned()
        });
        (calls.collect(), plan.warnings)
    }

    #[test]
    fn the_first_holder_of_set_and_pidfd_adds_it() {
        let (calls, warnings) = late(0);
        let expected = [
            "pidfd_open(77)",
            "dup3(3, 1)",
            "epoll_ctl(0, 1, 1",
            "dup3(3, 5)",
            "epoll_ctl(0, 1, 5",
            "close(5)",
            "close(3)",
        ];
        assert_eq!(calls, expected);
        // Number 2 refers to another file by now.
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].contains("as fd 2"), "{warnings:?}");
    }

    #[test]
    fn others_open_it_for_themselves() {
        let (calls, warnings) = late(1);
        assert_eq!(calls, ["pidfd_open(77)", "dup3(2, 1)", "close(2)"]);
        assert_eq!(warnings, [""; 0]);
    }

    #[test]
    fn only_those_of_the_first_process_are_there_at_once() {
        let snapshot = snapshot();
        let late: Vec<bool> = (0..4)
            .map(|d| is_late(DescriptionId(d), &snapshot))
            .collect();
        assert_eq!(late, [false, true, false, false]);
    }
}
