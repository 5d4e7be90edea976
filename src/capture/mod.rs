//! A live job becomes an image: the order of the work, and the freeze window.
//!
//! 1. Everything that stands in the way is looked for, from outside; the job runs.
//! 2. The place for the image is opened; the job runs.
//! 3. Freeze. State is captured, then the pages are read; compression and writing go on beside.
//! 4. Thaw (or not, see [`After`]).
//! 5. The metadata is written and the image is committed.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ckpt_image::{Codec, Header, ImageFile, Writer, WriterOptions};
use ckpt_tracer::fault::{self, Step};
use ckpt_tracer::kcmp;
use ckpt_tracer::proc::maps::Vma;
use ckpt_tracer::proc::pagemap::PagemapScanner;
use ckpt_tracer::proc::status::{read_status, read_task};
use ckpt_tracer::proc::{ProcRoot, tasks};
use ckpt_tracer::remote::withdraw_dispatch;
use ckpt_tracer::{Pid, Tid};

use crate::error::{Error, Obstacle, Result};
use crate::guard::door::Door;
use crate::host;
use crate::objects::births;
use crate::objects::cgroup::freezer::{Thawable, Thawed};
use crate::objects::cgroup::settings;
use crate::objects::files::left::Choices;
use crate::objects::ipc::{self, notice};
use crate::objects::job::FrozenJob;
use crate::objects::landlock::{self, Bystanders};
use crate::objects::namespaces::Namespaces;
use crate::objects::outsiders::process_name;
use crate::objects::process::{self, FromOutside, InJob, Process, Statuses};
use crate::objects::seccomp::surroundings::Surroundings;
use crate::objects::{Snapshot, SpaceId, aio, zombie};
use crate::progress::Progress;
use crate::snapshot;
use prove::Prove;

mod borrow;
pub mod bundle;
pub mod check;
mod cow;
mod end;
pub mod pages;
pub mod prove;
pub mod seen;
mod stored;

use crate::objects::save_files::SaveFiles;
use crate::objects::source::{Collector, Patience, Source};
use bundle::Bundle;
use end::kill;
use pages::PageSink;
use seen::{assemble, without_pages};
use stored::write_pages;

/// What becomes of the job after its checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum After {
    /// It goes on.
    #[default]
    Continue,
    /// It is left stopped, as by SIGSTOP, once the image is complete and synced.
    Stop,
    /// It is killed, once the image is complete and synced.
    Kill,
}

/// A wish for a checkpoint.
pub struct Request<'a> {
    /// The process: it and all that descend from it are the job.
    pub pid: Pid,
    /// The way to its guard, if it has one.
    pub guard: Option<&'a Door>,
    /// Further processes that belong to the job with their descendants, though another process
    /// has adopted them.
    pub adopted: Vec<Pid>,
    /// What it has to itself, as seen from outside of that.
    pub namespaces: Namespaces,
    /// Its supplementary groups as they are outside, if it has a user namespace to itself.
    pub groups: Vec<u32>,
    /// How pages are compressed.
    pub codec: Codec,
    /// What becomes of the job.
    pub after: After,
    /// Open files whose contents go into the image.
    pub save_files: SaveFiles,
    /// Programs, libraries and files that the job only reads go into the image as well.
    pub bundle: bool,
    /// Whether anything stands in the way of a restore is looked at before the image has its name.
    pub check: bool,
    /// Looks at the image.
    pub prover: Option<&'a dyn Prove>,
    /// The job is restored from the image in namespaces of its own, and compared, before anything else.
    pub rehearse: bool,
    /// It is such a copy: what goes with its IPC namespace is not missed.
    pub is_copy: bool,
    /// Descriptors that do not go into the image.
    pub choices: Choices,
    /// The job's frozen control groups, to be thawed for the checkpoint.
    pub frozen_groups: Option<Thawable>,
    /// Who is told how far it is.
    pub progress: &'a dyn Progress,
}

