//! Unread contents of a pty of the job.
//!
//! The kernel has no way to peek at them, so a helper process reads them and puts them back at once, while the job
//! stands still; if we are killed meanwhile, the helper completes its work. Anything that would prevent putting data
//! back is detected before anything is read. This includes changing the modes temporarily: output must not be
//! processed a second time, and an incomplete line can be read in noncanonical mode only.

use std::os::fd::OwnedFd;
use std::time::Duration;

use ckpt_sys::helper::Helper;
use ckpt_sys::tty::{self, Modes};
use ckpt_sys::{events, files};
use nix::errno::Errno;
use nix::unistd::{read, write};

use super::terminal::{Ending, Flow, Input};
use crate::error::Obstacle;

mod area;
mod flow;

use area::{Area, read_some};
use flow::takes_output;

type Result<T, E = Errno> = std::result::Result<T, E>;

/// Attempts, with a pause of [`NAP`] each, before data counts as stuck.
const ATTEMPTS: u32 = 2_000;
const NAP: Duration = Duration::from_micros(100);
/// An incomplete line is put back in pieces of this size, since a reprint character is needed that a piece does not
/// contain.
const BEGUN: usize = 128;
/// Bytes that the line discipline holds; more stays in the port's buffers.
const DISCIPLINE: usize = 4095;
/// With writes of this size a pty accepts the most (22,448 bytes of raw output; 20,480 in pieces of 256, 13,824 in
/// one piece). The port's buffers are allocated to fit the first write, and are limited as a whole.
const PIECE: usize = 1020;

/// Why the contents cannot be captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyError {
    /// A status change of a slave that the job has closed, unread by a reader in packet mode.
    Status,
    /// More input, in lines or to be edited, than the line discipline can hold.
    Much,
    /// A call failed.
    Failed(Errno),
}

impl CopyError {
    /// As an obstacle, for a message.
    pub fn obstacle(self, master: String) -> Obstacle {
        let moment = "let its reader read first, or try again in a moment";
        match self {
            CopyError::Status => Obstacle::new(
                master,
                "is the master of a pty in packet mode with an unread status, of a slave that is closed",
                moment,
            )
            .passing(),
            CopyError::Much => Obstacle::new(
                master,
                "is the master of a pty with more unread input than can be copied",
                moment,
            )
            .passing(),
            CopyError::Failed(errno) => Obstacle::new(
                master,
                format!(
                    "is the master of a pty whose unread data cannot be copied: {}",
                    errno.desc()
                ),
                moment,
            ),
        }
    }
}

/// Unread data, in both directions.
#[derive(Debug, Default)]
pub struct Waiting {
    /// From the slave to the master.
    pub output: Vec<u8>,
    /// From the master to the slave.
    pub input: Vec<Input>,
    /// Whether output is stopped.
    pub flow: Flow,
    /// Writes to the master are stopped.
    pub master_stopped: bool,
    /// Status that a reader in packet mode has not read, `TIOCPKT_*`.
    pub status: u8,
}

