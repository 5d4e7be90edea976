//! A rehearsal: the job comes back from its image in namespaces of its own, stopped, and is looked at by a
//! checkpoint of its own, as the job was.
//!
//! Nothing of the copy's code runs, and the plan of a restore writes to no file that has a name. What a
//! restore has to touch that the job uses at that moment, no namespace keeps apart, so such jobs are
//! refused ([`in_the_way`]). Locks are not taken.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use ckpt_image::{Codec, Reader};
use ckpt_tracer::fault::{self, Step};
use ckpt_tracer::mem::ProcessMemory;
use ckpt_tracer::{Pid, RemoteAddr};

use super::canonical::{Known, canonical};
use super::compare::{self, Difference};
use super::pages;
use crate::capture::save_files::SaveFiles;
use crate::capture::{self, After};
use crate::error::{Error, Obstacle, Result};
use crate::isolate::{self, First, Link};
use crate::objects::Snapshot;
use crate::objects::cgroup::Policy;
use crate::objects::files::Kind;
use crate::objects::files::left::Choices;
use crate::objects::files::lock::LockKind;
use crate::objects::namespaces::Namespaces;
use crate::progress::Silent;
use crate::restore::clock::ClockPolicy;
use crate::restore::{self, Opened, Request, pids};
use crate::snapshot;

/// Restores from `image` beside the job, whose processes are `leaving`, and answers in what the copy differs.
/// Nothing is left of it.
///
/// To be called while this process has one thread.
///
/// # Errors
/// When there can be no rehearsal, or the restore fails.
pub(super) fn rehearse(image: &File, name: &Path, leaving: Vec<Pid>) -> Result<Vec<Difference>> {
    let again = |file: &File| file.try_clone().map_err(failed);
    let reader = Reader::from_file(again(image)?, name)?;
    let mut job = snapshot::read(&reader, name)?;
    let obstacles = in_the_way(&job);
    if !obstacles.is_empty() {
        return Err(Error::Refused(obstacles));
    }
    let request = Request {
        leaving,
        stopped: true,
        foreground: false,
        clock: ClockPolicy::Host,
        cgroups: Policy::Ignore,
        fds: outside(&job).map(|fd| (fd, "/dev/null".into())).collect(),
        ..Request::plain(name, &Silent)
    };
    let mut opened = restore::open_to_rehearse(Reader::from_file(again(image)?, name)?, &request)?;
    if fault::hit(Step::RehearseMask).is_err() {
        opened.another_mask();
    }
    let copy = unnamed()?;
    perform(opened, &job, again(&copy)?)?;
    let copy = Reader::from_file(copy, name)?;
    let mut came_back = snapshot::read(&copy, name)?;
    let (stored, stored_again) = (job.clone(), came_back.clone());
    let known = Known::of(&job);
    canonical(&mut job, &known);
    canonical(&mut came_back, &known);
    let (mut found, spaces) = compare::compare(&job, &came_back)?;
    found.extend(pages::compare(
        (&stored, &reader),
        (&stored_again, &copy),
        &spaces,
    )?);
    Ok(found)
}

/// Descriptors for things outside of the job that `restore` would have to be told of.
fn outside(job: &Snapshot) -> impl Iterator<Item = i32> + '_ {
    let numbers = |index: usize| {
        let fds = job.processes.iter().flat_map(|p| &p.fds);
        fds.filter(move |e| e.description == index).map(|e| e.fd)
    };
    let outside = job.descriptions.iter().enumerate();
    outside
        .filter(|(_, d)| matches!(d.kind, Kind::Outside(_)))
        .filter(move |(index, _)| !numbers(*index).any(|fd| fd <= 2))
        .filter_map(move |(index, _)| numbers(index).next())
}

fn failed(error: std::io::Error) -> Error {
    Error::Restore(format!("cannot prepare the rehearsal: {error}"))
}

/// A file for the second image that goes with the last descriptor of it.
fn unnamed() -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .mode(0o600)
        .open(std::env::temp_dir());
    file.map_err(failed)
}

