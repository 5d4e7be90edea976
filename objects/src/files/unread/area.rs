//! The memory in which a helper process leaves what it took out of a pty.
#![allow(unsafe_code)]

use std::ops::{Deref, DerefMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;

use nix::errno::Errno;
use serde_bytes::ByteBuf;

use super::super::sys::poll_now;
use super::super::terminal::{Ending, Flow, Input};
use super::{Result, Waiting, read};

/// More than the kernel lets wait in one direction: twice 8 KiB in the port's buffers (`pty.c`,
/// `tty_buffer.c`), 4 KiB in the line discipline, and what the last write was over it.
const ROOM: usize = 64 * 1024;
/// Each line has a byte at least, or is an end of file that was typed.
const LINES: usize = 8 * 1024;
/// What the helper fills, in memory that both have.
#[repr(C)]
pub(super) struct Area {
    pub(super) output_len: usize,
    pub(super) input_len: usize,
    pub(super) lines: usize,
    pub(super) flow: Flow,
    pub(super) status: u8,
    pub(super) lengths: [u32; LINES],
    pub(super) endings: [Ending; LINES],
    pub(super) output: [u8; ROOM],
    pub(super) input: [u8; ROOM],
}

/// One that is still ours when the process that filled it has ended.
pub(super) struct Shared(NonNull<Area>);

impl Shared {
    pub(super) fn new() -> Result<Self> {
        // SAFETY: a new mapping.
        let area = unsafe {
            let (prot, flags) = (
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            );
            libc::mmap(std::ptr::null_mut(), size_of::<Area>(), prot, flags, -1, 0)
        };
        let area = NonNull::new(area.cast()).filter(|_| area != libc::MAP_FAILED);
        area.map(Self).ok_or_else(Errno::last)
    }
}

impl Deref for Shared {
    type Target = Area;

    fn deref(&self) -> &Area {
        // SAFETY: the mapping is of that size, and zero is valid for it; the helper has ended when we
        // look at it.
        unsafe { self.0.as_ref() }
    }
}

impl DerefMut for Shared {
    fn deref_mut(&mut self) -> &mut Area {
        // SAFETY: as above.
        unsafe { self.0.as_mut() }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: our mapping, of that size, to which no reference is left.
        unsafe { libc::munmap(self.0.as_ptr().cast(), size_of::<Area>()) };
    }
}

impl Area {
    pub(super) fn line(&mut self, len: usize, ending: Ending) -> Result<()> {
        let at = self.lines;
        *self.lengths.get_mut(at).ok_or(Errno::E2BIG)? = len as u32;
        self.endings[at] = ending;
        self.lines += 1;
        Ok(())
    }

    pub(super) fn waiting(&self) -> Waiting {
        let mut from = 0;
        let line = |at: usize| {
            let to = from + self.lengths[at] as usize;
            let bytes = ByteBuf::from(&self.input[from..to]);
            from = to;
            Input {
                bytes,
                ending: self.endings[at],
            }
        };
        Waiting {
            output: self.output[..self.output_len].to_vec(),
            input: (0..self.lines).map(line).collect(),
            flow: self.flow,
            status: self.status,
        }
    }
}

/// One read of input into it; nothing when there is none.
pub(super) fn read_some(slave: &OwnedFd, area: &mut Area) -> Result<Option<usize>> {
    if poll_now(slave, libc::POLLIN) & libc::POLLIN == 0 {
        return Ok(None);
    }
    let room = area.input.get_mut(area.input_len..area.input_len + 4096);
    match read(slave.as_raw_fd(), room.ok_or(Errno::E2BIG)?) {
        Ok(n) => {
            area.input_len += n;
            Ok(Some(n))
        }
        Err(Errno::EAGAIN) => Ok(None),
        Err(e) => Err(e),
    }
}
