//! Lower bounds for any checkpointer: plain loops over the same bytes in the same directory.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::sys;

/// Bytes of an iteration.
const PIECE: usize = 1 << 20;

/// Duration of a loop in seconds.
#[derive(Clone, Copy)]
pub(crate) struct Took {
    pub(crate) wall: f64,
    pub(crate) processor: f64,
}

/// process_vm_readv, write and fsync of a process's memory to a new file.
pub(crate) fn write_out(pid: i32, address: u64, len: u64, path: &Path) -> Result<Took> {
    remove(path)?;
    let mut buffer = vec![1; PIECE];
    let (begun, used) = (Instant::now(), sys::own_processor_time());
    let mut file = File::create_new(path)?;
    let mut at = 0;
    while at < len {
        let piece = (len - at).min(PIECE as u64) as usize;
        let read = sys::read_other(pid, address + at, &mut buffer[..piece])?;
        ensure!(read > 0, "the target's memory ends early");
        file.write_all(&buffer[..read])?;
        at += read as u64;
    }
    file.sync_all()?;
    Ok(Took {
        wall: begun.elapsed().as_secs_f64(),
        processor: sys::own_processor_time() - used,
    })
}

/// Removes a file, if it exists, outside the measured time.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Arguments of the hidden subcommand `read-back`.
#[derive(clap::Args, Debug)]
pub(crate) struct ReadBack {
    file: PathBuf,
}

/// Prints the seconds of pread of a whole file into fresh anonymous memory. A separate process, so that the memory is
/// fresh and the measuring process stays small.
pub(crate) fn read_back(args: &ReadBack) -> Result<()> {
    let file = File::open(&args.file)?;
    let len = file.metadata()?.len() as usize;
    let memory = sys::map_fresh(len)?;
    let begun = Instant::now();
    for (turn, piece) in memory.chunks_mut(PIECE).enumerate() {
        file.read_exact_at(piece, (turn * PIECE) as u64)?;
    }
    println!("{}", begun.elapsed().as_secs_f64());
    Ok(())
}

/// Runs [`read_back`] and returns its seconds.
pub(crate) fn read_in(path: &Path) -> Result<f64> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("read-back").arg(path).stdin(Stdio::null());
    let output = command.stderr(Stdio::inherit()).output()?;
    let text = String::from_utf8(output.stdout)?;
    text.trim().parse().context("the read-back loop failed")
}
