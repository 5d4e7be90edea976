//! `ckpt console`: the terminal of a job that runs in the background.

use std::io::{ErrorKind, stdin, stdout};
use std::os::fd::AsFd;

use clap::Args;

use super::exit::{Failure, Outcome};
use super::output;
use super::run::take_over_signals;
use crate::supervise::console::{self, End};
use crate::{Error, Obstacle};

/// Arguments of `ckpt console`.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Console {
    /// The pid of the job, as `restore --detach` printed it.
    #[arg(value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pid: i32,
}

const EXAMPLES: &str = "\
Ctrl-\\ typed twice detaches from the job; a single one goes to the job with the next key.

Examples:
  restore --detach editor.ckpt     prints the pid, 4242
  ckpt console 4242                connect to its terminal";

pub(crate) fn run(args: &Console) -> Outcome {
    let pid = args.pid;
    let signals = take_over_signals()?;
    let shown = stdin()
        .as_fd()
        .try_clone_to_owned()
        .and_then(|input| Ok((input, stdout().as_fd().try_clone_to_owned()?)))
        .and_then(|(input, output)| console::show(pid, &signals, input, output));
    match shown {
        Ok(End::Detached) => {
            output::note(&format!(
                "\nckpt: detached; attach again with: ckpt console {pid}"
            ));
            Ok(0)
        }
        Ok(End::Ended) => {
            output::note(&format!("\nckpt: process {pid} has ended"));
            Ok(0)
        }
        Ok(End::Busy) => Err(refuse(
            pid,
            "is open in another ckpt console",
            "detach that one with Ctrl-\\ Ctrl-\\ first",
        )),
        Err(e) if [ErrorKind::NotFound, ErrorKind::ConnectionRefused].contains(&e.kind()) => {
            Err(refuse(
                pid,
                "is not there: the process has ended, or was not restored with --detach from a job \
                 that had a terminal",
                "look for the right one with `pgrep -a NAME`",
            ))
        }
        Err(e) => Err(Failure::Message(format!(
            "cannot show the terminal of process {pid}: {e}"
        ))),
    }
}

fn refuse(pid: i32, reason: &str, remedy: &str) -> Failure {
    let object = format!("the console of process {pid}");
    Error::refuse(Obstacle::new(object, reason, remedy)).into()
}
