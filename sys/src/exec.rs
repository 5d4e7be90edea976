//! A new process from its creation to the exec of a program: gives its descriptors their numbers, waits to be traced,
//! and executes.
//!
//! The child of a possibly multithreaded process makes only system calls, on memory prepared before. So it uses no
//! [channel](crate::channel): one byte tells it to continue, and two numbers report a failure.
#![allow(unsafe_code)]

use std::collections::HashSet;
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use crate::files::duplicate_from;
use crate::process::leave;
use crate::{Errno, Result};

/// A program and its descriptors, which are kept clear of each other's target numbers.
#[derive(Debug)]
pub struct Program {
    executable: OwnedFd,
    /// Our descriptor and its target number, ascending by number; ours are none of the target numbers.
    descriptors: Vec<(OwnedFd, RawFd)>,
    go: OwnedFd,
    report: OwnedFd,
}

/// What failed in a new process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Giving descriptors their numbers.
    Descriptors,
    /// The exec.
    Exec,
}

impl Program {
    /// Moves descriptors off the target numbers of others. A byte on `go` permits the exec, end of file forbids it;
    /// failures are written to `report`.
    ///
    /// # Errors
    /// `EMFILE` when no numbers are free.
    pub fn prepare(
        executable: impl AsFd,
        descriptors: Vec<(OwnedFd, RawFd)>,
        go: impl AsFd,
        report: impl AsFd,
    ) -> Result<Self> {
        let numbers: HashSet<RawFd> = descriptors.iter().map(|(_, to)| *to).collect();
        let mut lowest = 3;
        let mut beside = |fd: BorrowedFd<'_>| duplicate_beside(fd, &numbers, &mut lowest);
        let mut kept = Vec::with_capacity(descriptors.len());
        for (fd, to) in descriptors {
            let is_aside = fd.as_raw_fd() > 2 && !numbers.contains(&fd.as_raw_fd());
            let fd = if is_aside { fd } else { beside(fd.as_fd())? };
            kept.push((fd, to));
        }
        kept.sort_by_key(|(_, to)| *to);
        Ok(Self {
            executable: beside(executable.as_fd())?,
            descriptors: kept,
            go: beside(go.as_fd())?,
            report: beside(report.as_fd())?,
        })
    }

    /// Executes the program, with that name as its only argument and no environment. `other_end` is the other end of
    /// `go`, which this process must not hold open itself. Without it this is the first process of a pid namespace,
    /// whose end would kill all others: on failure it then stops with SIGTRAP.
    pub fn execute(&self, name: &CStr, other_end: Option<BorrowedFd<'_>>) -> ! {
        // SAFETY: system calls on values and on memory that was prepared before; nothing is dropped here.
        unsafe {
            if let Some(other_end) = other_end {
                libc::close(other_end.as_raw_fd());
            }
            // Blocks all but SIGTRAP: a breakpoint that finds SIGTRAP blocked resets its action
            // (force_sig_info_to_task).
            let mask: u64 = !(1 << (libc::SIGTRAP - 1));
            let set = libc::SIG_SETMASK;
            libc::syscall(libc::SYS_rt_sigprocmask, set, &raw const mask, 0, 8);
            for signal in 1..=64 {
                if signal != libc::SIGKILL && signal != libc::SIGSTOP {
                    let default = [0u64; 4];
                    libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), 0, 8);
                }
            }
            let placed = self.place_descriptors();
            // Wait until the tracer has attached.
            let mut byte = 0u8;
            if libc::read(self.go.as_raw_fd(), (&raw mut byte).cast(), 1) != 1 {
                leave(127);
            }
            let is_first = other_end.is_none();
            if let Err(errno) = placed {
                self.fail(Step::Descriptors, errno, is_first);
            }
            let argv = [name.as_ptr(), std::ptr::null()];
            let envp = [std::ptr::null::<libc::c_char>()];
            libc::syscall(
                libc::SYS_execveat,
                self.executable.as_raw_fd(),
                c"".as_ptr(),
                argv.as_ptr(),
                envp.as_ptr(),
                libc::AT_EMPTY_PATH,
            );
            self.fail(Step::Exec, Errno::last_raw(), is_first)
        }
    }

    /// SAFETY: as in [`execute`](Self::execute).
    unsafe fn place_descriptors(&self) -> std::result::Result<(), i32> {
        let mut first = 0;
        let on_exec = libc::CLOSE_RANGE_CLOEXEC as i32;
        // SAFETY: as the function's.
        unsafe {
            for (fd, to) in &self.descriptors {
                if libc::dup3(fd.as_raw_fd(), *to, 0) < 0 {
                    return Err(Errno::last_raw());
                }
                if *to > first {
                    libc::close_range(first as u32, *to as u32 - 1, on_exec);
                }
                first = to + 1;
            }
            libc::close_range(first as u32, u32::MAX, on_exec);
        }
        Ok(())
    }

    /// SAFETY: as in [`execute`](Self::execute).
    unsafe fn fail(&self, step: Step, errno: i32, is_first: bool) -> ! {
        let mut report = [0u8; 8];
        report[..4].copy_from_slice(&(step as i32).to_ne_bytes());
        report[4..].copy_from_slice(&errno.to_ne_bytes());
        // SAFETY: as the function's.
        unsafe {
            libc::write(self.report.as_raw_fd(), report.as_ptr().cast(), 8);
            if !is_first {
                leave(127)
            }
            loop {
                // The tracer sees the stop, reports the failure and ends, which ends this process.
                let me = libc::syscall(libc::SYS_getpid);
                libc::syscall(libc::SYS_kill, me, libc::SIGTRAP);
                libc::pause();
            }
        }
    }
}

