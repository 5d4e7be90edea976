//! `restore IMAGE`: the same as `ckpt restore IMAGE`. See [`ckpt::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    ckpt::cli::restore_main()
}
