//! `ckpt attach`: a checkpoint of a running process.

use std::fmt;
use std::fs::File;
use std::io::{IsTerminal, stdout};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use ckpt_image::Codec;
use ckpt_tracer::Pid;
use ckpt_tracer::proc::status::read_status;
use ckpt_tracer::proc::{ProcRoot, tasks};
use clap::Args;
use nix::sys::signal::{SigSet, Signal};
use serde::Serialize;

use super::exit::{self, Failure, Outcome, Role, complain};
use super::places::Descriptors;
use super::{Verbosity, output, progress};
use crate::capture::prove::Prove;
use crate::capture::{self, After, Report};
use crate::guard::{self, door::Door};
use crate::isolate::{self, Visited};
use crate::objects::cgroup::freezer::{self, Thawable};
use crate::objects::job::Family;
use crate::objects::outsiders;
use crate::objects::save_files::{Pattern, SaveFiles};
use crate::rehearse::{self, Prover};
use crate::{Error, Obstacle};

/// Arguments of `ckpt attach`.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Attach {
    /// The process to checkpoint.
    #[arg(value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pid: i32,
    /// File for the image; `-` is standard output. Default: NAME.PID.ckpt in the current directory, after the
    /// process's name and pid.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Kill the process once the image is complete and synced to disk, unless something prevents a restore here.
    #[arg(long, conflicts_with = "stop")]
    kill: bool,
    /// Leave the process stopped, as by SIGSTOP, once the image is complete; `kill -CONT PID` continues it.
    #[arg(long)]
    stop: bool,
    /// With --kill, --stop or --rehearse: do not check first whether the job can be restored here from its image.
    #[arg(long)]
    no_check: bool,
    /// First restore a copy of the job from its image, stopped and in new namespaces, and compare it with the job;
    /// with --kill and --stop the job stays frozen meanwhile.
    #[arg(long, conflicts_with_all = ["drop", "fds"])]
    rehearse: bool,
    /// Compression of memory: none, lz4, zstd[:1-19] or gzip[:1-9].
    #[arg(long, value_name = "CODEC", default_value = "zstd:1")]
    codec: Codec,
    /// Include the other children of that process: orphans of the job that it has adopted.
    #[arg(long, value_name = "PID", hide = true)]
    adopted_by: Option<i32>,
    /// Store the contents of matching files that are open, or written through a mapping, for `restore --put-files`:
    /// GLOB is matched against the file's name, or against its whole path if it contains a slash; may be repeated.
    #[arg(long, value_name = "GLOB", value_parser = Pattern::parse)]
    save_files: Vec<Pattern>,
    /// Also store the program, its libraries and the files that it only reads, equal contents once: restore uses the
    /// stored ones where files are missing or differ.
    #[arg(long)]
    bundle: bool,
    #[command(flatten)]
    descriptors: Descriptors,
    /// For a job in a frozen control group (docker pause, systemctl freeze): thaw the group for the checkpoint and
    /// freeze it again. The job executes nothing meanwhile, except at the beginning with control groups of version 1.
    #[arg(long)]
    thaw: bool,
    /// Print the figures as a JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    verbosity: Verbosity,
}

const EXAMPLES: &str = "\
Examples:
  ckpt attach 4242                    write NAME.4242.ckpt here; the process continues
  ckpt attach 4242 -o job.ckpt --kill write job.ckpt, then end the process
  ckpt attach 4242 --save-files '*.log' --save-files '/data/**'
  ckpt attach 4242 --rehearse --kill  end it only if a copy restored from the image is identical
  ckpt attach 4242 --bundle           for a machine without the program and its libraries
  ckpt attach 4242 -o - | ssh host 'cat > job.ckpt'";

impl Attach {
    /// Whether to check for obstacles to a restore first.
    fn checks(&self) -> bool {
        (self.kill || self.stop || self.rehearse) && !self.no_check
    }
}

/// The children of `by` other than the job's root, this process and the job's guard.
pub(super) fn adopted(root: i32, by: i32) -> Result<Vec<Pid>, Failure> {
    let me = std::process::id() as i32;
    let children = tasks::children(&ProcRoot::default(), Pid(by)).map_err(crate::Error::from)?;
    let living = |pid: &Pid| read_status(*pid).is_ok_and(|s| !s.state.has_ended());
    Ok(children
        .into_iter()
        .filter(|pid| pid.raw() != root && pid.raw() != me && living(pid) && !guard::is_one(*pid))
        .collect())
}

