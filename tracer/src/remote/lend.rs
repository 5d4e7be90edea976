//! Duplicates of descriptors where pidfd_getfd(2) is not permitted: the process sends them to us itself
//! (`SCM_RIGHTS`, unix(7)).
//!
//! This is one list of calls, which the task completes even if we die: socketpair(2), whose result the kernel stores
//! into the operands of the later calls; sendmsg(2) from one of the pair to our socket; close(2) of both. Before that
//! the operands are -1, so that no call can hit a descriptor of the program's.
//!
//! In the middle of the list the process is marked: by the pair in its descriptor table, and by another umask.
//! Another process that shows the marks shares the table or the umask, which kcmp(2) would tell otherwise.

use std::os::fd::OwnedFd;

use ckpt_sys::{Errno, control, sockets};

use super::RemoteCalls;
use super::batch::{CALL_BYTES, Call};
use super::calls::checked;
use crate::fault::{self, Step};
use crate::{Error, Result};

/// `SCM_MAX_FD`, include/net/scm.h.
pub const AT_ONCE: usize = 253;

/// Offsets in the scratch memory; the lists of calls come last.
mod at {
    pub(super) const PAIR: u64 = 0;
    pub(super) const BYTE: u64 = 8;
    pub(super) const FROM: u64 = 16;
    pub(super) const TO: u64 = 64;
    pub(super) const HEADER: u64 = 128;
    pub(super) const IOVEC: u64 = 192;
    pub(super) const NAME: u64 = 256;
    pub(super) const CONTROL: u64 = 512;
    pub(super) const LIST: u64 = 2048;
}

/// Bytes of scratch memory needed.
pub const SCRATCH: u64 = 4096;

/// The marks on a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// A descriptor that it did not have before.
    pub fd: i32,
    /// Its changed umask.
    pub umask: u32,
}

/// The receiver of the duplicates.
#[derive(Debug)]
pub struct Borrower {
    socket: OwnedFd,
    /// Its `struct sockaddr_un`: an abstract name chosen by the kernel.
    name: Vec<u8>,
}

impl Borrower {
    /// Creates a socket that can be addressed by name.
    pub fn new() -> Result<Self> {
        let failed = |call, errno| Error::Kernel {
            call,
            object: "a socket for descriptors of the job".into(),
            errno,
        };
        let socket = sockets::socket(libc::AF_UNIX, libc::SOCK_DGRAM);
        let socket = socket.map_err(|errno| failed("socket", errno))?;
        // For an address of two bytes the kernel chooses the name.
        let unnamed = (libc::AF_UNIX as u16).to_ne_bytes();
        sockets::bind(&socket, &unnamed).map_err(|errno| failed("bind", errno))?;
        let name = sockets::own_address(&socket);
        let name = name.map_err(|errno| failed("getsockname", errno))?;
        Ok(Self { socket, name })
    }

    /// Duplicates some descriptors of the process, [`AT_ONCE`] at most. `umask` is the process's; `look` is called
    /// while it is marked.
    ///
    /// # Errors
    /// [`Error::Remote`] when the kernel refuses.
    pub fn borrow(
        &self,
        calls: &mut RemoteCalls<'_>,
        fds: &[i32],
        umask: u32,
        look: &mut dyn FnMut(Marks) -> Result<()>,
    ) -> Result<Vec<OwnedFd>> {
        let tid = calls.tid();
        let marked = umask ^ 0o001;
        let [first, second] = self.lists(calls, fds, umask, marked)?;
        let scratch = calls.scratch();
        let memory = calls.cave.mem;
        let answers = calls.batch_in_two(at::LIST, [&first, &second], &mut || {
            fault::hit(Step::Lending)?;
            let fd = i32::from_le_bytes(memory.read_array(scratch + at::PAIR)?);
            look(Marks { fd, umask: marked })
        })?;
        if answers[0] == 0 && answers[1] != 12 {
            // The kernel stored no numbers, so nothing was closed.
            let pair: [i32; 2] = [0, 4].map(|half| {
                let bytes = memory.read_array(scratch + at::PAIR + half);
                bytes.map_or(-1, i32::from_le_bytes)
            });
            for fd in pair {
                calls.call("close", libc::SYS_close, [fd as u32 as u64, 0, 0, 0, 0, 0])?;
            }
        }
        let all = first.iter().chain(&second).zip(answers);
        for (call, answer) in all {
            checked(tid, call.name, answer)?;
        }
        let copies = self.receive(fds.len())?;
        match copies.len() == fds.len() {
            true => Ok(copies),
            false => Err(Error::Remote {
                tid,
                call: "sendmsg",
                errno: Errno::EMFILE,
            }),
        }
    }

