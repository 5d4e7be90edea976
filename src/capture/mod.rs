//! A live job becomes an image: the order of the work, and the freeze window.
//!
//! 1. Everything that stands in the way is looked for, from outside; the job runs.
//! 2. The place for the image is opened; the job runs.
//! 3. Freeze. State is captured, then the pages are read; compression and writing go on beside.
//! 4. Thaw (or not, see [`After`]).
//! 5. The metadata is written and the image is committed.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ckpt_image::{Codec, ImageFile, Writer, WriterOptions};
use ckpt_tracer::Pid;
use ckpt_tracer::fault::{self, Step};
use ckpt_tracer::proc::maps::Vma;
use ckpt_tracer::proc::pagemap::{PageQuery, PagemapScanner};

use crate::error::{Error, Result};
use crate::host;
use crate::job::FrozenJob;
use crate::objects::process::{self, Process};
use crate::objects::{Snapshot, SpaceId, ipc, memory, zombie};
use crate::progress::Progress;
use crate::restore::births;
use crate::snapshot;

pub mod bundle;
mod cow;
pub mod pages;
pub mod save_files;
pub mod source;

use bundle::Bundle;
use cow::Comparison;
use pages::{PageSink, Reading};
use save_files::SaveFiles;
use source::{Collector, Patience, Source};

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
    /// Further processes that belong to the job with their descendants, though another process
    /// has adopted them.
    pub adopted: Vec<Pid>,
    /// How pages are compressed.
    pub codec: Codec,
    /// What becomes of the job.
    pub after: After,
    /// Open files whose contents go into the image.
    pub save_files: SaveFiles,
    /// Programs, libraries and files that the job only reads go into the image as well.
    pub bundle: bool,
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
    refuse_obstacles(&request.roots())?;
    let file = ImageFile::create(path)?;
    let commit = |file: ImageFile| {
        fault::hit(Step::BeforeSync)?;
        file.sync()?;
        fault::hit(Step::BeforeRename)?;
        Ok(file.commit()?)
    };
    let report = checkpoint(request, begun, file, commit).map_err(|error| named(error, path))?;
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
/// everything was written without error.
pub fn to_stream(request: &Request<'_>, sink: impl Write + Send + 'static) -> Result<Report> {
    let begun = Instant::now();
    refuse_obstacles(&request.roots())?;
    checkpoint(request, begun, sink, |mut sink| {
        sink.flush().map_err(|source| Error::File {
            what: "write",
            path: "the image to the pipe".into(),
            source,
        })
    })
}

fn refuse_obstacles(roots: &[Pid]) -> Result<()> {
    let obstacles = crate::check::obstacles_at_a_glance(roots)?;
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

fn checkpoint<W: Write + Send + 'static>(
    request: &Request<'_>,
    begun: Instant,
    sink: W,
    commit: impl FnOnce(W) -> Result<()>,
) -> Result<Report> {
    host::raise_descriptor_limit();
    let header = host::image_header(&Source::open(request.pid)?)?;
    let options = WriterOptions {
        codec: request.codec,
        threads: 0,
    };
    let mut writer = Writer::new(sink, &header, options)?;

    let mut attempts = 0;
    let mut frozen_at;
    let (frozen, sources, mut captured) = loop {
        frozen_at = Instant::now();
        let patience = if attempts < ATTEMPTS {
            Patience::Some
        } else {
            Patience::None
        };
        match freeze_and_capture(request, patience) {
            Err(e) if e.is_passing() && patience == Patience::Some => std::thread::sleep(BETWEEN),
            other => break other?,
        }
        attempts += 1;
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
    } else {
        held = Some(frozen);
    }
    let mut paused = frozen_at.elapsed();
    request.progress.end();

    let mut snapshot = captured.snapshot;
    host::read_build_ids(&mut snapshot);
    if request.bundle {
        request.progress.begin(bundle.bytes());
        let mut sink = PageSink::new(&mut writer, request.progress);
        snapshot.bundle = bundle.store(&mut sink)?;
        memory_bytes += sink.finish()?;
        request.progress.end();
    }
    writer.section(
        snapshot::SECTION,
        snapshot::VERSION,
        &snapshot::encode(&snapshot),
    )?;
    let (sink, summary) = writer.finish()?;
    commit(sink)?;
    if let Some(frozen) = held {
        match request.after {
            After::Kill => kill(&sources, frozen)?,
            _ => frozen.leave_stopped()?,
        }
        paused = frozen_at.elapsed();
    }
    Ok(Report {
        name: sources[0].stat.comm.to_string(),
        pid: request.pid.raw(),
        processes: snapshot.processes.len() as u32,
        threads,
        memory_bytes,
        image_bytes: summary.bytes,
        total: begun.elapsed(),
        paused,
        path: None,
        warnings: captured.warnings,
    })
}

