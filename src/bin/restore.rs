//! `restore IMAGE`: the same as `ckpt restore IMAGE`. See [`ckpt::cli`].
//!
//! The only unsafe code registers a function to be called before `main`: otherwise the runtime of Rust opens closed
//! standard streams before any code of ours runs (`ckpt_sys::standard`).
#![allow(unsafe_code)]

use std::process::ExitCode;

// SAFETY: the linker's list of functions to be called before `main`, of that type.
#[used]
#[unsafe(link_section = ".init_array")]
static STANDARD: extern "C" fn() = ckpt_sys::standard::make_sure;

fn main() -> ExitCode {
    ckpt::cli::restore_main()
}