    /// Writes all operands to the scratch memory, and returns the calls.
    fn lists(
        &self,
        calls: &RemoteCalls<'_>,
        fds: &[i32],
        umask: u32,
        marked: u32,
    ) -> Result<[Vec<Call>; 2]> {
        const UNSET: u64 = 0xffff_ffff;
        let place = |offset: u64| (calls.scratch() + offset).raw();
        let words =
            |words: &[u64]| -> Vec<u8> { words.iter().flat_map(|w| w.to_le_bytes()).collect() };
        let control_len = 16 + 4 * fds.len() as u64;
        let mut control = words(&[control_len]);
        for half in [libc::SOL_SOCKET, libc::SCM_RIGHTS].iter().chain(fds) {
            control.extend_from_slice(&half.to_le_bytes());
        }
        calls.write_scratch(at::PAIR, &words(&[u64::MAX, 0]))?;
        calls.write_scratch(at::NAME, &self.name)?;
        calls.write_scratch(at::CONTROL, &control)?;
        // sendmsg(2) needs one byte of data.
        calls.write_scratch(at::IOVEC, &words(&[place(at::BYTE), 1]))?;
        // struct msghdr
        let header = [
            place(at::NAME),
            self.name.len() as u64,
            place(at::IOVEC),
            1,
            place(at::CONTROL),
            control_len,
            0,
        ];
        calls.write_scratch(at::HEADER, &words(&header))?;

        let kind = (libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) as u64;
        let pid = calls.pid().raw() as u64;
        let family = libc::AF_UNIX as u64;
        let pair = [family, kind, 0, place(at::PAIR)];
        // struct iovec: source and destination.
        let copy = [pid, place(at::TO), 3, place(at::FROM), 3, 0];
        let first = vec![
            Call::new("socketpair", libc::SYS_socketpair, &pair),
            Call::new("process_vm_readv", libc::SYS_process_vm_readv, &copy),
            Call::new("umask", libc::SYS_umask, &[marked.into()]),
        ];
        let message = [UNSET, place(at::HEADER), libc::MSG_NOSIGNAL as u64];
        let second = vec![
            Call::new("umask", libc::SYS_umask, &[umask.into()]),
            Call::new("sendmsg", libc::SYS_sendmsg, &message),
            Call::new("close", libc::SYS_close, &[UNSET]),
            Call::new("close", libc::SYS_close, &[UNSET]),
        ];
        // The doorbell call is between the two parts; an operand follows the call's number.
        let operand = |call: u64| at::LIST + (first.len() as u64 + 1 + call) * CALL_BYTES + 8;
        let (one, other) = (place(at::PAIR), place(at::PAIR) + 4);
        calls.write_scratch(at::FROM, &words(&[one, 4, one, 4, other, 4]))?;
        let to = [1, 2, 3].map(|call| [place(operand(call)), 4]);
        calls.write_scratch(at::TO, &words(&to.concat()))?;
        Ok([first, second])
    }

    fn receive(&self, count: usize) -> Result<Vec<OwnedFd>> {
        let came = control::receive(&self.socket, &mut [0], libc::MSG_DONTWAIT);
        let mut came = came.map_err(|errno| Error::Kernel {
            call: "recvmsg",
            object: "descriptors of the job".into(),
            errno,
        })?;
        // The task may send more descriptors than it was asked for.
        came.rights.truncate(count);
        Ok(came.rights)
    }
}
