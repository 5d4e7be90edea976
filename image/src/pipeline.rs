//! State shared by the threads of a writer: a queue of raw records, and the compressed ones in order.
//!
//! ```text
//! caller ──submit──▶ todo ──workers──▶ done (slots by number) ──writer thread──▶ sink
//!    ▲                                                               │
//!    └───────────── room: fewer than `limit` in flight ◀─────────────┘
//! ```
//!
//! A record is in flight from `submit` until its bytes are in the sink. Only records in flight and the chunk that the
//! caller fills hold buffers, so memory is bounded at any speed of the sink.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::chunk::CHUNK_BYTES;
use crate::codec::{Codec, Encoder, Kind};
use crate::error::{Error, Result, copy_of};
use crate::index::{Record, payload_digest};

/// A record in flight: its header, run table and raw bytes, later its stored bytes.
pub(crate) struct Job {
    pub(crate) record: Record,
    pub(crate) table: Vec<u8>,
    pub(crate) raw: Vec<u8>,
    /// The compressor's output; its first `record.stored_len` bytes are valid unless the record is stored raw.
    pub(crate) out: Vec<u8>,
    /// Whether to compress it.
    pub(crate) packed: bool,
}

impl Job {
    pub(crate) fn stored(&self) -> &[u8] {
        match self.record.codec {
            0 => &self.raw,
            _ => &self.out[..self.record.stored_len.get() as usize],
        }
    }
}

#[derive(Default)]
struct State {
    /// Waiting for a worker, with their slot numbers.
    todo: VecDeque<(u64, Job)>,
    /// Slots from number `written` on; `None` while a worker has the record.
    done: VecDeque<Option<Job>>,
    /// Number of slots assigned.
    submitted: u64,
    /// Slots whose bytes are in the sink.
    written: u64,
    raw_pool: Vec<Vec<u8>>,
    out_pool: Vec<Vec<u8>>,
    /// There will be no more records.
    closed: bool,
    /// The writer is being dropped: stop.
    aborted: bool,
    failure: Option<Failure>,
}

enum Failure {
    Sink(std::io::Error),
    Died,
}

impl State {
    fn stopped(&self) -> bool {
        self.aborted || self.failure.is_some()
    }
}

pub(crate) struct Pipeline {
    state: Mutex<State>,
    /// Signals workers: there is a record, or the end.
    work: Condvar,
    /// Signals the writer thread: the next slot may be done, or the end.
    ready: Condvar,
    /// Signals the caller: a slot was written, or the end.
    room: Condvar,
    limit: u64,
}

impl Pipeline {
    pub(crate) fn new(limit: usize) -> Self {
        Pipeline {
            state: Mutex::default(),
            work: Condvar::new(),
            ready: Condvar::new(),
            room: Condvar::new(),
            limit: limit as u64,
        }
    }

    /// Ignores poisoning: after a panic of one thread a second one must not follow; `failure` reports it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, on: &Condvar, guard: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        on.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }

    /// An empty buffer for raw bytes; blocks while the limit of records is in flight.
    pub(crate) fn buffer(&self) -> Vec<u8> {
        let mut state = self.lock();
        while !state.stopped() && state.submitted - state.written >= self.limit {
            state = self.wait(&self.room, state);
        }
        let raw = state.raw_pool.pop();
        drop(state);
        raw.unwrap_or_else(|| Vec::with_capacity(CHUNK_BYTES))
    }

    pub(crate) fn submit(&self, job: Job) -> Result<()> {
        let mut state = self.lock();
        check(&state)?;
        let slot = state.submitted;
        state.submitted += 1;
        state.todo.push_back((slot, job));
        state.done.push_back(None);
        drop(state);
        self.work.notify_one();
        Ok(())
    }

    /// Takes back an unused buffer.
    pub(crate) fn recycle(&self, raw: Vec<u8>) {
        recycle(&mut self.lock(), raw, Vec::new());
    }

    /// Marks the end of the records.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.notify_all();
    }

    pub(crate) fn abort(&self) {
        self.lock().aborted = true;
        self.notify_all();
    }

    pub(crate) fn check(&self) -> Result<()> {
        check(&self.lock())
    }

    pub(crate) fn fail(&self, error: std::io::Error) {
        self.lock().failure.get_or_insert(Failure::Sink(error));
        self.notify_all();
    }

    fn notify_all(&self) {
        self.work.notify_all();
        self.ready.notify_all();
        self.room.notify_all();
    }

    /// Main function of a compressing thread.
    pub(crate) fn work(&self, codec: Codec) {
        let _guard = ReportPanic(self);
        let mut encoder = Encoder::new(codec);
        let mut state = self.lock();
        loop {
            if state.stopped() {
                return;
            }
            let Some((slot, mut job)) = state.todo.pop_front() else {
                if state.closed {
                    return;
                }
                state = self.wait(&self.work, state);
                continue;
            };
            job.out = if codec == Codec::None {
                Vec::new()
            } else {
                state.out_pool.pop().unwrap_or_default()
            };
            drop(state);
            compress(&mut encoder, codec, &mut job);
            state = self.lock();
            let place = (slot - state.written) as usize;
            state.done[place] = Some(job);
            if place == 0 {
                self.ready.notify_one();
            }
        }
    }

    /// The next record in order; `None` at the end and after a failure.
    pub(crate) fn next_done(&self) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if state.stopped() || (state.closed && state.done.is_empty()) {
                return None;
            }
            if let Some(job) = state.done.front_mut().and_then(Option::take) {
                return Some(job);
            }
            state = self.wait(&self.ready, state);
        }
    }

    /// Returns the buffers of the record from [`Pipeline::next_done`], whose bytes are now in the sink.
    pub(crate) fn written(&self, job: Job) {
        let mut state = self.lock();
        state.done.pop_front();
        state.written += 1;
        recycle(&mut state, job.raw, job.out);
        drop(state);
        self.room.notify_one();
    }
}

fn check(state: &State) -> Result<()> {
    match &state.failure {
        Some(Failure::Sink(error)) => Err(Error::Sink {
            source: copy_of(error),
        }),
        Some(Failure::Died) => Err(Error::WriterDied),
        None => Ok(()),
    }
}

/// Buffers larger than usual are not kept.
fn recycle(state: &mut State, mut raw: Vec<u8>, out: Vec<u8>) {
    raw.clear();
    if raw.capacity() > 0 && raw.capacity() <= 2 * CHUNK_BYTES {
        state.raw_pool.push(raw);
    }
    // Keeps its length, so that it is zeroed only once.
    if !out.is_empty() && out.len() <= 2 * CHUNK_BYTES {
        state.out_pool.push(out);
    }
}

fn compress(encoder: &mut Encoder, codec: Codec, job: &mut Job) {
    let bound = encoder.bound(job.raw.len());
    if job.out.len() < bound {
        job.out.resize(bound, 0);
    }
    let encoded = match job.packed {
        true => encoder.encode(&job.raw, &mut job.out[..bound]),
        false => None,
    };
    match encoded {
        Some(stored) => {
            job.record.codec = codec.kind() as u8;
            job.record.stored_len.set(stored as u32);
        }
        None => {
            job.record.codec = Kind::None as u8;
            job.record.stored_len.set(job.raw.len() as u32);
        }
    }
    job.record.digest = payload_digest(job.stored());
}

/// Reports a panic of its thread, so that the others do not wait for it.
pub(crate) struct ReportPanic<'a>(pub(crate) &'a Pipeline);

impl Drop for ReportPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().failure.get_or_insert(Failure::Died);
            self.0.notify_all();
        }
    }
}
