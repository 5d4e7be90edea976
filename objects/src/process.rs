//! A process (thread group): the state that its threads share.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use ckpt_tracer::Tid;
use ckpt_tracer::freeze::Frozen;
use ckpt_tracer::proc::maps::{VmFlags, Vma, read_maps, read_smaps};
use ckpt_tracer::proc::pagemap::PagemapScanner;
use ckpt_tracer::proc::status::Status;
use ckpt_tracer::proc::timers::read_timers;
use ckpt_tracer::remote::{Cave, RemoteCalls, Scratch};
use ckpt_tracer::task::Stopped;
use serde::{Deserialize, Serialize};

use super::address_space::{self, AddressSpace};
use super::cgroup::Cgroup;
use super::dynamic_state::{self, DynamicState};
use super::files::{self, FdEntry, lock::Lock, removed};
use super::ipc::Ipc;
use super::ipc::notice::{self, Notice};
use super::ipc::undo::{self, Adjustment};
use super::landlock::Bystanders;
use super::limits::Limit;
use super::memory_policy;
use super::segments::{self, Segment};
use super::signals::{self, Action, Pending};
use super::thread::{self, Thread};
use super::timers::{self, IntervalTimers, PosixTimer};
use super::{SpaceId, aio, memory};
use crate::bounds;
use crate::error::{Obstacle, Result};
use crate::index::{RemovedId, TerminalId};
use crate::source::{Collector, Copies, Source};
use crate::text::Shown;

pub mod kin;
mod seen;
mod sharing;

pub use seen::seen;
pub use sharing::tasks_with_memory_of;

/// A process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Process {
    /// Its id.
    #[serde(deserialize_with = "bounds::pid")]
    pub pid: i32,
    /// Its parent's id; 0 when the parent is outside its pid namespace.
    #[serde(deserialize_with = "bounds::pid")]
    pub parent: i32,
    /// It was forked by its parent, without an exec since: unchanged pages are shared with it.
    pub forked: bool,
    /// What it shares with its parent, other than after a fork.
    pub shares: Shares,
    /// Its exit signal, 0 for none.
    #[serde(default = "sigchld")]
    #[serde(deserialize_with = "bounds::signal")]
    pub exit_signal: i32,
    /// Process group.
    #[serde(deserialize_with = "bounds::pid")]
    pub group: i32,
    /// Session.
    #[serde(deserialize_with = "bounds::pid")]
    pub session: i32,
    /// Its controlling terminal, if it has one.
    pub terminal: Option<TerminalId>,
    /// The signal of the group stop in which the checkpoint found it.
    #[serde(default, deserialize_with = "bounds::signal")]
    pub stopped: Option<i32>,
    /// Stopped children whose stop wait(2) has not reported to it yet.
    #[serde(deserialize_with = "bounds::pid")]
    pub untold_stops: Vec<i32>,
    /// Continued children that wait(2) has not reported to it yet.
    #[serde(default, deserialize_with = "bounds::pid")]
    pub untold_continues: Vec<i32>,
    /// Command line, `\0` after each argument.
    #[serde(with = "serde_bytes")]
    pub command_line: Vec<u8>,
    /// Memory.
    pub memory: AddressSpace,
    /// Threads; the first one is the leader.
    pub threads: Vec<Thread>,
    /// Actions other than the default.
    #[serde(deserialize_with = "bounds::few::<_, _, 64>")]
    pub actions: Vec<Action>,
    /// Signals pending for the process.
    pub pending: Vec<Pending>,
    /// Interval timers.
    pub interval_timers: IntervalTimers,
    /// POSIX timers, by ascending id.
    pub posix_timers: Vec<PosixTimer>,
    /// Descriptors, ascending.
    pub fds: Vec<FdEntry>,
    /// POSIX locks, each with a descriptor of the file.
    pub record_locks: Vec<(i32, Lock)>,
    /// Its registrations for notification, mq_notify(3).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notices: Vec<Notice>,
    /// Its directories that were removed.
    #[serde(default)]
    pub removed: RemovedPlaces,
    /// Current directory.
    #[serde(with = "crate::raw_path")]
    pub cwd: PathBuf,
    /// Root directory.
    #[serde(with = "crate::raw_path")]
    pub root: PathBuf,
    /// umask(2).
    #[serde(deserialize_with = "bounds::umask")]
    pub umask: u32,
    /// Limits.
    #[serde(deserialize_with = "bounds::few::<_, _, 16>")]
    pub limits: Vec<Limit>,
    /// personality(2).
    pub personality: u32,
    /// `PR_GET_CHILD_SUBREAPER`.
    pub child_subreaper: bool,
    /// Control groups.
    #[serde(deserialize_with = "bounds::few::<_, _, 64>")]
    pub cgroups: Vec<Cgroup>,
    /// Permitted dynamic processor state.
    #[serde(default)]
    pub dynamic_state: DynamicState,
    /// `/proc/PID/oom_score_adj`.
    #[serde(deserialize_with = "bounds::oom_score")]
    pub oom_score_adj: i32,
    /// `/proc/PID/coredump_filter`.
    pub coredump_filter: Option<u32>,
    /// The nice value of its autogroup (sched(7)), if the kernel has autogroups.
    #[serde(default, deserialize_with = "bounds::nice")]
    pub autogroup_nice: Option<i32>,
    /// `/proc/PID/loginuid`, if the kernel has audit; `u32::MAX` is unset.
    #[serde(default)]
    pub login_uid: Option<u32>,
    /// Its semaphore adjustments (`SEM_UNDO`); those shared with its parent are in the parent's record.
    #[serde(default)]
    pub semaphore_adjustments: Vec<Adjustment>,
}

