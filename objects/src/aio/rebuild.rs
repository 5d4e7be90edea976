//! Restores AIO contexts.

use crate::memory::{Backing, Mapping};
use crate::plan::Builder;

use super::{EVENT, HEAD, NR, Ring, needs, places};

/// Requests submitted at once.
const AT_ONCE: u64 = 64;
/// Descriptors used meanwhile; those of the job are at high numbers then.
const NOTHING: u64 = 0;
const PIPE: [i32; 2] = [1, 2];
/// Bytes that fit into every pipe.
const PIPE_ROOM: u64 = 4096;

struct Context<'a> {
    at: u64,
    len: u64,
    ring: &'a Ring,
}

/// In the order of the kernel's table.
fn contexts(mappings: &[Mapping]) -> Vec<Context<'_>> {
    let mut all: Vec<Context<'_>> = mappings
        .iter()
        .filter_map(|m| match &m.backing {
            Backing::AioRing(ring) => Some(Context {
                at: m.start,
                len: m.end - m.start,
                ring,
            }),
            _ => None,
        })
        .collect();
    all.sort_by_key(|c| c.ring.id);
    all
}

/// Keeps the ranges of rings unmapped. The kernel chooses the address of a new ring, and a ring cannot be moved onto
/// itself.
pub fn reserve(mappings: &[Mapping], plan: &mut Builder) {
    for context in contexts(mappings) {
        let flags = libc::MAP_PRIVATE
            | libc::MAP_ANONYMOUS
            | libc::MAP_NORESERVE
            | libc::MAP_FIXED_NOREPLACE;
        let args = [
            context.at,
            context.len,
            libc::PROT_NONE as u64,
            flags as u64,
            u64::MAX,
            0,
        ];
        plan.expect(libc::SYS_mmap, &args, context.at, || context.object());
    }
}

/// Creates all contexts of an address space, after everything else is in place and its forks, which have no contexts,
/// are made. The lowest descriptors must be free. `affinities` are those of the tasks that will use them.
pub fn rebuild(mappings: &[Mapping], affinities: &[&[u8]], plan: &mut Builder) {
    let contexts = contexts(mappings);
    if contexts.is_empty() {
        return;
    }
    let object = || "AIO contexts".to_owned();
    // An empty file: a read of it completes at submission.
    let name = plan.data(b"aio\0");
    plan.expect(
        libc::SYS_memfd_create,
        &[name, libc::MFD_CLOEXEC.into()],
        NOTHING,
        object,
    );
    let pipe = plan.data(&PIPE.map(i32::to_le_bytes).concat());
    plan.syscall(libc::SYS_pipe2, &[pipe, libc::O_CLOEXEC as u64], object);
    // CPUs hold batches of free places, so we stay on one CPU. It keeps some, so if possible it is one of the job's.
    let before = plan.host().scheduling.affinity.clone();
    run_on(&first_of(&before), plan);
    let cpus = needs::possible_cpus().unwrap_or_default();
    if let Some(home) = needs::home(&cpus, affinities, &before) {
        let home = only(home);
        let args = [0, home.len() as u64, plan.data(&home)];
        plan.attempt(libc::SYS_sched_setaffinity, &args, || {
            "the CPU of AIO contexts".into()
        });
    }
    let requests = Requests::prepare(plan);
    for context in &contexts {
        context.rebuild(&requests, plan);
    }
    run_on(&before, plan);
    for fd in [NOTHING, PIPE[0] as u64, PIPE[1] as u64] {
        plan.syscall(libc::SYS_close, &[fd], object);
    }
}

/// Sets an affinity; an empty one is unknown.
fn run_on(affinity: &[u8], plan: &mut Builder) {
    if !affinity.is_empty() {
        let args = [0, affinity.len() as u64, plan.data(affinity)];
        plan.syscall(libc::SYS_sched_setaffinity, &args, || {
            "the affinity while AIO contexts are made".into()
        });
    }
}

/// The affinity of that CPU alone.
fn only(cpu: u32) -> Vec<u8> {
    let mut one = vec![0; (cpu as usize / 64 + 1) * 8];
    one[cpu as usize / 8] = 1 << (cpu % 8);
    one
}

/// The affinity reduced to its first CPU.
fn first_of(affinity: &[u8]) -> Vec<u8> {
    let first = affinity.iter().position(|byte| *byte != 0);
    let mut one = vec![0; affinity.len()];
    if let Some(at) = first {
        one[at] = affinity[at] & affinity[at].wrapping_neg();
    }
    one
}

/// No-op requests, and room for their events.
struct Requests {
    blocks: u64,
    events: u64,
}

impl Requests {
    fn prepare(plan: &mut Builder) -> Self {
        // All zero: IOCB_CMD_PREAD of no bytes from descriptor 0 (linux/aio_abi.h).
        let block = plan.reserve(64);
        let blocks = plan.data(&block.to_le_bytes().repeat(AT_ONCE as usize));
        let events = plan.reserve((AT_ONCE * EVENT) as usize);
        Self { blocks, events }
    }
}

impl Context<'_> {
    fn object(&self) -> String {
        format!("the AIO context {:#x}", self.at)
    }

    fn rebuild(&self, requests: &Requests, plan: &mut Builder) {
        let places = places(self.len);
        // The kernel stores the address of the ring into the next operation's operand.
        let handle = plan.reserve(8);
        let setup = [needs::requests(self.len), handle];
        plan.syscall(libc::SYS_io_setup, &setup, || self.object());
        let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        let moved = [handle, self.len, self.len, flags, self.at];
        plan.loading(libc::SYS_mremap, &moved, self.at, || self.object());
        // Succeeds only if the ring has that many places.
        let compare = (libc::FUTEX_CMP_REQUEUE | libc::FUTEX_PRIVATE_FLAG) as u64;
        let same = [self.at + NR, compare, 0, 0, self.at + HEAD, places];
        plan.expect(libc::SYS_futex, &same, 0, || self.object());

        let mut to_head = u64::from(self.ring.head);
        while to_head > 0 {
            let count = to_head.min(AT_ONCE).min(places / 4);
            self.submit(count, requests, plan);
            let get = [self.at, count, count, requests.events, 0];
            plan.expect(libc::SYS_io_getevents, &get, count, || self.object());
            to_head -= count;
        }
        let mut waiting = self.ring.waiting(places);
        while waiting > 0 {
            let count = waiting.min(AT_ONCE);
            self.submit(count, requests, plan);
            waiting -= count;
        }
        self.write_events(plan);
    }

    fn submit(&self, count: u64, requests: &Requests, plan: &mut Builder) {
        let args = [self.at, count, requests.blocks];
        plan.expect(libc::SYS_io_submit, &args, count, || self.object());
    }

    /// Writes the unread events over those of our requests.
    fn write_events(&self, plan: &mut Builder) {
        let places = places(self.len);
        let first = (places - u64::from(self.ring.head)) * EVENT;
        let (up_to_end, from_start) = self
            .ring
            .unread
            .split_at(self.ring.unread.len().min(first as usize));
        let begin = u64::from(self.ring.head);
        for (place, events) in [(begin, up_to_end), (0, from_start)] {
            let mut to = self.at + (place + 1) * EVENT;
            for piece in events.chunks(PIPE_ROOM as usize) {
                let (from, len) = (plan.data(piece), piece.len() as u64);
                plan.expect(libc::SYS_write, &[PIPE[1] as u64, from, len], len, || {
                    self.object()
                });
                plan.expect(libc::SYS_read, &[PIPE[0] as u64, to, len], len, || {
                    self.object()
                });
                to += len;
            }
        }
    }
}
