//! Relays a job's own terminal to ours: input to it, output from it, and changes of size.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::thread::JoinHandle;

use ckpt_sys::files;
use ckpt_sys::pipes::pipe;
use ckpt_sys::tty::{self, Modes};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{read, write};

use super::Terminal;

/// Polling interval of a terminal that no process has open, milliseconds.
const HUNG_UP: u16 = 50;
/// Bytes of a read.
const BLOCK: usize = 16 * 1024;

/// The relay; our terminal is restored when this is dropped.
#[derive(Debug)]
pub struct Relay {
    master: OwnedFd,
    /// Our terminal and its modes, if it is one.
    ours: Option<(OwnedFd, Modes)>,
    /// Closed to end it.
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Starts a relay between the master of the job's terminal and our input and output.
    ///
    /// # Errors
    /// When no descriptor or thread can be created.
    pub fn start(master: OwnedFd, input: OwnedFd, output: OwnedFd) -> io::Result<Self> {
        set_nonblocking(&master)?;
        let ours = match tty::modes(&input) {
            Ok(modes) => Some((input.try_clone()?, modes)),
            Err(_) => None,
        };
        let (stopped, stop) = pipe()?;
        let pump = Pump {
            master: master.try_clone()?,
            input: Some(input),
            output,
            pending: Vec::new(),
            stopped,
        };
        let mut relay = Self {
            master,
            ours,
            stop: Some(stop),
            thread: None,
        };
        if let Some((terminal, modes)) = &relay.ours {
            tty::set_modes(terminal, &modes.raw())?;
        }
        relay.resize();
        let thread = std::thread::Builder::new().name("relay".into());
        relay.thread = Some(thread.spawn(move || pump.run())?);
        Ok(relay)
    }

    /// Sets the size of the job's terminal to ours; SIGWINCH is sent in any case, since the job has to redraw.
    fn resize(&self) {
        if let Some((terminal, _)) = &self.ours
            && let Ok(size) = tty::size(terminal)
        {
            let _ = tty::set_size(&self.master, size);
        }
        redraw(&self.master);
    }
}

impl Terminal for Relay {
    fn takes(&mut self, signal: i32) -> bool {
        if signal == libc::SIGWINCH {
            self.resize();
        }
        signal == libc::SIGWINCH
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Some((terminal, modes)) = &self.ours {
            let _ = tty::set_modes(terminal, modes);
        }
    }
}

/// Sends SIGWINCH to the foreground process group of a terminal, by its master.
pub(super) fn redraw(master: &OwnedFd) {
    if let Some(group) = tty::foreground(master) {
        let group = nix::unistd::Pid::from_raw(group);
        let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGWINCH);
    }
}

pub(super) fn set_nonblocking(fd: &OwnedFd) -> nix::Result<()> {
    files::set_flags(fd, files::flags(fd)? | libc::O_NONBLOCK)
}

/// State of the thread.
struct Pump {
    master: OwnedFd,
    input: Option<OwnedFd>,
    output: OwnedFd,
    /// Typed, not yet written.
    pending: Vec<u8>,
    stopped: OwnedFd,
}

impl Pump {
    fn run(mut self) {
        let mut hung_up = false;
        loop {
            let ready = self.wait(hung_up);
            let Ready {
                master,
                typed,
                stop,
            } = match ready {
                Ok(ready) => ready,
                Err(Errno::EINTR) => continue,
                Err(_) => return,
            };
            hung_up = false;
            if typed {
                self.take_input();
            }
            self.pass_input();
            if master || stop {
                hung_up = self.pass_output() == Output::HungUp;
            }
            if stop {
                return;
            }
        }
    }

