//! What a new process does between its creation and the exec of the job's program.
#![allow(unsafe_code)]

use std::collections::HashSet;
use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

use crate::error::{Error, Result};

/// Prepared before the process exists, since a fork may only make system calls.
pub(crate) struct Orders {
    executable: RawFd,
    /// (our descriptor, number in the new process), ascending by number; ours are none of these numbers.
    descriptors: Vec<(RawFd, i32)>,
    name: CString,
    /// From here comes a byte when the tracer has attached, and the end if it never will.
    go: RawFd,
    /// Where the other end of that would be held open by the new process itself.
    other_end: RawFd,
    report: RawFd,
    /// It is the first process of its pid namespace, whose end would be that of the tracer.
    first: bool,
}

/// The descriptors that orders are about, out of the way of their numbers.
pub(crate) struct Kept {
    executable: OwnedFd,
    descriptors: Vec<(OwnedFd, i32)>,
    go: OwnedFd,
    report: OwnedFd,
}

impl Kept {
    /// Puts those aside that have the number of another one.
    ///
    /// # Errors
    /// When there is no room for them.
    pub(crate) fn beside(
        executable: &impl AsRawFd,
        descriptors: Vec<(OwnedFd, i32)>,
        go: &impl AsRawFd,
        report: &impl AsRawFd,
    ) -> Result<Self> {
        let numbers: HashSet<i32> = descriptors.iter().map(|(_, to)| *to).collect();
        let mut lowest = 3;
        let mut beside = |fd: RawFd| duplicate_beside(fd, &numbers, &mut lowest);
        let mut kept = Vec::with_capacity(descriptors.len());
        for (fd, to) in descriptors {
            let is_aside = fd.as_raw_fd() > 2 && !numbers.contains(&fd.as_raw_fd());
            let fd = if is_aside {
                fd
            } else {
                beside(fd.as_raw_fd())?
            };
            kept.push((fd, to));
        }
        kept.sort_by_key(|(_, to)| *to);
        Ok(Self {
            executable: beside(executable.as_raw_fd())?,
            descriptors: kept,
            go: beside(go.as_raw_fd())?,
            report: beside(report.as_raw_fd())?,
        })
    }

    /// The orders; without an `other_end` they are those of a namespace's first process.
    pub(crate) fn orders(&self, name: CString, other_end: Option<RawFd>) -> Orders {
        let descriptors = self.descriptors.iter();
        Orders {
            executable: self.executable.as_raw_fd(),
            descriptors: descriptors.map(|(fd, to)| (fd.as_raw_fd(), *to)).collect(),
            name,
            go: self.go.as_raw_fd(),
            other_end: other_end.unwrap_or(-1),
            report: self.report.as_raw_fd(),
            first: other_end.is_none(),
        }
    }
}

impl Orders {
    /// Carries them out.
    ///
    /// SAFETY: only to be called in the child of a fork; makes only system calls.
    pub(crate) unsafe fn execute(&self) -> ! {
        // SAFETY: system calls on values and on memory that was prepared before the fork.
        unsafe {
            libc::close(self.other_end);
            // All but SIGTRAP: the restorer's breakpoints must not find it blocked, since the
            // kernel then resets its action (force_sig_info_to_task).
            let mask: u64 = !(1 << (libc::SIGTRAP - 1));
            libc::syscall(
                libc::SYS_rt_sigprocmask,
                libc::SIG_SETMASK,
                &raw const mask,
                0,
                8,
            );
            for signal in 1..=64 {
                if signal != libc::SIGKILL && signal != libc::SIGSTOP {
                    let default = [0u64; 4];
                    libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), 0, 8);
                }
            }
            let placed = self.place_descriptors();
            // Until the tracer has attached.
            let mut byte = 0u8;
            if libc::read(self.go, (&raw mut byte).cast(), 1) != 1 {
                libc::_exit(127);
            }
            if let Err(errno) = placed {
                self.fail(0, errno);
            }
            let argv = [self.name.as_ptr(), std::ptr::null()];
            let envp = [std::ptr::null::<libc::c_char>()];
            libc::syscall(
                libc::SYS_execveat,
                self.executable,
                c"".as_ptr(),
                argv.as_ptr(),
                envp.as_ptr(),
                libc::AT_EMPTY_PATH,
            );
            self.fail(1, *libc::__errno_location())
        }
    }

    /// SAFETY: as [`execute`](Self::execute).
    unsafe fn place_descriptors(&self) -> Result<(), i32> {
        let mut first = 0;
        // SAFETY: as the function's.
        unsafe {
            for &(fd, to) in &self.descriptors {
                if libc::dup3(fd, to, 0) < 0 {
                    return Err(*libc::__errno_location());
                }
                if to > first {
                    libc::close_range(
                        first as u32,
                        to as u32 - 1,
                        libc::CLOSE_RANGE_CLOEXEC as i32,
                    );
                }
                first = to + 1;
            }
            libc::close_range(first as u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32);
        }
        Ok(())
    }

    /// SAFETY: as [`execute`](Self::execute).
    unsafe fn fail(&self, step: i32, errno: i32) -> ! {
        let mut report = [0u8; 8];
        report[..4].copy_from_slice(&step.to_ne_bytes());
        report[4..].copy_from_slice(&errno.to_ne_bytes());
        // SAFETY: as the function's.
        unsafe {
            libc::write(self.report, report.as_ptr().cast(), 8);
            if !self.first {
                libc::_exit(127)
            }
            loop {
                // The tracer is told, tells why, and ends; that ends us.
                libc::syscall(
                    libc::SYS_kill,
                    libc::syscall(libc::SYS_getpid),
                    libc::SIGTRAP,
                );
                libc::pause();
            }
        }
    }
}

/// A copy under a number that is none of these, from `lowest` on, which goes up.
fn duplicate_beside(fd: RawFd, numbers: &HashSet<i32>, lowest: &mut i32) -> Result<OwnedFd> {
    loop {
        // SAFETY: a call without pointers.
        let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, *lowest) };
        let copy = Errno::result(copy).map_err(|e| {
            Error::Restore(format!(
                "cannot place descriptors: {}; raise the limit with ulimit -n",
                e.desc()
            ))
        })?;
        // SAFETY: the kernel just gave us this descriptor.
        let copy = unsafe { OwnedFd::from_raw_fd(copy) };
        *lowest = copy.as_raw_fd() + 1;
        if !numbers.contains(&copy.as_raw_fd()) {
            return Ok(copy);
        }
    }
}
