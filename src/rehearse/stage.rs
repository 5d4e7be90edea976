//! A rehearsal: restores the job from its image in new namespaces, stopped, and checkpoints the copy for comparison.
//!
//! No code of the copy runs, and its open files are its own ([`private`]).

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use ckpt_image::{Codec, Reader};
use ckpt_sys::channel::Channel;
use ckpt_tracer::fault::{self, Step};
use ckpt_tracer::mem::ProcessMemory;
use ckpt_tracer::{Pid, RemoteAddr};
use serde::{Deserialize, Serialize};

use super::canonical::{Known, canonical};
use super::compare;
use super::{pages, private};
use crate::capture::prove::Rehearsal;
use crate::capture::{self, After};
use crate::error::Difference;
use crate::error::{Error, Obstacle, Result};
use crate::isolate::{self, First, Link, Spec};
use crate::objects::Snapshot;
use crate::objects::cgroup::Policy;
use crate::objects::files::left::Choices;
use crate::objects::namespaces::Namespaces;
use crate::objects::options::{FilesPolicy, Options};
use crate::objects::save_files::SaveFiles;
use crate::objects::sockets::inet;
use crate::objects::sockets::netlink::NetlinkSocket;
use crate::objects::sockets::unix::{Role, UnixSocket};
use crate::progress::Silent;
use crate::restore::{self, ClockPolicy, Placed, Request};
use crate::snapshot;

/// Restores from `image` beside the job, whose processes are `leaving`, and returns the differences of the copy.
/// Nothing is left of the copy.
///
/// Must be called while this process is single-threaded.
///
/// # Errors
/// When a rehearsal is not possible, or the restore fails.
pub(super) fn rehearse(image: &File, name: &Path, leaving: Vec<Pid>) -> Result<Rehearsal> {
    let again = |file: &File| file.try_clone().map_err(failed);
    let reader = Reader::from_file(again(image)?, name)?;
    let job = snapshot::read_unbounded(&reader, name)?;
    let request = Request {
        objects: Options {
            leaving,
            // The substitutes for the job's own files are for the copy only.
            files: FilesPolicy::Adopt,
            ..Options::default()
        },
        stopped: true,
        foreground: false,
        bounded: false,
        clock: ClockPolicy::Host,
        cgroups: Policy::Ignore,
        ..Request::plain(name, &Silent)
    };
    let opened = restore::open_trusted(Reader::from_file(again(image)?, name)?, &request)?;
    let (copy, mut wanted) = (unnamed()?, unnamed()?);
    let told = perform(
        opened.place_in_namespace(),
        &job,
        again(&copy)?,
        again(&wanted)?,
    )?;
    let copy = Reader::from_file(copy, name)?;
    let came_back = snapshot::read_unbounded(&copy, name)?;
    wanted.rewind().map_err(failed)?;
    let mut bytes = Vec::new();
    wanted.read_to_end(&mut bytes).map_err(failed)?;
    let wanted: Snapshot =
        ciborium::from_reader(bytes.as_slice()).map_err(|e| Error::step("compare the copy", e))?;
    let known = Known::of(&job);
    let (mut before, mut after) = (wanted, came_back.clone());
    canonical(&mut before, &known);
    canonical(&mut after, &known);
    let (mut found, spaces) = compare::compare(&before, &after)?;
    found.extend(pages::compare(
        (&job, &reader),
        (&came_back, &copy),
        &spaces,
    )?);
    found.retain(|difference| !is_untold(difference));
    let (forgone, differences): (Vec<_>, Vec<_>) =
        found.into_iter().partition(|d| told.any && is_forgone(d));
    Ok(Rehearsal {
        differences,
        warnings: forgone
            .into_iter()
            .map(|d| format!("at the restore: {d}"))
            .collect(),
    })
}

/// Whether the job's socket has no peer credentials, because the peer has ended or is outside the namespace. A
/// restored connection always has some.
fn is_untold(difference: &Difference) -> bool {
    difference.part == "kind unixsocket peer credentials" && difference.before == compare::NOTHING
}

/// Whether a restore without permission leaves it out, with a warning.
fn is_forgone(difference: &Difference) -> bool {
    const PARTS: [&str; 12] = [
        "autogroup nice",
        "io ports",
        "kind unixsocket options",
        "kind unixsocket peer credentials",
        "limits",
        "login uid",
        "memory dumpable",
        "memory lock future",
        "memory policy",
        "oom score adj",
        "scheduling",
        "security",
    ];
    let part = difference.part.as_str();
    PARTS.iter().any(|of| {
        let rest = part.strip_prefix(of);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
    })
}

