//! Copies of descriptors where pidfd_getfd(2) is not permitted: the process hands them out itself,
//! in a message to us (`SCM_RIGHTS`, unix(7)).
//!
//! It is one list of calls, which the task executes to its end also if we die: a pair of sockets
//! is made, its numbers are put by the kernel where the later calls read their operands, the message
//! is sent from one of them to ours, and both are closed. Until the kernel has put the numbers
//! there, the operands are -1, so that no call can hit a descriptor of the program's.
//!
//! In the middle of the list the process has marks on it: the pair in its table of descriptors, and another
//! umask. Who shows them as well shares those things with it, which is what kcmp(2) would tell.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use super::RemoteCalls;
use super::batch::{CALL_BYTES, Call};
use super::calls::checked;
use crate::fault::{self, Step};
use crate::{Error, Result};

/// `SCM_MAX_FD`, include/net/scm.h.
pub const AT_ONCE: usize = 253;

/// Where the pieces stand in the scratch memory; the lists of calls come last.
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

/// Scratch memory that is needed.
pub const SCRATCH: u64 = 4096;

/// The marks on a process while they are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// A descriptor that it did not have.
    pub fd: i32,
    /// Its umask, which was another one.
    pub umask: u32,
}

/// Whoever gets the copies.
#[derive(Debug)]
pub struct Borrower {
    socket: OwnedFd,
    /// Its `struct sockaddr_un`, as the kernel has chosen it: an abstract name.
    name: Vec<u8>,
}

impl Borrower {
    /// Makes a socket that can be written to by its name.
    pub fn new() -> Result<Self> {
        let failed = |call, errno| Error::Kernel {
            call,
            object: "a socket for descriptors of the job".into(),
            errno,
        };
        let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: a call without pointers.
        let fd = Errno::result(unsafe { libc::socket(libc::AF_UNIX, kind, 0) })
            .map_err(|errno| failed("socket", errno))?;
        // SAFETY: the kernel just gave us this descriptor.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut name = vec![0u8; size_of::<libc::sockaddr_un>()];
        name[..2].copy_from_slice(&(libc::AF_UNIX as u16).to_ne_bytes());
        let mut len = name.len() as libc::socklen_t;
        // SAFETY: a name of two bytes makes the kernel choose one; it writes `len` bytes at most.
        unsafe {
            let r = libc::bind(fd, name.as_ptr().cast(), 2);
            Errno::result(r).map_err(|errno| failed("bind", errno))?;
            let r = libc::getsockname(fd, name.as_mut_ptr().cast(), &raw mut len);
            Errno::result(r).map_err(|errno| failed("getsockname", errno))?;
        }
        name.truncate(len as usize);
        Ok(Self { socket, name })
    }

    /// Copies of some descriptors of the process, [`AT_ONCE`] at most. `umask` is the process's;
    /// `look` is called while the marks are on it.
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
            // The kernel has put the numbers nowhere, so nothing was closed.
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

    /// Writes everything into the scratch memory that the calls use, and answers the calls.
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
        // One byte goes with them.
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
        // struct iovec, from where and to where.
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
        // The ring stands between the two parts; an operand stands behind the call's number.
        let operand = |call: u64| at::LIST + (first.len() as u64 + 1 + call) * CALL_BYTES + 8;
        let (one, other) = (place(at::PAIR), place(at::PAIR) + 4);
        calls.write_scratch(at::FROM, &words(&[one, 4, one, 4, other, 4]))?;
        let to = [1, 2, 3].map(|call| [place(operand(call)), 4]);
        calls.write_scratch(at::TO, &words(&to.concat()))?;
        Ok([first, second])
    }

    fn receive(&self, count: usize) -> Result<Vec<OwnedFd>> {
        // struct cmsghdr, then the numbers; in words, for its alignment.
        let mut control = [0u64; 2 + AT_ONCE.div_ceil(2)];
        let mut byte = [0u8; 1];
        let mut iovec = libc::iovec {
            iov_base: byte.as_mut_ptr().cast(),
            iov_len: 1,
        };
        // SAFETY: a structure of numbers and pointers, for which zero is nothing.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = &raw mut iovec;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = 16 + (4 * count).next_multiple_of(8);
        let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
        // SAFETY: everything that the header points to lives on, with the lengths that it says.
        let r = unsafe { libc::recvmsg(self.socket.as_raw_fd(), &raw mut header, flags) };
        Errno::result(r).map_err(|errno| Error::Kernel {
            call: "recvmsg",
            object: "descriptors of the job".into(),
            errno,
        })?;
        let len = (control[0] as usize).min(size_of_val(&control));
        let is_rights = header.msg_controllen >= 16
            && control[1] == (libc::SCM_RIGHTS as u64) << 32 | libc::SOL_SOCKET as u64;
        let found = if is_rights { (len - 16) / 4 } else { 0 };
        let number = |i: usize| (control[2 + i / 2] >> (32 * (i % 2))) as i32;
        // SAFETY: the kernel just gave us these descriptors.
        Ok((0..found)
            .map(|i| unsafe { OwnedFd::from_raw_fd(number(i)) })
            .collect())
    }
}
