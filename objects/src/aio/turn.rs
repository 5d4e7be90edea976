//! Turns a ring once around, to its old position, by requests of ours.
//!
//! No-op requests that complete at submission fill a context: the number that it accepts is the number of free
//! places. Each leaves an event, so the tail moves, and a program that consumes events without a system call may have
//! been stopped with the old head in a register. So exactly as many requests are submitted as the ring has places,
//! which brings the tail back.
//!
//! All of it is one batch, which the task completes even if we are killed. The number of requests that a call accepts
//! is not known beforehand, so the requests count themselves. There is one control block (`struct iocb`), which reads
//! its successor over itself, from a table in a memfd; the last successor is invalid. io_submit(2) is passed the same
//! block repeatedly and stops there.
//!
//! Then the batch restores the unread events and the head. If a request of the program's completes during the batch,
//! its event is among ours: it is found and restored afterwards. It is lost only if we are killed in these same
//! microseconds.

use ckpt_tracer::remote::{Call, Hold, RemoteCalls};
use nix::errno::Errno;

use super::{HEAD, Seen, TAIL, capacity, distance};
use crate::error::{Error, Result};

/// Identifies events of ours, together with the address of the control block.
const MARK: u64 = 0x636b_7074_0061_696f;
/// How often a batch consumes the submitted events and submits more.
const ROUNDS: usize = 3;
/// Bytes of a control block (`struct iocb`, linux/aio_abi.h).
const BLOCK: u64 = 64;
/// Offset of its successor: the file offset, and a word that must be 0.
const SUCCESSOR: u64 = 40;
/// Bytes of a table entry.
const ENTRY: u64 = 16;
/// Offsets in the scratch memory.
const NAME: u64 = BLOCK;
const OLD_HEAD: u64 = BLOCK + 8;
const AFFINITY: u64 = 128;
/// Room for 8,192 CPUs.
pub(super) const AFFINITY_ROOM: u64 = 1024;
const MASKS: u64 = AFFINITY + AFFINITY_ROOM;

/// Offsets in the scratch memory and in the memfd, for a ring of a given size.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    ring: u64,
    places: u64,
    mask: u64,
    blocks: u64,
    file: u64,
    events: u64,
    seen: u64,
    list: u64,
    /// Bytes of scratch memory.
    pub(super) len: u64,
    /// In the memfd: a buffer for copying.
    through: u64,
    /// The initial entries.
    begin: u64,
    /// Bytes of the memfd.
    pub(super) file_len: u64,
}

impl Room {
    pub(super) fn of(ring: u64, cpus: &[u32]) -> Self {
        let places = super::places(ring);
        let mask = (u64::from(cpus.iter().copied().max().unwrap_or(0)) / 64 + 1) * 8;
        let through = (2 * places * ENTRY).next_multiple_of(4096);
        let begin = through + ring;
        let file_len = begin + 2 * ENTRY;
        let blocks = (MASKS + mask * cpus.len() as u64).next_multiple_of(64);
        let file = blocks + places * 8;
        let events = (file + file_len).next_multiple_of(64);
        let seen = events + ring;
        let list = seen + ring * 2 * (ROUNDS as u64 + 2);
        let calls = 2 * cpus.len() as u64 + 64;
        let len = (list + calls * 64 + 256).next_multiple_of(4096);
        Self {
            ring,
            places,
            mask,
            blocks,
            file,
            events,
            seen,
            list,
            len,
            through,
            begin,
            file_len,
        }
    }
}

/// Result of a turn.
#[derive(Debug)]
pub(super) struct Turned {
    /// Requests that it accepted, with no event in it.
    pub(super) free: u64,
    /// Events of the program's own requests that completed meanwhile, in order.
    pub(super) foreign: Vec<Vec<u8>>,
    /// CPUs to which the task could not be moved: offline, or outside its cpuset.
    pub(super) unreached: usize,
}

