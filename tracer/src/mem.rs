//! Another process's memory.
//!
//! Two ways, chosen by what the kernel checks: `process_vm_readv`/`writev` honour page protections and are fast;
//! `/proc/PID/mem` overrides protections (`FOLL_FORCE`), and so reaches PROT_NONE pages and text.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};

use crate::{Error, Pid, RemoteAddr, Result};

/// The memory of one process, open for reading and writing.
///
/// The file stays tied to the address space that the process had when it was opened:
/// after an exec it reads as empty.
#[derive(Debug)]
pub struct ProcessMemory {
    pid: Pid,
    file: File,
}

impl ProcessMemory {
    /// Opens `/proc/PID/mem`; needs permission to trace the process (ptrace(2), "Ptrace access mode checking").
    pub fn open(pid: Pid) -> Result<Self> {
        let path = PathBuf::from(format!("/proc/{pid}/mem"));
        match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => Ok(Self { pid, file }),
            Err(source) => Err(Error::Proc { path, source }),
        }
    }

    /// The process.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Reads exactly `into.len()` bytes, regardless of page protections.
    pub fn read(&self, addr: RemoteAddr, into: &mut [u8]) -> Result<()> {
        self.file
            .read_exact_at(into, addr.raw())
            .map_err(|e| self.error("read", addr, into.len(), e))
    }

    /// Writes all bytes, regardless of page protections. A private file page is copied first; the file is never
    /// written.
    pub fn write(&self, addr: RemoteAddr, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all_at(bytes, addr.raw())
            .map_err(|e| self.error("write", addr, bytes.len(), e))
    }

    /// Reads one fixed-size value.
    pub fn read_array<const N: usize>(&self, addr: RemoteAddr) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read(addr, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads a little-endian `u64`.
    pub fn read_u64(&self, addr: RemoteAddr) -> Result<u64> {
        Ok(u64::from_le_bytes(self.read_array(addr)?))
    }

    fn error(&self, what: &'static str, addr: RemoteAddr, len: usize, e: std::io::Error) -> Error {
        let errno = Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
        Error::Memory {
            what,
            pid: self.pid,
            addr,
            len,
            errno,
        }
    }
}

/// Reads `into.len()` bytes with `process_vm_readv(2)`; returns how many were read before
/// the first unreadable page. Any thread may call it.
pub fn read_vm(pid: Pid, addr: RemoteAddr, into: &mut [u8]) -> Result<usize> {
    let remote = remote(addr, into.len());
    let read = process_vm_readv(
        nix::unistd::Pid::from_raw(pid.raw()),
        &mut [IoSliceMut::new(into)],
        &[remote],
    );
    read.map_err(|errno| failed("read", pid, remote, errno))
}

/// Writes with `process_vm_writev(2)` as far as pages are writable; returns how many bytes.
pub fn write_vm(pid: Pid, addr: RemoteAddr, bytes: &[u8]) -> Result<usize> {
    let remote = remote(addr, bytes.len());
    let written = process_vm_writev(
        nix::unistd::Pid::from_raw(pid.raw()),
        &[IoSlice::new(bytes)],
        &[remote],
    );
    written.map_err(|errno| failed("write", pid, remote, errno))
}

fn remote(addr: RemoteAddr, len: usize) -> RemoteIoVec {
    let base = addr.raw() as usize;
    RemoteIoVec { base, len }
}

fn failed(what: &'static str, pid: Pid, at: RemoteIoVec, errno: Errno) -> Error {
    Error::Memory {
        what,
        pid,
        addr: RemoteAddr(at.base as u64),
        len: at.len,
        errno,
    }
}

/// Most pieces that one `process_vm_readv` takes (`UIO_MAXIOV`).
pub const MAX_PIECES: usize = 1024;

/// Appends pieces of another process's memory, at most [`MAX_PIECES`], to `into` in one call.
/// Returns the bytes appended, which end before the first unreadable page. Any thread may
/// call it.
pub fn append_vm(pid: Pid, pieces: &[(u64, usize)], into: &mut Vec<u8>) -> Result<usize> {
    let total: usize = pieces.iter().map(|(_, len)| len).sum();
    into.reserve(total);
    let room = into.spare_capacity_mut();
    let local = libc::iovec {
        iov_base: room.as_mut_ptr().cast(),
        iov_len: total,
    };
    let parts: Vec<libc::iovec> = pieces
        .iter()
        .map(|&(addr, len)| libc::iovec {
            iov_base: addr as *mut _,
            iov_len: len,
        })
        .collect();
    // SAFETY: `local` covers reserved room of ours; `parts` are only interpreted in the other
    // process.
    let n = unsafe {
        libc::process_vm_readv(pid.raw(), &local, 1, parts.as_ptr(), parts.len() as u64, 0)
    };
    match Errno::result(n) {
        Ok(n) => {
            // SAFETY: the kernel has initialised `n` bytes behind the old length.
            unsafe { into.set_len(into.len() + n as usize) };
            Ok(n as usize)
        }
        Err(Errno::EFAULT) => Ok(0),
        Err(Errno::ESRCH) => Err(Error::Died { tid: pid.leader() }),
        Err(errno) => {
            let first = RemoteAddr(pieces.first().map_or(0, |p| p.0));
            Err(failed("read", pid, remote(first, total), errno))
        }
    }
}
