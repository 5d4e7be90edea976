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
pub(super) struct Threshold {
    listener: Option<UnixListener>,
    visitors: Vec<Visitor>,
}

#[derive(Debug)]
struct Visitor {
    stream: UnixStream,
    /// It has requested a detach.
    wants: bool,
    /// It has been told of the detach.
    told: bool,
}

impl Threshold {
    /// Listens under our own name. If another process has the name, no requests are possible.
    pub(super) fn new() -> Self {
        let me = std::process::id() as i32;
        let listener = address(Pid(me), me).and_then(|at| UnixListener::bind_addr(&at));
        let listener = listener.and_then(|l| l.set_nonblocking(true).map(|()| l));
        Self {
            listener: listener.ok(),
            visitors: Vec::new(),
        }
    }

    /// Descriptors to poll. At the limit of connections no further one is accepted.
    pub(super) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let visitors = self.visitors.iter().map(|v| v.stream.as_fd());
        let listener = self.listener.iter().filter(|_| self.visitors.len() < MOST);
        listener.map(AsFd::as_fd).chain(visitors)
    }

    /// Reads from all connections; whether any requests a detach.
    pub(super) fn look(&mut self) -> bool {
        // Limited, so that endless connections or data do not keep us from the job's tasks: the rest is handled the
        // next time.
        for _ in 0..AT_ONCE {
            if self.visitors.len() == MOST {
                break;
            }
            let Some(Ok((stream, _))) = self.listener.as_ref().map(UnixListener::accept) else {
                break;
            };
            // Root of the job's user namespace may trace it, as its user may.
            let ours = |uid| uid == 0 || uid == geteuid().as_raw();
            let welcome = peer(&stream).is_some_and(|(_, uid)| ours(uid));
            if welcome && stream.set_nonblocking(true).is_ok() {
                self.visitors.push(Visitor {
                    stream,
                    wants: false,
                    told: false,
                });
            }
        }
        self.visitors.retain_mut(Visitor::hear);
        self.visitors.iter().any(|visitor| visitor.wants)
    }

    /// Reports the detach.
    pub(super) fn left(&mut self) {
        for visitor in self.visitors.iter_mut().filter(|v| v.wants && !v.told) {
            visitor.told = visitor.stream.write_all(&[LEFT]).is_ok();
        }
    }

    /// Reports that detaching failed, and drops the requests.
    pub(super) fn stays(&mut self) {
        for visitor in self.visitors.iter_mut().filter(|v| v.wants) {
            let _ = visitor.stream.write_all(&[STAYS]);
            visitor.wants = false;
        }
    }
}

impl Visitor {
    /// Reads from a connection; false when it is closed.
    fn hear(&mut self) -> bool {
        let mut said = [0; 16];
        match self.stream.read(&mut said) {
            Ok(0) => false,
            Ok(n) => {
                self.wants = said[n - 1] == LEAVE;
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

    fn visitor() -> (UnixStream, Threshold) {
        let (asks, stream) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        let visitors = vec![Visitor {
            stream,
            wants: false,
            told: false,
        }];
        let threshold = Threshold {
            listener: None,
            visitors,
        };
        (asks, threshold)
    }

    #[test]
    fn who_asks_is_told_once_and_let_in_until_it_is_gone() {
        let (mut asks, mut threshold) = visitor();
        assert!(!threshold.look());
        asks.write_all(&[LEAVE]).unwrap();
        assert!(threshold.look());
        threshold.left();
        threshold.left();
        let mut answer = [0; 4];
        assert_eq!(asks.read(&mut answer).unwrap(), 1);
        assert_eq!(answer[0], LEFT);
        asks.write_all(&[COME]).unwrap();
        assert!(!threshold.look());
        asks.write_all(&[LEAVE]).unwrap();
        assert!(threshold.look());
        drop(asks);
        assert!(!threshold.look());
        assert!(threshold.visitors.is_empty());
    }

    #[test]
    fn whoever_comes_or_talks_without_end_is_heard_a_little_at_a_time() {
        let mut threshold = Threshold::new();
        let me = std::process::id() as i32;
        let connect = |_| UnixStream::connect_addr(&address(Pid(me), me).unwrap()).unwrap();
        let mut crowd: Vec<UnixStream> = (0..100).map(connect).collect();
        assert!(!threshold.look());
        assert_eq!(threshold.visitors.len(), AT_ONCE);
        crowd[0].write_all(&[COME; 100]).unwrap();
        crowd[0].write_all(&[LEAVE]).unwrap();
        assert!(!threshold.look());
        assert_eq!(threshold.visitors.len(), 2 * AT_ONCE);
        let looks = (0..10).filter(|_| threshold.look()).count();
        assert!((1..10).contains(&looks), "it is heard in the end");
        assert_eq!(threshold.visitors.len(), MOST);
        assert_eq!(threshold.fds().count(), MOST);
        drop(crowd);
        threshold.look();
        assert!(threshold.fds().count() > threshold.visitors.len());
    }

    #[test]
    fn who_is_refused_does_not_want_it_any_more() {
        let (mut asks, mut threshold) = visitor();
        asks.write_all(&[LEAVE]).unwrap();
        assert!(threshold.look());
        threshold.stays();
        assert!(!threshold.look());
        let mut answer = [0];
        asks.read_exact(&mut answer).unwrap();
        assert_eq!(answer, [STAYS]);
    }
}