/// A series of submitted requests, possibly empty, and the ring afterwards.
struct Burst {
    made: u64,
    seen: Seen,
}

/// Makes the batches.
pub(super) struct Turner<'c, 'a> {
    pub(super) calls: &'c mut RemoteCalls<'a>,
    pub(super) room: Room,
    /// The possible CPUs. The last one keeps what is left in reserve, so it should be one on which the job may run.
    pub(super) cpus: &'c [u32],
    /// The affinity to restore at the end.
    pub(super) affinity: &'c [u8],
    /// The number that the next descriptor gets.
    pub(super) fd: i32,
    /// Tasks that must not see the ring meanwhile.
    pub(super) hold: &'c mut Hold<'a>,
}

impl Turner<'_, '_> {
    /// Requests that an empty context without events accepts.
    pub(super) fn capacity(&self) -> u64 {
        capacity(self.room.places, self.cpus.len() as u64)
    }

    /// Turns a ring. `ring` is its present state.
    pub(super) fn turn(&mut self, at: u64, ring: &Seen) -> Result<Turned> {
        let places = self.room.places;
        let unread = distance(ring.word(HEAD), ring.word(TAIL), places);
        let mut turned = Turned {
            free: 0,
            foreign: Vec::new(),
            unreached: 0,
        };
        let (mut tail, mut missing, mut total) = (ring.word(TAIL), places, 0);
        // Twice around if one turn would end before the context is full.
        if missing - unread < self.capacity() {
            missing += places;
        }
        for batch in 0.. {
            // The last requests stand for the unread events: the kernel counts their places as used. Before them all
            // others are consumed.
            let (bursts, unreached) = self.batch(at, ring, [missing - unread, unread])?;
            if batch == 0 {
                turned.free = bursts[1].made;
                turned.unreached = unreached;
            }
            let made: u64 = bursts.iter().map(|b| b.made).sum();
            for burst in bursts {
                tail = self.look(&burst, tail, &mut turned)?;
            }
            total += made;
            missing -= made;
            if missing == 0 || total == 0 {
                break;
            }
            if missing < unread {
                missing += places;
            }
            // With all tasks stopped, the number of free places is constant.
            if batch > 4 * places {
                return Err(self.odd("takes no more requests"));
            }
        }
        Ok(turned)
    }

    /// Finds the program's events among ours; returns the tail.
    fn look(&self, burst: &Burst, from: u32, turned: &mut Turned) -> Result<u32> {
        let places = self.room.places;
        let tail = burst.seen.word(TAIL);
        let others = (distance(from, tail, places) + places - burst.made % places) % places;
        let count = burst.made + others;
        if count >= places {
            return Err(self.odd("has more events than places"));
        }
        let mut ours = Vec::with_capacity(16);
        ours.extend_from_slice(&MARK.to_le_bytes());
        ours.extend_from_slice(&self.calls.scratch().raw().to_le_bytes());
        let before = turned.foreign.len();
        for n in 0..count {
            let event = burst.seen.event((u64::from(from) + n) % places);
            if !event.starts_with(&ours) {
                turned.foreign.push(event.to_vec());
            }
        }
        match (turned.foreign.len() - before) as u64 == others {
            true => Ok(tail),
            false => Err(self.odd("shows other events than were counted")),
        }
    }

    fn odd(&self, what: &str) -> Error {
        let object = format!("an AIO context of process {}", self.calls.pid());
        Error::refuse(crate::error::Obstacle::without_remedy(object, what))
    }