/// Removed working and root directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemovedPlaces {
    /// The working directory.
    pub cwd: Option<RemovedId>,
    /// The root directory.
    pub root: Option<RemovedId>,
}

/// The exit signal of nearly all processes.
pub fn sigchld() -> i32 {
    libc::SIGCHLD
}

/// What a process shares with its parent, clone(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shares {
    /// Descriptors (`CLONE_FILES`).
    pub files: bool,
    /// Directories and umask (`CLONE_FS`).
    pub fs: bool,
    /// Memory (`CLONE_VM`).
    #[serde(default)]
    pub memory: bool,
    /// Signal actions (`CLONE_SIGHAND`).
    #[serde(default)]
    pub actions: bool,
    /// Semaphore adjustments (`CLONE_SYSVSEM`).
    #[serde(default)]
    pub adjustments: bool,
}

impl Shares {
    /// Flags of clone(2).
    pub fn flags(self) -> i32 {
        let all = [
            (self.files, libc::CLONE_FILES),
            (self.fs, libc::CLONE_FS),
            (self.memory, libc::CLONE_VM),
            (self.actions, libc::CLONE_SIGHAND),
            (self.adjustments, libc::CLONE_SYSVSEM),
        ];
        let shared = all.iter().filter(|(shared, _)| *shared);
        shared.fold(0, |flags, (_, flag)| flags | flag)
    }
}

impl Process {
    /// Whether any of its threads is restricted by seccomp.
    pub fn is_under_seccomp(&self) -> bool {
        self.threads.iter().any(|t| t.seccomp.is_on())
    }
}

/// What can be captured of a process without executing anything in it. `ckpt check` uses it, since it finds all
/// obstacles.
pub struct FromOutside {
    /// Mappings, as the kernel lists them.
    pub vmas: Vec<Vma>,
    /// Mappings, classified.
    pub memory: memory::Captured,
    /// Descriptors.
    pub fds: Vec<FdEntry>,
    /// Directories that were removed.
    pub removed: RemovedPlaces,
    /// Controlling terminal.
    pub terminal: Option<TerminalId>,
    /// POSIX locks, by descriptor.
    pub record_locks: Vec<(i32, Lock)>,
    /// Its registrations with message queues; [`notice::learn`] adds the cookies.
    pub notices: Vec<Notice>,
    /// Reads the page tables.
    pub scanner: PagemapScanner,
}

/// How much of the memory is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Mappings without their flags: no cost in proportion to the memory.
    Glance,
    /// With flags and guard pages, for which the kernel walks the page tables.
    Full,
}

