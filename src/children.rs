//! Children of this process: what has become of them, and what one that stays lets go of.

use std::os::fd::RawFd;

use ckpt_sys::process::{self, Status};

/// What has become of a child, or of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It has ended, with this exit code or 128 plus this signal.
    Ended(i32),
    /// It was stopped by this signal.
    Stopped(i32),
}

/// Waits for children that have ended and are none of `known`: orphans that we have adopted.
pub fn reap_adopted(known: &[i32]) {
    // The first one that can be told hides others; it is waited for soon.
    while let Some(pid) = process::some_ended().filter(|pid| !known.contains(pid)) {
        let _ = process::wait(pid, libc::WNOHANG);
    }
}

/// Asks what has become of a child of ours, without waiting.
pub fn changed(pid: i32) -> nix::Result<Option<Change>> {
    let waited = process::wait(pid, libc::WNOHANG | libc::WUNTRACED)?;
    Ok(match waited {
        Some((_, Status::Stopped(signal))) => Some(Change::Stopped(signal)),
        Some((_, status)) => status.code().map(Change::Ended),
        None => None,
    })
}

/// Lets go of directory, standard streams and every other descriptor but those `kept`, does what this process is for,
/// and ends it: what a process that stays with a job held open would seem to be in use.
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