    /// One batch: consumes all events, fills the context on every CPU, consumes them again and submits more, up to
    /// the first number; consumes those and submits the second number. Returns the series, and the number of CPUs that
    /// were out of reach.
    fn batch(&mut self, at: u64, ring: &Seen, todo: [u64; 2]) -> Result<(Vec<Burst>, usize)> {
        self.write_scratch(ring, todo)?;
        let (room, fd) = (self.room, self.fd as u64);
        let base = self.calls.scratch().raw();
        let list = List {
            fd,
            room,
            at,
            base,
            calls: Vec::new(),
            bursts: Vec::new(),
        };
        let list = list.fill(self.cpus);
        let unread = distance(ring.word(HEAD), ring.word(TAIL), room.places);
        let list = list.put_back(
            &ring.stretches(ring.word(HEAD).into(), unread),
            self.affinity.len() as u64,
        );
        let answers =
            self.calls
                .batch_holding(room.list, &[&list.calls], self.hold, &mut || Ok(()))?;
        self.check(&list, &answers)?;
        let mut bursts = Vec::new();
        for (n, calls) in list.bursts.iter().enumerate() {
            let made = calls.iter().map(|c| answers[*c].max(0) as u64).sum();
            let mut bytes = vec![0; room.ring as usize];
            let seen = base + room.seen + n as u64 * room.ring;
            self.calls
                .memory()
                .read(ckpt_tracer::RemoteAddr(seen), &mut bytes)?;
            bursts.push(Burst {
                made,
                seen: Seen { bytes },
            });
        }
        let unreached = list.calls.iter().zip(&answers);
        let unreached = unreached.filter(|(call, answer)| list.is_move(call) && **answer < 0);
        Ok((bursts, unreached.count()))
    }

    /// Checks all results. If the memfd could not be created or filled, nothing was submitted.
    fn check(&self, list: &List, answers: &[i64]) -> Result<()> {
        let failed = |call: &Call, errno: i64| {
            Error::Tracer(ckpt_tracer::Error::Remote {
                tid: self.calls.tid(),
                call: call.name,
                errno: Errno::from_raw(-errno as i32),
            })
        };
        for (call, answer) in list.calls.iter().zip(answers) {
            let fine = match call.nr {
                libc::SYS_memfd_create => *answer == list.fd as i64,
                // Offline CPUs, and CPUs outside our cpuset.
                libc::SYS_sched_setaffinity if list.is_move(call) => true,
                libc::SYS_io_submit => {
                    *answer >= 0 || [libc::EAGAIN, libc::EINVAL].contains(&(-*answer as i32))
                }
                libc::SYS_pwrite64 | libc::SYS_pread64 => *answer == call.args[2] as i64,
                _ => *answer >= 0,
            };
            if !fine {
                return Err(failed(call, (*answer).min(0)));
            }
        }
        Ok(())
    }

    fn write_scratch(&self, ring: &Seen, [first, second]: [u64; 2]) -> Result<()> {
        let room = &self.room;
        let base = self.calls.scratch().raw();
        let mut bytes = vec![0u8; room.list as usize];
        let mut put = |at: u64, what: &[u8]| {
            bytes[at as usize..at as usize + what.len()].copy_from_slice(what);
        };
        // data, key and flags, operation and priority, descriptor, buffer, bytes, offset, reserved.
        put(0, &MARK.to_le_bytes());
        put(20, &self.fd.to_le_bytes());
        put(24, &(base + SUCCESSOR).to_le_bytes());
        put(32, &ENTRY.to_le_bytes());
        // Invalid until the first entry has been read.
        put(48, &1u64.to_le_bytes());
        put(OLD_HEAD, &ring.word(HEAD).to_le_bytes());
        put(AFFINITY, self.affinity);
        for (n, cpu) in self.cpus.iter().enumerate() {
            put(
                MASKS + n as u64 * room.mask + u64::from(cpu / 8),
                &[1 << (cpu % 8)],
            );
        }
        for n in 0..room.places {
            put(room.blocks + n * 8, &base.to_le_bytes());
        }
        let entry = |n: u64, last: bool| [n * ENTRY, last.into()].map(u64::to_le_bytes).concat();
        for n in 0..first + second {
            let next = n + 1;
            put(
                room.file + n * ENTRY,
                &entry(next, next == first || next == first + second),
            );
        }
        put(room.file + room.begin, &entry(0, first == 0));
        put(room.file + room.begin + ENTRY, &entry(first, second == 0));
        put(room.events, &ring.bytes);
        self.calls.write_scratch(0, &bytes)?;
        Ok(())
    }
}

