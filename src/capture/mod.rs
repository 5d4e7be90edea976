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
use ckpt_tracer::freeze::Frozen;
use ckpt_tracer::proc::maps::Vma;
use ckpt_tracer::proc::pagemap::{PageQuery, PagemapScanner};

use crate::error::{Error, Result};
use crate::host;
use crate::objects::{Snapshot, SpaceId, ipc, process};
use crate::progress::Progress;
use crate::snapshot;

pub mod pages;
pub mod source;

use pages::PageSink;
use source::{Collector, Source};

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
    /// The process.
    pub pid: Pid,
    /// How pages are compressed.
    pub codec: Codec,
    /// What becomes of the job.
    pub after: After,
    /// Who is told how far it is.
    pub progress: &'a dyn Progress,
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
}

/// Checkpoints into a file: complete and synced when this returns, or not there at all.
pub fn to_file(request: &Request<'_>, path: &Path) -> Result<Report> {
    let begun = Instant::now();
    refuse_obstacles(request.pid)?;
    let file = ImageFile::create(path)?;
    let commit = |file: ImageFile| {
        fault::hit(Step::BeforeSync)?;
        file.sync()?;
        fault::hit(Step::BeforeRename)?;
        Ok(file.commit()?)
    };
    checkpoint(request, begun, file, commit).map(|report| Report {
        path: Some(path.to_owned()),
        ..report
    })
}

/// Checkpoints into a stream. With [`After::Stop`] and [`After::Kill`] "complete" means that
/// everything was written without error.
pub fn to_stream(request: &Request<'_>, sink: impl Write + Send + 'static) -> Result<Report> {
    let begun = Instant::now();
    refuse_obstacles(request.pid)?;
    checkpoint(request, begun, sink, |mut sink| {
        sink.flush().map_err(|source| Error::File {
            what: "write",
            path: "the image to the pipe".into(),
            source,
        })
    })
}

fn refuse_obstacles(pid: Pid) -> Result<()> {
    let obstacles = crate::check::obstacles_at_a_glance(pid)?;
    if obstacles.is_empty() {
        Ok(())
    } else {
        Err(Error::Refused(obstacles))
    }
}

fn checkpoint<W: Write + Send + 'static>(
    request: &Request<'_>,
    begun: Instant,
    sink: W,
    commit: impl FnOnce(W) -> Result<()>,
) -> Result<Report> {
    let mut source = Source::open(request.pid)?;
    let header = host::image_header(&source)?;
    let options = WriterOptions {
        codec: request.codec,
        threads: 0,
    };
    let mut writer = Writer::new(sink, &header, options)?;

    let frozen_at = Instant::now();
    let mut frozen = Frozen::freeze(request.pid)?;
    // The process may have called exec since it was looked at first.
    source = Source::open(source.pid)?;
    let captured = capture_frozen(&mut frozen, &source)?;
    fault::hit(Step::StateCaptured)?;
    let mut snapshot = captured.snapshot;
    let memory_bytes = {
        let mut sink = PageSink::new(&mut writer, request.progress);
        let process = &snapshot.processes[0];
        let ranges = stored_ranges(&captured.vmas, &captured.scanner)?;
        request
            .progress
            .begin(ranges.iter().map(|r| r.bytes()).sum());
        let half = ranges.len() / 2;
        for (i, range) in ranges.iter().enumerate() {
            if i == half {
                fault::hit(Step::PagesHalf)?;
            }
            let space = process.memory.space;
            sink.memory(
                &source.mem,
                space,
                range.runs.iter().copied(),
                range.zero_is_default,
            )?;
        }
        for (space, contents) in &captured.contents {
            sink.contents(&source.mem, *space, contents)?;
        }
        sink.finish()?
    };
    fault::hit(Step::Release)?;

    let threads = frozen.tasks().len() as u32;
    let mut held = None;
    if request.after == After::Continue {
        frozen.thaw()?;
    } else {
        held = Some(frozen);
    }
    let mut paused = frozen_at.elapsed();
    request.progress.end();

    host::read_build_ids(&mut snapshot);
    writer.section(
        snapshot::SECTION,
        snapshot::VERSION,
        &snapshot::encode(&snapshot),
    )?;
    let (sink, summary) = writer.finish()?;
    commit(sink)?;
    if let Some(frozen) = held {
        match request.after {
            After::Kill => kill(&source, frozen)?,
            _ => frozen.leave_stopped()?,
        }
        paused = frozen_at.elapsed();
    }
    Ok(Report {
        name: source.stat.comm.to_string(),
        pid: request.pid.raw(),
        processes: 1,
        threads,
        memory_bytes,
        image_bytes: summary.bytes,
        total: begun.elapsed(),
        paused,
        path: None,
    })
}

fn kill(source: &Source, frozen: Frozen) -> Result<()> {
    source.pidfd.signal(libc::SIGKILL)?;
    frozen.thaw()?;
    Ok(())
}

struct CapturedJob {
    snapshot: Snapshot,
    vmas: Vec<Vma>,
    scanner: PagemapScanner,
    contents: Vec<(SpaceId, source::Contents)>,
}

fn capture_frozen(frozen: &mut Frozen, source: &Source) -> Result<CapturedJob> {
    for task in frozen.tasks() {
        if source.status.seccomp == Some(2) {
            task.suspend_seccomp()?;
        }
    }
    let mut collector = Collector::default();
    let space = collector.new_space();
    let outside = process::capture_from_outside(source, process::Depth::Full, &mut collector)?;
    ipc::capture(&[(source, &outside.vmas)], &mut collector)?;
    if !collector.obstacles.is_empty() {
        return Err(Error::Refused(collector.obstacles));
    }
    let (process, vmas, scanner) =
        process::capture(frozen, source, outside, space, &collector.ipc)?;
    let host = host::describe(&process)?;
    let Collector {
        descriptions,
        mapped_files,
        shared_memory,
        contents,
        ipc,
        ..
    } = collector;
    let snapshot = Snapshot {
        host,
        processes: vec![process],
        descriptions,
        mapped_files,
        shared_memory,
        ipc,
    };
    Ok(CapturedJob {
        snapshot,
        vmas,
        scanner,
        contents,
    })
}

/// Pages of one mapping that go into the image.
struct StoredRange {
    runs: Vec<(u64, u64)>,
    zero_is_default: bool,
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
                zero_is_default: vma.is_private_anonymous(),
            });
        }
    }
    Ok(ranges)
}
