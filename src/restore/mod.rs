//! An image becomes a running job: the plan, and its execution.
//!
//! Everything that can be checked is checked before a process exists: the image's metadata,
//! the machine, the files, the pid. Then a process is created that executes the job's own
//! executable and is stopped before its first instruction ([`spawn`]), and the plan
//! ([`planner`]) is executed in it ([`driver`]).

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use ckpt_image::{Arch, Reader};
use ckpt_tracer::proc::status::read_status;
use ckpt_tracer::{Pid, Tid};

use crate::error::{Error, Obstacle, Result};
use crate::host;
use crate::objects::credentials::{self, Credentials};
use crate::objects::files::changed::Cut;
use crate::objects::files::inotify::Overflows;
use crate::objects::{Snapshot, ipc, scheduling};
use crate::progress::Progress;
use crate::snapshot;
use planner::Job;
use put::PutFiles;
use terminal::Wish;

pub mod births;
mod build;
pub mod clock;
pub mod contents;
pub mod driver;
pub mod env;
mod executor;
pub mod fill;
mod handover;
pub mod paths;
pub mod pids;
pub mod plan;
pub mod planner;
pub mod pty;
pub mod put;
pub mod spawn;
pub mod stop;
pub mod terminal;
pub mod terminals;

/// What to do with files that are not as they were at the checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FilesPolicy {
    /// Refuse, naming the file and what changed.
    #[default]
    Strict,
    /// Take what is there.
    Adopt,
    /// As strict, and files that the job writes lose what was appended after the checkpoint.
    Truncate,
}

/// A wish for a restore.
pub struct Request<'a> {
    /// The image.
    pub image: &'a Path,
    /// About changed files.
    pub files: FilesPolicy,
    /// Where the job's paths lead now (`--map-path OLD=NEW`).
    pub map_paths: Vec<paths::Mapping>,
    /// About files whose contents the image holds.
    pub put_files: PutFiles,
    /// About the clocks that differ from boot to boot.
    pub clock: clock::ClockPolicy,
    /// Descriptors that get another file than they had (`--fd N=PATH`).
    pub fds: BTreeMap<i32, PathBuf>,
    /// Whoever has the image is trusted, as only root may say.
    pub any_owner: bool,
    /// Leave the job stopped, for a debugger.
    pub stopped: bool,
    /// The caller waits for the job: a job that led its process group gets the terminal.
    pub foreground: bool,
    /// Who is told how far it is.
    pub progress: &'a dyn Progress,
}

/// A restored job: its root is a child of the caller.
#[derive(Debug)]
pub struct Restored {
    /// The root's pid.
    pub pid: i32,
    /// What could not be brought back exactly, without harm to the job (a hard limit, say);
    /// one sentence each.
    pub warnings: Vec<String>,
    /// The master of the job's terminal, when that is a new one.
    pub master: Option<OwnedFd>,
}

/// An image that was read, and that can be restored as far as it and the machine are concerned.
pub struct Opened<'a> {
    request: &'a Request<'a>,
    image: Reader,
    snapshot: Snapshot,
    /// Our supplementary groups; in a user namespace the kernel does not show them.
    groups: Vec<u32>,
}

impl Opened<'_> {
    /// The work is done by that one.
    pub fn restored_by(&mut self, owner: &crate::isolate::Owner) {
        self.groups = owner.groups.clone();
    }
}

/// The plans as text, one operation a line. Touches nothing.
pub fn dry_run(opened: &mut Opened<'_>) -> Result<String> {
    clock::foresee(opened.request.clock, &mut opened.snapshot.host)?;
    let Opened {
        request,
        image,
        snapshot,
        groups,
    } = &*opened;
    ipc::refuse(snapshot, request)?;
    let job = Job::new(snapshot, image, request, host_state(groups)?).map_err(Error::Refused)?;
    let mut text = String::new();
    if let Some(warning) = put::warning(request.put_files, snapshot) {
        text.push_str(&format!("# warning: {warning}\n"));
    }
    for put in put::decide(snapshot, image, request.put_files)? {
        text.push_str(&format!("# {}\n", put.describe()));
    }
    for cut in Cut::all(snapshot, request).map_err(Error::Refused)? {
        text.push_str(&format!("# {}\n", cut.describe()));
    }
    for (index, process) in snapshot.processes.iter().enumerate() {
        let planned = job.plan(index, &[], None).map_err(Error::Refused)?;
        if snapshot.processes.len() > 1 {
            text.push_str(&format!("# process {}\n", process.pid));
        }
        for warning in &planned.plan.warnings {
            text.push_str(&format!("# warning: {warning}\n"));
        }
        text.push_str(&planned.plan.to_text());
    }
    Ok(text)
}