/// Copies the unread contents of a pty whose tasks are all stopped, by its master. `slave` is a descriptor of the
/// other side, if the job has one. `asked` are the descriptions of either side with O_ASYNC, which is cleared
/// meanwhile: otherwise the transfer would raise SIGIO in their owners.
pub fn look(
    master: &OwnedFd,
    slave: Option<&OwnedFd>,
    asked: &[&OwnedFd],
) -> Result<Waiting, CopyError> {
    let ready = events::poll_now(master, libc::POLLIN | libc::POLLPRI);
    let status = tty::packet_mode(master) && ready & libc::POLLPRI != 0;
    if status && slave.is_none() {
        return Err(CopyError::Status);
    }
    let output = ready & libc::POLLIN != 0 && tty::unread(master) > 0;
    let lines = slave.and_then(|s| tty::modes(s).ok());
    let lines = lines.is_some_and(|m| m.local & libc::ICANON != 0);
    let input = slave.is_some_and(|s| lines || tty::unread(s) > 0);
    let full = slave.is_some_and(|s| !takes_output(s));
    let stopped = !takes_output(master);
    if !output && !input && !full && !status && !stopped {
        return Ok(Waiting::default());
    }
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK;
    // Trying to open a locked one would make it unusable (`TTY_IO_ERROR`, pty_open of pty.c).
    let own = match tty::is_locked(master) {
        true => Err(Errno::EIO),
        false => tty::peer(master, flags),
    };
    let own = match (own, slave) {
        (Ok(own), _) => own,
        // Locked, or in exclusive mode. A write through the job's own description may block when it is full.
        (Err(_), Some(slave)) if tty::unread(master) < DISCIPLINE => {
            let copy = slave.try_clone();
            copy.map_err(|_| CopyError::Failed(Errno::EMFILE))?
        }
        (Err(errno), _) => return Err(CopyError::Failed(errno)),
    };
    let modes = tty::modes(&own).map_err(CopyError::Failed)?;
    // Above that, some bytes may be unprocessed, which makes a difference.
    if input && !modes.passes_input_on() && tty::unread(&own) > DISCIPLINE / 2 {
        return Err(CopyError::Much);
    }
    let work = Work {
        master,
        slave: &own,
        packets: tty::packet_mode(master),
        modes,
    };
    work.in_helper(asked, input).map_err(CopyError::Failed)
}

/// Puts unread data into a new pty; its modes are set afterwards.
pub fn put(master: &OwnedFd, slave: &OwnedFd, modes: Modes, waiting: &Waiting) -> Result<()> {
    let work = Work {
        master,
        slave,
        packets: waiting.status != 0,
        modes,
    };
    if work.packets {
        // Flow control as in the job, before status changes are generated.
        tty::set_modes(slave, &modes)?;
        tty::set_packet_mode(master, true)?;
        work.set_status(waiting.status)?;
    }
    if !waiting.input.is_empty() {
        let all: Vec<u8> = waiting
            .input
            .iter()
            .flat_map(|i| i.bytes.to_vec())
            .collect();
        let pieces = waiting.input.iter().map(|i| (&i.bytes[..], i.ending));
        work.put_pieces(&all, pieces, |bytes| work.write(slave, master, bytes))?;
    }
    tty::set_modes(slave, &work.unprocessed())?;
    work.write(master, slave, &waiting.output)?;
    tty::set_modes(slave, &work.modes)?;
    work.stop(waiting.flow, waiting.status)?;
    if waiting.master_stopped {
        work.stop_master();
    }
    Ok(())
}

/// Sets O_ASYNC of a description that has an owner.
fn set_async(fd: &OwnedFd, on: bool) {
    let flags = files::flags(fd).unwrap_or(0);
    let flags = match on {
        true => flags | libc::O_ASYNC,
        false => flags & !libc::O_ASYNC,
    };
    let _ = files::set_flags(fd, flags);
}

struct Work<'a> {
    master: &'a OwnedFd,
    slave: &'a OwnedFd,
    packets: bool,
    modes: Modes,
}

