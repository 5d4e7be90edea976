//! All sockets of a job: connections, queues, and files in flight between them.

mod hidden;
mod judge;

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use ckpt_sys::sockets;
use ckpt_tracer::Pid;
use ckpt_tracer::kcmp::{KcmpType, kcmp, same_description};
use ckpt_tracer::sock_diag::unix as unix_diag;
use serde_bytes::ByteBuf;

use super::names;
use super::queue::{self, Seen};
use super::unix::{GHOST, Name, Role, Style, UnixSocket};
use super::urgent::Urgent;
use crate::error::{Obstacle, Result};

/// An open file description of the job.
pub struct Open<'a> {
    /// A duplicate of its descriptor.
    pub copy: &'a OwnedFd,
    /// `fd 3 of process 12 (name)`, for messages.
    pub object: String,
    /// Base of relative names: `/proc/PID/cwd`.
    pub directory: PathBuf,
}

/// Result for a socket.
#[derive(Debug)]
pub enum Verdict {
    /// It can be captured.
    Inside(Box<UnixSocket>),
    /// Its peer is outside the job.
    Outside(Box<Obstacle>),
    /// It cannot be captured.
    Refused(Box<Obstacle>),
}

/// All unix domain sockets of a job.
#[derive(Default)]
pub struct Survey {
    /// By the number of the description: first the given ones, in their order, then those in flight.
    pub verdicts: HashMap<usize, Verdict>,
    /// Descriptions held by unread messages only, in the order of their numbers.
    pub in_flight: Vec<OwnedFd>,
    /// Closed sockets with remaining effects: their descriptions follow all others.
    pub ghosts: Vec<UnixSocket>,
}

/// One socket of the job.
struct Live {
    number: usize,
    copy: OwnedFd,
    object: String,
    directory: PathBuf,
    inode: u64,
    style: Style,
    seen: Vec<(Seen, Vec<usize>)>,
    /// It holds descriptors that were not read, since the job runs or an empty message hides them.
    unseen: bool,
    fault: Option<String>,
}

/// Captures the unix domain sockets among all descriptions of the job. `held` says that the job is frozen.
pub fn survey(open: &[Open<'_>], held: bool) -> Result<Survey> {
    let mut known = Known::of(open);
    let mut live = Vec::new();
    for (number, o) in open.iter().enumerate() {
        live.extend(Live::of(
            number,
            o.copy,
            o.object.clone(),
            o.directory.clone(),
        ));
    }
    if live.is_empty() {
        return Ok(Survey::default());
    }
    let mut at = 0;
    while at < live.len() {
        let found = live[at].read(held, &mut known)?;
        let (inode, directory) = (live[at].inode, live[at].directory.clone());
        for (number, copy) in found {
            let object = format!("a socket in flight in socket:[{inode}]");
            live.extend(Live::of(number, &copy, object, directory.clone()));
            known.in_flight.push(copy);
        }
        at += 1;
    }
    let table = Table::read(&live, held)?;
    let mut survey = Survey {
        in_flight: known.in_flight,
        ..Survey::default()
    };
    let mut ghosts = Ghosts::default();
    for socket in &live {
        let verdict = judge::judge(socket, &table, &mut ghosts);
        survey.verdicts.insert(socket.number, verdict);
    }
    survey.ghosts = ghosts.made;
    Ok(survey)
}

/// Numbered descriptions.
struct Known {
    all: Vec<(u64, u64, i32)>,
    in_flight: Vec<OwnedFd>,
}

impl Known {
    fn of(open: &[Open<'_>]) -> Self {
        let all = open.iter().map(|o| Self::entry(o.copy)).collect();
        Self {
            all,
            in_flight: Vec::new(),
        }
    }

    fn entry(fd: &OwnedFd) -> (u64, u64, i32) {
        let stat = ckpt_sys::files::fstat(fd);
        let (device, inode) = stat.map_or((0, 0), |s| (s.st_dev, s.st_ino));
        (device, inode, fd.as_raw_fd())
    }

    /// The number of a description found in a message, and whether it is new.
    fn number(&mut self, fd: &OwnedFd) -> Result<(usize, bool)> {
        let (device, inode, raw) = Self::entry(fd);
        let me = Pid::own().leader();
        for (number, (d, i, other)) in self.all.iter().enumerate() {
            if (*d, *i) != (device, inode) {
                continue;
            }
            let same = match same_description(raw, *other) {
                Some(same) => same,
                None => kcmp(me, me, KcmpType::File(raw, *other))?.is_eq(),
            };
            if same {
                return Ok((number, false));
            }
        }
        self.all.push((device, inode, raw));
        Ok((self.all.len() - 1, true))
    }
}

impl Live {
    /// `None` if it is not a unix domain socket.
    fn of(number: usize, copy: &OwnedFd, object: String, directory: PathBuf) -> Option<Self> {
        if !super::is_unix(copy) {
            return None;
        }
        let style = Style::of(sockets::int_option(copy, libc::SO_TYPE).ok()?)?;
        Some(Self {
            number,
            inode: ckpt_sys::files::fstat(copy).ok()?.st_ino,
            copy: copy.try_clone().ok()?,
            object,
            directory,
            style,
            seen: Vec::new(),
            unseen: false,
            fault: None,
        })
    }

    /// Reads the queue; returns descriptions found for the first time.
    fn read(&mut self, held: bool, known: &mut Known) -> Result<Vec<(usize, OwnedFd)>> {
        let mut found = Vec::new();
        let seen = match queue::contents(&self.copy, self.style, held) {
            Ok(seen) => seen,
            // The job read it between two calls of ours.
            Err(queue::Fault::Kernel(_)) if !held => Vec::new(),
            Err(fault) => {
                self.fault = Some(fault.reason());
                return Ok(found);
            }
        };
        let mut descriptors = 0;
        for mut message in seen {
            let mut rights = Vec::new();
            for fd in std::mem::take(&mut message.rights) {
                descriptors += 1;
                let (number, new) = known.number(&fd)?;
                rights.push(number);
                if new {
                    found.push((number, fd));
                }
            }
            self.seen.push((message, rights));
        }
        self.unseen = descriptors < in_queue(&self.copy);
        let waits = |(seen, _): &(Seen, _)| seen.urgent == Some(Urgent::Waits);
        if held && self.unseen && self.seen.iter().any(waits) {
            // A peek at an urgent byte does not return its descriptors.
            self.fault = Some(queue::Fault::UrgentPlace.reason());
        }
        Ok(found)
    }

    fn refuse(&self, reason: impl Into<String>, remedy: &str) -> Verdict {
        Verdict::Refused(Box::new(Obstacle::new(&self.object, reason, remedy)))
    }

    /// A transient refusal.
    fn refuse_for_now(&self, reason: impl Into<String>, remedy: &str) -> Verdict {
        let obstacle = Obstacle::new(&self.object, reason, remedy);
        Verdict::Refused(Box::new(obstacle.passing()))
    }
}

/// Number of descriptors in a socket's queue (Linux 5.7; 0 before).
fn in_queue(socket: &OwnedFd) -> usize {
    let path = format!("/proc/self/fdinfo/{}", socket.as_raw_fd());
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("scm_fds:")?.trim().parse().ok())
        .unwrap_or(0)
}

/// All sockets of the kernel, and which of them are the job's.
struct Table<'a> {
    diag: HashMap<u64, unix_diag::UnixSocket>,
    live: HashMap<u64, &'a Live>,
    /// The job is frozen.
    held: bool,
    /// The job may have sockets in flight that were not read, since it runs.
    unseen: bool,
    /// Clients in backlogs of the job, and their listening socket.
    waiting: HashSet<u64>,
    /// Names of listening sockets of the job.
    listening: HashSet<(Style, Vec<u8>)>,
    /// Names that datagram sockets of the job are bound to.
    datagram: HashMap<Vec<u8>, u64>,
    /// See [`hidden::owing`].
    owing: HashSet<u64>,
}