/// The failed step of a process that ended or stopped itself before its exec; `None` when it was killed.
pub fn failure(report: impl AsFd) -> Option<(Step, Errno)> {
    let mut bytes = [0; 8];
    if nix::unistd::read(report, &mut bytes) != Ok(8) {
        return None;
    }
    let [a, b, c, d, e, f, g, h] = bytes;
    let step = match i32::from_ne_bytes([a, b, c, d]) {
        0 => Step::Descriptors,
        _ => Step::Exec,
    };
    Some((step, Errno::from_raw(i32::from_ne_bytes([e, f, g, h]))))
}

/// Duplicates to a free number from `lowest` on that is none of these; raises `lowest`.
fn duplicate_beside(
    fd: BorrowedFd<'_>,
    numbers: &HashSet<RawFd>,
    lowest: &mut RawFd,
) -> Result<OwnedFd> {
    loop {
        let copy = duplicate_from(fd, *lowest)?;
        *lowest = copy.as_raw_fd() + 1;
        if !numbers.contains(&copy.as_raw_fd()) {
            return Ok(copy);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipes::pipe;
    use crate::process::{Fork, Status, end_of, fork_bare};
    use std::fs::File;
    use std::io::{Read, Write};

    #[test]
    fn a_program_finds_its_descriptors() {
        let (out, to) = pipe().unwrap();
        let (go, mut let_go) = pipe().map(|(r, w)| (r, File::from(w))).unwrap();
        let (report, told) = pipe().unwrap();
        let program = File::open("/bin/echo").unwrap();
        let program = Program::prepare(&program, vec![(to, 1)], &go, &told).unwrap();
        let Fork::Parent(child) = fork_bare().unwrap() else {
            program.execute(c"echo", Some(let_go.as_fd()))
        };
        let_go.write_all(b"!").unwrap();
        drop((program, told));
        let mut said = String::new();
        File::from(out).read_to_string(&mut said).unwrap();
        assert_eq!(
            (said.as_str(), end_of(child)),
            ("\n", Ok(Status::Exited(0)))
        );
        assert_eq!(failure(&report), None);
    }

    #[test]
    fn it_tells_what_failed() {
        let (go, mut let_go) = pipe().map(|(r, w)| (r, File::from(w))).unwrap();
        let (report, told) = pipe().unwrap();
        let directory = File::open("/").unwrap();
        let program = Program::prepare(&directory, Vec::new(), &go, &told).unwrap();
        let Fork::Parent(child) = fork_bare().unwrap() else {
            program.execute(c"none", Some(let_go.as_fd()))
        };
        let_go.write_all(b"!").unwrap();
        assert_eq!(end_of(child), Ok(Status::Exited(127)));
        assert_eq!(failure(&report), Some((Step::Exec, Errno::EACCES)));
    }
}
