//! The protocol by which a guard is asked to detach: a socket with an abstract name (unix(7)), which exists only
//! while the guard does. Within one pid namespace a signal would do; a socket also shows the end of a requester in
//! another one, and lets the requester wait until the guard has detached.
//!
//! 1. A process that wants to trace the job connects, and sends `LEAVE`.
//! 2. The guard clears the flag in all tasks, detaches, and sends `LEFT`.
//! 3. The requester sends `COME`, or ends: the guard attaches to the rest of the job.
//!
//! These are single bytes rather than messages of a channel (`ckpt_sys::channel`): the two may be of different
//! versions, and the guard, which serves many and must not wait for one, reads available bytes without waiting for a
//! whole frame.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::Duration;

use ckpt_tracer::Pid;
use ckpt_tracer::proc::ProcRoot;
use ckpt_tracer::proc::status::read_status;
use nix::unistd::geteuid;

use super::first::peer;
use crate::error::{Error, Obstacle, Result};

const LEAVE: u8 = b'l';
const LEFT: u8 = b'L';
const STAYS: u8 = b'N';
const COME: u8 = b'c';

/// The guard waits for tasks to stop, and answers within this time.
const PATIENCE: Duration = Duration::from_secs(10);

/// Pids depend on the pid namespace; its inode does not.
fn address(pid: Pid, inside: i32) -> io::Result<SocketAddr> {
    use std::os::unix::fs::MetadataExt;
    let namespace = ProcRoot::default().process(pid).join("ns/pid");
    let namespace = std::fs::metadata(namespace)?.ino();
    SocketAddr::from_abstract_name(format!("{}.{namespace}.{inside}", super::NAME))
}

/// A process that wants to trace the job for a while.
#[derive(Debug)]
pub struct Door {
    stream: UnixStream,
    guard: i32,
}

impl Door {
    /// Connects to the guard of a process, if it has one that is visible here.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn of(pid: Pid) -> Result<Option<Self>> {
        let tracer = read_status(pid).map_or(0, |status| status.tracer_pid);
        if tracer == 0 || !super::is_one(Pid(tracer)) {
            return Ok(None);
        }
        let refused = |why: &str| Error::refuse(obstacle(pid, tracer, why));
        let inside = read_status(Pid(tracer)).map_or(0, |s| s.ns_pid.last().copied().unwrap_or(0));
        let stream = address(Pid(tracer), inside).and_then(|at| UnixStream::connect_addr(&at));
        let stream = stream.map_err(|error| refused(&format!("cannot be reached ({error})")))?;
        let _ = stream.set_read_timeout(Some(PATIENCE));
        // Another process with that name is told nothing.
        match peer(&stream) {
            Some((listens, _)) if listens == tracer => Ok(Some(Self {
                stream,
                guard: tracer,
            })),
            _ => Err(refused("has lost its socket to another process")),
        }
    }

    /// Waits until the guard has detached from all of a job.
    ///
    /// # Errors
    /// When it does not.
    pub fn leave(&self, pid: Pid) -> Result<()> {
        let mut stream = &self.stream;
        let mut answer = [0];
        let asked = stream.write_all(&[LEAVE]);
        let answered = asked.and_then(|()| stream.read_exact(&mut answer));
        match answered {
            Ok(()) if answer == [LEFT] => Ok(()),
            // It has ended; if the job continues, its next tracer will be reported.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            _ => Err(Error::refuse(obstacle(
                pid,
                self.guard,
                "cannot detach from it now: a task does not stop, or is under seccomp filters",
            ))),
        }
    }

    /// Permits the guard to attach again.
    pub fn come(&self) {
        let _ = (&self.stream).write_all(&[COME]);
    }
}

fn obstacle(pid: Pid, guard: i32, why: &str) -> Obstacle {
    Obstacle::new(
        format!("process {pid}"),
        format!("is traced by {} (pid {guard}), which {why}", super::NAME),
        "try again, as the user who started the job or as root",
    )
}

/// Connections accepted between two checks of the job's tasks.
const AT_ONCE: usize = 16;
/// Most connections at a time.
const MOST: usize = 64;

/// The guard's side.
#[derive(Debug)]
pub(super) struct Server {
    listener: Option<UnixListener>,
    connections: Vec<Connection>,
}

#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    /// It has requested a detach.
    wants: bool,
    /// It has been told of the detach.
    told: bool,
}

impl Server {
    /// Listens under our own name. If another process has the name, no requests are possible.
    pub(super) fn new() -> Self {
        let me = std::process::id() as i32;
        let listener = address(Pid(me), me).and_then(|at| UnixListener::bind_addr(&at));
        let listener = listener.and_then(|l| l.set_nonblocking(true).map(|()| l));
        Self {
            listener: listener.ok(),
            connections: Vec::new(),
        }
    }

