//! `ckpt`: checkpoint, restart and look into running programs. See [`ckpt::cli`].
//!
//! The one unsafe thing here is to have a function called before `main`: the runtime of Rust opens standard streams that
//! are closed before any code of ours runs otherwise (`ckpt_sys::standard`).
#![allow(unsafe_code)]

use std::process::ExitCode;

// SAFETY: the linker's list of functions to be called before `main`, of that type.
#[used]
#[unsafe(link_section = ".init_array")]
static STANDARD: extern "C" fn() = ckpt_sys::standard::make_sure;

fn main() -> ExitCode {
    ckpt::cli::main()
}