impl Request<'_> {
    /// The root of the job, and what was adopted.
    fn roots(&self) -> Vec<Pid> {
        let mut roots = vec![self.pid];
        roots.extend(&self.adopted);
        roots
    }

    /// Nothing stands in the way of a restore from that image but what an option of `restore` settles,
    /// which is told.
    fn prove(&self, image: &File, name: &Path) -> Result<Vec<String>> {
        let Some(prover) = self.prover else {
            return Ok(Vec::new());
        };
        let mut told = Vec::new();
        if self.check {
            let found = prover.obstacles(image, name)?;
            // What a job that goes on has done to its files since, it will go on doing.
            let runs = self.after == After::Continue;
            let (notes, obstacles): (Vec<_>, Vec<_>) =
                found.into_iter().partition(|o| o.by_option || runs);
            if !obstacles.is_empty() {
                return Err(Error::NotRestorable(obstacles));
            }
            told.extend(notes.iter().map(seen::note));
        }
        if self.rehearse {
            let found = prover.rehearsal(image, name)?;
            if !found.differences.is_empty() {
                return Err(Error::Differs(found.differences));
            }
            told.extend(found.warnings);
        }
        Ok(told)
    }
}

/// What a checkpoint was.
#[derive(Clone, Debug)]
pub struct Report {
    /// The process's name.
    pub name: String,
    /// Its pid.
    pub pid: i32,
    /// Processes in the image.
    pub processes: u32,
    /// Threads in the image.
    pub threads: u32,
    /// Bytes of memory in the image, before compression.
    pub memory_bytes: u64,
    /// Bytes of the image.
    pub image_bytes: u64,
    /// Time in all.
    pub total: Duration,
    /// Time during which the job's tasks did not run.
    pub paused: Duration,
    /// The image, unless it went to a pipe.
    pub path: Option<PathBuf>,
    /// What the user should know of a checkpoint that succeeded, one sentence each.
    pub warnings: Vec<String>,
}

/// Checkpoints into a file: complete and synced when this returns, or not there at all.
pub fn to_file(request: &Request<'_>, path: &Path) -> Result<Report> {
    let begun = Instant::now();
    refuse_obstacles(request)?;
    let file = ImageFile::create(path)?;
    let commit = |file: ImageFile| {
        let told = request.prove(file.file(), path)?;
        fault::hit(Step::BeforeSync)?;
        file.sync()?;
        fault::hit(Step::BeforeRename)?;
        file.commit()?;
        Ok(told)
    };
    let complete = |_: &Snapshot, _: &Header| Ok(Vec::new());
    let report = checkpoint(request, begun, file, complete, commit);
    let report = report.map_err(|error| named(error, path))?;
    Ok(Report {
        path: Some(path.to_owned()),
        ..report
    })
}

/// The writer does not know where its bytes go, but whoever reads the message has to.
fn named(error: Error, path: &Path) -> Error {
    match error {
        Error::Image(ckpt_image::Error::Sink { source }) => Error::Image(ckpt_image::Error::Io {
            path: path.to_owned(),
            action: "write the image",
            source,
        }),
        other => other,
    }
}

/// Checkpoints into a stream. With [`After::Stop`] and [`After::Kill`] "complete" means that
/// everything was written without error, and what is looked at before is an image without pages: if
/// something stands in the way of its restore, the stream ends before it is an image.
pub fn to_stream(request: &Request<'_>, sink: impl Write + Send + 'static) -> Result<Report> {
    let begun = Instant::now();
    refuse_obstacles(request)?;
    let complete = |snapshot: &Snapshot, header: &Header| match request.prover {
        Some(_) => request.prove(&without_pages(snapshot, header)?, Path::new("(stream)")),
        None => Ok(Vec::new()),
    };
    checkpoint(request, begun, sink, complete, |mut sink| {
        let flushed = sink.flush().map_err(|source| Error::File {
            what: "write",
            path: "the image to the pipe".into(),
            source,
        });
        flushed.map(|()| Vec::new())
    })
}

fn refuse_obstacles(request: &Request<'_>) -> Result<()> {
    let obstacles =
        crate::capture::check::obstacles_at_a_glance(&request.roots(), &request.choices)?;
    if obstacles.is_empty() {
        Ok(())
    } else {
        let found = Error::Refused(obstacles);
        // The frozen job will tell.
        if found.is_passing() {
            Ok(())
        } else {
            Err(found)
        }
    }
}