/// Restores; `lend` is told what the job wants of our terminal, if it shall have it, when it is
/// complete and about to be let go. On error no process is left behind.
pub fn restore(opened: &mut Opened<'_>, lend: &mut dyn FnMut(Option<Wish>)) -> Result<Restored> {
    clock::enter(opened.request.clock, &mut opened.snapshot.host)?;
    let Opened {
        request,
        image,
        snapshot,
        groups,
    } = &*opened;
    let job = Job::new(snapshot, image, request, host_state(groups)?).map_err(Error::Refused)?;
    // First plans find what stands in the way, before anything exists.
    let mut obstacles = Vec::new();
    let mut inherit = Vec::new();
    for index in 0..snapshot.processes.len() {
        match job.draft(index) {
            Ok(plan) if index == 0 => inherit = plan.inherit,
            Ok(_) => {}
            Err(more) => obstacles.extend(more),
        }
    }
    obstacles.extend(pids::taken(&pids::ids(snapshot, &job.births)));
    obstacles.extend(credentials::obstacles(snapshot, &job.host.credentials));
    let puts = refused_or(
        put::decide(snapshot, image, request.put_files),
        &mut obstacles,
    )?;
    let cuts = Cut::all(snapshot, request).map_err(Error::Refused);
    let cuts = refused_or(cuts, &mut obstacles)?;
    if !obstacles.is_empty() {
        return Err(Error::Refused(obstacles));
    }
    ipc::refuse(snapshot, request)?;
    let put_back = put::put(&puts, image)?;
    let objects = ipc::Prepared::new(snapshot, image, request)?;
    let root = &snapshot.processes[0];
    let ptys = pty::Ptys::make(snapshot, &job.terminals)?;
    let descriptors = contents::open_all(&inherit, snapshot, image, &ptys)?;
    let mut overflows = Some(Overflows::of(&inherit, &descriptors, snapshot)?);
    let lost = ptys.warnings.clone();
    let master = ptys.finish(snapshot)?;
    let executable = contents::executable(root.memory.executable, snapshot, image)?;
    // Processes of the job that lose their parents become ours.
    crate::supervise::adopt_orphans();
    let (mut brood, leader) = spawn::spawn(root, &executable, descriptors)?;
    let last = &mut || {
        overflows.take().map_or(Ok(()), Overflows::make)?;
        let ours = request.foreground && master.is_none() && root.session != root.pid;
        lend(ours.then(|| Wish::of(snapshot, &job.terminals)));
        Ok(())
    };
    let mut warnings = driver::rebuild(&job, image, &cuts, &mut brood, leader, last)?;
    warnings.extend(lost);
    brood.keep();
    warnings.extend(objects.keep());
    warnings.extend(put::warning(request.put_files, snapshot));
    warnings.extend(put_back.keep());
    Ok(Restored {
        pid: root.pid,
        warnings,
        master,
    })
}

/// Collects a refusal with the others.
fn refused_or<T: Default>(result: Result<T>, obstacles: &mut Vec<Obstacle>) -> Result<T> {
    match result {
        Err(Error::Refused(more)) => {
            obstacles.extend(more);
            Ok(T::default())
        }
        other => other,
    }
}

/// Reads an image, and checks what can be checked of it and the machine.
///
/// # Errors
/// What is wrong with it, and what this machine lacks.
pub fn open<'a>(request: &'a Request<'a>) -> Result<Opened<'a>> {
    let image = open_own(request)?;
    image.require_arch(Arch::native())?;
    let mut snapshot = snapshot::read(&image, request.image)?;
    let faults = crate::inspect::references::check(&snapshot, &image);
    if let Some(fault) = faults.into_iter().next() {
        return Err(Error::Metadata {
            path: request.image.to_owned(),
            what: fault,
        });
    }
    refuse_other_machine(&snapshot)?;
    paths::apply(&request.map_paths, &mut snapshot).map_err(Error::Refused)?;
    put::forget(request.put_files, &mut snapshot);
    Ok(Opened {
        request,
        image,
        snapshot,
        groups: read_status(Pid(std::process::id() as i32))?.groups,
    })
}