/// Output of `ckpt attach --json`; the keys are fixed.
#[derive(Debug, Serialize)]
struct Figures<'a> {
    /// The process's name.
    name: &'a str,
    /// Its pid.
    pid: i32,
    /// Number of processes in the image.
    processes: u32,
    /// Number of threads in the image.
    threads: u32,
    /// Bytes of memory in the image before compression.
    memory_bytes: u64,
    /// Bytes of the image.
    image_bytes: u64,
    /// Total time in seconds.
    total_seconds: f64,
    /// Length of the pause in seconds.
    paused_seconds: f64,
    /// Path of the image; null when it went to standard output.
    path: Option<String>,
    /// Whether a copy was restored from it and matched the job.
    rehearsed: bool,
}

impl<'a> Figures<'a> {
    fn of(report: &'a Report, rehearsed: bool) -> Self {
        Figures {
            name: &report.name,
            pid: report.pid,
            processes: report.processes,
            threads: report.threads,
            memory_bytes: report.memory_bytes,
            image_bytes: report.image_bytes,
            total_seconds: report.total.as_secs_f64(),
            paused_seconds: report.paused.as_secs_f64(),
            path: report.path.as_ref().map(crate::text::of_path),
            rehearsed,
        }
    }
}

impl fmt::Display for Figures<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: pid {}, {}, {}, memory {}, image {}, {:.3} s in all, {:.3} s paused, {}",
            output::visible(self.name.as_bytes()),
            self.pid,
            output::count(self.processes.into(), "process"),
            output::count(self.threads.into(), "thread"),
            output::bytes(self.memory_bytes),
            output::bytes(self.image_bytes),
            self.total_seconds,
            self.paused_seconds,
            output::visible(self.path.as_deref().unwrap_or("standard output").as_bytes()),
        )
    }
}

pub(crate) fn run(args: &Attach) -> Outcome {
    // In our namespaces, which is not visible inside the job's.
    let door = Door::of(Pid(args.pid))?;
    let groups = frozen_groups(args, door.is_some())?;
    if let Some(obstacle) = args.rehearse.then(rehearse::in_the_way).flatten() {
        return Err(Error::refuse(obstacle).into());
    }
    let prover = match args.checks() || args.rehearse {
        true => Some(Prover::start(Pid(args.pid), args.adopted_by.map(Pid))?),
        false => None,
    };
    Ok(isolate::visit(Pid(args.pid), |visited| {
        let outcome = match visited {
            Ok(visited) => attach(args, visited, door, groups, prover.as_ref()),
            Err(error) => Err(error.into()),
        };
        exit::report(Role::Tool, outcome)
    })?)
}

/// The frozen control groups of the job, if they may be thawed. Determined here: inside the job's namespaces they
/// have other paths.
fn frozen_groups(args: &Attach, guarded: bool) -> Result<Option<Thawable>, Failure> {
    let mut roots = vec![Pid(args.pid)];
    if let Some(by) = args.adopted_by {
        roots.extend(adopted(args.pid, by)?);
    }
    let job = Family::of_all(&roots).unwrap_or_default().living;
    let groups = freezer::frozen(&job);
    let refuse = |obstacle: Obstacle| Err(Error::refuse(obstacle).into());
    match groups.first() {
        None => Ok(None),
        Some(group) if !args.thaw => refuse(group.obstacle(args.pid)),
        // The guard's remote calls would wait for the thaw.
        Some(_) if guarded => refuse(Obstacle::new(
            format!("process {}", args.pid),
            "is guarded (--cpu-baseline) and in a frozen control group, for which --thaw is not supported",
            "thaw the group first",
        )),
        Some(_) => Ok(Some(Thawable::open(&groups, &job)?)),
    }
}

