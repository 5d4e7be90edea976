//! `ckpt`: checkpoint, restart and look into running programs. See [`ckpt::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    ckpt::cli::main()
}
