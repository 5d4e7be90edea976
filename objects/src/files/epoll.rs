//! epoll(7).

use std::cmp::Ordering;
use std::collections::HashMap;
use std::os::fd::AsRawFd;

use ckpt_tracer::capabilities::Use;
use ckpt_tracer::kcmp::{KcmpType, kcmp};
use ckpt_tracer::proc::fdinfo::{EpollTarget, FdDetail};
use ckpt_tracer::proc::fdlink::FdLink;
use ckpt_tracer::{Error, Pid};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::kind::{Captured, OpenFile, Place, Sight};
use super::left::Left;
use super::rebuild::place;
use super::signalfd::SignalFd;
use super::{Look, Staging, WITHHELD_REMEDY, late};
use crate::Snapshot;
use crate::bounds;
use crate::error::Obstacle;
use crate::index::DescriptionId;
use crate::plan::Builder;
use crate::process::Process;
use crate::references::{Faults, require};
use crate::source::{Collector, Copies, Source};

/// An interest list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Epoll {
    /// Its entries.
    pub entries: Vec<Entry>,
    /// Its busy polling of network devices, unless it is the system's default (Linux 6.9, EPIOCGPARAMS).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub busy_poll: Option<BusyPoll>,
}

/// `struct epoll_params`, ioctl_eventpoll(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BusyPoll {
    /// Duration in microseconds.
    pub microseconds: u32,
    /// Packets at a time.
    pub budget: u16,
    /// Whether it replaces interrupts.
    pub preferred: u8,
}

impl OpenFile for Epoll {
    fn capture(sight: &Sight, _: &mut Collector) -> Captured {
        match &sight.look.link {
            FdLink::AnonInode(name) if name == "eventpoll" => {
                Some(Ok(Epoll::empty(sight.look).into()))
            }
            _ => None,
        }
    }

    fn anon_inode() -> Option<&'static str> {
        Some("eventpoll")
    }

    fn class(&self) -> &'static str {
        "epoll"
    }

    fn shown(&self) -> String {
        format!("epoll:{} entries", self.entries.len())
    }

    fn check(&self, number: DescriptionId, snapshot: &Snapshot, faults: &mut Faults) {
        for entry in &self.entries {
            require!(
                faults,
                entry.description.find(&snapshot.descriptions).is_some(),
                "entry {} of the epoll in description {number} refers to description {}, which does not exist",
                entry.fd,
                entry.description
            );
            require!(
                faults,
                entry.description != number && entry.fd >= 0,
                "entry {} of the epoll in description {number} is none that an epoll can have",
                entry.fd
            );
        }
    }

    fn each_reference(&self, f: &mut dyn FnMut(DescriptionId)) {
        self.entries.iter().for_each(|entry| f(entry.description));
    }

    /// The kernel lists a set in the order of its own addresses.
    fn make_comparable(&mut self, _: &mut u32) {
        // Always watched, except in a disarmed EPOLLONESHOT entry, which watches nothing.
        let always = (libc::EPOLLERR | libc::EPOLLHUP) as u32;
        self.entries.iter_mut().for_each(|e| e.events &= !always);
        self.entries.sort_by_key(|e| (e.fd, e.description, e.data));
    }

    /// Creates it, still empty.
    fn open(&self, at: &Place, plan: &mut Builder) -> Result<(), Vec<Obstacle>> {
        plan.expect(libc::SYS_epoll_create1, &[0], 0, || "an epoll set".into());
        place(0, at.at, plan, || "an epoll set".into());
        self.rebuild_busy_poll(at.at, plan);
        Ok(())
    }

    fn complete(&self, at: i32, staging: Staging, snapshot: &Snapshot, plan: &mut Builder) {
        let later = |d| late::is_late(d, snapshot) || is_bound(d, snapshot);
        self.rebuild_entries(at, staging, later, plan);
    }
}

impl Epoll {
    /// A set whose entries are filled in later.
    fn empty(look: &Look) -> Self {
        let busy_poll = ckpt_sys::events::busy_poll(&look.copy);
        let busy_poll = busy_poll.map(|[a, b, c, d, e, f, preferred, _]| BusyPoll {
            microseconds: u32::from_ne_bytes([a, b, c, d]),
            budget: u16::from_ne_bytes([e, f]),
            preferred,
        });
        Self {
            entries: Vec::new(),
            busy_poll: busy_poll.filter(|params| *params != BusyPoll::default()),
        }
    }

