use super::*;
use crate::SpaceId;
use crate::files::epoll::{Entry, Epoll};
use crate::files::{Description, Kind};
use crate::fixture::{MEMORY, good_image, image, mapping, snapshot};
use crate::index::{DescriptionId, FileId, SegmentId, SetId, SharedId};
use crate::memory::{Backing, SharedMemory};
use crate::signals::Action;
use crate::zombie::Zombie;

/// The only fault of a snapshot after a change.
fn fault(change: impl FnOnce(&mut Snapshot)) -> String {
    let mut snapshot = snapshot();
    change(&mut snapshot);
    let faults = check(&snapshot, &good_image());
    assert_eq!(faults.len(), 1, "{faults:#?}");
    faults[0].clone()
}

#[test]
fn a_good_image_has_no_fault() {
    assert_eq!(check(&snapshot(), &good_image()), Vec::<String>::new());
}

#[test]
fn tasks() {
    let twice = fault(|s| s.processes[0].threads[1].tid = 50);
    assert_eq!(twice, "thread 50 of process 50 exists twice");
    let leader = fault(|s| s.processes[0].threads.reverse());
    assert_eq!(leader, "the first thread of process 50 is not its leader");
    let root = fault(|s| {
        s.processes[0].pid = 60;
        s.processes[0].threads[0].tid = 60;
    });
    assert!(root.contains("the header says"), "{root}");
}

/// A child of process 50, forked, that has its pages.
fn with_child(snapshot: &mut Snapshot) {
    let mut child = snapshot.processes[0].clone();
    (child.pid, child.parent, child.forked) = (70, 50, true);
    child.threads.truncate(1);
    child.threads[0].tid = 70;
    child.memory.space = SpaceId(77);
    child.memory.inherited = vec![(MEMORY, MEMORY + 4096)];
    snapshot.processes.push(child);
}

#[test]
fn trees() {
    let mut good = snapshot();
    with_child(&mut good);
    assert_eq!(check(&good, &good_image()), Vec::<String>::new());
    let fault_of = |change: fn(&mut Snapshot)| {
        fault(|s| {
            with_child(s);
            change(s);
        })
    };
    let before = fault_of(|s| (s.processes[0].parent, s.processes[1].parent) = (70, 50));
    assert_eq!(before, "process 50 comes before its parent 70");
    let alone = fault_of(|s| s.processes[1].parent = 4);
    assert!(alone.contains("a parent that is not there"), "{alone}");
    let nowhere = fault_of(|s| s.processes[1].memory.inherited[0].1 += 1 << 30);
    assert!(nowhere.contains("where it has no memory"), "{nowhere}");
    let stopped = fault_of(|s| s.processes[1].stopped = Some(libc::SIGHUP));
    assert!(stopped.contains("not a stop signal"), "{stopped}");
    let zombie = |pid, parent, status| Zombie {
        pid,
        parent,
        group: pid,
        session: 50,
        ids: None,
        exit_signal: libc::SIGCHLD,
        status,
        name: b"ended".to_vec(),
    };
    let taken = fault(|s| s.zombies.push(zombie(51, 50, 0)));
    assert!(taken.contains("another one's"), "{taken}");
    let orphan = fault(|s| s.zombies.push(zombie(80, 9, 0)));
    assert!(orphan.contains("the parent of process 80"), "{orphan}");
    let status = fault(|s| s.zombies.push(zombie(80, 50, 0x7f)));
    assert!(status.contains("an impossible wait status"), "{status}");
}

/// A child of process 50 that shares its memory and actions.
fn with_sharer(snapshot: &mut Snapshot) {
    let mut child = snapshot.processes[0].clone();
    (child.pid, child.parent) = (70, 50);
    child.threads.truncate(1);
    child.threads[0].tid = 70;
    (child.shares.memory, child.shares.actions) = (true, true);
    snapshot.processes.push(child);
}

