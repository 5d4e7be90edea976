//! Whether a process can be checkpointed and restored: finds all obstacles from outside, without side effects.

mod access;

use std::cmp::Ordering;
use std::os::unix::fs::MetadataExt;

use ckpt_tracer::kcmp::{KcmpType, group_tasks, has_undo_list, kcmp};
use ckpt_tracer::proc::stat::read_stat;
use ckpt_tracer::proc::status::read_status;
use ckpt_tracer::proc::tasks;
use ckpt_tracer::{Error as TracerError, Pid, Tid};
use nix::errno::Errno;

use access::{accessible, denial};

use crate::capture::seen::Planned;
use crate::error::{Obstacle, Result};
use crate::objects::files::left::Choices;
use crate::objects::findings::Findings;
use crate::objects::ipc;
use crate::objects::job::Family;
use crate::objects::namespaces;
use crate::objects::process::kin;
use crate::objects::process::{self, Depth, FromOutside};
use crate::objects::process_tree;
use crate::objects::source::{Collector, Copies, Source};
use crate::objects::zombie::{self, Zombie};

/// All obstacles to a checkpoint of these processes and their descendants, and, if there are none, to the planned
/// restore of it here. Has no side effects.
///
/// # Errors
/// When they cannot be inspected.
pub fn findings(roots: &[Pid], choices: &Choices, planned: &Planned<'_>) -> Result<Findings> {
    let sight = look_while_it_runs(roots, Depth::Full, choices, Some(planned))?;
    Ok(sight.found)
}

/// The same before a checkpoint, in brief: what costs time in proportion to the memory is read only once, when the
/// job is frozen. If the job changes too fast, the rest is found at the freeze.
pub fn obstacles_at_a_glance(roots: &[Pid], choices: &Choices) -> Result<Vec<Obstacle>> {
    let sight = look_while_it_runs(roots, Depth::Glance, choices, None)?;
    Ok(if sight.steady {
        sight.found.obstacles
    } else {
        Vec::new()
    })
}

/// Result of one inspection of a running job.
struct Inspection {
    found: Findings,
    /// Its processes were the same before and after.
    steady: bool,
}

/// Inspects a job until its processes stay the same meanwhile, for a limited time. A new process may look like one
/// outside the job, and one that is ending loses its state bit by bit. So findings count, and errors too, when they
/// occur twice with the same processes.
fn look_while_it_runs(
    roots: &[Pid],
    depth: Depth,
    choices: &Choices,
    planned: Option<&Planned<'_>>,
) -> Result<Inspection> {
    const LOOKS: u32 = 20;
    let mut last: Option<(Family, Vec<Obstacle>)> = None;
    for number in 0.. {
        for &root in roots {
            // An adopted process may have ended since it was found.
            if let Err(obstacle) = accessible(root)
                && (root == roots[0] || !is_ending(root))
            {
                return Ok(Inspection {
                    found: Findings::from(vec![obstacle]),
                    steady: true,
                });
            }
        }
        let family = Family::of_all(roots)?;
        let seen = look(&family, depth, choices, planned);
        let alone = family.living.len() == 1 && family.ended.is_empty();
        let steady = !family.living.iter().any(|pid| is_ending(*pid))
            && Family::of_all(roots).is_ok_and(|now| now.living == family.living);
        match seen {
            Ok(found) if found.is_clear() => {
                return Ok(Inspection { found, steady });
            }
            Ok(found) => {
                let now = (family, found.obstacles.clone());
                let again = last.take().is_some_and(|l| l == now);
                if steady && (alone || again) || number == LOOKS {
                    return Ok(Inspection { found, steady });
                }
                last = Some(now);
            }
            Err(e) if steady => return Err(e),
            Err(_) if number == LOOKS => {
                let found = Findings::default();
                return Ok(Inspection { found, steady });
            }
            Err(_) => last = None,
        }
    }
    unreachable!("the last attempt returns")
}

fn look(
    family: &Family,
    depth: Depth,
    choices: &Choices,
    planned: Option<&Planned<'_>>,
) -> Result<Findings> {
    let mut sources = Vec::with_capacity(family.living.len());
    for &pid in &family.living {
        if let Err(obstacle) = accessible(pid) {
            return Ok(Findings::from(vec![obstacle]));
        }
        match Source::open(pid) {
            Ok(source) => sources.push(source),
            Err(e) => return denial(e.into(), &[pid]).map(Findings::from),
        }
    }
    let all: Vec<&Source> = sources.iter().collect();
    let mut collector = Collector::for_a_look();
    collector.choices = choices.clone();
    let outside = match look_at_all(&all, &family.ended, depth, &mut collector) {
        Ok(outside) => outside,
        Err(e) => return denial(e, &family.living).map(Findings::from),
    };
    let obstacles = std::mem::take(&mut collector.findings.obstacles);
    // Without duplicates of the descriptors their restore cannot be planned.
    let planned = planned.filter(|_| matches!(collector.copies, Copies::Taken));
    match planned.filter(|_| obstacles.is_empty()) {
        Some(planned) => planned.look(&all, outside, &family.ended, &mut collector),
        None => Ok(Findings::from(obstacles)),
    }
}

