//! Flow control of a slave's output, and the status for a reader in packet mode.

use std::os::fd::OwnedFd;

use ckpt_sys::events::poll_now;
use ckpt_sys::tty::{self, Modes};
use nix::errno::Errno;
use nix::unistd::read;

use super::super::terminal::Flow;
use super::{ATTEMPTS, Result, Work, soon, write_all};

/// Status bits (`TIOCPKT_*`, ioctl_tty(2)).
mod packet {
    /// The slave's input was flushed.
    pub(super) const FLUSH_READ: u8 = 1;
    /// Its output was flushed.
    pub(super) const FLUSH_WRITE: u8 = 2;
    /// Its output was resumed.
    pub(super) const START: u8 = 8;
    /// Ctrl-S and Ctrl-Q do not stop it any more.
    pub(super) const NO_STOP: u8 = 16;
    /// They do.
    pub(super) const DO_STOP: u8 = 32;
    /// Modes were set with EXTPROC.
    pub(super) const IOCTL: u8 = 64;
}

/// Whether the slave, or the master, accepts output now: it is not stopped, and has room.
pub(super) fn takes_output(end: &OwnedFd) -> bool {
    poll_now(end, libc::POLLOUT) & libc::POLLOUT != 0
}

impl Work<'_> {
    /// Reads the status that a reader in packet mode has not read yet, which clears it.
    pub(super) fn take_status(&self) -> Result<u8> {
        let mut status = [0];
        let ready = || poll_now(self.master, libc::POLLPRI) & libc::POLLPRI != 0;
        let mut all = 0;
        while self.packets && ready() {
            read(self.master, &mut status)?;
            all |= status[0];
        }
        Ok(all)
    }

    /// Generates that status without other effects: the pty is empty and its output not stopped. [`Work::stop`]
    /// generates the status of a stop.
    pub(super) fn set_status(&self, status: u8) -> Result<()> {
        self.take_status()?;
        if status & packet::FLUSH_READ != 0 {
            tty::flush(self.slave, libc::TCIFLUSH)?;
        }
        if status & packet::FLUSH_WRITE != 0 {
            tty::flush(self.slave, libc::TCOFLUSH)?;
        }
        let mut other = self.modes;
        if status & (packet::DO_STOP | packet::NO_STOP) != 0 {
            // The status says whether the usual characters stop and start output.
            other.input ^= libc::IXON;
            if status & packet::DO_STOP == 0 {
                other.chars[libc::VSTOP] = 0x13;
                other.chars[libc::VSTART] = 0x11;
                other.input |= libc::IXON;
            }
        }
        if status & packet::IOCTL != 0 {
            other.local ^= libc::EXTPROC;
        }
        if other != self.modes {
            tty::set_modes(self.slave, &other)?;
            tty::set_modes(self.slave, &self.modes)?;
        }
        if status & packet::START != 0 {
            flow(self.slave, libc::TCOOFF);
            flow(self.slave, libc::TCOON);
        }
        Ok(())
    }

    /// Resumes output, after all data has been taken. Returns what had stopped it.
    pub(super) fn start(&self) -> Flow {
        let goes_on = || {
            // Waits until a kernel worker has freed the room.
            poll_now(self.master, libc::POLLIN);
            takes_output(self.slave)
        };
        if soon(ATTEMPTS / 10, goes_on) {
            return Flow::Running;
        }
        // Only affects a stop by tcflow (n_tty_ioctl_helper, tty_ioctl.c).
        flow(self.slave, libc::TCOON);
        if takes_output(self.slave) {
            return Flow::Called;
        }
        flow(self.slave, libc::TCOOFF);
        flow(self.slave, libc::TCOON);
        Flow::Typed
    }

    /// Lets what is written to the master go on, all that waited having been taken; answers whether tcflow had stopped it. No
    /// character does.
    pub(super) fn start_master(&self) -> bool {
        let goes_on = || {
            poll_now(self.slave, libc::POLLIN);
            takes_output(self.master)
        };
        if soon(ATTEMPTS / 10, goes_on) {
            return false;
        }
        flow(self.master, libc::TCOON);
        takes_output(self.master)
    }

    pub(super) fn stop_master(&self) {
        flow(self.master, libc::TCOOFF);
    }

    /// Stops output as before; the modes are restored. A reader in packet mode keeps its previous unread status.
    pub(super) fn stop(&self, how: Flow, status: u8) -> Result<()> {
        match how {
            Flow::Running => {}
            Flow::Called => flow(self.slave, libc::TCOOFF),
            Flow::Typed => self.type_stop()?,
        }
        if status == 0 {
            self.take_status()?;
        }
        Ok(())
    }

    /// Waits until part of an incomplete line, written in these modes, is taken in, with everything before it. The
    /// reprint character (VREPRINT) is typed after it, which only generates an echo. The master must have no other
    /// output: the echo is flushed there, since a read would return the status of packet mode instead.
    pub(super) fn await_begun(&self, modes: Modes, begun: &[u8]) -> Result<()> {
        let is_free = |c: &u8| *c != b'\n' && !modes.chars.contains(c) && !begun.contains(c);
        let again = (1..=254).find(is_free).ok_or(Errno::E2BIG)?;
        let mut echoing = self.unprocessed();
        (echoing.input, echoing.chars) = (modes.input, modes.chars);
        echoing.local = (modes.local | libc::ECHO | libc::IEXTEN) & !libc::ECHOCTL;
        echoing.chars[libc::VREPRINT] = again;
        tty::set_modes(self.slave, &echoing)?;
        write_all(self.master, self.slave, &[again])?;
        // The part itself is echoed too, if it is only now taken in; the character, a line feed and the line are
        // longer.
        let printed = soon(10 * ATTEMPTS, || {
            poll_now(self.master, libc::POLLIN);
            tty::unread(self.master) > begun.len()
        });
        // Waits for the kernel worker (`termios_rwsem`), so that the whole echo can be flushed.
        tty::set_modes(self.slave, &modes)?;
        tty::flush(self.master, libc::TCIFLUSH)?;
        printed.then_some(()).ok_or(Errno::EAGAIN)
    }

    /// Types the stop character: only such a stop is resumed by the start character.
    fn type_stop(&self) -> Result<()> {
        let mut modes = self.modes;
        modes.input |= libc::IXON;
        let stop = &mut modes.chars[libc::VSTOP];
        if *stop == 0 {
            *stop = 0x13;
        }
        let stop = *stop;
        let changed = modes != self.modes;
        if changed {
            tty::set_modes(self.slave, &modes)?;
        }
        write_all(self.master, self.slave, &[stop])?;
        let stopped = soon(ATTEMPTS, || !takes_output(self.slave));
        if changed {
            tty::set_modes(self.slave, &self.modes)?;
        }
        if !stopped {
            flow(self.slave, libc::TCOOFF);
            return Err(Errno::EAGAIN);
        }
        Ok(())
    }
}

/// tcflow(3).
fn flow(fd: &OwnedFd, action: i32) {
    let _ = tty::flow(fd, action);
}