fn attach(
    args: &Attach,
    visited: &Visited,
    door: Option<Door>,
    frozen_groups: Option<Thawable>,
    prover: Option<&Prover>,
) -> Outcome {
    let to_stdout = args.output.as_deref() == Some(Path::new("-"));
    if to_stdout && stdout().is_terminal() {
        let text = "an image is not written to a terminal; redirect standard output, or name a file with -o FILE";
        return Err(Failure::Usage(text.into()));
    }
    if to_stdout && args.rehearse {
        let text =
            "--rehearse restores from the image, which has to be a file: name one with -o FILE";
        return Err(Failure::Usage(text.into()));
    }
    // At the file size limit the write must fail, without a signal to the job.
    let mut too_large = SigSet::empty();
    too_large.add(Signal::SIGXFSZ);
    too_large
        .thread_block()
        .map_err(|e| Failure::Message(format!("cannot block a signal: {}", e.desc())))?;
    let progress = progress::on_terminal("checkpoint", !args.verbosity.quiet);
    let door = match door {
        Some(door) => Some(door),
        None => Door::of(visited.pid)?,
    };
    let request = capture::Request {
        pid: visited.pid,
        guard: door.as_ref(),
        adopted: visited
            .init
            .or(args.adopted_by)
            .map_or_else(|| Ok(Vec::new()), |by| adopted(visited.pid.raw(), by))?,
        namespaces: visited.namespaces.clone(),
        groups: visited.groups.clone(),
        codec: args.codec,
        after: match (args.kill, args.stop) {
            (true, _) => After::Kill,
            (_, true) => After::Stop,
            _ => After::Continue,
        },
        save_files: SaveFiles::new(args.save_files.clone()),
        bundle: args.bundle,
        check: args.checks(),
        prover: prover.map(|prover| prover as &dyn Prove),
        rehearse: args.rehearse,
        is_copy: false,
        choices: args.descriptors.choices_to_store()?,
        frozen_groups,
        progress: &*progress,
    };
    let shared = shared(args, &request);
    let report = if to_stdout {
        let sink = stdout().as_fd().try_clone_to_owned();
        let sink =
            sink.map_err(|e| Failure::Message(format!("cannot use standard output: {e}")))?;
        capture::to_stream(&request, File::from(sink))
    } else {
        let path = match &args.output {
            Some(path) => path.clone(),
            None => default_name(visited.pid, Pid(args.pid))?,
        };
        capture::to_file(&request, &path)
    };
    drop(progress);
    let report = Report {
        pid: args.pid,
        ..report?
    };
    if !args.verbosity.quiet {
        let warnings = report.warnings.iter().chain(&shared);
        warnings.for_each(|warning| complain(&format!("warning: {warning}")));
    }
    tell(args, &report, to_stdout)
}

/// What the job shares with processes outside. A job of `ckpt run` is not asked: it started with what it shares.
fn shared(args: &Attach, request: &capture::Request<'_>) -> Vec<String> {
    if args.verbosity.quiet || args.adopted_by.is_some() {
        return Vec::new();
    }
    let mut roots = vec![request.pid];
    roots.extend(&request.adopted);
    let job = Family::of_all(&roots).unwrap_or_default().living;
    let worth_it = |s: &outsiders::Shared| args.verbosity.verbose || !s.standard;
    let shared = outsiders::shared(&job).into_iter().filter(worth_it);
    shared.map(|s| s.sentence).collect()
}

fn tell(args: &Attach, report: &Report, to_stdout: bool) -> Outcome {
    if args.verbosity.verbose && report.image_bytes > 0 {
        output::note(&format!(
            "codec {}, ratio {:.2}, {}/s",
            args.codec,
            report.memory_bytes as f64 / report.image_bytes as f64,
            output::bytes(
                (report.memory_bytes as f64 / report.total.as_secs_f64().max(1e-9)) as u64
            ),
        ));
    }
    let figures = Figures::of(report, args.rehearse);
    let text = match args.json {
        true => output::json(&figures)?,
        false if args.verbosity.quiet => return Ok(0),
        false => format!("{figures}\n"),
    };
    if to_stdout {
        output::note(text.trim_end());
    } else {
        output::print(text)?;
    }
    Ok(0)
}

/// Default name: the process's name, and its pid as the user knows it.
fn default_name(inner: Pid, pid: Pid) -> Result<PathBuf, Failure> {
    let comm = std::fs::read(format!("/proc/{inner}/comm"));
    let comm = comm.map_err(|_| {
        let (object, remedy) = (format!("process {pid}"), "look for it with `pgrep -a NAME`");
        Error::refuse(Obstacle::new(object, "does not exist", remedy))
    })?;
    Ok(image_name(&comm, pid))
}

/// `<comm>.<pid>.ckpt`, without slashes and control characters.
fn image_name(comm: &[u8], pid: Pid) -> PathBuf {
    let comm = comm.strip_suffix(b"\n").unwrap_or(comm);
    let comm = if comm.is_empty() { b"process" } else { comm };
    let harmless = |byte: &u8| {
        if *byte == b'/' || byte.is_ascii_control() {
            b'_'
        } else {
            *byte
        }
    };
    let mut name: Vec<u8> = comm.iter().map(harmless).collect();
    name.extend_from_slice(format!(".{pid}.ckpt").as_bytes());
    let name = std::ffi::OsString::from_vec(name);
    debug_assert!(!name.as_bytes().contains(&b'/'));
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_in_the_directory() {
        let name = |comm: &[u8]| image_name(comm, Pid(7)).into_os_string().into_vec();
        assert_eq!(name(b"sleep\n"), b"sleep.7.ckpt");
        assert_eq!(name(b"kworker/0:1\n"), b"kworker_0:1.7.ckpt");
        assert_eq!(name(b"../../x\n"), b".._.._x.7.ckpt");
        assert_eq!(name(b"a\nb\n"), b"a_b.7.ckpt");
        assert_eq!(name(b"\n"), b"process.7.ckpt");
        assert_eq!(name(b"\xff\n"), b"\xff.7.ckpt");
    }
}
