//! A pid namespace for the measurement: restored jobs need their old pids, and the end of its first process ends
//! everything.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::sys;

/// Tells the process inside the directory for its files.
const SCRATCH: &str = "CKPT_BENCH_SCRATCH";

/// The directory for files, if this is the process inside.
pub(crate) fn scratch() -> Option<PathBuf> {
    std::env::var_os(SCRATCH).map(PathBuf::from)
}

/// Runs this program again in a pid namespace of its own; always removes its files.
pub(crate) fn run_inside(dir: &Path) -> Result<ExitCode> {
    let scratch = dir.join(format!("ckpt-bench.{}", std::process::id()));
    std::fs::create_dir(&scratch).with_context(|| format!("cannot use {}", dir.display()))?;
    let scratch = scratch.canonicalize()?;
    let done = run_with(&scratch);
    let cleaned = std::fs::remove_dir_all(&scratch);
    cleaned.with_context(|| format!("cannot remove {}", scratch.display()))?;
    done
}

fn run_with(scratch: &Path) -> Result<ExitCode> {
    // A root without CAP_SYS_ADMIN may still have user namespaces.
    if !(sys::is_root() && sys::unshare(false).is_ok()) {
        sys::unshare(true).context("cannot make a pid namespace")?;
    }
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let mut inside = Command::new(std::env::current_exe()?);
    inside.args(arguments).env(SCRATCH, scratch);
    let mut inside = inside.spawn().context("cannot run in a pid namespace")?;
    sys::ignore_signals();
    let code = inside.wait()?.code().unwrap_or(1);
    Ok(ExitCode::from(code as u8))
}

/// Initialization of the process inside.
pub(crate) fn settle_in() -> Result<()> {
    sys::end_by_signals();
    sys::keep_descriptors().context("cannot mark descriptors")?;
    sys::mount_proc().context("cannot mount /proc of the pid namespace")
}