/// `complete` is called with the snapshot before it is written, `commit` with the whole image; both
/// answer what the user should know.
fn checkpoint<W: Write + Send + 'static>(
    request: &Request<'_>,
    begun: Instant,
    sink: W,
    complete: impl FnOnce(&Snapshot, &Header) -> Result<Vec<String>>,
    commit: impl FnOnce(W) -> Result<Vec<String>>,
) -> Result<Report> {
    crate::objects::limits::raise_descriptor_limit();
    let header = host::image_header(&Source::open(request.pid)?)?;
    let options = WriterOptions {
        codec: request.codec,
        threads: 0,
    };
    let mut writer = Writer::new(sink, &header, options)?;

    let mut attempts = 0;
    let mut frozen_at;
    let mut paused_before = Duration::ZERO;
    let (frozen, sources, mut captured) = loop {
        frozen_at = Instant::now();
        let patience = if attempts < ATTEMPTS && paused_before < MOST_PAUSED {
            Patience::Some
        } else {
            Patience::None
        };
        if let Some(guard) = request.guard {
            guard.leave(request.pid)?;
        }
        match freeze_and_capture(request, patience) {
            Err(e) if e.is_passing() && patience == Patience::Some => {}
            other => break other?,
        }
        request.guard.iter().for_each(|guard| guard.come());
        attempts += 1;
        paused_before += frozen_at.elapsed();
        std::thread::sleep(BETWEEN);
    };
    fault::hit(Step::StateCaptured)?;
    let bundle = match request.bundle {
        true => Bundle::open(&captured.snapshot, captured.next_space)?,
        false => Bundle::empty(),
    };
    let mut memory_bytes = write_pages(&mut writer, &sources, &mut captured, request.progress)?;
    fault::hit(Step::Release)?;

    let threads = frozen.tasks() as u32;
    let mut held = None;
    if request.after == After::Continue {
        frozen.thaw()?;
        request.guard.iter().for_each(|guard| guard.come());
    } else {
        held = Some(frozen);
    }
    let mut paused = frozen_at.elapsed();
    request.progress.end();

    let mut snapshot = captured.snapshot;
    host::read_build_ids(&mut snapshot);
    settings::read_groups(&mut snapshot);
    if request.bundle {
        request.progress.begin(bundle.bytes());
        let mut sink = PageSink::new(&mut writer, request.progress);
        snapshot.bundle = bundle.store(&mut sink)?;
        memory_bytes += sink.finish()?;
        request.progress.end();
    }
    let mut warnings = captured.warnings;
    warnings.extend(complete(&snapshot, &header)?);
    snapshot::write(&mut writer, &snapshot)?;
    let (sink, summary) = writer.finish()?;
    warnings.extend(commit(sink)?);
    if let Some(frozen) = held {
        match request.after {
            After::Kill if request.pid.raw() == 1 => frozen.end_with_us()?,
            After::Kill => kill(&sources, frozen)?,
            After::Continue => unreachable!("it was let go"),
            After::Stop => frozen.leave_stopped()?,
        }
        paused = frozen_at.elapsed();
    }
    Ok(Report {
        name: crate::text::of(&sources[0].stat.comm.0),
        pid: request.pid.raw(),
        processes: snapshot.processes.len() as u32,
        threads,
        memory_bytes,
        image_bytes: summary.bytes,
        total: begun.elapsed(),
        paused: paused_before + paused,
        path: None,
        warnings,
    })
}

fn unmatched(pattern: &String) -> String {
    format!(
        "--save-files {pattern} matches no file that the job has open or writes through a mapping"
    )
}

/// How often a checkpoint is begun anew while something is in the way that goes by itself; the job
/// runs in between.
const ATTEMPTS: u32 = 10;
/// When the job has stood still for so long in all, the next attempt is the last.
const MOST_PAUSED: Duration = Duration::from_secs(4);
/// Time that the job has for it.
const BETWEEN: Duration = Duration::from_millis(30);

