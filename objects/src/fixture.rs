//! A small job for tests: one process with two threads, three mappings and two descriptors.

use std::path::PathBuf;

use ckpt_image::{Header, Reader, Writer, WriterOptions};

use crate::address_space::{AddressSpace, Layout};
use crate::files::{Description, FdEntry, device, eventfd};
use crate::index::{DescriptionId, FileId};
use crate::memory::{Backing, FileIdentity, MappedFile, Mapping, MappingFlags};
use crate::process::Process;
use crate::thread::{GeneralRegisters, Thread};
use crate::{Host, Snapshot, SpaceId};

/// The address of the fixture's anonymous memory: three pages, the second of which is stored.
pub const MEMORY: u64 = 0x10_0000;

/// A mapping without flags, readable and writable.
pub fn mapping(start: u64, pages: u64, backing: Backing) -> Mapping {
    Mapping {
        start,
        end: start + pages * 4096,
        prot: 3,
        backing,
        flags: MappingFlags::empty(),
        name: None,
        protection_key: 0,
        guards: Vec::new(),
        policy: None,
    }
}

fn thread(tid: i32) -> Thread {
    Thread {
        tid,
        name: b"test".to_vec(),
        regs: GeneralRegisters {
            orig_rax: u64::MAX,
            rip: MEMORY + 4096,
            ..Default::default()
        },
        xstate: Vec::new(),
        signal_mask: 0,
        pending: Vec::new(),
        alternate_stack: (0, 2, 0),
        rseq: None,
        robust_list: (0, 0),
        clear_child_tid: 0,
        scheduling: Default::default(),
        credentials: Default::default(),
        parent_death_signal: 0,
        seccomp: Default::default(),
        switches: Vec::new(),
        memory_policy: None,
        thread_areas: Vec::new(),
        io_ports: Vec::new(),
        core_cookie: 0,
        landlocked: false,
        security: Vec::new(),
        dispatch: None,
    }
}

/// Its snapshot.
pub fn snapshot() -> Snapshot {
    let file = MappedFile {
        path: PathBuf::from("/nonexistent/program"),
        identity: FileIdentity {
            device: (0, 0),
            inode: 1,
            mode: 0o100755,
            size: 4096,
            modified_ns: 0,
            build_id: None,
            created_ns: None,
        },
        contents: None,
        attributes: None,
        saved: None,
    };
    let file_backing = Backing::PrivateFile {
        file: FileId(0),
        offset: 0,
    };
    let process = Process {
        pid: 50,
        parent: 1,
        forked: false,
        shares: Default::default(),
        exit_signal: libc::SIGCHLD,
        record_locks: Vec::new(),
        notices: Vec::new(),
        group: 50,
        session: 50,
        terminal: None,
        stopped: None,
        untold_stops: Vec::new(),
        untold_continues: Vec::new(),
        dynamic_state: Default::default(),
        command_line: b"program\0argument\0".to_vec(),
        memory: AddressSpace {
            space: SpaceId(1),
            layout: Layout::default(),
            auxv: Vec::new(),
            executable: FileId(0),
            mappings: vec![
                mapping(0x1000, 1, file_backing),
                mapping(MEMORY, 3, Backing::Anonymous),
                mapping(MEMORY + 3 * 4096, 1, Backing::Anonymous),
            ],
            inherited: Vec::new(),
            lock_future: 0,
            thp_disabled: false,
            switches: Vec::new(),
            segments: Vec::new(),
            dumpable: 1,
            membarrier: 0,
        },
        threads: vec![thread(50), thread(51)],
        actions: Vec::new(),
        pending: Vec::new(),
        interval_timers: Default::default(),
        posix_timers: Vec::new(),
        fds: [0, 1]
            .map(|fd| FdEntry {
                fd,
                description: DescriptionId(fd as usize),
                close_on_exec: fd == 1,
            })
            .into(),
        removed: Default::default(),
        cwd: "/".into(),
        root: "/".into(),
        umask: 0o22,
        limits: Vec::new(),
        personality: 0,
        child_subreaper: false,
        cgroups: Vec::new(),
        oom_score_adj: 0,
        coredump_filter: None,
        autogroup_nice: None,
        login_uid: None,
        semaphore_adjustments: Vec::new(),
    };
    let null = device::Device {
        path: "/dev/null".into(),
        number: (1, 3),
    };
    let event = eventfd::EventFd {
        count: 3,
        semaphore: false,
    };
    let description = |kind| Description {
        kind,
        flags: 2,
        owner: None,
        made_by: None,
        locks: Vec::new(),
    };
    Snapshot {
        namespaces: Default::default(),
        cgroups: Vec::new(),
        zombies: Vec::new(),
        host: Host::default(),
        processes: vec![process],
        descriptions: vec![description(null.into()), description(event.into())],
        terminals: Vec::new(),
        mapped_files: vec![file],
        removed: Vec::new(),
        shared_memory: Vec::new(),
        ipc: Default::default(),
        bundle: Vec::new(),
    }
}

/// An image with these pages: space, address, fill byte.
pub fn image(pages: &[(u32, u64, u8)]) -> Reader {
    let header = Header {
        pid: 50,
        processes: 1,
        threads: 2,
        ..Header::default()
    };
    let mut writer = Writer::new(Vec::new(), &header, WriterOptions::default()).unwrap();
    let mut chunk = writer.chunk();
    for (space, address, byte) in pages {
        chunk.push(*space, *address, 4096, &[*byte; 4096]);
    }
    writer.submit(chunk).unwrap();
    Reader::from_bytes(writer.finish().unwrap().0).unwrap()
}

/// The image that matches [`snapshot`].
pub fn good_image() -> Reader {
    image(&[(1, MEMORY + 4096, 0x90)])
}