fn unmatched(pattern: &String) -> String {
    format!("--save-files {pattern} matches no file that the job has open")
}

/// How often a checkpoint is begun anew while something is in the way that goes by itself; the job
/// runs in between.
const ATTEMPTS: u32 = 10;
/// Time that the job has for it.
const BETWEEN: Duration = Duration::from_millis(30);

/// Freezes the job and captures all but its pages. On an error it goes on.
fn freeze_and_capture(
    request: &Request<'_>,
    patience: Patience,
) -> Result<(FrozenJob, Vec<Source>, CapturedJob)> {
    let mut frozen = FrozenJob::freeze(&request.roots())?;
    let sources = open_sources(&frozen)?;
    let captured = capture_frozen(&mut frozen, &sources, &request.save_files, patience)?;
    Ok((frozen, sources, captured))
}

/// What is known of a process from outside, once it is frozen: it may have called exec since it
/// was looked at first.
fn open_sources(frozen: &FrozenJob) -> Result<Vec<Source>> {
    let sources = frozen.processes.iter().map(|f| Source::open(f.pid()));
    Ok(sources.collect::<ckpt_tracer::Result<_>>()?)
}

/// All at once, so that none sees the end of another one.
fn kill(sources: &[Source], frozen: FrozenJob) -> Result<()> {
    for source in sources {
        match source.pidfd.signal(libc::SIGKILL) {
            // Ended by the end of another one, in a pid namespace.
            Ok(()) | Err(ckpt_tracer::Error::Died { .. }) => {}
            Err(e) => return Err(e.into()),
        }
    }
    frozen.thaw()
}

struct CapturedJob {
    snapshot: Snapshot,
    /// Of each process.
    memory: Vec<(Vec<Vma>, PagemapScanner)>,
    contents: Vec<(SpaceId, source::Contents)>,
    /// The first that nothing has.
    next_space: SpaceId,
    /// See [`Report::warnings`].
    warnings: Vec<String>,
}

fn capture_frozen(
    job: &mut FrozenJob,
    sources: &[Source],
    save_files: &SaveFiles,
    patience: Patience,
) -> Result<CapturedJob> {
    for (frozen, source) in job.processes.iter().zip(sources) {
        if source.status.seccomp == Some(2) {
            for task in frozen.tasks() {
                task.suspend_seccomp()?;
            }
        }
    }
    let mut collector = Collector::default();
    collector.patience = patience;
    collector.save_files = save_files.clone();
    let all: Vec<&Source> = sources.iter().collect();
    crate::check::shared_by_processes(&all, &mut collector)?;
    let outside = process::capture_from_outside(&all, process::Depth::Full, &mut collector)?;
    let vmas = outside.iter().map(|o| o.vmas.as_slice());
    ipc::capture(
        &all.iter().copied().zip(vmas).collect::<Vec<_>>(),
        &mut collector,
    )?;
    if !collector.obstacles.is_empty() {
        return Err(Error::Refused(collector.obstacles));
    }
    let stopped: Vec<(Pid, i32)> = job
        .processes
        .iter()
        .zip(sources)
        .filter(|(frozen, _)| frozen.stopped_by().is_some())
        .map(|(_, source)| (source.status.ppid, source.pid.raw()))
        .collect();
    let mut processes: Vec<Process> = Vec::with_capacity(sources.len());
    let mut memory = Vec::with_capacity(sources.len());
    for ((frozen, source), outside) in job.processes.iter_mut().zip(sources).zip(outside) {
        let space = collector.new_space();
        let children = stopped.iter().filter(|(parent, _)| *parent == source.pid);
        let children: Vec<i32> = children.map(|(_, child)| *child).collect();
        let (mut process, vmas, scanner) =
            process::capture(frozen, source, outside, space, &children, &collector.ipc)?;
        process.shares = collector
            .shares
            .get(&source.pid)
            .copied()
            .unwrap_or_default();
        process.forked = processes
            .iter()
            .find(|p| p.pid == process.parent)
            .is_some_and(|parent| process.is_fork_of(parent));
        processes.push(process);
        memory.push((vmas, scanner));
    }
    let zombies = job.ended.iter().map(|pid| zombie::capture(*pid));
    let zombies = zombies.collect::<Result<_>>()?;
    let host = host::describe(&processes[0], sources)?;
    let next_space = collector.new_space();
    let Collector {
        descriptions,
        terminals,
        mapped_files,
        shared_memory,
        contents,
        ipc,
        save_files,
        mut warnings,
        ..
    } = collector;
    warnings.extend(save_files.unmatched().iter().map(unmatched));
    let snapshot = Snapshot {
        host,
        processes,
        zombies,
        descriptions,
        terminals,
        mapped_files,
        shared_memory,
        ipc,
        bundle: Vec::new(),
    };
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

/// Streams the pages of all processes and what else has contents; answers the bytes stored.
fn write_pages<W: Write + Send + 'static>(
    writer: &mut Writer<W>,
    sources: &[Source],
    captured: &mut CapturedJob,
    progress: &dyn Progress,
) -> Result<u64> {
    let mut sink = PageSink::new(writer, progress);
    let processes = &mut captured.snapshot.processes;
    let mut held: Vec<Vec<(u64, u64)>> = Vec::with_capacity(processes.len());
    let mut stored: Vec<Vec<StoredRange>> = Vec::with_capacity(processes.len());
    for (index, (vmas, scanner)) in captured.memory.iter().enumerate() {
        let mut ranges = stored_ranges(vmas, scanner)?;
        held.push(ranges.iter().flat_map(|r| r.runs.clone()).collect());
        if processes[index].forked {
            let shared = leave_to_parent(&mut ranges, index, processes, sources, &held)?;
            processes[index].memory.inherited = shared;
        }
        stored.push(ranges);
    }
    progress.begin(stored.iter().flatten().map(StoredRange::bytes).sum());
    let half = stored.iter().map(Vec::len).sum::<usize>() / 2;
    let mut count = 0;
    for (index, ranges) in stored.iter().enumerate() {
        for range in ranges {
            if count == half {
                fault::hit(Step::PagesHalf)?;
            }
            count += 1;
            sink.memory(
                &sources[index].mem,
                processes[index].memory.space,
                range.runs.iter().copied(),
                range.how,
            )?;
        }
    }
    for (space, contents) in &captured.contents {
        sink.contents(*space, contents)?;
    }
    sink.finish()
}

