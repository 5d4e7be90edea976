//! `ckpt run`: a program with checkpoints at an interval.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use ckpt_image::Codec;
use clap::{Args, ValueEnum};

use super::exit::{Failure, Outcome, complain};
use super::places::Descriptors;
use super::{Verbosity, output};
use crate::guard::{Entrance, Guard, Watch};
use crate::host::{BASELINE, BIND_NOW};
use crate::isolate::{self, First, Init, Link, Spec};
use crate::objects::processor::Baseline;
use crate::objects::save_files::Pattern;
use crate::restore::next_pid;
use crate::supervise::interval::parse_duration;
use crate::supervise::periodic::{Periodic, Plan, Tell};
use crate::supervise::retention::Images;
use crate::supervise::{self, Child, NoTerminal, Signals, Supervised, Terminal};

/// Arguments of `ckpt run`.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Run {
    /// Name of the images, NAME.1.ckpt, NAME.2.ckpt …; default: the program's name.
    #[arg(long, value_name = "NAME")]
    name: Option<OsString>,
    /// Directory of the images; created if it does not exist.
    #[arg(long, value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Interval between checkpoints: 30s, 5m, 1h, or plain seconds. Without it no checkpoint is taken.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    interval: Option<Duration>,
    /// Keep this many of the newest images and remove older ones; the last valid one is always kept.
    #[arg(long, value_name = "COUNT", default_value = "2", value_parser = clap::value_parser!(u32).range(1..))]
    keep: u32,
    /// Compression of memory: none, lz4, zstd[:1-19] or gzip[:1-9].
    #[arg(long, value_name = "CODEC", default_value = "zstd:1")]
    codec: Codec,
    /// With each checkpoint store the contents of matching open files, as `ckpt attach --save-files` does; may be
    /// repeated.
    #[arg(long, value_name = "GLOB", value_parser = Pattern::parse)]
    save_files: Vec<Pattern>,
    #[command(flatten)]
    descriptors: Descriptors,
    /// Start the program in a pid namespace of its own, so that it can be restored when its pids are taken outside.
    #[arg(long)]
    isolated: bool,
    /// With each checkpoint store the program, its libraries and the files that it only reads, as `ckpt attach
    /// --bundle` does.
    #[arg(long)]
    bundle: bool,
    /// Limit the program to the processor features of a level, x86-64-v2 or x86-64-v3: its images can be restored on
    /// every machine of that level.
    #[arg(long, value_name = "LEVEL")]
    cpu_baseline: Option<Baseline>,
    /// With a baseline: the result of CPUID in its programs.
    #[arg(long, value_name = "POLICY", default_value = "auto")]
    cpuid: Cpuid,
    #[command(flatten)]
    verbosity: Verbosity,
    /// The program and its arguments.
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "PROG"
    )]
    command: Vec<OsString>,
}

/// The result of CPUID in the job's programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Cpuid {
    /// The features of the baseline, if the processor supports CPUID faulting; a guard process of ckpt then traces
    /// the job.
    Auto,
    /// The real processor.
    Host,
}

const EXAMPLES: &str = "\
The program gets every signal that is sent to ckpt, and its exit code is returned. A checkpoint
that fails is reported in one line on standard error; the program continues.

Examples:
  ckpt run --interval 10m -- ./simulate input.dat
  ckpt run --name job --dir /var/ckpt --interval 1h --keep 3 -- python3 train.py
  ckpt run --isolated --interval 10m -- ./simulate input.dat
  ckpt run --cpu-baseline x86-64-v3 --interval 1h -- ./simulate
                                   to restore on another processor
  restore /var/ckpt/job.7.ckpt     continue from the seventh checkpoint";