/// Captures processes from outside, in the order of `sources`; obstacles go into the collector.
pub fn capture_from_outside(
    sources: &[&Source],
    depth: Depth,
    collector: &mut Collector,
) -> Result<Vec<FromOutside>> {
    let mut survey = files::Survey::of(sources, &collector.copies)?;
    let terminals = files::terminal::Ends::of(sources, &survey.looks, collector);
    let fds = match collector.copies {
        Copies::None => files::judge_by_sight(sources, &survey, collector),
        _ => files::capture(sources, &mut survey, &terminals, collector)?,
    };
    let locks = survey.seen.into_iter().map(|seen| {
        let locks = seen.into_iter().map(|s| (s.fd, s.locks));
        locks.flat_map(|(fd, locks)| locks.into_iter().map(move |l| (fd, l)))
    });
    let mut all: Vec<FromOutside> = Vec::with_capacity(sources.len());
    for (index, (source, (fds, locks))) in
        sources.iter().zip(fds.into_iter().zip(locks)).enumerate()
    {
        let removed = directories(source, collector)?;
        timers::judge(
            source,
            &|pid| sources.iter().any(|s| s.pid == pid),
            collector,
        )?;
        let scanner = PagemapScanner::open(source.dir.clone())?;
        let parent = sources.iter().position(|s| s.pid == source.status.ppid);
        let parent = parent.and_then(|at| all.get(at));
        let (vmas, memory) = match parent.filter(|_| collector.shares(source.pid).memory) {
            Some(parent) => (parent.vmas.clone(), parent.memory.clone()),
            None => memory_from_outside(source, depth, &scanner, collector)?,
        };
        let requests = aio::hides_requests(source, &vmas, collector)?;
        requests.into_iter().for_each(|o| collector.refuse(o));
        all.push(FromOutside {
            vmas,
            memory,
            fds,
            removed,
            record_locks: locks.collect(),
            notices: Vec::new(),
            terminal: terminals.controlling(index, source, collector),
            scanner,
        });
    }
    for (source, outside) in sources.iter().zip(&all) {
        memory::hidden_by_guards(source, &outside.memory.mappings, collector);
    }
    notice::survey(sources, &mut all, collector);
    Ok(all)
}

/// The processes with their mappings; those that share their parent's memory are left out.
pub fn address_spaces<'a>(
    sources: &[&'a Source],
    outside: &'a [FromOutside],
    collector: &Collector,
) -> Vec<(&'a Source, &'a [Vma])> {
    let all = sources.iter().zip(outside);
    all.map(
        |(source, outside)| match collector.shares(source.pid).memory {
            true => (*source, [].as_slice()),
            false => (*source, outside.vmas.as_slice()),
        },
    )
    .collect()
}

fn memory_from_outside(
    source: &Source,
    depth: Depth,
    scanner: &PagemapScanner,
    collector: &mut Collector,
) -> Result<(Vec<Vma>, memory::Captured)> {
    let dir = source.dir.clone();
    let (vmas, guards) = match depth {
        Depth::Glance => (read_maps(dir)?, Vec::new()),
        Depth::Full => (read_smaps(dir)?, memory::guard_pages(scanner)?),
    };
    let memory = memory::capture(source, &vmas, &guards, collector)?;
    let room = crate::holes::permitted(source, &vmas, SCRATCH);
    collector.findings.obstacles.extend(room.err());
    Ok((vmas, memory))
}

/// Checks that the working directory and the root directory can be found or recreated.
fn directories(source: &Source, collector: &mut Collector) -> Result<RemovedPlaces> {
    let mut places = RemovedPlaces::default();
    for name in ["cwd", "root"] {
        let link = match std::fs::read_link(source.dir.join(name)) {
            Ok(link) => link,
            // A process that is ending has none any more.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let tid = source.pid.leader();
                return Err(ckpt_tracer::Error::Died { tid }.into());
            }
            Err(e) => return Err(crate::Error::file("look at", source.dir.join(name))(e)),
        };
        let there = std::fs::metadata(source.dir.join(name));
        let named = std::fs::metadata(&link);
        let reachable = matches!((&there, &named), (Ok(a), Ok(b)) if memory::same_file(a, b));
        let removed = |collector: &mut Collector| {
            let path = without_deleted(&link)?;
            let handle = ckpt_sys::files::handle(&source.dir.join(name)).ok()?;
            removed::enter(&path, &handle, &mut collector.removed).ok()
        };
        if reachable {
            continue;
        }
        // Of several processes that share a descriptor table, one fills it.
        let shared = collector.shares(source.pid);
        let found = match shared.files && !shared.fs {
            true => None,
            false => removed(collector),
        };
        match name {
            "cwd" => places.cwd = found,
            _ => places.root = found,
        }
        if found.is_none() {
            collector.findings.obstacles.push(Obstacle::new(
                source.title(),
                format!(
                    "has the directory {} as its {name}, which was deleted",
                    link.shown()
                ),
                "let the program change to another directory",
            ));
        }
    }
    Ok(places)
}