fn look_at_all(
    sources: &[&Source],
    ended: &[Pid],
    depth: Depth,
    collector: &mut Collector,
) -> Result<Vec<FromOutside>> {
    for source in sources {
        inside_the_job(source, collector)?;
    }
    if matches!(collector.copies, Copies::Taken) {
        shared_by_processes(sources, collector)?;
    }
    clocks_of_their_own(sources, collector);
    let outside = process::capture_from_outside(sources, depth, collector)?;
    if matches!(collector.copies, Copies::Taken) {
        // A process that its parent has just reaped is not part of the job any more.
        let zombies = ended.iter().filter_map(|pid| zombie::capture(*pid).ok());
        let zombies: Vec<Zombie> = zombies.collect();
        let kin = kin::of_all(sources, &outside, collector)?;
        if let Err(obstacles) = process_tree::decide_for(&kin, &zombies) {
            obstacles.into_iter().for_each(|o| collector.refuse(o));
        }
    }
    let spaces = process::address_spaces(sources, &outside, collector);
    collector.ended = ended.iter().map(|pid| pid.raw()).collect();
    ipc::capture(&spaces, collector)?;
    Ok(outside)
}

/// What processes may share, beyond what a fork leaves shared.
const SHARED: [(KcmpType, &str); 5] = [
    (KcmpType::Vm, "its memory (CLONE_VM)"),
    (KcmpType::Files, "its table of descriptors (CLONE_FILES)"),
    (KcmpType::Fs, "its working directory (CLONE_FS)"),
    (KcmpType::Sighand, "its signal actions (CLONE_SIGHAND)"),
    (
        KcmpType::Sysvsem,
        "its adjustments of semaphores (CLONE_SYSVSEM)",
    ),
];

/// Finds processes that share these things. Sharing with the parent can be restored and is recorded.
pub fn shared_by_processes(sources: &[&Source], collector: &mut Collector) -> Result<()> {
    let leaders: Vec<Tid> = sources.iter().map(|s| s.pid.leader()).collect();
    for (what, name) in SHARED {
        for group in group_tasks(leaders.clone(), what)? {
            if group.len() < 2 || what == KcmpType::Sysvsem && !may_share_adjustments(group[0])? {
                continue;
            }
            let members = group
                .iter()
                .flat_map(|tid| sources.iter().find(|s| s.pid.leader() == *tid));
            let members: Vec<&&Source> = members.collect();
            for member in &members[1..] {
                if !members.iter().any(|m| m.pid == member.status.ppid) {
                    collector.findings.obstacles.push(Obstacle::new(
                        member.title(),
                        format!(
                            "shares {name} with {}, but not with its parent, which is not supported",
                            members[0].title()
                        ),
                        "wait until one of them has ended",
                    ));
                    continue;
                }
                let shares = collector.shares.entry(member.pid).or_default();
                match what {
                    KcmpType::Vm => shares.memory = true,
                    KcmpType::Files => shares.files = true,
                    KcmpType::Fs => shares.fs = true,
                    KcmpType::Sighand => shares.actions = true,
                    _ => shares.adjustments = true,
                }
            }
        }
    }
    let of_job = |pid| sources.iter().any(|s| s.pid == pid);
    for source in sources.iter().filter(|s| !of_job(s.status.ppid)) {
        shared_with_outsider(source, collector);
    }
    Ok(())
}

/// Two tasks without an undo list (semop(2)) share none. After setns(2) into another user namespace we may not
/// compare ourselves; without semaphores there is nothing to adjust.
fn may_share_adjustments(task: Tid) -> Result<bool> {
    match has_undo_list(task) {
        Err(TracerError::Kernel {
            errno: Errno::EPERM,
            ..
        }) if ipc::no_semaphores() => Ok(false),
        other => Ok(other?),
    }
}

/// Refuses processes whose clocks differ from the first one's, or from those of their future children: a restore sets
/// the same for all (time_namespaces(7)).
fn clocks_of_their_own(sources: &[&Source], collector: &mut Collector) {
    let namespace = |source: &Source, name: &str| {
        let path = source.dir.join("ns").join(name);
        std::fs::metadata(path).ok().map(|meta| meta.ino())
    };
    let first = sources.first().and_then(|s| namespace(s, "time"));
    for source in sources {
        let both = ["time", "time_for_children"].map(|name| namespace(source, name));
        if both.iter().any(|one| one.is_some() && *one != first) {
            collector.findings.obstacles.push(Obstacle::without_remedy(
                source.title(),
                "is in another time namespace than the job's first process, or its children will be, which \
                 is not supported",
            ));
        }
    }
}