/// The calls of a batch.
struct List {
    fd: u64,
    room: Room,
    at: u64,
    base: u64,
    calls: Vec<Call>,
    /// For each burst, the indices of its io_submit calls.
    bursts: Vec<Vec<usize>>,
}

impl List {
    fn call(&mut self, name: &'static str, nr: i64, args: &[u64]) {
        self.calls.push(Call::new(name, nr, args));
    }

    /// Whether a call moves the task to a CPU to be filled.
    fn is_move(&self, call: &Call) -> bool {
        call.nr == libc::SYS_sched_setaffinity && call.args[2] != self.base + AFFINITY
    }

    /// Through the memfd, whose pages exist: a copy that fails would leave a wrong head.
    fn copy(&mut self, to: u64, from: u64, len: u64) {
        let through = self.room.through;
        self.call(
            "pwrite64",
            libc::SYS_pwrite64,
            &[self.fd, from, len, through],
        );
        self.call("pread64", libc::SYS_pread64, &[self.fd, to, len, through]);
    }

    /// Marks all events as consumed.
    fn take_out(&mut self) {
        self.copy(self.at + HEAD, self.at + TAIL, 4);
    }

    /// Sets the control block to the first or second initial entry.
    fn begin(&mut self, which: u64) {
        let from = self.room.begin + which * ENTRY;
        self.call(
            "pread64",
            libc::SYS_pread64,
            &[self.fd, self.base + SUCCESSOR, ENTRY, from],
        );
    }

    fn submit(&mut self) {
        if let Some(burst) = self.bursts.last_mut() {
            burst.push(self.calls.len());
        }
        let args = [self.at, self.room.places, self.base + self.room.blocks];
        self.call("io_submit", libc::SYS_io_submit, &args);
    }

    fn look(&mut self) {
        let to = self.base + self.room.seen + (self.bursts.len() as u64 - 1) * self.room.ring;
        self.copy(to, self.at, self.room.ring);
    }

    fn fill(mut self, cpus: &[u32]) -> Self {
        let (room, base) = (self.room, self.base);
        self.call(
            "memfd_create",
            libc::SYS_memfd_create,
            &[base + NAME, libc::MFD_CLOEXEC.into()],
        );
        self.call(
            "pwrite64",
            libc::SYS_pwrite64,
            &[self.fd, base + room.file, room.file_len, 0],
        );
        self.begin(0);
        self.take_out();
        self.burst(|list| {
            for n in 0..cpus.len() as u64 {
                let mask = base + MASKS + n * room.mask;
                let args = [0, room.mask, mask];
                list.call("sched_setaffinity", libc::SYS_sched_setaffinity, &args);
                list.submit();
            }
        });
        for round in 0..=ROUNDS {
            self.take_out();
            if round == ROUNDS {
                self.begin(1);
            }
            self.burst(List::submit);
        }
        self
    }

    /// Submits one burst and reads the ring before and after. The kernel completes no more requests than there are
    /// places since the events were consumed; but others may have completed between the last read and that.
    fn burst(&mut self, submit: impl FnOnce(&mut Self)) {
        self.bursts.push(Vec::new());
        self.look();
        self.bursts.push(Vec::new());
        submit(self);
        self.look();
    }

    /// Restores the unread events, the head, and the affinity.
    fn put_back(mut self, unread: &[(u64, u64)], affinity: u64) -> Self {
        for (at, len) in unread {
            self.copy(self.at + at, self.base + self.room.events + at, *len);
        }
        self.copy(self.at + HEAD, self.base + OLD_HEAD, 4);
        let args = [0, affinity, self.base + AFFINITY];
        self.call("sched_setaffinity", libc::SYS_sched_setaffinity, &args);
        self.call("close", libc::SYS_close, &[self.fd]);
        self
    }
}