/// An obstacle to any rehearsal here, independent of the job.
#[must_use]
pub fn in_the_way() -> Option<Obstacle> {
    let possible = ckpt_tracer::features::namespaces_permitted();
    (!possible).then(|| {
        Obstacle::new(
            "a rehearsal",
            "needs a pid and a mount namespace of its own, for which this system permits you no user namespace",
            "run attach as root, raise user.max_user_namespaces (or what else forbids user namespaces here, such as \
             kernel.apparmor_restrict_unprivileged_userns), or leave --rehearse out",
        )
    })
}

fn failed(error: std::io::Error) -> Error {
    Error::step("prepare the rehearsal", error)
}

/// A nameless file for the second image, freed with its last descriptor.
fn unnamed() -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .mode(0o600)
        .open(std::env::temp_dir());
    file.map_err(failed)
}

/// Messages about the complete copy.
#[derive(Debug, Serialize, Deserialize)]
struct Told {
    /// Whether the restore has warned.
    any: bool,
}

/// Restores the copy in its namespaces, takes its image, and ends it together with them. `wanted` receives the
/// expected snapshot.
fn perform(mut placed: Placed<'_>, job: &Snapshot, copy: File, mut wanted: File) -> Result<Told> {
    const DONE: &str = "the rehearsal is over";
    let mut spec = placed.namespaces()?;
    spec.others.ipc = true;
    spec.network = abstract_names(job)
        || inet::all(job).next().is_some()
        || job
            .descriptions
            .iter()
            .any(|d| d.kind.get::<NetlinkSocket>().is_some());
    let groups = placed.groups_of_the_job().to_vec();
    let (done, told) = Channel::pair().map_err(|e| failed(e.into()))?;
    let root = job.processes[0].pid;
    let stack = job.processes[0].threads[0].regs.rsp;
    let body = move |_: &Link, first: Option<First>| {
        let text = |error: Error| error.to_string();
        placed.restored_inside(first).map_err(text)?;
        let changed = placed.edit(|snapshot| {
            let sockets = private::substitute(snapshot)?;
            Ok((sockets, snapshot::encode(snapshot)))
        });
        let (sockets, bytes) = changed.map_err(text)?;
        wanted
            .write_all(&bytes)
            .map_err(|error| error.to_string())?;
        if fault::hit(Step::RehearseMask).is_err() {
            placed.edit(|snapshot| {
                snapshot.processes[0].threads[0].signal_mask ^= 1 << (libc::SIGUSR2 - 1);
            });
        }
        let restored = restore::restore(&mut placed, &mut |_| {}).map_err(text)?;
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
            is_copy: true,
            progress: &Silent,
        };
        capture::to_stream(&request, copy).map_err(text)?;
        fault::hit(Step::Rehearsed).map_err(|error| error.to_string())?;
        drop(sockets);
        let any = !restored.warnings.is_empty();
        told.send(&Told { any })
            .map_err(|error| error.to_string())?;
        // The end of the first process ends all in its namespace.
        Err(DONE.to_owned())
    };
    let init = match spec.builder {
        None => isolate::start(&spec, body),
        // The copy's first process is not our child, so its end cannot be controlled from outside. So an outer
        // namespace surrounds it, whose first process ends with us, which ends all.
        Some(_) => isolate::start(&Spec::own(), move |_: &Link, _| {
            let inner = isolate::start(&spec, body);
            let ended = inner.and_then(|mut init| init.until_it_runs());
            Err(ended.map_or_else(|error| error.to_string(), |_| DONE.to_owned()))
        }),
    };
    let ended = init.and_then(|mut init| init.until_it_runs().map(drop));
    match (done.receive(), ended) {
        (Ok(told), _) => Ok(told),
        (Err(_), Err(error)) => Err(error),
        (Err(error), Ok(())) => Err(failed(error.into())),
    }
}

/// Whether it has or uses abstract socket names, which belong to a network namespace.
fn abstract_names(job: &Snapshot) -> bool {
    let has = |socket: &UnixSocket| {
        let own = socket.name.as_ref().is_some_and(|n| n.file.is_none());
        own || matches!(&socket.role, Role::Beyond { address } if address.first() == Some(&0))
    };
    job.descriptions
        .iter()
        .any(|d| d.kind.get::<UnixSocket>().is_some_and(has))
}