/// Refuses a process that shares with a parent outside the job. Unknown if we may not trace the parent.
fn shared_with_outsider(source: &Source, collector: &mut Collector) {
    let (pid, parent) = (source.pid.leader(), source.status.ppid);
    let same = |what| kcmp(pid, parent.leader(), what).is_ok_and(Ordering::is_eq);
    let shared = SHARED.iter().find(|(what, _)| {
        same(*what) && (*what != KcmpType::Sysvsem || has_undo_list(pid).unwrap_or(false))
    });
    if let Some((_, name)) = shared {
        collector.findings.obstacles.push(Obstacle::new(
            source.title(),
            format!("shares {name} with its parent, process {parent}, which is outside the job"),
            format!("checkpoint that one as well: ckpt attach {parent}"),
        ));
    }
}

/// Whether the process is ending or has ended. It loses its memory and its descriptors before it becomes a zombie.
fn is_ending(pid: Pid) -> bool {
    /// `linux/sched.h`.
    const PF_EXITING: u32 = 0x4;
    read_stat(pid).map_or(true, |stat| {
        stat.state.has_ended() || stat.flags & PF_EXITING != 0
    })
}

/// Obstacles in the process's own state.
pub fn inside_the_job(source: &Source, collector: &mut Collector) -> Result<()> {
    let tids = tasks::list_tasks(source.pid)?;
    lives_elsewhere(source, &tids, collector)?;
    let surroundings = collector.surroundings();
    for tid in tids {
        let Ok(status) = read_status((source.pid, tid)) else {
            continue;
        };
        if let Some((reason, remedy)) = surroundings.in_the_way(&status) {
            refuse(source, reason, Some(remedy), collector);
            break;
        }
    }
    Ok(())
}

/// The part of them that may have changed until the freeze, if the job was changing.
pub fn lives_elsewhere(source: &Source, tids: &[Tid], collector: &mut Collector) -> Result<()> {
    if is_32_bit(source) {
        let reason = "is a 32-bit program, which is not supported";
        refuse(source, reason.into(), Some("use a 64-bit build"), collector);
    }
    if source
        .status
        .untag_mask
        .is_some_and(|mask| mask != u64::MAX)
    {
        let reason = "uses tagged pointers (ARCH_ENABLE_TAGGED_ADDR), which are not supported";
        let remedy = "run the program without linear address masking";
        refuse(source, reason.into(), Some(remedy), collector);
    }
    for kind in other_namespaces(source)? {
        let remedy = format!(
            "run ckpt, and later restore, inside it: nsenter --target {} --{} ckpt …",
            source.pid,
            nsenter_option(&kind)
        );
        let reason = format!("is in another {kind} namespace than ckpt, which is not supported");
        refuse(source, reason, Some(&remedy), collector);
    }
    if matches!(collector.copies, Copies::Taken) {
        for &tid in tids {
            if let Some(what) = own_table(source.pid, tid)? {
                let reason =
                    format!("has a thread {tid} with its own {what}, which is not supported");
                refuse(source, reason, None, collector);
                break;
            }
        }
    }
    Ok(())
}

fn refuse(source: &Source, reason: String, remedy: Option<&str>, collector: &mut Collector) {
    collector.findings.obstacles.push(Obstacle {
        object: source.title(),
        reason,
        remedy: remedy.map(str::to_owned),
        passing: false,
        by_option: false,
    });
}

/// Kinds of namespaces that the process does not share with us. The restored process would be in those of `restore`.
fn other_namespaces(source: &Source) -> Result<Vec<String>> {
    match namespaces::others(&source.dir) {
        // Permission to trace the process is checked elsewhere.
        Err(TracerError::Proc { source, .. }) if source.raw_os_error() == Some(libc::EACCES) => {
            Ok(Vec::new())
        }
        Ok(mut kinds) => {
            let own = |kind: &String| namespaces::OWN.contains(&kind.as_str());
            // Together with a pid namespace these could be entered, but not with the others.
            if kinds.iter().any(|kind| kind == "pid") && !kinds.iter().all(own) {
                kinds.retain(|kind| !own(kind));
            }
            Ok(kinds)
        }
        Err(e) => Err(e.into()),
    }
}

/// The option of nsenter(1) for a kind of namespace.
fn nsenter_option(kind: &str) -> &str {
    match kind {
        "mnt" => "mount",
        other => other,
    }
}

/// What a thread does not share with the first one: it was created without CLONE_FILES or CLONE_FS, or called
/// unshare(2).
fn own_table(pid: Pid, tid: Tid) -> Result<Option<&'static str>> {
    for (what, name) in [
        (KcmpType::Files, "table of descriptors"),
        (KcmpType::Fs, "working directory"),
    ] {
        match kcmp(pid.leader(), tid, what) {
            Ok(Ordering::Equal) | Err(TracerError::Died { .. }) => {}
            Ok(_) => return Ok(Some(name)),
            // As above.
            Err(TracerError::Kernel {
                errno: Errno::EPERM,
                ..
            }) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(None)
}

/// Whether auxiliary vector and code segment are 32-bit, by the executable.
fn is_32_bit(source: &Source) -> bool {
    let mut ident = [0; 5];
    std::fs::File::open(source.dir.join("exe"))
        .and_then(|f| std::os::unix::fs::FileExt::read_exact_at(&f, &mut ident, 0))
        .is_ok_and(|()| ident[..4] == *b"\x7fELF" && ident[4] == 1)
}
