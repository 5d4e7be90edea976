//! Proves that a context has no request in flight.
//!
//! A context has one place less than its ring has events. A place is in use from the submission of a request until
//! its event is consumed. So if the requests of ours that a context accepts and the events in its ring add up to its
//! places, none is in flight ([`turn`](super::turn) describes the submission). CPUs hold free places in reserve, so
//! requests are submitted on each CPU. An unreachable reserve makes the sum too small, never too large. A task may move to
//! all CPUs of its cpuset, whatever its affinity. The last CPU is one on which the job itself may run: at the end, that CPU
//! has what is in reserve.
//!
//! A sum that is too small by some number means that many in flight: no task submits more while all are stopped, and
//! the tail shows their completion. This precedes the capture of files, since a request may still write to one.

use std::time::{Duration, Instant};

use ckpt_sys::tasks::affinity as affinity_of;
use ckpt_tracer::RemoteAddr;
use ckpt_tracer::proc::limits::read_limits;
use ckpt_tracer::proc::maps::Vma;
use ckpt_tracer::proc::status::read_task;
use ckpt_tracer::proc::tasks;
use ckpt_tracer::remote::{Call, Cave, Hold, RemoteCalls, Scratch, may_ring};
use ckpt_tracer::task::Stopped;

use super::needs::home;
use super::turn::{AFFINITY_ROOM, Room, Turner};
use super::{EVENT, HEAD, Seen, TAIL, distance, is_ring, refused};
use crate::error::{Error, Obstacle, Result};
use crate::job::FrozenJob;
use crate::process::{self, FromOutside};
use crate::source::{Collector, Source};

/// How long to wait for requests.
const PATIENCE: Duration = Duration::from_secs(1);
const NO_DOORBELL: &str = "belongs to a process that catches or blocks SIGURG, SIGWINCH and SIGCHLD, and ignores \
     no other signal, which is not supported";
/// Interval of polling the tail.
const PAUSE: Duration = Duration::from_micros(200);

/// Waits until no context of a frozen job has a request in flight. Returns whether there is any context.
///
/// # Errors
/// [`Error::Refused`] if requests do not complete, or if that cannot be determined.
pub fn settle(job: &mut FrozenJob, outside: &[FromOutside], collector: &Collector) -> Result<bool> {
    let (mut frozen, sources) = job.split();
    let spaces = process::address_spaces(&sources, outside, collector);
    let with_rings = spaces.iter().enumerate();
    let with_rings = with_rings.filter(|(_, (_, vmas))| vmas.iter().any(is_ring));
    let mut any = false;
    for (index, (source, vmas)) in with_rings {
        let cave = Cave::dig(&source.mem, vmas, frozen[index].tasks())?;
        let cave = cave.with_doorbell(frozen[index].tasks());
        let tasks = process::tasks_with_memory_of(index, &mut frozen, &sources, collector);
        settle_process(tasks, &cave, source, vmas)?;
        cave.fill_in()?;
        any = true;
    }
    Ok(any)
}

/// Whether processes share a descriptor table but not memory: one could open a file during a batch, which relies on
/// the table.
fn shares_only_descriptors(collector: &Collector) -> bool {
    let mut shares = collector.shares.values();
    shares.any(|s| s.files && !s.memory)
}

/// Why requests in flight of a process cannot be detected, as seen from outside.
pub fn hides_requests(
    source: &Source,
    vmas: &[Vma],
    collector: &Collector,
) -> Result<Option<Obstacle>> {
    let Some(ring) = vmas.iter().filter(|v| is_ring(v)).max_by_key(|v| v.len()) else {
        return Ok(None);
    };
    let room = Room::of(ring.len(), &super::needs::possible_cpus()?);
    let refuse = |reason: &str, remedy: &str| Ok(Some(refused(source, ring, reason, remedy)));
    // Suspended filters are in force again when we are killed, in the middle of a batch.
    if source.status.seccomp == Some(2) {
        return refuse(
            "belongs to a process with seccomp filters, which is not supported",
            "run the program without seccomp filters, or without native AIO",
        );
    }
    let tasks = tasks::list_tasks(source.pid)?.into_iter();
    let statuses: Vec<_> = tasks
        .filter_map(|tid| read_task(source.pid, tid).ok())
        .collect();
    if !may_ring(statuses.iter().map(|status| &status.signals)) {
        return refuse(
            NO_DOORBELL,
            "let the program neither catch nor block one of them",
        );
    }
    if file_size_limit(source)? < room.file_len {
        let reason = format!(
            "cannot be examined: the process's limit of the file size is below {}",
            room.file_len
        );
        return refuse(&reason, "raise it: prlimit --fsize=unlimited --pid PID");
    }
    if shares_only_descriptors(collector) {
        return refuse(
            "belongs to a job in which processes share descriptors and not their memory, which is not \
             supported",
            "io_destroy it before the checkpoint",
        );
    }
    Ok(None)
}

