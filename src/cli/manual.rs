//! `ckpt completions` and `ckpt man`: files that a package installs in addition to the programs.

use std::path::PathBuf;

use clap::{Args, Command, ValueEnum};
use clap_complete::aot::{Bash, Fish, Zsh};
use clap_mangen::Man;

use super::exit::{Failure, Outcome};
use super::output;

/// Arguments of `ckpt completions`.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  ckpt completions bash > /etc/bash_completion.d/ckpt")]
pub struct Completions {
    /// The shell to complete in.
    shell: Shell,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// Arguments of `ckpt man`.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  ckpt man /usr/local/share/man/man1")]
pub struct ManPages {
    /// The directory for the pages, one for each command; by default ckpt(1) is printed.
    #[arg(value_name = "DIR")]
    directory: Option<PathBuf>,
}

/// Completions of both programs, in one file.
pub(crate) fn completions(args: &Completions, ckpt: Command, restore: Command) -> Outcome {
    let mut script = Vec::new();
    for mut command in [ckpt, restore] {
        let name = command.get_name().to_owned();
        match args.shell {
            Shell::Bash => clap_complete::generate(Bash, &mut command, name, &mut script),
            Shell::Zsh => clap_complete::generate(Zsh, &mut command, name, &mut script),
            Shell::Fish => clap_complete::generate(Fish, &mut command, name, &mut script),
        }
    }
    output::print(script)?;
    Ok(0)
}

/// Manual pages of both programs and of every command of `ckpt`.
pub(crate) fn pages(args: &ManPages, ckpt: Command, restore: Command) -> Outcome {
    let Some(directory) = &args.directory else {
        output::print(page(ckpt)?)?;
        return Ok(0);
    };
    for command in [ckpt.disable_help_subcommand(true), restore] {
        clap_mangen::generate_to(command, directory)
            .map_err(crate::Error::file("write the manual pages into", directory))?;
    }
    Ok(0)
}

fn page(command: Command) -> Result<Vec<u8>, Failure> {
    let mut page = Vec::new();
    let rendered = Man::new(command).render(&mut page);
    rendered.map_err(|error| Failure::Message(format!("cannot make a manual page: {error}")))?;
    Ok(page)
}