    fn wait(&self, hung_up: bool) -> nix::Result<Ready> {
        let mut events = PollFlags::POLLIN;
        if !self.pending.is_empty() {
            events |= PollFlags::POLLOUT;
        }
        let mut fds = vec![PollFd::new(self.stopped.as_fd(), PollFlags::POLLIN)];
        let mut at = [0; 2];
        if !hung_up {
            at[0] = fds.len();
            fds.push(PollFd::new(self.master.as_fd(), events));
        }
        if let Some(input) = self.input.as_ref().filter(|_| self.pending.is_empty()) {
            at[1] = fds.len();
            fds.push(PollFd::new(input.as_fd(), PollFlags::POLLIN));
        }
        let timeout = if hung_up {
            PollTimeout::from(HUNG_UP)
        } else {
            PollTimeout::NONE
        };
        poll(&mut fds, timeout)?;
        let is = |at: usize| fds[at].any().unwrap_or(false);
        Ok(Ready {
            stop: is(0),
            master: hung_up || is(at[0]),
            typed: at[1] != 0 && is(at[1]),
        })
    }

    fn take_input(&mut self) {
        let Some(input) = &self.input else { return };
        let mut block = [0; BLOCK];
        match read(input, &mut block) {
            Ok(n @ 1..) => {
                self.follow_size(input);
                self.pending.extend(&block[..n]);
            }
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            // At the end of redirected input, the job gets an end of file too.
            Ok(_) | Err(_) => {
                self.input = None;
                let end = tty::modes(&self.master).map_or(4, |m| m.chars[libc::VEOF]);
                self.pending.push(end);
            }
        }
    }

    /// Sets the size before input that was typed after the change. SIGWINCH, which another thread handles, may be
    /// later.
    fn follow_size(&self, ours: &OwnedFd) {
        if let Ok(size) = tty::size(ours)
            && tty::size(&self.master).is_ok_and(|theirs| theirs != size)
        {
            let _ = tty::set_size(&self.master, size);
        }
    }

    fn pass_input(&mut self) {
        while !self.pending.is_empty() {
            match write(&self.master, &self.pending) {
                Ok(n) => drop(self.pending.drain(..n)),
                Err(Errno::EINTR) => {}
                Err(_) => return,
            }
        }
    }

    /// Reads all output.
    fn pass_output(&mut self) -> Output {
        let mut block = [0; BLOCK];
        loop {
            match read(&self.master, &mut block) {
                Ok(n @ 1..) => write_all(&self.output, &block[..n]),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Output::Taken,
                Ok(_) | Err(_) => return Output::HungUp,
            }
        }
    }
}

#[derive(PartialEq, Eq)]
enum Output {
    Taken,
    HungUp,
}

struct Ready {
    master: bool,
    typed: bool,
    stop: bool,
}

/// The reader may have gone, which does not concern the job.
fn write_all(output: &OwnedFd, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match write(output, bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                let mut fds = [PollFd::new(output.as_fd(), PollFlags::POLLOUT)];
                let _ = poll(&mut fds, PollTimeout::NONE);
            }
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tty::Size;

    #[test]
    fn a_change_of_size_is_ahead_of_what_is_typed_after_it() {
        let pty = || {
            let master = tty::new_pty(libc::O_RDWR).unwrap();
            let slave = tty::peer(&master, libc::O_RDWR | libc::O_NOCTTY).unwrap();
            (master, slave)
        };
        let ((screen, ours), (master, jobs)) = (pty(), pty());
        let size = Size {
            rows: 31,
            columns: 101,
            ..Size::default()
        };
        tty::set_size(&screen, size).unwrap();
        write(&screen, b"typed\n").unwrap();
        let (stopped, _stop) = nix::unistd::pipe().unwrap();
        let mut pump = Pump {
            master,
            input: Some(ours),
            output: jobs.try_clone().unwrap(),
            pending: Vec::new(),
            stopped,
        };
        // No SIGWINCH arrives here, so nothing else sets the size.
        pump.take_input();
        assert_eq!(pump.pending, b"typed\n");
        assert_eq!(tty::size(&jobs).unwrap(), size);
    }
}