fn settle_process(
    mut tasks: Vec<&mut Stopped>,
    cave: &Cave<'_>,
    source: &Source,
    vmas: &[Vma],
) -> Result<()> {
    let rings: Vec<&Vma> = vmas.iter().filter(|v| is_ring(v)).collect();
    let cpus = super::needs::possible_cpus()?;
    let largest = rings.iter().map(|r| r.len()).max().unwrap_or(0);
    let affinities: Vec<Vec<u8>> = tasks.iter().map(|t| affinity_of(t.tid().raw())).collect();
    let cpus = home_last(cpus, &affinities);
    let room = Room::of(largest, &cpus);
    let refuse =
        |reason: String, remedy: &str| Error::refuse(refused(source, rings[0], &reason, remedy));
    if tasks.is_empty() {
        let tid = source.pid.leader();
        return Err(ckpt_tracer::Error::Died { tid }.into());
    }
    let leader = tasks.remove(0);
    let taken = vmas.iter().map(|v| (v.start, v.end));
    let scratch =
        crate::holes::find(taken, room.len + Hold::room(tasks.len())).ok_or_else(|| {
            refuse(
                "leaves no free room in the address space".into(),
                "use a smaller ring",
            )
        })?;
    if !cave.has_doorbell() {
        let reason = NO_DOORBELL;
        return Err(refuse(
            reason.into(),
            "let the program neither catch nor block one of them",
        ));
    }
    let memory = Scratch::in_hole(RemoteAddr(scratch), room.len);
    let mut calls = RemoteCalls::begin(leader, cave, memory)?;
    contexts_are_there(&mut calls, source, &rings)?;
    let affinity = affinity(&mut calls)?;
    let fd = next_descriptor(source)?;
    let mut hold = Hold::new(tasks, RemoteAddr(scratch + room.len));
    hold.map(&mut calls)?;
    let mut settled = Ok(());
    for ring in rings {
        let room = Room::of(ring.len(), &cpus);
        let calls = &mut calls;
        let turner = Turner {
            calls,
            room,
            cpus: &cpus,
            affinity: &affinity,
            fd,
            hold: &mut hold,
        };
        settled = settled.and_then(|()| settle_context(turner, source, ring));
    }
    hold.unmap(&mut calls)?;
    calls.finish()?;
    settled
}

/// The CPUs, with the one at the end on which most of the tasks may run; the first task has the first affinity.
fn home_last(mut cpus: Vec<u32>, affinities: &[Vec<u8>]) -> Vec<u32> {
    let masks: Vec<&[u8]> = affinities.iter().map(Vec::as_slice).collect();
    let first = masks.first().copied().unwrap_or_default();
    if let Some(home) = home(&cpus, &masks, first) {
        cpus.retain(|cpu| *cpu != home);
        cpus.push(home);
    }
    cpus
}

/// A forked process has the mapping without a context; submitting nothing detects that.
fn contexts_are_there(calls: &mut RemoteCalls<'_>, source: &Source, rings: &[&Vma]) -> Result<()> {
    for ring in rings {
        let submit = Call::new("io_submit", libc::SYS_io_submit, &[ring.start, 0, 0]);
        if calls.batch(0, &[submit])? != [0] {
            return Err(Error::refuse(refused(
                source,
                ring,
                "is no context of this process: only its mapping came over with a fork",
                "let the program unmap it in the child, or mark it with MADV_DONTFORK before the fork",
            )));
        }
    }
    Ok(())
}

/// The affinity to restore at the end. The kernel remembers what a task requested, and applies it when its cpuset
/// grows (`user_cpus_ptr`, Linux 6.2): a task that may run on its whole cpuset requests all CPUs.
fn affinity(calls: &mut RemoteCalls<'_>) -> Result<Vec<u8>> {
    let (now, all, then) = (0, AFFINITY_ROOM, 2 * AFFINITY_ROOM);
    let base = calls.scratch().raw();
    let everywhere = [0xff; AFFINITY_ROOM as usize];
    calls.write_scratch(all, &everywhere)?;
    let get = |at: u64| {
        let args = [0, AFFINITY_ROOM, base + at];
        Call::new("sched_getaffinity", libc::SYS_sched_getaffinity, &args)
    };
    let set = |at: u64| {
        let args = [0, AFFINITY_ROOM, base + at];
        Call::new("sched_setaffinity", libc::SYS_sched_setaffinity, &args)
    };
    // Bytes past those that the kernel writes are zero: no CPU.
    calls.write_scratch(now, &[0; AFFINITY_ROOM as usize])?;
    calls.write_scratch(then, &[0; AFFINITY_ROOM as usize])?;
    let list = 3 * AFFINITY_ROOM;
    calls.batch_ok(list, &[get(now), set(all), get(then), set(now)])?;
    let now: [u8; AFFINITY_ROOM as usize] = calls.read_scratch(now)?;
    let then: [u8; AFFINITY_ROOM as usize] = calls.read_scratch(then)?;
    Ok(if now == then { everywhere } else { now }.to_vec())
}