impl Work<'_> {
    fn in_helper(&self, asked: &[&OwnedFd], input: bool) -> Result<Waiting> {
        let mut area = Area::new();
        let done = Helper::run_with(&mut *area, |area| {
            asked.iter().for_each(|fd| set_async(fd, false));
            let done = self.work(area, input);
            asked.iter().for_each(|fd| set_async(fd, true));
            done.map_or_else(|e| e as i32, |()| 0)
        });
        match done? {
            0 => Ok(area.waiting()),
            errno => Err(Errno::from_raw(errno)),
        }
    }

    fn work(&self, area: &mut Area, input: bool) -> Result<()> {
        area.status = self.take_status()?;
        let mut done = self.take_output(area);
        area.flow = self.start();
        if area.flow != Flow::Running {
            done = done.and(self.take_echoes(area));
        }
        if input {
            done = done.and(self.take_input(area));
            done = done.and(tty::set_modes(self.slave, &self.modes));
            // The echo of input that was only now processed.
            done = done.and(self.take_output(area));
        }
        // What is put back is written to the master.
        area.master_stopped = self.start_master();
        done = done.and(self.set_status(area.status));
        // After any failure, what was taken is put back: input first, while output has room.
        if input {
            done = done.and(self.put_input(area));
        }
        done = done.and(self.put_output(area));
        done = done.and(self.stop(area.flow, area.status));
        if area.master_stopped {
            self.stop_master();
        }
        done
    }

    fn take_output(&self, area: &mut Area) -> Result<()> {
        let mut block = [0u8; 4097];
        // Polling makes the kernel process the port's buffers.
        while events::poll_now(self.master, libc::POLLIN) & libc::POLLIN != 0 {
            if tty::unread(self.master) == 0 {
                break;
            }
            let n = read(self.master, &mut block)?;
            let data = &block[usize::from(self.packets).min(n)..n];
            let to = area.output_len + data.len();
            let room = area.output.get_mut(area.output_len..to);
            room.ok_or(Errno::E2BIG)?.copy_from_slice(data);
            area.output_len = to;
        }
        Ok(())
    }

    /// The kernel writes pending echoes before other output (`n_tty_write`); they must not precede the existing
    /// output.
    fn take_echoes(&self, area: &mut Area) -> Result<()> {
        let _ = write(self.slave, &[]);
        self.take_output(area)
    }

    fn put_output(&self, area: &Area) -> Result<()> {
        let processed = self.modes.output & libc::OPOST != 0;
        if processed {
            tty::set_modes(self.slave, &self.unprocessed())?;
        }
        let output = &area.output[..area.output_len];
        let put = self.put_back(self.master, self.slave, output);
        if processed {
            tty::set_modes(self.slave, &self.modes)?;
        }
        put
    }

    fn unprocessed(&self) -> Modes {
        let mut modes = self.modes;
        modes.output &= !libc::OPOST;
        modes
    }

    fn take_input(&self, area: &mut Area) -> Result<()> {
        let canonical = self.modes.local & libc::ICANON != 0;
        if canonical {
            while let Some(n) = read_some(self.slave, area)? {
                let last = area.input[..area.input_len].last().copied();
                let own = |c: u8| c != 0 && last == Some(c);
                let ends = [self.modes.chars[libc::VEOL], self.modes.chars[libc::VEOL2]];
                let complete = n > 0 && (last == Some(b'\n') || ends.into_iter().any(own));
                area.line(
                    n,
                    if complete {
                        Ending::Line
                    } else {
                        Ending::EndOfFile
                    },
                )?;
            }
        }
        let mut modes = self.modes;
        modes.local &= !libc::ICANON;
        modes.chars[libc::VMIN] = 1;
        modes.chars[libc::VTIME] = 0;
        tty::set_modes(self.slave, &modes)?;
        while let Some(n @ 1..) = read_some(self.slave, area)? {
            area.line(n, Ending::Open)?;
        }
        Ok(())
    }

    fn put_input(&self, area: &Area) -> Result<()> {
        let bytes = &area.input[..area.input_len];
        let mut from = 0;
        let pieces = (0..area.lines).map(|line| {
            let to = from + area.lengths[line] as usize;
            let piece = (&bytes[from..to], area.endings[line]);
            from = to;
            piece
        });
        let back = |bytes: &[u8]| self.put_back(self.slave, self.master, bytes);
        let put = self.put_pieces(bytes, pieces, back);
        put.and(tty::set_modes(self.slave, &self.modes))
    }

    /// Writes input, while the slave's output is running and empty; the modes stay changed. A kernel worker processes
    /// the input asynchronously and must find these modes, so this waits until all of it is taken in.
    fn put_pieces<'a>(
        &self,
        all: &[u8],
        pieces: impl Iterator<Item = (&'a [u8], Ending)>,
        write: impl Fn(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let modes = self.verbatim(all);
        tty::set_modes(self.slave, &modes)?;
        let canonical = modes.local & (libc::ICANON | libc::EXTPROC) == libc::ICANON;
        let mut ready = 0;
        let taken_in = |ready: usize| {
            let all = || {
                events::poll_now(self.slave, libc::POLLIN);
                tty::unread(self.slave) == ready.min(DISCIPLINE)
            };
            soon(10 * ATTEMPTS, all) || !canonical
        };
        for (bytes, ending) in pieces {
            // FIONREAD does not count an incomplete line after complete ones.
            if canonical && ending == Ending::Open {
                for piece in bytes.chunks(BEGUN) {
                    let lines = taken_in(ready);
                    write(piece)?;
                    self.await_begun(modes, piece)?;
                    lines.then_some(()).ok_or(Errno::EAGAIN)?;
                }
                continue;
            }
            write(bytes)?;
            if ending == Ending::EndOfFile {
                write(&[modes.chars[libc::VEOF]])?;
            }
            ready += bytes.len();
        }
        taken_in(ready).then_some(()).ok_or(Errno::EAGAIN)
    }

    /// Writes data to be read from one side through the other, such that the most fits.
    fn write(&self, reader: &OwnedFd, writer: &OwnedFd, bytes: &[u8]) -> Result<()> {
        let mut pieces = bytes.chunks(PIECE);
        pieces.try_for_each(|piece| {
            // Existing data is processed first, so that the buffers have the most room.
            events::poll_now(reader, libc::POLLIN);
            write_all(writer, reader, piece)
        })
    }

    /// The same for data taken from a job: data that does not fit until its reader reads is left to a process that
    /// waits for that.
    fn put_back(&self, reader: &OwnedFd, writer: &OwnedFd, bytes: &[u8]) -> Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let mut piece = &rest[..rest.len().min(PIECE)];
            let len = piece.len();
            events::poll_now(reader, libc::POLLIN);
            let written = write_some(writer, reader, &mut piece);
            rest = &rest[len - piece.len()..];
            if written == Err(Errno::EAGAIN) {
                let _ends_by_itself = Helper::start(|| {
                    while !rest.is_empty() {
                        let _ = write_some(writer, reader, &mut rest);
                    }
                    0
                });
                return Ok(());
            }
            written?;
        }
        Ok(())
    }

    /// Modes in which these bytes are taken literally: without echo, editing, signals and translation; lines end as
    /// before.
    fn verbatim(&self, bytes: &[u8]) -> Modes {
        let raw = self.modes.raw();
        let mut modes = self.modes;
        modes.input = raw.input;
        modes.local = raw.local | (self.modes.local & libc::ICANON);
        if self.packets {
            // IXON changes would be reported to a reader in packet mode.
            modes.input |= self.modes.input & libc::IXON;
        }
        let end = (1..=254)
            .find(|c| *c != b'\n' && !bytes.contains(c))
            .unwrap_or(255);
        for (index, c) in modes.chars.iter_mut().enumerate() {
            let kept = [libc::VEOL, libc::VEOL2, libc::VSTART, libc::VSTOP];
            if !kept.contains(&index) {
                *c = 0;
            }
        }
        modes.chars[libc::VEOF] = end;
        if modes.local & libc::ICANON == 0 {
            modes.chars[libc::VMIN] = 1;
            modes.chars[libc::VTIME] = 0;
        }
        modes
    }
}

/// Writes all; when there is no room, the other side processes its buffers.
fn write_all(to: &OwnedFd, other: &OwnedFd, bytes: &[u8]) -> Result<()> {
    let mut rest = bytes;
    write_some(to, other, &mut rest)
}

/// The same; what does not fit for a long time stays in `rest`.
fn write_some(to: &OwnedFd, other: &OwnedFd, rest: &mut &[u8]) -> Result<()> {
    let mut attempts = 0;
    while !rest.is_empty() {
        match write(to, rest) {
            Ok(n) => *rest = &rest[n..],
            Err(Errno::EAGAIN) if attempts < ATTEMPTS => {
                attempts += 1;
                events::poll_now(other, libc::POLLIN);
                nap(1);
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Whether a condition becomes true within that many attempts.
fn soon(attempts: u32, is: impl Fn() -> bool) -> bool {
    is() || (0..attempts).any(|_| {
        nap(1);
        is()
    })
}

fn nap(times: u32) {
    std::thread::sleep(NAP * times);
}

#[cfg(test)]
mod tests;
