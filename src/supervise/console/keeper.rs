//! The process that keeps a job's terminal.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use ckpt_sys::prctl;
use ckpt_sys::process::{self, Fork};
use ckpt_sys::tty::{self, Size};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{read, setsid, write};

use super::{BUSY, FREE, SIZED, TYPED};
use crate::supervise::relay::{redraw, set_nonblocking};

/// Bytes of previous output that a client gets first.
const SCREENFUL: usize = 64 * 1024;
/// A client that reads nothing for this time is disconnected, so that the job does not wait for it.
const PATIENCE: Duration = Duration::from_secs(2);
/// Polling interval of a terminal that no process has open, milliseconds.
const HUNG_UP: u16 = 100;

/// Starts the keeper of the terminal of job `pid`, a child of ours, until the job ends.
///
/// # Errors
/// When its socket or the process cannot be created.
pub fn serve(pid: i32, master: OwnedFd) -> io::Result<()> {
    let path = super::socket(&super::directory()?, pid)?;
    let listener = bind(&path)?;
    set_nonblocking(&master)?;
    let job = ckpt_sys::events::pidfd(pid, 0)?;
    // Helper threads of the restore have been joined, so that we are single-threaded.
    match process::fork()? {
        Fork::Parent(_) => Ok(()),
        Fork::Child => {
            settle();
            let keeper = Keeper {
                master,
                listener,
                job,
                client: None,
                frames: Vec::new(),
                pending: Vec::new(),
                screen: VecDeque::new(),
            };
            keeper.run();
            let _ = std::fs::remove_file(path);
            process::leave(0)
        }
    }
}

/// Binds a socket to that name; replaces one whose keeper has ended.
fn bind(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse && UnixStream::connect(path).is_err() => {
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        other => other,
    }
}

/// Leaves session, directory and standard streams of the caller.
fn settle() {
    let _ = setsid();
    let _ = std::env::set_current_dir("/");
    if let Ok(null) = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
    {
        let _ = nix::unistd::dup2_stdin(&null);
        let _ = nix::unistd::dup2_stdout(&null);
        let _ = nix::unistd::dup2_stderr(&null);
    }
    prctl::set_name(c"ckpt-console");
    let _ = ckpt_sys::signals::ignore(libc::SIGHUP);
}

struct Keeper {
    master: OwnedFd,
    listener: UnixListener,
    job: OwnedFd,
    client: Option<UnixStream>,
    /// Received from the client, not yet a whole frame.
    frames: Vec<u8>,
    /// Typed, not yet written to the terminal.
    pending: Vec<u8>,
    screen: VecDeque<u8>,
}

/// What poll has reported.
#[derive(Default)]
struct Ready {
    master: bool,
    listener: bool,
    job: bool,
    client: bool,
}

impl Keeper {
    fn run(mut self) {
        let mut hung_up = false;
        loop {
            let ready = match self.wait(hung_up) {
                Ok(ready) => ready,
                Err(Errno::EINTR) => continue,
                Err(_) => return,
            };
            self.pass_input();
            hung_up = (ready.master || ready.job) && !self.pass_output();
            if ready.job {
                return;
            }
            if ready.listener {
                self.accept();
            }
            if ready.client {
                self.listen_to_client();
            }
        }
    }

    fn wait(&self, hung_up: bool) -> nix::Result<Ready> {
        let mut events = PollFlags::POLLIN;
        if !self.pending.is_empty() {
            events |= PollFlags::POLLOUT;
        }
        let mut fds = vec![
            PollFd::new(self.job.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
        ];
        let (mut master, mut client) = (None, None);
        if !hung_up {
            master = Some(fds.len());
            fds.push(PollFd::new(self.master.as_fd(), events));
        }
        if let Some(stream) = self.client.as_ref().filter(|_| self.pending.is_empty()) {
            client = Some(fds.len());
            fds.push(PollFd::new(stream.as_fd(), PollFlags::POLLIN));
        }
        let timeout = if hung_up {
            PollTimeout::from(HUNG_UP)
        } else {
            PollTimeout::NONE
        };
        poll(&mut fds, timeout)?;
        let is = |at: usize| fds[at].any().unwrap_or(false);
        Ok(Ready {
            job: is(0),
            listener: is(1),
            master: hung_up || master.is_some_and(is),
            client: client.is_some_and(is),
        })
    }

    fn accept(&mut self) {
        let Ok((mut stream, _)) = self.listener.accept() else {
            return;
        };
        let _ = stream.set_write_timeout(Some(PATIENCE));
        if self.client.is_some() {
            let _ = stream.write_all(&[BUSY]);
            return;
        }
        let (first, second) = self.screen.as_slices();
        let greeted = stream
            .write_all(&[FREE])
            .and_then(|()| stream.write_all(first))
            .and_then(|()| stream.write_all(second));
        if greeted.is_ok() {
            self.frames.clear();
            self.client = Some(stream);
        }
    }

    fn listen_to_client(&mut self) {
        let Some(client) = &mut self.client else {
            return;
        };
        let mut block = [0; 4096];
        match client.read(&mut block) {
            Ok(n @ 1..) => self.frames.extend(&block[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return,
            Ok(_) | Err(_) => {
                self.client = None;
                return;
            }
        }
        while let [what, high, low, rest @ ..] = &self.frames[..] {
            let len = usize::from(u16::from_be_bytes([*high, *low]));
            let Some(body) = rest.get(..len) else { break };
            match *what {
                TYPED => self.pending.extend(body),
                SIZED => resize(&self.master, body),
                _ => {}
            }
            self.frames.drain(..3 + len);
        }
        self.pass_input();
    }

    fn pass_input(&mut self) {
        while !self.pending.is_empty() {
            match write(&self.master, &self.pending) {
                Ok(n) => drop(self.pending.drain(..n)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                Err(_) => self.pending.clear(),
            }
        }
    }

    /// Reads all output; false when no process has the terminal open.
    fn pass_output(&mut self) -> bool {
        let mut block = [0; 16 * 1024];
        loop {
            match read(&self.master, &mut block) {
                Ok(n @ 1..) => self.show(&block[..n]),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return true,
                Ok(_) | Err(_) => return false,
            }
        }
    }

    fn show(&mut self, bytes: &[u8]) {
        self.screen.extend(bytes);
        let over = self.screen.len().saturating_sub(SCREENFUL);
        self.screen.drain(..over);
        if let Some(client) = &mut self.client
            && client.write_all(bytes).is_err()
        {
            self.client = None;
        }
    }
}

/// The new screen is redrawn even if its size is the same.
fn resize(master: &OwnedFd, body: &[u8]) {
    if let [a, b, c, d, e, f, g, h] = *body {
        let size = Size {
            rows: u16::from_be_bytes([a, b]),
            columns: u16::from_be_bytes([c, d]),
            width: u16::from_be_bytes([e, f]),
            height: u16::from_be_bytes([g, h]),
        };
        let _ = tty::set_size(master, size);
    }
    redraw(master);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_makes_room() {
        let dir = std::env::temp_dir().join(format!("ckpt-keeper-{}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        let path = dir.join("socket");
        drop(bind(&path).unwrap());
        let taken = bind(&path).unwrap();
        assert!(bind(&path).is_err());
        drop(taken);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
