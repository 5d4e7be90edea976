//! `restore`: restores a job from its image.

use std::io::{stdin, stdout};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use ckpt_sys::prctl::die_with_parent;
use ckpt_tracer::Pid;
use clap::{Args, ValueEnum};
use nix::unistd::geteuid;

use super::exit::{Failure, Outcome, complain};
use super::launch::launch;
use super::places::Places;
use super::run::{Cpuid, leave_standard_streams, take_over_signals, wait, watch};
use super::{Verbosity, as_owner, output, progress};
use crate::guard::Guard;
use crate::objects::cgroup::Policy;
use crate::progress::Silent;
use crate::restore::{self, ClockPolicy, ImageFile, Pids, env};
use crate::supervise::relay::Relay;
use crate::supervise::{NoTerminal, Terminal, console};

/// Arguments of `restore`.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Restore {
    /// The image to restore.
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
    /// Return as soon as the job runs, and print its pid.
    #[arg(long)]
    detach: bool,
    /// Leave the job stopped before its first instruction, for a debugger, and print its pid.
    #[arg(long)]
    stopped: bool,
    /// Print the operations of the restore, one on each line, and change nothing.
    #[arg(long, conflicts_with_all = ["detach", "stopped"])]
    dry_run: bool,
    #[command(flatten)]
    places: Places,
    /// The job's CLOCK_MONOTONIC and CLOCK_BOOTTIME, which start at boot.
    #[arg(long, value_name = "POLICY", default_value = "auto")]
    clock: Clock,
    /// The job's control groups: keep (the original ones, as far as they exist), ignore (those of restore), restore
    /// (create missing ones with their settings), or a path: the original ones below that group.
    #[arg(long, value_name = "keep|ignore|restore|ROOT", default_value = "keep")]
    cgroups: Policy,
    /// The pid namespace of the job.
    #[arg(long, value_name = "PLACE", default_value = "auto")]
    pids: Where,
    /// Pass a value to the job: a line in the file that its environment names in CKPT_RESTORE_ENV; may be repeated.
    #[arg(long, value_name = "NAME=VALUE", value_parser = env::parse)]
    env: Vec<(String, String)>,
    /// As root: restore an image that belongs to another user, with that user's rights.
    #[arg(long)]
    any_owner: bool,
    /// For a job with a baseline: the result of CPUID in its programs.
    #[arg(long, value_name = "POLICY", default_value = "auto")]
    cpuid: Cpuid,
    #[command(flatten)]
    verbosity: Verbosity,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Where {
    /// Yours, if the pids are free and you may choose them; otherwise a new one.
    Auto,
    /// Yours, or fail.
    Keep,
    /// A new one: the same image can be restored several times at once.
    Namespace,
}