#[test]
fn shared_memory() {
    let mut good = snapshot();
    with_sharer(&mut good);
    assert_eq!(check(&good, &good_image()), Vec::<String>::new());
    let fault_of = |change: fn(&mut Process)| {
        fault(|s| {
            with_sharer(s);
            change(&mut s.processes[1]);
        })
    };
    let memory = "process 70 does not have the memory that it shares with its parent";
    assert_eq!(fault_of(|p| p.memory.mappings.truncate(1)), memory);
    assert_eq!(fault_of(|p| p.memory.space = SpaceId(2)), memory);
    assert_eq!(fault_of(|p| p.forked = true), memory);
    let action = Action {
        signal: 1,
        ..Action::default()
    };
    let actions = "process 70 does not have the signal actions that it shares with its parent";
    assert_eq!(
        fault(|s| {
            with_sharer(s);
            s.processes[1].actions.push(action);
        }),
        actions
    );
    let own = fault_of(|p| (p.shares.memory, p.shares.actions) = (false, false));
    assert!(own.contains("belongs to two address spaces"), "{own}");
    assert_eq!(
        fault_of(|p| (p.shares.memory, p.memory.space) = (false, SpaceId(2))),
        actions
    );
    let signal = fault_of(|p| p.exit_signal = 65);
    assert!(signal.contains("signal 65"), "{signal}");
}

#[test]
fn mappings() {
    let overlap = fault(|s| s.processes[0].memory.mappings[2].start -= 4096);
    assert!(overlap.contains("overlaps"), "{overlap}");
    let odd = fault(|s| s.processes[0].memory.mappings[0].end += 1);
    assert!(odd.contains("no range of pages"), "{odd}");
    let file = Backing::PrivateFile {
        file: FileId(7),
        offset: 0,
    };
    let missing = fault(|s| s.processes[0].memory.mappings[0].backing = file);
    assert!(
        missing.contains("file 7, which does not exist"),
        "{missing}"
    );
    let offset = Backing::PrivateFile {
        file: FileId(0),
        offset: u64::MAX - 4095,
    };
    let wrapped = fault(|s| s.processes[0].memory.mappings[0].backing = offset);
    assert!(wrapped.contains("impossible offset"), "{wrapped}");
    let guard = fault(|s| s.processes[0].memory.mappings[1].guards = vec![(0, 4096)]);
    assert!(guard.contains("guard pages"), "{guard}");
    assert!(fault(|s| s.processes[0].memory.executable = FileId(1)).contains("executable"));
}

#[test]
fn descriptors() {
    assert!(
        fault(|s| s.processes[0].fds[1].description = DescriptionId(9)).contains("description 9")
    );
    assert!(fault(|s| s.processes[0].fds[1].fd = 0).contains("exists twice"));
    let epoll = |description| {
        let entry = Entry {
            fd: 1,
            description,
            events: 1,
            data: 0,
        };
        let kind = Kind::from(Epoll {
            entries: vec![entry],
            busy_poll: None,
        });
        Description {
            kind,
            flags: 0,
            owner: None,
            made_by: None,
            locks: Vec::new(),
        }
    };
    assert!(fault(|s| s.descriptions.push(epoll(DescriptionId(9)))).contains("description 9"));
    assert!(
        fault(|s| s.descriptions.push(epoll(DescriptionId(2))))
            .contains("none that an epoll can have")
    );
}

#[test]
fn pages_belong_somewhere() {
    let of = |pages: &[(u32, u64, u8)]| check(&snapshot(), &image(pages));
    // Across the border of two adjacent mappings.
    assert!(of(&[(1, MEMORY + 8192, 1), (1, MEMORY + 12288, 1)]).is_empty());
    for (page, expected) in [
        ((1, 0x8000), "the stored page at 0x8000 of process 50"),
        (
            (1, MEMORY + 4 * 4096),
            "the stored page at 0x104000 of process 50",
        ),
        ((2, 0), "the pages of space 2 belong to nothing"),
    ] {
        let faults = of(&[(page.0, page.1, 1)]);
        assert!(
            faults.len() == 1 && faults[0].contains(expected),
            "{faults:?}"
        );
    }
}