/// Freezes the job and captures all but its pages. On an error it goes on.
fn freeze_and_capture(
    request: &Request<'_>,
    patience: Patience,
) -> Result<(FrozenJob, Vec<Source>, CapturedJob)> {
    let groups = request.frozen_groups.as_ref().map(Thawed::begin);
    let groups = groups.transpose()?;
    let mut frozen = FrozenJob::freeze(&request.roots())?;
    groups.iter().try_for_each(Thawed::complete)?;
    frozen.groups = groups;
    let sources = open_sources(&frozen)?;
    let mut captured = capture_frozen(&mut frozen, &sources, request, patience)?;
    captured.snapshot.namespaces = request.namespaces.clone();
    captured.snapshot.show_groups(&request.groups);
    Ok((frozen, sources, captured))
}

/// What is known of a process from outside, once it is frozen: it may have called exec since it
/// was looked at first.
fn open_sources(frozen: &FrozenJob) -> Result<Vec<Source>> {
    let sources = frozen.processes.iter().map(|f| Source::open(f.pid()));
    Ok(sources.collect::<ckpt_tracer::Result<_>>()?)
}

/// Processes of our pid namespace whose parents are outside of it, but for ourselves and those that
/// came with us: nobody who was born inside has none.
fn brought_in() -> Vec<Pid> {
    let me = Pid::own();
    let alive =
        |pid: &Pid| read_status(*pid).is_ok_and(|s| s.ppid.raw() == 0 && !s.state.has_ended());
    let pids = tasks::list_processes(&ProcRoot::default()).unwrap_or_default();
    let pids = pids.into_iter();
    pids.filter(|pid| *pid != me && alive(pid)).collect()
}

fn not_of_the_job(pid: Pid) -> String {
    format!(
        "{} was brought into the job's pid namespace from outside: it is not in the image, and ends \
         with the job",
        process_name(pid)
    )
}

struct CapturedJob {
    snapshot: Snapshot,
    /// Of each process.
    memory: Vec<(Vec<Vma>, PagemapScanner)>,
    contents: Vec<(SpaceId, crate::objects::source::Contents)>,
    /// The first that nothing has.
    next_space: SpaceId,
    /// See [`Report::warnings`].
    warnings: Vec<String>,
}

/// Suspends seccomp filters where we may. Else they must be those that we are under, in every task
/// as it is now: it may have added some since it was looked at first.
fn filters_in_force(
    job: &FrozenJob,
    sources: &[Source],
    collector: &mut Collector,
) -> Result<Statuses> {
    let mut statuses = Statuses::new();
    for (frozen, source) in job.processes.iter().zip(sources) {
        for task in frozen.tasks() {
            let status = read_task(source.pid, task.tid())?;
            if status.seccomp.unwrap_or(0) != 0 {
                let surroundings = collector.surroundings();
                if surroundings == Surroundings::Master {
                    task.suspend_seccomp()?;
                } else if let Some((reason, remedy)) = surroundings.in_the_way(&status) {
                    return Err(Error::refuse(Obstacle::new(source.title(), reason, remedy)));
                }
            }
            statuses.insert(task.tid(), status);
        }
    }
    Ok(statuses)
}

/// All that can be seen from outside of a frozen job in whose way nothing is.
fn look(
    job: &mut FrozenJob,
    sources: &[Source],
    request: &Request<'_>,
    patience: Patience,
) -> Result<(Collector, Vec<FromOutside>)> {
    let mut collector = Collector::default();
    collector.patience = patience;
    collector.save_files = request.save_files.clone();
    collector.choices = request.choices.clone();
    collector.alone_in_ipc = request.namespaces.ipc;
    collector.is_copy = request.is_copy;
    let all: Vec<&Source> = sources.iter().collect();
    match kcmp::withheld() {
        None => crate::capture::check::shared_by_processes(&all, &mut collector)?,
        Some(call) => collector.copies = borrow::all(job, sources, call)?,
    }
    let outside = process::capture_from_outside(&all, process::Depth::Full, &mut collector)?;
    let spaces = process::address_spaces(&all, &outside, &collector);
    ipc::capture(&spaces, &mut collector)?;
    if !collector.obstacles.is_empty() {
        return Err(Error::Refused(collector.obstacles));
    }
    Ok((collector, outside))
}

