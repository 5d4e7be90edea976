//! `ckpt-bench`: the cost of checkpoints and restores, as ratios to a floor measured in the same run.
//!
//! One program has all roles, because `cargo run` builds one binary: it executes itself again as the target
//! ([`target`]), as the plain loop that reads memory back ([`floor`]), and as the program that only makes system
//! calls ([`system_calls`]).
#![deny(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};

mod beat;
mod bench;
mod floor;
mod namespace;
mod report;
mod sys;
mod system_calls;
mod target;
mod tools;

use bench::Bench;
use report::Report;

/// Measures ckpt: `all`, or one subject. Figures are medians; ratios are taken round by round.
#[derive(Parser, Debug)]
#[command(name = "ckpt-bench", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Everything below.
    All(Common),
    /// The floor alone: plain loops of process_vm_readv + write, and of pread into fresh memory.
    Floor(Sized),
    /// A checkpoint and a restart of a target of one size, against the floor.
    Size(Sized),
    /// A target with very many threads.
    Threads(Many),
    /// A target with very many processes.
    Processes(Many),
    /// System calls under `ckpt run` against the same without it.
    Overhead(Common),
    /// Memory that ckpt itself uses, by the target's size.
    Memory(Common),
    /// Our readers of /proc against those of the crate procfs.
    Readers(Many),
    /// Codecs: time, pause, size.
    Codecs(Sized),
    /// The program that is checkpointed.
    #[command(hide = true)]
    Target(target::Args),
    /// The program that does system calls.
    #[command(hide = true)]
    SystemCalls(system_calls::Args),
    /// The loop that reads memory back.
    #[command(hide = true)]
    ReadBack(floor::ReadBack),
}

/// Options of every subject.
#[derive(Args, Debug, Clone)]
pub(crate) struct Common {
    /// Directory for images; a subdirectory is created there and removed again.
    #[arg(long, default_value = "/dev/shm")]
    dir: PathBuf,
    /// Few rounds and small sizes: tests that everything works, not how fast it is.
    #[arg(long)]
    quick: bool,
    /// Print the figures as a JSON object.
    #[arg(long)]
    json: bool,
    /// Number of measurements.
    #[arg(long)]
    rounds: Option<usize>,
    /// Directory of `ckpt` and `restore`; default: that of this program.
    #[arg(long, value_name = "DIR")]
    bin: Option<PathBuf>,
}

#[derive(Args, Debug, Clone)]
struct Sized {
    #[command(flatten)]
    common: Common,
    /// Memory of the target.
    #[arg(long)]
    mib: Option<u64>,
    /// Its threads.
    #[arg(long, default_value_t = 5)]
    threads: usize,
}

#[derive(Args, Debug, Clone)]
struct Many {
    #[command(flatten)]
    common: Common,
    /// How many.
    #[arg(long)]
    count: Option<usize>,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Target(args) => target::run(&args).map(|()| ExitCode::SUCCESS),
        Command::SystemCalls(args) => system_calls::run(&args).map(|()| ExitCode::SUCCESS),
        Command::ReadBack(args) => floor::read_back(&args).map(|()| ExitCode::SUCCESS),
        command => measure(&command),
    };
    done.unwrap_or_else(|error| {
        eprintln!("ckpt-bench: {error:#}");
        ExitCode::FAILURE
    })
}

fn measure(command: &Command) -> Result<ExitCode> {
    let common = match command {
        Command::Floor(args) | Command::Size(args) | Command::Codecs(args) => &args.common,
        Command::Threads(args) | Command::Processes(args) | Command::Readers(args) => &args.common,
        Command::All(common) | Command::Overhead(common) | Command::Memory(common) => common,
        Command::Target(_) | Command::SystemCalls(_) | Command::ReadBack(_) => {
            anyhow::bail!("not a subject")
        }
    };
    let Some(scratch) = namespace::scratch() else {
        return namespace::run_inside(&common.dir);
    };
    namespace::settle_in()?;
    let bench = Bench::new(common, scratch).context("cannot begin")?;
    let mut report = Report::new(&common.dir);
    subjects(command, &bench, &mut report);
    if common.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    Ok(ExitCode::from(u8::from(!report.failures.is_empty())))
}

/// Runs the requested subjects; failures are recorded, and the rest continues.
fn subjects(command: &Command, bench: &Bench, report: &mut Report) {
    let quick = bench.quick;
    let pick = |full: u64, small: u64| if quick { small } else { full };
    match command {
        Command::Floor(a) => bench.floor(a.mib.unwrap_or(pick(1024, 128)), a.threads, report),
        Command::Size(a) => bench.size(a.mib.unwrap_or(pick(1024, 128)), a.threads, report),
        Command::Codecs(a) => bench.codecs(a.mib.unwrap_or(pick(512, 64)), a.threads, report),
        Command::Threads(a) => bench.threads(a.count.unwrap_or(pick(10_000, 500) as usize), report),
        Command::Processes(a) => {
            bench.processes(a.count.unwrap_or(pick(1000, 100) as usize), report);
        }
        Command::Overhead(_) => bench.overhead(report),
        Command::Memory(_) => bench.memory(report),
        Command::Readers(a) => bench.readers(a.count.unwrap_or(pick(10_000, 500) as usize), report),
        _ => {
            bench.size(64, 5, report);
            bench.size(pick(1024, 128), 5, report);
            bench.threads(pick(10_000, 500) as usize, report);
            bench.processes(pick(1000, 100) as usize, report);
            bench.memory(report);
            bench.readers(pick(10_000, 500) as usize, report);
            bench.codecs(pick(512, 64), 5, report);
            bench.overhead(report);
        }
    }
}
