//! The command lines of `ckpt` and `restore`: one module for each command. Exit codes are in [`exit`].

use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};

mod as_owner;
pub mod attach;
pub mod check;
pub mod console;
pub mod exit;
pub mod inspect;
mod launch;
pub mod manual;
mod output;
pub mod places;
pub mod progress;
pub mod restore;
pub mod run;
pub mod verify;

use exit::{Outcome, Role};

/// Checkpoint and restore running programs, from outside: without root, without preloading anything.
#[derive(Parser, Debug)]
#[command(name = "ckpt", version, after_help = exit::HELP, max_term_width = 100)]
#[command(arg_required_else_help = true, subcommand_required = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Restore a job from its image; the same as `ckpt restore`.
#[derive(Parser, Debug)]
#[command(name = "restore", version, max_term_width = 100)]
pub struct RestoreCli {
    #[command(flatten)]
    args: restore::Restore,
}

/// Amount of output.
#[derive(Args, Clone, Copy, Debug)]
pub struct Verbosity {
    /// Print errors only.
    #[arg(short, long, conflicts_with = "verbose")]
    quiet: bool,
    /// Print more details.
    #[arg(short, long)]
    verbose: bool,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Write a checkpoint of a running process; it continues afterwards.
    Attach(attach::Attach),
    /// Start a program, take checkpoints of it at an interval, and return its exit code.
    Run(run::Run),
    /// Rebuild a job from its image and return its exit code.
    Restore(restore::Restore),
    /// Show the terminal of a job that was restored with --detach, and type to it.
    Console(console::Console),
    /// Show what is possible here, or all obstacles for one process or one image.
    Check(check::Check),
    /// Show the contents of an image.
    Inspect(inspect::Inspect),
    /// Read a whole image and check its consistency.
    Verify(verify::Verify),
    /// Print completions for a shell.
    Completions(manual::Completions),
    /// Write the manual pages.
    Man(manual::ManPages),
}

impl Command {
    fn role(&self) -> Role {
        match self {
            Command::Run(_) | Command::Restore(_) => Role::Supervisor,
            _ => Role::Tool,
        }
    }

    fn run(&self) -> Outcome {
        match self {
            Command::Attach(args) => attach::run(args),
            Command::Run(args) => run::run(args),
            Command::Restore(args) => restore::run(args),
            Command::Console(args) => console::run(args),
            Command::Check(args) => check::run(args),
            Command::Inspect(args) => inspect::run(args),
            Command::Verify(args) => verify::run(args),
            Command::Completions(args) => {
                manual::completions(args, Cli::command(), RestoreCli::command())
            }
            Command::Man(args) => manual::pages(args, Cli::command(), RestoreCli::command()),
        }
    }
}

/// `ckpt`.
pub fn main() -> ExitCode {
    match Cli::try_parse() {
        Ok(cli) => exit::finish(cli.command.role(), cli.command.run()),
        Err(error) => usage(&error),
    }
}

/// `restore`.
pub fn restore_main() -> ExitCode {
    match RestoreCli::try_parse() {
        Ok(cli) => exit::finish(Role::Supervisor, restore::run(&cli.args)),
        Err(error) => usage(&error),
    }
}

/// Help and version go to standard output with code 0, usage errors to standard error with code 2.
fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let text = error.to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    output::note(&format!("ckpt: {}", text.trim_end()));
    ExitCode::from(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_lines_are_consistent() {
        Cli::command().debug_assert();
        RestoreCli::command().debug_assert();
    }
}