/// Restores the copy in its namespaces, takes its image, and ends it with them.
fn perform(mut opened: Opened<'_>, job: &Snapshot, copy: File) -> Result<()> {
    const DONE: &str = "the rehearsal is over";
    let mut spec = pids::namespaces(&opened)?;
    if let Some(owner) = &spec.owner {
        opened.restored_by(owner);
    }
    spec.others.ipc = true;
    spec.network = abstract_names(job);
    let groups = opened.groups_of_the_job().to_vec();
    let (mut done, mut told) = UnixStream::pair().map_err(failed)?;
    let root = job.processes[0].pid;
    let stack = job.processes[0].threads[0].regs.rsp;
    let init = isolate::start(&spec, move |_: &mut Link, first: Option<First>| {
        opened.restored_inside(first);
        let text = |error: Error| error.to_string();
        pids::keep_clear(&opened).map_err(text)?;
        restore::restore(&mut opened, &mut |_| {}).map_err(text)?;
        if fault::hit(Step::RehearsePage).is_err() {
            let mem = ProcessMemory::open(Pid(root)).map_err(|error| error.to_string())?;
            let written = mem.write(RemoteAddr(stack), &[0x5a; 8]);
            written.map_err(|error| error.to_string())?;
        }
        let request = capture::Request {
            pid: Pid(root),
            guard: None,
            adopted: Vec::new(),
            namespaces: Namespaces {
                ipc: true,
                ..Namespaces::default()
            },
            groups,
            codec: Codec::Lz4,
            after: After::Continue,
            save_files: SaveFiles::new(Vec::new()),
            bundle: false,
            choices: Choices::default(),
            frozen_groups: None,
            check: false,
            prover: None,
            rehearse: false,
            progress: &Silent,
        };
        capture::to_stream(&request, copy).map_err(text)?;
        told.write_all(b"!").map_err(|error| error.to_string())?;
        // Its end is that of all in its namespace.
        Err(DONE.to_owned())
    });
    let ended = init.and_then(|mut init| init.until_it_runs().map(drop));
    match (done.read_exact(&mut [0]), ended) {
        (Ok(()), _) => Ok(()),
        (Err(_), Err(error)) => Err(error),
        (Err(error), Ok(())) => Err(failed(error)),
    }
}

fn abstract_names(job: &Snapshot) -> bool {
    job.descriptions.iter().any(|d| match &d.kind {
        Kind::UnixSocket(socket) => socket.name.as_ref().is_some_and(|n| n.file.is_none()),
        _ => false,
    })
}

/// What a copy beside the job would take from it or give to it.
fn in_the_way(job: &Snapshot) -> Vec<Obstacle> {
    /// What opening and closing a file tells those who watch it.
    const OPENING: u32 = libc::IN_ACCESS | libc::IN_OPEN | libc::IN_CLOSE;
    let reason = |kind: &Kind| match kind {
        Kind::Fifo(_) => Some("is a FIFO, whose bytes the job and its copy would have together"),
        Kind::UnixSocket(socket) if socket.name.as_ref().is_some_and(|n| n.file.is_some()) => {
            Some("is a socket with a path, which its copy would take from it")
        }
        Kind::MessageQueue(queue) if !queue.unlinked && queue.held > 0 => {
            Some("is a message queue, whose messages cannot be read without taking them")
        }
        Kind::Inotify(inotify) if inotify.watches.iter().any(|w| w.mask & OPENING != 0) => {
            Some("watches how files are opened, as its copy would do")
        }
        Kind::Fanotify(_) => Some("is told of what its copy would do"),
        _ => None,
    };
    let descriptions = job.descriptions.iter().enumerate();
    let found = descriptions.filter_map(|(index, d)| {
        let lease = d.locks().iter().any(|l| l.kind == LockKind::Lease);
        let lease = lease.then_some("holds a lease, which its copy would break");
        let reason = lease.or_else(|| reason(&d.kind))?;
        let of = job.processes.iter().find_map(|process| {
            let entry = process.fds.iter().find(|e| e.description == index)?;
            Some(format!("fd {} of process {}", entry.fd, process.pid))
        });
        let object = of.unwrap_or_else(|| "a file in flight".into());
        let reason = format!("cannot be rehearsed: it {reason}");
        let remedy = "leave --rehearse out; --kill still checks that nothing stands in the way";
        Some(Obstacle::new(object, reason, remedy))
    });
    found.collect()
}