impl From<Where> for Pids {
    fn from(place: Where) -> Self {
        match place {
            Where::Auto => Pids::Auto,
            Where::Keep => Pids::Keep,
            Where::Namespace => Pids::Namespace,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Clock {
    /// As continue if that is permitted, otherwise as host.
    Auto,
    /// They continue from their values at the checkpoint; needs a time namespace.
    Continue,
    /// Those of the machine; fails if they would go back.
    Host,
}

const EXAMPLES: &str = "\
Examples:
  restore job.ckpt                 continue the job here; return its exit code
  restore --detach job.ckpt        leave it running in the background
  restore --fd 1=new.log job.ckpt  send its standard output elsewhere
  restore --stopped job.ckpt       leave it stopped, for `gdb -p PID`
  restore --map-path /home/me/run=/scratch/run job.ckpt
                                   its files are elsewhere now
  restore --files truncate job.ckpt
                                   truncate its logs to their old size
  restore --put-files job.ckpt     with the files that --save-files stored
  restore --pids namespace job.ckpt
                                   one of several, beside the first
  restore --pids namespace --env SEED=7 job.ckpt
                                   the same, with a variable for $CKPT_RESTORE_ENV";

pub(crate) fn run(args: &Restore) -> Outcome {
    // Usage errors do not depend on the image.
    args.places.request(&args.image, &Silent)?;
    let handed = as_owner::handed(&args.image)?;
    let as_owner = handed.is_some();
    let image = handed.map_or_else(|| ImageFile::open(&args.image), Ok)?;
    if args.any_owner && geteuid().is_root() && image.owner() != 0 {
        return as_owner::run(image);
    }
    let progress = progress::on_terminal("restore", !args.verbosity.quiet);
    let request = restore::Request {
        clock: match args.clock {
            Clock::Auto => ClockPolicy::Auto,
            Clock::Continue => ClockPolicy::Continue,
            Clock::Host => ClockPolicy::Host,
        },
        cgroups: args.cgroups.clone(),
        stopped: args.stopped,
        foreground: !args.stopped && !args.detach,
        bounded: args.dry_run,
        probed: None,
        ..args.places.request(&args.image, &*progress)?
    };
    if args.dry_run {
        let mut lines = output::Lines::new();
        let mut placed = restore::open_file(image, &request)?.place_for_a_look()?;
        placed.look()?.dry_run(&mut |line| lines.add(line))?;
        lines.end()?;
        return Ok(0);
    }
    let opened = restore::open_file(image, &request)?;
    let guarded = args.cpuid == Cpuid::Auto && !args.stopped && Guard::is_possible();
    let baseline = opened.baseline().filter(|_| guarded);
    let restored = launch(opened, args.pids.into(), &args.env, args.verbosity.quiet);
    drop(progress);
    let mut restored = restored?;
    if as_owner {
        // From now on our exit follows the job's.
        die_with_parent(false);
    }
    if !args.verbosity.quiet {
        restored
            .warnings
            .iter()
            .for_each(|warning| complain(&format!("warning: {warning}")));
    }
    // Until the guard traces the job, programs see the real processor, which has all features of the baseline.
    let guard = baseline.map(|level| Guard::over(level, vec![Pid(restored.pid)]));
    let guard = match guard.transpose() {
        Ok(guard) => guard,
        Err(error) => {
            if !args.verbosity.quiet {
                complain(&format!(
                    "warning: the job is not guarded: {error}; its programs see all features of the \
                     processor"
                ));
            }
            None
        }
    };
    if args.stopped || args.detach {
        if let Some(master) = restored.master.take() {
            serve(restored.pid, master)?;
        }
        output::print_line(restored.pid)?;
    }
    if args.stopped {
        output::note(&format!(
            "ckpt: stopped; attach with: gdb -p {}",
            restored.pid
        ));
        return Ok(0);
    }
    if args.detach {
        return Ok(0);
    }
    if args.verbosity.verbose {
        output::note(&format!("ckpt: running as process {}", restored.pid));
    }
    let signals = take_over_signals()?;
    let mut terminal: Box<dyn Terminal> = match (restored.master, restored.terminal) {
        (Some(master), _) => Box::new(show(master)?),
        (None, Some(lent)) => Box::new(lent),
        (None, None) => Box::new(NoTerminal),
    };
    leave_standard_streams()?;
    wait(
        &mut *restored.job,
        &signals,
        None,
        &mut *terminal,
        &mut watch(guard),
    )
}

/// Connects the job's terminal to ours.
fn show(master: OwnedFd) -> Result<Relay, Failure> {
    let shown = stdin()
        .as_fd()
        .try_clone_to_owned()
        .and_then(|input| Ok((input, stdout().as_fd().try_clone_to_owned()?)))
        .and_then(|(input, output)| Relay::start(master, input, output));
    shown.map_err(|error| Failure::Message(format!("cannot show the job's terminal: {error}")))
}

/// Leaves the job's terminal to a process to which `ckpt console` connects.
fn serve(pid: i32, master: OwnedFd) -> Result<(), Failure> {
    console::serve(pid, master).map_err(|error| {
        Failure::Message(format!(
            "process {pid} runs, but its terminal cannot be kept: {error}"
        ))
    })
}
