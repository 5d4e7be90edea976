//! The memory in which a helper process stores what it took from a pty.

use std::os::fd::OwnedFd;

use ckpt_sys::events::poll_now;
use nix::errno::Errno;
use nix::unistd::read;
use serde_bytes::ByteBuf;

use super::super::terminal::{Ending, Flow, Input};
use super::{Result, Waiting};

/// More than the kernel holds in one direction: twice 8 KiB in the port's buffers (`pty.c`, `tty_buffer.c`), 4 KiB in
/// the line discipline, and the excess of the last write.
const ROOM: usize = 64 * 1024;
/// Each line has at least one byte, or is an end-of-file character.
const LINES: usize = 8 * 1024;

/// The data of the helper.
#[derive(Clone, Copy)]
pub(super) struct Area {
    pub(super) output_len: usize,
    pub(super) input_len: usize,
    pub(super) lines: usize,
    pub(super) flow: Flow,
    pub(super) master_stopped: bool,
    pub(super) status: u8,
    pub(super) lengths: [u32; LINES],
    pub(super) endings: [Ending; LINES],
    pub(super) output: [u8; ROOM],
    pub(super) input: [u8; ROOM],
}

impl Area {
    /// Empty.
    pub(super) fn new() -> Box<Self> {
        Box::new(Self {
            output_len: 0,
            input_len: 0,
            lines: 0,
            flow: Flow::Running,
            master_stopped: false,
            status: 0,
            lengths: [0; LINES],
            endings: [Ending::Line; LINES],
            output: [0; ROOM],
            input: [0; ROOM],
        })
    }

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
            master_stopped: self.master_stopped,
            status: self.status,
        }
    }
}

/// Stores one read of input; `None` if there is none.
pub(super) fn read_some(slave: &OwnedFd, area: &mut Area) -> Result<Option<usize>> {
    if poll_now(slave, libc::POLLIN) & libc::POLLIN == 0 {
        return Ok(None);
    }
    let room = area.input.get_mut(area.input_len..area.input_len + 4096);
    match read(slave, room.ok_or(Errno::E2BIG)?) {
        Ok(n) => {
            area.input_len += n;
            Ok(Some(n))
        }
        Err(Errno::EAGAIN) => Ok(None),
        Err(e) => Err(e),
    }
}