    /// Descriptors to poll. At the limit of connections no further one is accepted.
    pub(super) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let connections = self.connections.iter().map(|c| c.stream.as_fd());
        let listener = self
            .listener
            .iter()
            .filter(|_| self.connections.len() < MOST);
        listener.map(AsFd::as_fd).chain(connections)
    }

    /// Reads from all connections; whether any requests a detach.
    pub(super) fn look(&mut self) -> bool {
        // Limited, so that endless connections or data do not keep us from the job's tasks: the rest is handled the
        // next time.
        for _ in 0..AT_ONCE {
            if self.connections.len() == MOST {
                break;
            }
            let Some(Ok((stream, _))) = self.listener.as_ref().map(UnixListener::accept) else {
                break;
            };
            // Root of the job's user namespace may trace it, as its user may.
            let ours = |uid| uid == 0 || uid == geteuid().as_raw();
            let welcome = peer(&stream).is_some_and(|(_, uid)| ours(uid));
            if welcome && stream.set_nonblocking(true).is_ok() {
                self.connections.push(Connection {
                    stream,
                    wants: false,
                    told: false,
                });
            }
        }
        self.connections.retain_mut(Connection::read);
        self.connections.iter().any(|connection| connection.wants)
    }

    /// Reports the detach.
    pub(super) fn left(&mut self) {
        for connection in self.connections.iter_mut().filter(|c| c.wants && !c.told) {
            connection.told = connection.stream.write_all(&[LEFT]).is_ok();
        }
    }

    /// Reports that detaching failed, and drops the requests.
    pub(super) fn stays(&mut self) {
        for connection in self.connections.iter_mut().filter(|c| c.wants) {
            let _ = connection.stream.write_all(&[STAYS]);
            connection.wants = false;
        }
    }
}

impl Connection {
    /// Reads from a connection; false when it is closed.
    fn read(&mut self) -> bool {
        let mut bytes = [0; 16];
        match self.stream.read(&mut bytes) {
            Ok(0) => false,
            Ok(n) => {
                self.wants = bytes[n - 1] == LEAVE;
                self.told = false;
                true
            }
            Err(e) => e.kind() == io::ErrorKind::WouldBlock,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection() -> (UnixStream, Server) {
        let (asks, stream) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        let connections = vec![Connection {
            stream,
            wants: false,
            told: false,
        }];
        let server = Server {
            listener: None,
            connections,
        };
        (asks, server)
    }

    #[test]
    fn a_client_is_served_until_it_disconnects() {
        let (mut asks, mut server) = connection();
        assert!(!server.look());
        asks.write_all(&[LEAVE]).unwrap();
        assert!(server.look());
        server.left();
        server.left();
        let mut answer = [0; 4];
        assert_eq!(asks.read(&mut answer).unwrap(), 1);
        assert_eq!(answer[0], LEFT);
        asks.write_all(&[COME]).unwrap();
        assert!(!server.look());
        asks.write_all(&[LEAVE]).unwrap();
        assert!(server.look());
        drop(asks);
        assert!(!server.look());
        assert!(server.connections.is_empty());
    }

    #[test]
    fn connections_and_data_without_end_are_limited_in_each_round() {
        let mut server = Server::new();
        let me = std::process::id() as i32;
        let connect = |_| UnixStream::connect_addr(&address(Pid(me), me).unwrap()).unwrap();
        let mut crowd: Vec<UnixStream> = (0..100).map(connect).collect();
        assert!(!server.look());
        assert_eq!(server.connections.len(), AT_ONCE);
        crowd[0].write_all(&[COME; 100]).unwrap();
        crowd[0].write_all(&[LEAVE]).unwrap();
        assert!(!server.look());
        assert_eq!(server.connections.len(), 2 * AT_ONCE);
        let looks = (0..10).filter(|_| server.look()).count();
        assert!((1..10).contains(&looks), "it is heard in the end");
        assert_eq!(server.connections.len(), MOST);
        assert_eq!(server.fds().count(), MOST);
        drop(crowd);
        server.look();
        assert!(server.fds().count() > server.connections.len());
    }

    #[test]
    fn a_refused_client_is_forgotten() {
        let (mut asks, mut server) = connection();
        asks.write_all(&[LEAVE]).unwrap();
        assert!(server.look());
        server.stays();
        assert!(!server.look());
        let mut answer = [0];
        asks.read_exact(&mut answer).unwrap();
        assert_eq!(answer, [STAYS]);
    }
}
