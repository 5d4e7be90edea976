//! `restore`: a job goes on from its image.

use std::collections::BTreeMap;
use std::io::{stdin, stdout};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::exit::{Failure, Outcome, complain};
use super::launch::launch;
use super::run::{leave_standard_streams, take_over_signals, wait};
use super::{Loudness, output, progress};
use crate::restore::clock::ClockPolicy;
use crate::restore::paths::Mapping;
use crate::restore::pids::Pids;
use crate::restore::put::PutFiles;
use crate::restore::{self, FilesPolicy, env};
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
    /// Print what would be done, one operation a line, and touch nothing.
    #[arg(long, conflicts_with_all = ["detach", "stopped"])]
    dry_run: bool,
    /// Give descriptor N the file PATH instead of the one it had; may be repeated.
    #[arg(long = "fd", value_name = "N=PATH", value_parser = parse_fd)]
    fds: Vec<(i32, PathBuf)>,
    /// Look for what lay at or below OLD at or below NEW: files, mapped files, programs, directories. May be repeated; the longest OLD wins.
    #[arg(long = "map-path", value_name = "OLD=NEW", value_parser = parse_mapping)]
    map_paths: Vec<Mapping>,
    /// Put the files back whose contents `--save-files` stored, before the job opens them; never over one that was changed after the checkpoint.
    #[arg(long)]
    put_files: bool,
    /// With --put-files: over one that was changed after the checkpoint as well.
    #[arg(long, requires = "put_files")]
    overwrite: bool,
    /// What to do with files that changed since the checkpoint.
    #[arg(long, value_name = "POLICY", default_value = "strict")]
    files: Files,
    /// Which clocks the job gets that begin with the machine (CLOCK_MONOTONIC, CLOCK_BOOTTIME).
    #[arg(long, value_name = "POLICY", default_value = "auto")]
    clock: Clock,
    /// Where the job has its pids.
    #[arg(long, value_name = "PLACE", default_value = "auto")]
    pids: Where,
    /// Hand a value to the job: a line in the file that its environment names in CKPT_RESTORE_ENV; may be repeated.
    #[arg(long, value_name = "NAME=VALUE", value_parser = env::parse)]
    env: Vec<(String, String)>,
    /// As root: restore an image that belongs to another user, with the ids that are in it.
    #[arg(long)]
    any_owner: bool,
    #[command(flatten)]
    loudness: Loudness,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Where {
    /// Among yours, if they are free and you may choose them; else in a pid namespace of its own.
    Auto,
    /// Among yours, or not at all.
    Keep,
    /// In a pid namespace of its own: the same image can be restored several times at once.
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
enum Files {
    /// Refuse, and name the file and what changed.
    Strict,
    /// Take the files as they are now.
    Adopt,
    /// As strict, and cut files that the job was writing back to their length at the checkpoint.
    Truncate,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Clock {
    /// As continue where that is permitted, else as host.
    Auto,
    /// They go on from where they stood at the checkpoint; that takes a time namespace.
    Continue,
    /// Those of the machine, unless they would go back.
    Host,
}

const EXAMPLES: &str = "\
Examples:
  restore job.ckpt                 go on with the job here; return its exit code
  restore --detach job.ckpt        leave it running in the background
  restore --fd 1=new.log job.ckpt  send its standard output elsewhere
  restore --stopped job.ckpt       leave it to `gdb -p PID`
  restore --map-path /home/me/run=/scratch/run job.ckpt
                                   its files are elsewhere now
  restore --files truncate job.ckpt
                                   cut its logs back to where they were
  restore --put-files job.ckpt     with the files that --save-files stored
  restore --pids namespace job.ckpt
                                   one of several, beside the first
  restore --pids namespace --env SEED=7 job.ckpt
                                   the same, told something in $CKPT_RESTORE_ENV";

fn parse_fd(text: &str) -> Result<(i32, PathBuf), String> {
    let (fd, path) = text
        .split_once('=')
        .ok_or("N=PATH is wanted, such as 1=out.log")?;
    match fd.parse() {
        Ok(number) if number >= 0 && !path.is_empty() => Ok((number, path.into())),
        Ok(number) if number >= 0 => Err("the path is empty".into()),
        _ => Err(format!("{fd:?} is not the number of a descriptor")),
    }
}

fn parse_mapping(text: &str) -> Result<Mapping, String> {
    let (old, new) = text
        .split_once('=')
        .ok_or("OLD=NEW is wanted, such as /old/place=/new/place")?;
    let old = PathBuf::from(old);
    if !old.is_absolute() {
        return Err(format!(
            "{} is not the whole path, from / on",
            old.display()
        ));
    }
    let new = std::path::absolute(new).map_err(|_| "the new path is empty")?;
    Ok(Mapping { old, new })
}

pub(crate) fn run(args: &Restore) -> Outcome {
    for (index, mapping) in args.map_paths.iter().enumerate() {
        if args.map_paths[..index].iter().any(|m| m.old == mapping.old) {
            return Err(Failure::Usage(format!(
                "--map-path {} is given twice; give each path once",
                mapping.old.display()
            )));
        }
    }
    let mut fds = BTreeMap::new();
    for (fd, path) in &args.fds {
        if fds.insert(*fd, path.clone()).is_some() {
            return Err(Failure::Usage(format!(
                "--fd {fd} is given twice; give each descriptor once"
            )));
        }
    }
    let progress = progress::on_terminal("restore", !args.loudness.quiet);
    let request = restore::Request {
        image: &args.image,
        files: match args.files {
            Files::Strict => FilesPolicy::Strict,
            Files::Adopt => FilesPolicy::Adopt,
            Files::Truncate => FilesPolicy::Truncate,
        },
        map_paths: args.map_paths.clone(),
        put_files: match (args.put_files, args.overwrite) {
            (false, _) => PutFiles::No,
            (true, false) => PutFiles::UnlessNewer,
            (true, true) => PutFiles::Overwrite,
        },
        clock: match args.clock {
            Clock::Auto => ClockPolicy::Auto,
            Clock::Continue => ClockPolicy::Continue,
            Clock::Host => ClockPolicy::Host,
        },
        fds,
        any_owner: args.any_owner,
        stopped: args.stopped,
        foreground: !args.stopped && !args.detach,
        progress: &*progress,
    };
    if args.dry_run {
        let plan = restore::dry_run(&mut restore::open(&request)?)?;
        let end = if plan.ends_with('\n') || plan.is_empty() {
            ""
        } else {
            "\n"
        };
        output::print(plan + end)?;
        return Ok(0);
    }
    let mut opened = restore::open(&request)?;
    let restored = launch(
        &mut opened,
        args.pids.into(),
        &args.env,
        args.loudness.quiet,
    );
    drop(opened);
    drop(progress);
    let mut restored = restored?;
    if !args.loudness.quiet {
        restored
            .warnings
            .iter()
            .for_each(|warning| complain(&format!("warning: {warning}")));
    }
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
    if args.loudness.verbose {
        output::note(&format!("ckpt: running as process {}", restored.pid));
    }
    let signals = take_over_signals()?;
    let mut terminal: Box<dyn Terminal> = match (restored.master, restored.terminal) {
        (Some(master), _) => Box::new(show(master)?),
        (None, Some(lent)) => Box::new(lent),
        (None, None) => Box::new(NoTerminal),
    };
    leave_standard_streams()?;
    wait(&mut *restored.job, &signals, None, &mut *terminal)
}

/// Shows the job's terminal on ours.
fn show(master: OwnedFd) -> Result<Relay, Failure> {
    let shown = stdin()
        .as_fd()
        .try_clone_to_owned()
        .and_then(|input| Ok((input, stdout().as_fd().try_clone_to_owned()?)))
        .and_then(|(input, output)| Relay::start(master, input, output));
    shown.map_err(|error| Failure::Message(format!("cannot show the job's terminal: {error}")))
}

/// Leaves the job's terminal to a process that `ckpt console` finds.
fn serve(pid: i32, master: OwnedFd) -> Result<(), Failure> {
    console::serve(pid, master).map_err(|error| {
        Failure::Message(format!(
            "process {pid} runs, but its terminal cannot be kept: {error}"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_parsed() {
        let mapping = parse_mapping("/a/b=/c=d").unwrap();
        assert_eq!((mapping.old, mapping.new), ("/a/b".into(), "/c=d".into()));
        assert!(parse_mapping("/a=here").unwrap().new.is_absolute());
        for bad in ["/a", "a=/b", "=/b", "/a=", ""] {
            assert!(parse_mapping(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn descriptors_are_parsed() {
        assert_eq!(parse_fd("1=out.log").unwrap(), (1, "out.log".into()));
        assert_eq!(parse_fd("10=a=b").unwrap(), (10, "a=b".into()));
        for bad in ["1", "=x", "-1=x", "x=y", "1=", "99999999999=x"] {
            assert!(parse_fd(bad).is_err(), "{bad}");
        }
    }
}