pub(crate) fn run(args: &Run) -> Outcome {
    let (program, arguments) = args.command.split_first().ok_or(Failure::Told)?;
    let images = Images::new(&args.dir, name_of(args, program)?);
    if args.interval.is_some() {
        let made = std::fs::create_dir_all(&args.dir).and_then(|()| images.counters());
        made.map_err(|error| {
            let dir = output::visible(args.dir.as_os_str().as_bytes());
            Failure::Message(format!(
                "cannot use the directory {dir}: {error}; choose another with --dir"
            ))
        })?;
    }
    let signals = take_over_signals()?;
    ckpt_sys::prctl::adopt_orphans();
    let (guard, entrance) = match args.cpu_baseline.and_then(|level| guarded(level, args)) {
        Some(level) => {
            let made = Guard::before_the_program(level);
            let (guard, entrance) = made.map_err(|error| {
                Failure::Message(format!(
                    "cannot start the guard of the baseline: {error}; --cpuid host needs none"
                ))
            })?;
            (Some(guard), Some(entrance))
        }
        None => (None, None),
    };
    let start = |entrance: Option<Entrance>| {
        let mut command = Command::new(program);
        command.args(arguments);
        if let Some(level) = args.cpu_baseline {
            keep_to(level, &mut command);
        }
        next_pid::leave_the_first_ids();
        let traced = args.interval.is_some();
        supervise::start(command, &signals, traced, entrance).map_err(|error| {
            let program = output::visible(program.as_bytes());
            format!("cannot start {program}: {error}; check its name and PATH")
        })
    };
    let mut job: Box<dyn Supervised> = match args.isolated {
        true => Box::new(isolated(|| start(entrance))?),
        false => Box::new(Child(start(entrance).map_err(Failure::Message)?)),
    };
    leave_standard_streams()?;
    let mut periodic = args.interval.map(|interval| {
        let plan = Plan {
            interval,
            images,
            keep: args.keep as usize,
            codec: args.codec,
            save_files: args.save_files.clone(),
            bundle: args.bundle,
            descriptors: args.descriptors.words(),
        };
        let (quiet, verbose) = (args.verbosity.quiet, args.verbosity.verbose);
        let failed: Tell = Box::new(|line| complain(&line));
        let done: Tell = Box::new(move |line| {
            if verbose && !quiet {
                complain(&line);
            }
        });
        Periodic::new(plan, job.pid(), failed, done)
    });
    let mut watch = watch(guard);
    wait(
        &mut *job,
        &signals,
        periodic.as_mut(),
        &mut NoTerminal,
        &mut watch,
    )
}

/// The level, if a guard is wanted and possible.
fn guarded(level: Baseline, args: &Run) -> Option<Baseline> {
    let possible = args.cpuid == Cpuid::Auto && Guard::is_possible();
    if !possible && args.cpuid == Cpuid::Auto && args.verbosity.verbose && !args.verbosity.quiet {
        complain(&format!(
            "this processor has no CPUID faulting: programs that do not ask glibc may use more than {level}"
        ));
    }
    possible.then_some(level)
}

/// Messages of a guard are reported as all others.
pub(crate) fn watch(guard: Option<Guard>) -> Watch {
    Watch::over(guard, Box::new(|line| complain(&line)))
}

/// Starts a program as the child of a new namespace's first process.
fn isolated(start: impl FnOnce() -> Result<i32, String>) -> Result<Init, Failure> {
    let mut init = isolate::start(&Spec::own(), |link: &Link, _first: Option<First>| {
        let pid = start()?;
        let _ = link.ready(None);
        let _ = link.running(pid, Vec::new(), None);
        Ok(pid)
    })?;
    init.until_it_runs()?;
    Ok(init)
}

/// Through its environment, which all programs that it starts inherit.
fn keep_to(level: Baseline, command: &mut Command) {
    const TUNABLES: &str = "GLIBC_TUNABLES";
    let before = std::env::var(TUNABLES).ok();
    command.env(TUNABLES, level.glibc_tunables(before.as_deref()));
    command.env(BASELINE, level.name());
    command.env(BIND_NOW, "1");
}

/// Waits for a job in the foreground; returns its exit code.
pub(crate) fn wait(
    job: &mut dyn Supervised,
    signals: &Signals,
    periodic: Option<&mut Periodic>,
    terminal: &mut dyn Terminal,
    watch: &mut Watch,
) -> Outcome {
    let pid = job.pid();
    let code = supervise::wait_for(job, signals, periodic, terminal, watch).map_err(|errno| {
        Failure::Message(format!("cannot wait for process {pid}: {}", errno.desc()))
    })?;
    Ok(u8::try_from(code).unwrap_or(u8::MAX))
}

pub(crate) fn take_over_signals() -> Result<Signals, Failure> {
    Signals::take_over()
        .map_err(|errno| Failure::Message(format!("cannot prepare for signals: {}", errno.desc())))
}

/// Closes our standard input and output: otherwise their other ends would not see the program close its own.
pub(crate) fn leave_standard_streams() -> Result<(), Failure> {
    let left = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .and_then(|null| {
            nix::unistd::dup2_stdin(&null)?;
            Ok(nix::unistd::dup2_stdout(&null)?)
        });
    left.map_err(|error| Failure::Message(format!("cannot use /dev/null: {error}")))
}

fn name_of(args: &Run, program: &OsString) -> Result<OsString, Failure> {
    let name = match &args.name {
        Some(name) => Some(name.as_os_str()),
        None => Path::new(program).file_name(),
    };
    match name {
        Some(name) if !name.is_empty() && !name.as_bytes().contains(&b'/') => Ok(name.to_owned()),
        _ => Err(Failure::Usage(
            "--name takes a file name without a slash; name the directory with --dir".into(),
        )),
    }
}
