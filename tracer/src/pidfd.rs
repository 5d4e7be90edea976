//! Processes by pidfd, and duplicates of their descriptors.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use crate::{Error, Pid, Result};

/// A `pidfd`: refers to the same process even after its pid is reused.
#[derive(Debug)]
pub struct PidFd {
    pid: Pid,
    fd: OwnedFd,
}

impl PidFd {
    /// `pidfd_open(2)` (Linux 5.3).
    pub fn open(pid: Pid) -> Result<Self> {
        let fd = ckpt_sys::events::pidfd(pid.raw(), 0)
            .map_err(|errno| Error::from_errno("pidfd_open", pid.leader(), errno))?;
        Ok(Self { pid, fd })
    }

    /// The process.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Duplicates descriptor `fd` of the process: the same open file description (`pidfd_getfd(2)`, Linux 5.6). Needs
    /// permission to trace the process.
    pub fn get_fd(&self, fd: i32) -> Result<OwnedFd> {
        // SAFETY: a system call without pointers.
        let copy = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.fd.as_raw_fd(), fd, 0) };
        let copy = Errno::result(copy).map_err(|errno| Error::Kernel {
            call: "pidfd_getfd",
            object: format!("fd {fd} of process {}", self.pid),
            errno,
        })?;
        // SAFETY: the kernel just gave us this descriptor (close-on-exec); nothing else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(copy as i32) })
    }

    /// Sends a signal (`pidfd_send_signal(2)`).
    pub fn signal(&self, signal: i32) -> Result<()> {
        // Without a siginfo it has kill(2) semantics.
        self.send(signal, std::ptr::null())
    }

    /// Sends a signal with a value, as sigqueue(3) does.
    pub fn queue(&self, signal: i32, value: u64) -> Result<()> {
        // `siginfo_t`: number, errno, code, padding; pid and uid of the sender, the value.
        let mut info = [0u32; 32];
        info[0] = signal as u32;
        info[2] = libc::SI_QUEUE as u32;
        info[4] = std::process::id();
        info[5] = nix::unistd::getuid().as_raw();
        info[6] = value as u32;
        info[7] = (value >> 32) as u32;
        self.send(signal, info.as_ptr())
    }

    fn send(&self, signal: i32, info: *const u32) -> Result<()> {
        let fd = self.fd.as_raw_fd();
        // SAFETY: the siginfo is null or has its 128 bytes.
        let r = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, info, 0) };
        Errno::result(r)
            .map(drop)
            .map_err(|errno| Error::from_errno("pidfd_send_signal", self.pid.leader(), errno))
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for PidFd {
    fn as_raw_fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}