#[test]
fn spaces_have_one_owner_and_an_end() {
    let shared = |space| SharedMemory {
        space,
        size: 4096,
        inode: 1,
        huge_page_size: 0,
        reach: 0,
    };
    let fault = fault(|s| s.shared_memory.push(shared(SpaceId(1))));
    assert!(
        fault.contains("belongs to a process and to a file"),
        "{fault}"
    );
    let mut long = snapshot();
    long.shared_memory.push(shared(SpaceId(2)));
    assert!(check(&long, &image(&[(2, 0, 1)])).is_empty());
    assert!(check(&long, &image(&[(2, 4096, 1)]))[0].contains("reach beyond"));
    let view = Backing::SharedMemory {
        object: SharedId(0),
        offset: 0,
    };
    long.processes[0]
        .memory
        .mappings
        .push(mapping(0x200_0000, 2, view));
    assert!(check(&long, &image(&[]))[0].contains("reaches beyond"));
    // mremap(2) makes such mappings.
    long.shared_memory[0].reach = 2 * 4096;
    assert!(check(&long, &image(&[])).is_empty());
}

#[test]
fn hostile_numbers_do_no_harm() {
    let mut hostile = snapshot();
    let process = &mut hostile.processes[0];
    for mapping in &mut process.memory.mappings {
        (mapping.start, mapping.end) = (u64::MAX - 4095, 4096);
        mapping.backing = Backing::AnonymousHuge { page_size: 0 };
    }
    process.memory.mappings.reverse();
    process.fds[0].fd = i32::MIN;
    process.fds[1].fd = i32::MAX;
    process.pid = i32::MIN;
    assert!(!check(&hostile, &good_image()).is_empty());
}

#[test]
fn faults_are_described_up_to_a_bound() {
    let mut many = snapshot();
    many.processes[0].fds = vec![many.processes[0].fds[0]; 10_000];
    let faults = check(&many, &good_image());
    assert_eq!(faults.len(), MAX_FAULTS + 1);
    assert_eq!(
        faults[MAX_FAULTS],
        format!("and {} more faults", 10_000 - 1 - MAX_FAULTS)
    );
}

#[test]
fn objects_of_the_ipc_namespace() {
    use crate::ipc::undo::Adjustment;
    use crate::ipc::{Claim, Object, sysv_sem, sysv_shm};
    let object = Object {
        id: 7,
        key: 0,
        mode: 0o600,
        uid: 0,
        gid: 0,
        creator_uid: 0,
        creator_gid: 0,
    };
    let segment = |size| sysv_shm::Segment {
        object,
        size,
        destroyed: false,
        locked: false,
        huge_page_size: 0,
        contents: SpaceId(2),
    };
    let mut good = snapshot();
    good.ipc.segments.push(segment(5000));
    let view = |segment| Backing::SysV {
        segment,
        offset: 0,
        writable: true,
    };
    let mappings = &mut good.processes[0].memory.mappings;
    mappings.push(mapping(0x200_0000, 2, view(SegmentId(0))));
    assert!(check(&good, &image(&[(2, 4096, 1)])).is_empty());
    assert!(check(&good, &image(&[(2, 8192, 1)]))[0].contains("reach beyond"));
    // mremap(2) makes mappings of ordinary pages, but not of huge pages, extend past the end.
    good.processes[0].memory.mappings[3].end += 2 << 20;
    assert!(check(&good, &image(&[])).is_empty());
    good.ipc.segments[0].huge_page_size = 2 << 20;
    assert!(check(&good, &image(&[]))[0].contains("beyond the 5000 bytes of segment 0"));
    good.processes[0].memory.mappings[3].backing = view(SegmentId(1));
    assert!(check(&good, &image(&[]))[0].contains("segment 1, which does not exist"));
    let empty = fault(|s| s.ipc.segments.push(segment(0)));
    assert!(empty.contains("impossible size"), "{empty}");

    let set = |value, operators| sysv_sem::Set {
        object,
        claim: Claim::Used,
        values: vec![value],
        operators,
    };
    let high = fault(|s| s.ipc.semaphores.push(set(32768, vec![1])));
    assert!(high.contains("above 32767"), "{high}");
    let short = fault(|s| s.ipc.semaphores.push(set(1, Vec::new())));
    assert!(short.contains("1 values of 0"), "{short}");
    let adjusts = fault(|s| {
        s.ipc.semaphores.push(set(1, vec![1]));
        s.processes[0].semaphore_adjustments.push(Adjustment {
            set: SetId(0),
            semaphore: 1,
            by: 1,
        });
    });
    assert!(adjusts.contains("semaphore 1 of set 0"), "{adjusts}");
}
