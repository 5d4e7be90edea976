//! A program that does hardly anything but system calls, and says how long one took.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;

use crate::sys;

/// Arguments of the hidden subcommand `system-calls`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// A file of at least one byte.
    #[arg(long)]
    file: PathBuf,
    #[arg(long)]
    count: u32,
}

/// Prints the nanoseconds of one getppid(2) and of one pread(2) of one byte.
pub(crate) fn run(args: &Args) -> Result<()> {
    let file = File::open(&args.file)?;
    let each = |begun: Instant| begun.elapsed().as_nanos() as f64 / f64::from(args.count);
    let begun = Instant::now();
    for _ in 0..args.count {
        std::hint::black_box(sys::getppid());
    }
    let getppid = each(begun);
    let begun = Instant::now();
    for _ in 0..args.count {
        file.read_exact_at(&mut [0], 0)?;
    }
    println!("{getppid} {}", each(begun));
    Ok(())
}