/// The path without the kernel's ` (deleted)`.
fn without_deleted(link: &Path) -> Option<PathBuf> {
    let name = link.as_os_str().as_bytes().strip_suffix(b" (deleted)")?;
    Some(PathBuf::from(OsStr::from_bytes(name)))
}

/// The relations of a process to others in the job.
pub struct InJob<'a> {
    /// The space for its pages, unless it shares its parent's memory.
    pub space: SpaceId,
    /// Its parent, if that belongs to the job.
    pub parent: Option<&'a Process>,
    /// What it shares with its parent.
    pub shares: Shares,
    /// Its stopped children.
    pub stopped_children: &'a [i32],
    /// Its other children.
    pub running_children: &'a [i32],
    /// The job's objects of the IPC namespace.
    pub ipc: &'a Ipc,
    /// The statuses of all tasks of the job.
    pub statuses: &'a Statuses,
    /// Probe processes that detect Landlock.
    pub bystanders: &'a Bystanders,
}

/// `/proc/PID/task/TID/status` of frozen tasks: reading it is slow, so it is read once.
pub type Statuses = HashMap<Tid, Status>;

impl InJob<'_> {
    fn status(&self, tid: Tid) -> Result<&Status> {
        let status = self.statuses.get(&tid);
        Ok(status.ok_or(ckpt_tracer::Error::Died { tid })?)
    }
}

/// Scratch memory for the results of remote calls.
const SCRATCH: u64 = 16 * 1024;

/// Captures a frozen process. One thread after the other is prepared for remote calls, the leader first; the scratch
/// memory is handed over between them.
pub fn capture(
    frozen: &mut Frozen,
    source: &Source,
    outside: FromOutside,
    job: &InJob<'_>,
) -> Result<(Process, Vec<Vma>, PagemapScanner)> {
    let pid = source.pid;
    let (mut process, vmas, scanner) = seen(source, outside, job, &[])?;
    process.stopped = frozen.stopped_by();
    let pending = frozen
        .tasks()
        .first()
        .map(|t| signals::capture_pending(t, true));
    process.pending = pending.transpose()?.unwrap_or_default();
    let listed = read_timers(source.dir.clone())?;

    let tids: Vec<_> = frozen.tasks().iter().map(|t| t.tid()).collect();
    let memory_for_calls = scratch(source, &vmas, SCRATCH)?;
    let scratch = memory_for_calls.at();
    let cave = Cave::dig(&source.mem, &vmas, frozen.tasks())?;
    let cave = cave.with_doorbell(frozen.tasks());
    let (leader, others) = frozen
        .tasks_mut()
        .split_first_mut()
        .ok_or(ckpt_tracer::Error::Died { tid: pid.leader() })?;
    let calls = RemoteCalls::begin(leader, &cave, memory_for_calls);
    let mut calls = calls.map_err(|e| crate::holes::refusal(source, SCRATCH, e))?;
    let mut has_segments = false;
    if !job.shares.memory {
        let asked = address_space::capture(&mut calls)?;
        has_segments = segments::has_local(&mut calls)?;
        let memory = &mut process.memory;
        memory_policy::capture(&mut calls, &mut memory.mappings)?;
        memory.layout.brk = asked.brk;
        memory.lock_future = lock_future(&mut calls, &vmas)?;
        memory.switches = asked.switches;
        memory.dumpable = asked.dumpable;
        memory.membarrier = asked.membarrier;
    }
    if !job.shares.actions {
        process.actions = signals::capture_actions(&mut calls)?;
    }
    process.dynamic_state = dynamic_state::capture(&mut calls)?;
    process.interval_timers = timers::capture_interval(&mut calls)?;
    process.posix_timers = timers::capture_posix(&mut calls, &listed)?;
    let get = [PR_GET_CHILD_SUBREAPER, scratch.raw(), 0, 0, 0, 0];
    calls.call("prctl(PR_GET_CHILD_SUBREAPER)", libc::SYS_prctl, get)?;
    process.child_subreaper = calls.read_scratch::<4>(0)? != [0; 4];
    process.untold_stops = untold(&mut calls, libc::WSTOPPED, job.stopped_children)?;
    process.untold_continues = untold(&mut calls, libc::WCONTINUED, job.running_children)?;
    if !job.shares.adjustments {
        process.semaphore_adjustments = undo::capture(&mut calls, &job.ipc.semaphores, &tids)?;
    }
    let status = job.status(pid.leader())?;
    let bystander = job.bystanders.beside(status);
    process.threads = vec![thread::capture(&mut calls, source, status, bystander)?];
    for task in others {
        let status = job.status(task.tid())?;
        calls = calls.hand_over(task)?;
        let bystander = job.bystanders.beside(status);
        let thread = thread::capture(&mut calls, source, status, bystander)?;
        process.threads.push(thread);
    }
    calls.finish()?;
    if has_segments {
        // The whole table takes more scratch memory than everything else.
        let leader = &mut frozen.tasks_mut()[0];
        process.memory.segments = local_segments(leader, source, &vmas, &cave)?;
    }
    cave.fill_in()?;
    Ok((process, vmas, scanner))
}