fn capture_frozen(
    job: &mut FrozenJob,
    sources: &[Source],
    request: &Request<'_>,
    patience: Patience,
) -> Result<CapturedJob> {
    let mut collector = Collector::default();
    let statuses = filters_in_force(job, sources, &mut collector)?;
    // Of a job that does not stand still this is seen only now.
    for (frozen, source) in job.processes.iter().zip(sources) {
        let tids: Vec<Tid> = frozen.tasks().iter().map(|task| task.tid()).collect();
        crate::capture::check::lives_elsewhere(source, &tids, &mut collector)?;
    }
    if !collector.obstacles.is_empty() {
        return Err(Error::Refused(collector.obstacles));
    }
    for (frozen, source) in job.processes.iter().zip(sources) {
        // Of all, before anybody's memory is looked at: it may be that of several.
        withdraw_dispatch(frozen.tasks(), &source.mem)?;
    }
    let (mut collector, mut outside) = look(job, sources, request, patience)?;
    // What a request was still writing may be in files and in memory that were just looked at.
    if aio::settle(job, sources, &outside, &collector)? {
        (collector, outside) = look(job, sources, request, patience)?;
    }
    notice::learn(job, sources, &mut outside, &collector)?;
    let stops: Vec<bool> = job
        .processes
        .iter()
        .map(|frozen| frozen.stopped_by().is_some())
        .collect();
    let children = |parent: Pid, stopped: bool| -> Vec<i32> {
        let all = sources.iter().zip(&stops);
        all.filter(|(s, is)| s.status.ppid == parent && **is == stopped)
            .map(|(s, _)| s.pid.raw())
            .collect()
    };
    let bystanders = Bystanders::of(statuses.values());
    let mut processes: Vec<Process> = Vec::with_capacity(sources.len());
    let mut memory = Vec::with_capacity(sources.len());
    for ((frozen, source), outside) in job.processes.iter_mut().zip(sources).zip(outside) {
        let shares = collector.shares(source.pid);
        let parent = processes.iter().find(|p| p.pid == source.status.ppid.raw());
        let space = match parent.filter(|_| shares.memory) {
            Some(parent) => parent.memory.space,
            None => collector.new_space(),
        };
        let in_job = InJob {
            space,
            parent,
            shares,
            stopped_children: &children(source.pid, true),
            running_children: &children(source.pid, false),
            ipc: &collector.ipc,
            statuses: &statuses,
            bystanders: &bystanders,
        };
        let (process, vmas, scanner) = process::capture(frozen, source, outside, &in_job)?;
        processes.push(process);
        memory.push((vmas, scanner));
    }
    let zombies = job.ended.iter().map(|pid| zombie::capture(*pid));
    let zombies = zombies.collect::<Result<_>>()?;
    let all: Vec<&Source> = sources.iter().collect();
    let host = host::describe(&processes[0], &all)?;
    let next_space = collector.new_space();
    let snapshot = assemble(host, processes, zombies, &mut collector);
    let Collector {
        contents,
        save_files,
        mut warnings,
        ..
    } = collector;
    warnings.extend(snapshot.processes.iter().filter_map(landlock::warning));
    warnings.extend(save_files.unmatched().iter().map(unmatched));
    if snapshot.processes[0].pid == 1 {
        let of_the_job =
            |pid: &Pid| sources.iter().any(|s| s.pid == *pid) || job.ended.contains(pid);
        let others = brought_in().into_iter().filter(|pid| !of_the_job(pid));
        warnings.extend(others.map(not_of_the_job));
    }
    // What could not be brought about again is refused now, not at the restore.
    births::decide(&snapshot).map_err(Error::Refused)?;
    Ok(CapturedJob {
        snapshot,
        memory,
        contents,
        next_space,
        warnings,
    })
}