impl<'a> Table<'a> {
    fn read(live: &'a [Live], held: bool) -> Result<Self> {
        let diag = unix_diag::dump()?.into_iter();
        let mut table = Self {
            diag: diag.map(|s| (s.inode.into(), s)).collect(),
            live: live.iter().map(|l| (l.inode, l)).collect(),
            held,
            unseen: live.iter().any(|l| l.unseen),
            waiting: HashSet::new(),
            listening: HashSet::new(),
            datagram: HashMap::new(),
            owing: HashSet::new(),
        };
        if held {
            table.owing = hidden::owing(live, &table.diag);
        }
        for socket in live {
            let name = sockets::own_name(&socket.copy).unwrap_or_default();
            if socket.style == Style::Datagram && !name.is_empty() {
                table.datagram.entry(name).or_insert(socket.inode);
                continue;
            }
            if let Some(diag) = table.diag.get(&socket.inode).filter(|d| d.listening) {
                table
                    .waiting
                    .extend(diag.pending.iter().map(|i| u64::from(*i)));
                table.listening.insert((socket.style, name));
            }
        }
        Ok(table)
    }
}

impl Table<'_> {
    /// While the job runs, it may have created a socket after its descriptors were listed.
    fn is_of_the_job(&self, inode: u64) -> bool {
        let lately = |live: &&Live| {
            let process = live.directory.parent().unwrap_or(Path::new("/proc/self"));
            let link = format!("socket:[{inode}]");
            let fds = std::fs::read_dir(process.join("fd")).into_iter();
            fds.flatten()
                .flatten()
                .any(|fd| std::fs::read_link(fd.path()).is_ok_and(|l| l.as_os_str() == &*link))
        };
        let may_be = || self.unseen || self.live.values().any(lately);
        self.live.contains_key(&inode) || !self.held && may_be()
    }
}

/// Closed sockets.
#[derive(Default)]
struct Ghosts {
    made: Vec<UnixSocket>,
    /// Senders of datagrams that are not peers, by name.
    senders: HashMap<Vec<u8>, u64>,
}

impl Ghosts {
    fn add(&mut self, style: Style, name: &[u8], cwd: &Path, role: Role) -> u64 {
        let inode = GHOST + self.made.len() as u64;
        self.made.push(UnixSocket {
            inode,
            style,
            name: (!name.is_empty()).then(|| Name {
                bytes: ByteBuf::from(name),
                // A stream got its name from the listening socket.
                bound: style == Style::Datagram,
                file: names::gone(name, cwd),
            }),
            role,
            shutdown: 0,
            reset: false,
            queue: Vec::new(),
            options: Vec::new(),
            filter: Vec::new(),
            peer_credentials: None,
        });
        inode
    }

    fn sender(&mut self, name: &[u8], cwd: &Path) -> u64 {
        if let Some(inode) = self.senders.get(name) {
            return *inode;
        }
        let inode = self.add(Style::Datagram, name, cwd, Role::Unconnected);
        self.senders.insert(name.to_vec(), inode);
        inode
    }
}