fn local_segments(
    leader: &mut Stopped,
    source: &Source,
    vmas: &[Vma],
    cave: &Cave<'_>,
) -> Result<Vec<Segment>> {
    let scratch = scratch(source, vmas, segments::LARGEST)?;
    let calls = RemoteCalls::begin(leader, cave, scratch);
    let mut calls = calls.map_err(|e| crate::holes::refusal(source, segments::LARGEST, e))?;
    let segments = segments::capture_local(&mut calls)?;
    calls.finish()?;
    Ok(segments)
}

/// Scratch memory for remote calls.
fn scratch(source: &Source, vmas: &[Vma], bytes: u64) -> Result<Scratch> {
    crate::holes::scratch(source, vmas, bytes).map_err(crate::Error::refuse)
}

/// `PR_GET_CHILD_SUBREAPER`.
const PR_GET_CHILD_SUBREAPER: u64 = 37;

/// Children whose stop (`WSTOPPED`) or continuation (`WCONTINUED`) wait(2) would still report to the process, queried
/// with `WNOWAIT`.
fn untold(calls: &mut RemoteCalls<'_>, what: i32, children: &[i32]) -> Result<Vec<i32>> {
    let options = what | libc::WNOHANG | libc::WNOWAIT | libc::__WALL;
    /// `si_pid` in `siginfo_t`.
    const SI_PID: u64 = 16;
    let mut ask = |id_type: libc::idtype_t, id: i32| -> Result<i32> {
        let info = calls.scratch().raw();
        calls.write_scratch(0, &[0; 128])?;
        let args = [id_type.into(), id as u64, info, options as u64, 0, 0];
        calls.call("waitid", libc::SYS_waitid, args)?;
        Ok(i32::from_le_bytes(calls.read_scratch(SI_PID)?))
    };
    let mut untold = Vec::new();
    // Usually there is nothing to report.
    if !children.is_empty() && ask(libc::P_ALL, 0)? != 0 {
        for &child in children {
            if ask(libc::P_PID, child)? == child {
                untold.push(child);
            }
        }
    }
    Ok(untold)
}

/// The flags of `mlockall` for future mappings cannot be read, but a new mapping shows them, and the scratch memory
/// is one. Checked only if something is locked.
fn lock_future(calls: &mut RemoteCalls<'_>, vmas: &[Vma]) -> Result<u32> {
    if !vmas.iter().any(|v| v.flags.contains(VmFlags::LOCKED)) {
        return Ok(0);
    }
    let scratch = calls.scratch().raw();
    let now = read_smaps(calls.pid())?;
    let Some(new) = now.iter().find(|v| v.start <= scratch && scratch < v.end) else {
        return Ok(0);
    };
    let bit = |flag, bit: i32| {
        if new.flags.contains(flag) {
            bit as u32
        } else {
            0
        }
    };
    Ok(bit(VmFlags::LOCKED, libc::MCL_FUTURE) | bit(VmFlags::LOCK_ON_FAULT, libc::MCL_ONFAULT))
}