/// What is in an image runs with the ids that are in it, so whoever wrote it must be ourselves, or
/// trusted by root.
fn open_own(request: &Request<'_>) -> Result<Reader> {
    let image = Reader::open(request.image)?;
    let path = request.image;
    let owner = std::fs::metadata(path).map(|meta| std::os::unix::fs::MetadataExt::uid(&meta));
    let me = nix::unistd::geteuid();
    match owner {
        Ok(owner) if owner != me.as_raw() && !(me.is_root() && request.any_owner) => {
            let remedy = match me.is_root() {
                true => "if you trust whoever wrote it, restore it with --any-owner",
                false => "if you trust whoever wrote it as yourself, make a copy that is yours",
            };
            Err(Error::refuse(Obstacle::new(
                format!("the image {}", path.display()),
                format!("belongs to uid {owner} and you are uid {me}"),
                remedy,
            )))
        }
        _ => Ok(image),
    }
}

/// What the processor and the kernel must have in common with those of the checkpoint.
fn refuse_other_machine(snapshot: &Snapshot) -> Result<()> {
    let was = &snapshot.host;
    let mut obstacles = Vec::new();
    let now = ckpt_tracer::features::KernelFeatures::probe().cpu.xcr0;
    let missing = was.xcr0 & !now;
    if missing != 0 {
        obstacles.push(Obstacle::new(
            "the job",
            format!(
                "may use processor state that this machine does not have ({})",
                component_names(missing)
            ),
            "restore it on a machine with the same or a newer processor",
        ));
    }
    let uses_vdso = snapshot.processes.iter().any(|p| {
        use crate::objects::memory::{Backing, KernelMapping};
        p.memory
            .mappings
            .iter()
            .any(|m| m.backing == Backing::Kernel(KernelMapping::Vdso))
    });
    if uses_vdso && was.vdso_digest != host::vdso_digest() {
        obstacles.push(Obstacle::new(
            "the job",
            format!(
                "was checkpointed on kernel {} with another vDSO, which is not supported yet",
                was.kernel
            ),
            "restore it on a machine with that kernel",
        ));
    }
    if obstacles.is_empty() {
        Ok(())
    } else {
        Err(Error::Refused(obstacles))
    }
}

/// Names of xsave components (Intel SDM volume 1, chapter 13).
fn component_names(bits: u64) -> String {
    const NAMES: &[(u64, &str)] = &[
        (1 << 1, "SSE"),
        (1 << 2, "AVX"),
        (3 << 3, "MPX"),
        (7 << 5, "AVX-512"),
        (1 << 9, "protection keys"),
        (3 << 17, "AMX"),
    ];
    let names: Vec<&str> = NAMES
        .iter()
        .filter(|(mask, _)| bits & mask != 0)
        .map(|(_, name)| *name)
        .collect();
    if names.is_empty() {
        format!("components {bits:#x}")
    } else {
        names.join(", ")
    }
}

/// What the new process will have from us before the plan sets anything.
fn host_state(groups: &[u32]) -> Result<plan::HostState> {
    const CAP_SYS_RESOURCE: u64 = 1 << 24;
    let me = Pid(std::process::id() as i32);
    let status = read_status(me)?;
    let mut credentials = Credentials::of(&status, own_securebits());
    credentials.groups = groups.to_vec();
    // Exec by root gives all permitted capabilities; by others, none but the ambient ones.
    if status.uid.effective == 0 {
        credentials.permitted = status.capabilities.bounding;
        credentials.effective = status.capabilities.bounding;
    } else {
        credentials.permitted = status.capabilities.ambient;
        credentials.effective = status.capabilities.ambient;
    }
    Ok(plan::HostState {
        scheduling: scheduling::capture(Tid(me.raw()), 0),
        may_raise_limits: status.capabilities.effective & CAP_SYS_RESOURCE != 0,
        credentials,
    })
}

#[allow(unsafe_code)]
fn own_securebits() -> u32 {
    // SAFETY: a call without pointers.
    unsafe { libc::prctl(libc::PR_GET_SECUREBITS, 0, 0, 0, 0) }.max(0) as u32
}