    fn rebuild_busy_poll(&self, at: i32, plan: &mut Builder) {
        let Some(params) = self.busy_poll else { return };
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&params.microseconds.to_ne_bytes());
        bytes[4..6].copy_from_slice(&params.budget.to_ne_bytes());
        bytes[6] = params.preferred;
        let data = plan.data(&bytes);
        let args = [at as u64, ckpt_sys::events::EPIOCSPARAMS, data];
        let without = format!(
            "an epoll set does not poll network devices as it did (EPIOCSPARAMS); it may need Linux 6.9, and {}",
            Use::BusyPoll
        );
        plan.try_syscall(libc::SYS_ioctl, &args, &without);
    }
}

/// One entry: an open file description under the number with which it was added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The number; it may be closed by now or refer to another file.
    #[serde(deserialize_with = "bounds::fd")]
    pub fd: i32,
    /// Index in the snapshot's descriptions.
    pub description: DescriptionId,
    /// `EPOLL*`.
    pub events: u32,
    /// The user data.
    pub data: u64,
}

/// Fills in the entries of the epoll sets among `looks`, whose descriptions begin at `first`.
///
/// fdinfo identifies an entry by the number with which it was added. `KCMP_EPOLL_TFD` compares descriptions with it;
/// the likely candidate is tried first.
pub fn capture_entries(
    sources: &[&Source],
    looks: &[Look],
    first: usize,
    collector: &mut Collector,
) -> crate::Result<()> {
    for (index, set) in looks.iter().enumerate() {
        let FdDetail::Epoll { targets } = &set.info.detail else {
            continue;
        };
        let kinds = &collector.descriptions[first..];
        let is_left = |at: usize| {
            kinds
                .get(at)
                .is_some_and(|d| d.kind.get::<Left>().is_some())
        };
        let left: Vec<bool> = (0..looks.len()).map(is_left).collect();
        let mut entries = Vec::with_capacity(targets.len());
        let mut seen: HashMap<i32, u32> = HashMap::new();
        for target in targets {
            // Several descriptions may have been added under the same number, one after the other.
            let turn = seen.entry(target.tfd).or_default();
            let found = match collector.copies {
                Copies::Lent(_) if targets.iter().filter(|t| t.tfd == target.tfd).count() > 1 => {
                    collector
                        .findings
                        .obstacles
                        .push(untold(set, sources, target));
                    continue;
                }
                Copies::Lent(_) => find_by_adding(looks, set, target)?,
                _ => find(looks, set, target, *turn)?,
            };
            *turn += 1;
            match found {
                // Closing a file removes it from the sets that watch it.
                Some(at) if left[at] => {}
                Some(at) => entries.push(Entry {
                    fd: target.tfd,
                    description: DescriptionId(first + at),
                    events: target.events,
                    data: target.data,
                }),
                None => collector.findings.obstacles.push(Obstacle::new(
                    set.object(sources[set.process]),
                    format!(
                        "is an epoll set that watches a file added as fd {}, which only a process \
                         outside the job still has open",
                        target.tfd
                    ),
                    "remove it from the set before the checkpoint",
                )),
            }
        }
        if let Some(epoll) = collector.descriptions[first + index]
            .kind
            .get_mut::<Epoll>()
        {
            epoll.entries = entries;
        }
    }
    Ok(())
}

/// Without kcmp(2): EPOLL_CTL_ADD fails with EEXIST if the set has the description under that number.
fn find_by_adding(
    looks: &[Look],
    set: &Look,
    target: &EpollTarget,
) -> crate::Result<Option<usize>> {
    for at in candidates(looks, set, target) {
        let asked = ckpt_sys::events::epoll_has(&set.copy, &looks[at].copy, target.tfd);
        if asked.map_err(|errno| Error::Kernel {
            call: "epoll_ctl",
            object: format!("an epoll set, about fd {}", target.tfd),
            errno,
        })? {
            return Ok(Some(at));
        }
    }
    Ok(None)
}

