//! Children of this process: their state changes, and processes that stay with a job.

use std::os::fd::RawFd;

use ckpt_sys::process::{self, Status};

/// State change of a child, or of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It has ended: exit code, or 128 plus the signal.
    Ended(i32),
    /// It was stopped by this signal.
    Stopped(i32),
}

/// Reaps zombies other than `known`: adopted orphans.
pub fn reap_adopted(known: &[i32]) {
    // waitid(2) reports only the first; others are hidden until it is reaped.
    while let Some(pid) = process::some_ended().filter(|pid| !known.contains(pid)) {
        let _ = process::wait(pid, libc::WNOHANG);
    }
}

/// The state change of a child of ours, without waiting.
pub fn changed(pid: i32) -> nix::Result<Option<Change>> {
    let waited = process::wait(pid, libc::WNOHANG | libc::WUNTRACED)?;
    Ok(match waited {
        Some((_, Status::Stopped(signal))) => Some(Change::Stopped(signal)),
        Some((_, status)) => status.code().map(Change::Ended),
        None => None,
    })
}

/// Leaves the working directory, closes standard streams and every other descriptor but `kept`, runs `main`, and ends
/// the process: a process that stays with a job must not keep files in use.
pub fn stay(kept: &[RawFd], main: impl FnOnce() -> i32) -> ! {
    let _ = std::env::set_current_dir("/");
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null");
    if let Ok(null) = null {
        let _ = nix::unistd::dup2_stdin(&null);
        let _ = nix::unistd::dup2_stdout(&null);
        let _ = nix::unistd::dup2_stderr(&null);
    }
    process::stay(kept, main)
}
