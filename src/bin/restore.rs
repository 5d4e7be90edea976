//! `restore IMAGE`: the same as `ckpt restore IMAGE`. See [`ckpt::cli`].
#![allow(unsafe_code)]

use std::process::ExitCode;

// SAFETY: the linker's list of functions to be called before `main`, of that type.
#[used]
#[unsafe(link_section = ".init_array")]
static STANDARD: extern "C" fn() = ckpt::cli::standard::make_sure;

fn main() -> ExitCode {
    ckpt::cli::restore_main()
}