fn untold(set: &Look, sources: &[&Source], target: &EpollTarget) -> Obstacle {
    Obstacle::new(
        set.object(sources[set.process]),
        format!(
            "is an epoll set that watches several files as fd {}, and telling them apart needs kcmp(2), \
             which is not permitted",
            target.tfd
        ),
        WITHHELD_REMEDY,
    )
}

/// Descriptions of the watched inode, the likely one first.
fn candidates(looks: &[Look], set: &Look, target: &EpollTarget) -> Vec<usize> {
    let mut candidates: Vec<usize> = (0..looks.len())
        .filter(|&i| looks[i].stat.st_ino == target.ino)
        .collect();
    candidates.sort_by_key(|&i| (looks[i].process != set.process, looks[i].fd != target.tfd));
    candidates
}

fn find(
    looks: &[Look],
    set: &Look,
    target: &EpollTarget,
    turn: u32,
) -> crate::Result<Option<usize>> {
    let me = Pid::own().leader();
    for at in candidates(looks, set, target) {
        // By our duplicates: a running process (`ckpt check`) may have closed its descriptors since.
        let what = KcmpType::EpollTfd {
            fd: looks[at].copy.as_raw_fd(),
            efd: set.copy.as_raw_fd(),
            tfd: target.tfd as u32,
            toff: turn,
        };
        match kcmp(me, me, what) {
            Ok(Ordering::Equal) => return Ok(Some(at)),
            Ok(_) => {}
            Err(Error::Kernel {
                errno: Errno::ENOENT,
                ..
            }) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(None)
}

impl Epoll {
    /// Adds the entries: each description temporarily gets the number with which it was added. Those for which
    /// `later` holds are added when their descriptions are final.
    fn rebuild_entries(
        &self,
        at: i32,
        staging: Staging,
        later: impl Fn(DescriptionId) -> bool,
        plan: &mut Builder,
    ) {
        for entry in self.entries.iter().filter(|e| !later(e.description)) {
            let object = || entry.object();
            let fd = entry.fd as u64;
            let from = staging.of(entry.description) as u64;
            plan.expect(
                libc::SYS_dup3,
                &[from, fd, libc::O_CLOEXEC as u64],
                fd,
                object,
            );
            entry.add(at, entry.fd, plan);
            plan.syscall(libc::SYS_close, &[fd], object);
        }
    }
}

/// Whether a description is a signalfd. A set that watches one waits for signals of the process that added it
/// (`signalfd_poll`, fs/signalfd.c), so that process has to add it again.
fn is_bound(description: DescriptionId, snapshot: &Snapshot) -> bool {
    let watched = description.find(&snapshot.descriptions);
    watched.is_some_and(|d| d.kind.get::<SignalFd>().is_some())
}

/// Adds the entries that the process has to add itself: of sets that it is the first process to hold. Called before
/// the process has its own numbers.
pub fn rebuild_bound(index: usize, snapshot: &Snapshot, staging: Staging, plan: &mut Builder) {
    for (set, description) in DescriptionId::each(&snapshot.descriptions) {
        let Some(epoll) = description.kind.get::<Epoll>() else {
            continue;
        };
        let holds = |p: &Process| p.fds.iter().any(|e| e.description == set);
        let first = snapshot.processes.iter().position(holds).unwrap_or(0);
        if first == index {
            let others = |d: DescriptionId| !is_bound(d, snapshot);
            epoll.rebuild_entries(staging.of(set), staging, others, plan);
        }
    }
}

impl Entry {
    /// Its name in messages.
    pub fn object(&self) -> String {
        format!("the epoll entry for fd {}", self.fd)
    }

    /// Adds it to the set `epoll`; the file is open under `fd`.
    pub fn add(&self, epoll: i32, fd: i32, plan: &mut Builder) {
        // struct epoll_event is packed on x86-64.
        let mut event = [0; 12];
        event[..4].copy_from_slice(&self.events.to_le_bytes());
        event[4..].copy_from_slice(&self.data.to_le_bytes());
        let event = plan.data(&event);
        let args = [epoll as u64, libc::EPOLL_CTL_ADD as u64, fd as u64, event];
        plan.syscall(libc::SYS_epoll_ctl, &args, || self.object());
    }
}
