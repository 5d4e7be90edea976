//! The client that shows a job's terminal.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use ckpt_sys::tty::{self, Modes};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::read;

use super::{FREE, SIZED, TYPED};
use crate::supervise::Signals;

/// Detach key, to be typed twice: Ctrl-\.
const DETACH: u8 = 0x1c;

/// Why the client ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The user detached.
    Detached,
    /// The job has ended.
    Ended,
    /// Another client is connected.
    Busy,
}

/// Shows the terminal of job `pid` on input and output until the job ends or the user detaches.
///
/// # Errors
/// `NotFound` or `ConnectionRefused` when the job has no such terminal.
pub fn show(pid: i32, signals: &Signals, input: OwnedFd, output: OwnedFd) -> io::Result<End> {
    let path = super::socket(&super::directory()?, pid)?;
    let mut stream = UnixStream::connect(path)?;
    let mut verdict = [0];
    stream.read_exact(&mut verdict)?;
    if verdict != [FREE] {
        return Ok(End::Busy);
    }
    let _raw = Raw::of(&input)?;
    let mut client = Client {
        stream,
        input,
        output: output.into(),
        keys: Keys::default(),
    };
    client.send_size()?;
    client.run(signals)
}

/// Sets our terminal to raw mode until this is dropped.
struct Raw(Option<(OwnedFd, Modes)>);

impl Raw {
    fn of(terminal: &OwnedFd) -> io::Result<Self> {
        let Ok(modes) = tty::modes(terminal) else {
            return Ok(Self(None));
        };
        tty::set_modes(terminal, &modes.raw())?;
        Ok(Self(Some((terminal.try_clone()?, modes))))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some((terminal, modes)) = &self.0 {
            let _ = tty::set_modes(terminal, modes);
        }
    }
}

struct Client {
    stream: UnixStream,
    input: OwnedFd,
    output: std::fs::File,
    keys: Keys,
}

impl Client {
    fn run(&mut self, signals: &Signals) -> io::Result<End> {
        loop {
            let mut fds = [
                PollFd::new(self.stream.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.input.as_fd(), PollFlags::POLLIN),
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            let [printed, typed, signalled] = fds.map(|fd| fd.any().unwrap_or(false));
            if printed && !self.print()? {
                return Ok(End::Ended);
            }
            while let Some(received) = signals.next().ok().flatten().filter(|_| signalled) {
                match received.signal {
                    libc::SIGWINCH => self.send_size()?,
                    libc::SIGTERM | libc::SIGHUP | libc::SIGINT | libc::SIGQUIT => {
                        return Ok(End::Detached);
                    }
                    _ => {}
                }
            }
            // After a previous change of size.
            if typed && !self.pass_on()? {
                return Ok(End::Detached);
            }
        }
    }

    /// False at the end of the job.
    fn print(&mut self) -> io::Result<bool> {
        let mut block = [0; 16 * 1024];
        match self.stream.read(&mut block) {
            Ok(0) => Ok(false),
            Ok(n) => {
                self.output.write_all(&block[..n])?;
                self.output.flush()?;
                Ok(true)
            }
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// False when the user detaches.
    fn pass_on(&mut self) -> io::Result<bool> {
        let mut block = [0; 4096];
        let n = match read(&self.input, &mut block) {
            Ok(n) => n,
            Err(Errno::EINTR) => return Ok(true),
            // Our terminal has hung up.
            Err(Errno::EIO) => 0,
            Err(e) => return Err(e.into()),
        };
        let (typed, leave) = self.keys.typed(&block[..n]);
        if !typed.is_empty() {
            self.send(TYPED, &typed)?;
        }
        Ok(n > 0 && !leave)
    }

    fn send_size(&mut self) -> io::Result<()> {
        match tty::size(&self.input) {
            Ok(size) => {
                let words = [size.rows, size.columns, size.width, size.height];
                self.send(SIZED, &words.map(u16::to_be_bytes).concat())
            }
            Err(_) => Ok(()),
        }
    }

    fn send(&mut self, what: u8, body: &[u8]) -> io::Result<()> {
        let mut frame = vec![what];
        frame.extend(u16::try_from(body.len()).unwrap_or(u16::MAX).to_be_bytes());
        frame.extend(body);
        match self.stream.write_all(&frame) {
            // End of file follows at once.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => other,
        }
    }
}

/// Recognizes the detach keys.
#[derive(Default)]
struct Keys {
    /// The first of the two was typed.
    begun: bool,
}

impl Keys {
    /// The input for the job, and whether to detach.
    fn typed(&mut self, bytes: &[u8]) -> (Vec<u8>, bool) {
        let mut typed = Vec::with_capacity(bytes.len() + 1);
        for &byte in bytes {
            match (byte == DETACH, std::mem::take(&mut self.begun)) {
                (true, true) => return (typed, true),
                (true, false) => self.begun = true,
                (false, begun) => {
                    if begun {
                        typed.push(DETACH);
                    }
                    typed.push(byte);
                }
            }
        }
        (typed, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_keys_in_a_row_detach() {
        let mut keys = Keys::default();
        assert_eq!(keys.typed(b"ls\n"), (b"ls\n".to_vec(), false));
        assert_eq!(keys.typed(b"a\x1c"), (b"a".to_vec(), false));
        assert_eq!(keys.typed(b"b"), (b"\x1cb".to_vec(), false));
        assert_eq!(keys.typed(b"\x1cx\x1c"), (b"\x1cx".to_vec(), false));
        assert_eq!(keys.typed(b"\x1cz"), (Vec::new(), true));
    }
}