fn file_size_limit(source: &Source) -> Result<u64> {
    let limits = read_limits(source.pid)?;
    let of_it = limits
        .iter()
        .find(|l| l.resource as u32 == libc::RLIMIT_FSIZE);
    Ok(of_it.map_or(u64::MAX, |l| l.soft))
}

/// The lowest free number; the job is frozen, so the table does not change.
fn next_descriptor(source: &Source) -> Result<i32> {
    let path = source.dir.join("fd");
    let error = Error::file("look at", &path);
    let mut taken = Vec::new();
    for entry in std::fs::read_dir(&path).map_err(&error)? {
        taken.extend(
            entry
                .map_err(&error)?
                .file_name()
                .to_str()
                .and_then(|n| n.parse::<i32>().ok()),
        );
    }
    Ok((0..).find(|n| !taken.contains(n)).unwrap_or(i32::MAX))
}

fn settle_context(mut turner: Turner<'_, '_>, source: &Source, vma: &Vma) -> Result<()> {
    let begun = Instant::now();
    loop {
        let ring = Seen::read(source, vma).map_err(|o| Error::refuse(*o))?;
        let turned = turner.turn(vma.start, &ring)?;
        if turned.foreign.is_empty() {
            let in_flight = in_flight(&turner, source, vma, turned.free)?;
            put_back_the_rest(source, vma, &ring, in_flight)?;
            let left = wait(source, vma, &ring, in_flight, begun)?;
            return match left {
                0 => Ok(()),
                _ => Err(Error::refuse(unfinished(
                    source,
                    vma,
                    left,
                    turned.unreached,
                ))),
            };
        }
        // They are where they would be without us, before the kernel's tail. But their places count as free until the
        // next turn, which takes them for unread events.
        let places = ring.places();
        let tail = u64::from(ring.word(TAIL));
        for (n, event) in turned.foreign.iter().enumerate() {
            let place = (tail + n as u64) % places;
            source
                .mem
                .write(RemoteAddr(vma.start + (place + 1) * EVENT), event)?;
        }
    }
}

/// Apparent number of requests in flight.
fn in_flight(turner: &Turner<'_, '_>, source: &Source, vma: &Vma, free: u64) -> Result<u64> {
    let all = turner.capacity();
    all.checked_sub(free).ok_or_else(|| {
        let reason = format!(
            "takes {free} requests where {all} were expected: this kernel counts differently"
        );
        let remedy = "io_destroy it before the checkpoint";
        Error::refuse(refused(source, vma, &reason, remedy))
    })
}

/// Restores events that the program had already consumed: they should not be read, but they are its memory. Places to
/// which requests in flight may write are left out.
fn put_back_the_rest(source: &Source, vma: &Vma, ring: &Seen, in_flight: u64) -> Result<()> {
    let (places, tail) = (ring.places(), u64::from(ring.word(TAIL)));
    let unread = distance(ring.word(HEAD), ring.word(TAIL), places);
    let rest = places - unread - in_flight;
    for (at, len) in ring.stretches((tail + in_flight) % places, rest) {
        let bytes = &ring.bytes[at as usize..(at + len) as usize];
        source.mem.write(RemoteAddr(vma.start + at), bytes)?;
    }
    Ok(())
}

/// Waits until the tail has advanced by that many; returns how many are missing after that time.
fn wait(source: &Source, vma: &Vma, ring: &Seen, in_flight: u64, begun: Instant) -> Result<u64> {
    loop {
        let word = source.mem.read_array(RemoteAddr(vma.start + TAIL))?;
        let done = distance(ring.word(TAIL), u32::from_le_bytes(word), ring.places());
        if done >= in_flight {
            return Ok(0);
        }
        if begun.elapsed() > PATIENCE {
            return Ok(in_flight - done);
        }
        std::thread::sleep(PAUSE);
    }
}

fn unfinished(source: &Source, vma: &Vma, left: u64, unreached: usize) -> Obstacle {
    let wait = "let the program wait for them or io_cancel them before the checkpoint; a poll does not end by itself";
    let flying = format!("has requests in flight that do not end ({left})");
    if unreached == 0 {
        return refused(source, vma, &flying, wait);
    }
    let reason = format!(
        "{flying}, or as many of its places are reserved by CPUs that are offline or outside its cpuset"
    );
    let remedy = format!("{wait}; or let its cpuset have all CPUs during the checkpoint");
    refused(source, vma, &reason, &remedy)
}
