//! The most memory that a program takes.
#![allow(unsafe_code)]

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

/// Runs a program without output; its exit code, and the most memory in bytes that it had at one time. After `seconds` on a
/// processor it is killed, and has no exit code.
///
/// The figure is `VmHWM` where the program ends: `ru_maxrss` of getrusage(2) knows what this process had at the fork as well.
pub(crate) fn peak_of(command: &mut Command, seconds: u64) -> (Option<i32>, usize) {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let limit = libc::rlimit {
        rlim_cur: seconds,
        rlim_max: seconds,
    };
    // SAFETY: between fork and exec there are two system calls, one of which reads a struct.
    unsafe {
        command.pre_exec(move || {
            ptrace::traceme()?;
            match libc::setrlimit(libc::RLIMIT_CPU, &limit) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    let pid = Pid::from_raw(command.spawn().expect("it can be started").id() as i32);
    let mut peak = 0;
    // The first stop is that of execve(2).
    waitpid(pid, None).expect("it is a child");
    let options = Options::PTRACE_O_TRACEEXIT | Options::PTRACE_O_EXITKILL;
    ptrace::setoptions(pid, options).expect("it has stopped");
    let mut signal = None;
    loop {
        // It may be killed at any time.
        let _ = ptrace::cont(pid, signal);
        signal = None;
        match waitpid(pid, None).expect("it is a child") {
            WaitStatus::Exited(_, code) => return (Some(code), peak),
            WaitStatus::Signaled(..) => return (None, peak),
            WaitStatus::PtraceEvent(..) => peak = high_water_mark(pid),
            WaitStatus::Stopped(_, what) => signal = Some(what),
            _ => {}
        }
    }
}

/// `VmHWM` of a process (proc_pid_status(5)), in bytes.
fn high_water_mark(pid: Pid) -> usize {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it has not ended");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    kib.map_or(0, |kib: usize| kib << 10)
}