/// Takes the pages out of `ranges` that a forked process has in common with its parent; answers
/// them.
fn leave_to_parent(
    ranges: &mut [StoredRange],
    child: usize,
    processes: &[Process],
    sources: &[Source],
    held: &[Vec<(u64, u64)>],
) -> Result<Vec<(u64, u64)>> {
    let parent_pid = processes[child].parent;
    let Some(parent) = processes.iter().position(|p| p.pid == parent_pid) else {
        return Ok(Vec::new());
    };
    let over = memory::inherited(
        &processes[parent].memory.mappings,
        &processes[child].memory.mappings,
    );
    let over: Vec<(u64, u64)> = over.iter().map(|i| (i.start, i.end)).collect();
    let comparison = Comparison {
        parent: &sources[parent].mem,
        child: &sources[child].mem,
        common: memory::intersect(&held[parent], &over),
        pagemap: Comparison::pagemap(&sources[child].dir),
    };
    let mut inherited = Vec::new();
    for range in ranges {
        let split = comparison.split(&range.runs)?;
        range.runs = split.own;
        inherited.extend(split.inherited);
    }
    Ok(memory::join(inherited))
}

/// Pages of one mapping that go into the image.
struct StoredRange {
    runs: Vec<(u64, u64)>,
    how: Reading,
}

impl StoredRange {
    fn bytes(&self) -> u64 {
        self.runs.iter().map(|(start, end)| end - start).sum()
    }
}

fn stored_ranges(vmas: &[Vma], scanner: &PagemapScanner) -> Result<Vec<StoredRange>> {
    use ckpt_tracer::proc::maps::VmaName as Name;
    let mut ranges = Vec::new();
    for vma in vmas {
        let kernels = matches!(
            vma.name,
            Name::Vdso | Name::Vvar | Name::VvarVclock | Name::Vsyscall
        );
        if kernels {
            continue;
        }
        let Some(query) = PageQuery::stored_pages(vma) else {
            continue;
        };
        let mut runs = Vec::new();
        scanner.scan(vma.start..vma.end, query, |run| {
            runs.push((run.start, run.end))
        })?;
        if !runs.is_empty() {
            ranges.push(StoredRange {
                runs,
                how: Reading {
                    zero_is_default: vma.is_private_anonymous(),
                    shared: vma.pss < vma.rss,
                },
            });
        }
    }
    Ok(ranges)
}
