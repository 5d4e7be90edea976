//! Whether a process can be checkpointed and restored: everything that stands in the way,
//! found from outside before anything is touched.

use std::cmp::Ordering;

use ckpt_tracer::kcmp::{KcmpType, group_tasks, kcmp};
use ckpt_tracer::proc::stat::read_stat;
use ckpt_tracer::proc::status::{Status, read_status};
use ckpt_tracer::proc::{ProcRoot, tasks};
use ckpt_tracer::{Error as TracerError, Pid, Tid, refusal};
use nix::errno::Errno;
use nix::unistd::geteuid;

use crate::capture::source::{Collector, Source};
use crate::error::{Error, Obstacle, Result};
use crate::job::Family;
use crate::objects::ipc;
use crate::objects::process::{self, Depth};

/// All obstacles to a checkpoint of `pid` and its descendants; empty when there is none. Touches
/// nothing.
pub fn obstacles(pid: Pid) -> Result<Vec<Obstacle>> {
    look(&[pid], Depth::Full)
}

/// The same before a checkpoint, at a glance: what takes time with the size of the memory is
/// looked at once only, when the job is frozen.
pub fn obstacles_at_a_glance(roots: &[Pid]) -> Result<Vec<Obstacle>> {
    for &root in roots {
        if let Err(obstacle) = accessible(root) {
            return Ok(vec![obstacle]);
        }
    }
    let before = Family::of_all(roots)?;
    let obstacles = look(roots, Depth::Glance)?;
    // Who has just been born looks like somebody outside the job to those that were there before:
    // the other side of a connection, a user of shared memory. The frozen job will tell.
    if !obstacles.is_empty() && Family::of_all(roots)?.living != before.living {
        return Ok(Vec::new());
    }
    Ok(obstacles)
}

fn look(roots: &[Pid], depth: Depth) -> Result<Vec<Obstacle>> {
    for &root in roots {
        if let Err(obstacle) = accessible(root) {
            return Ok(vec![obstacle]);
        }
    }
    let family = Family::of_all(roots)?;
    let mut sources = Vec::with_capacity(family.living.len());
    for &pid in &family.living {
        if !roots.contains(&pid)
            && let Err(obstacle) = accessible(pid)
        {
            // Unless it was there only for a moment.
            if has_ended(pid) {
                continue;
            }
            return Ok(vec![obstacle]);
        }
        match Source::open(pid) {
            Ok(source) => sources.push(source),
            Err(TracerError::Proc { source, .. })
                if source.raw_os_error() == Some(libc::EACCES) =>
            {
                return Ok(vec![denied(pid)]);
            }
            Err(e) if !roots.contains(&pid) && (is_ending(&e) || has_ended(pid)) => {}
            Err(e) => return Err(e.into()),
        }
    }
    let all: Vec<&Source> = sources.iter().collect();
    look_at_all(&all, depth)
}

fn look_at_all(sources: &[&Source], depth: Depth) -> Result<Vec<Obstacle>> {
    let mut collector = Collector::default();
    for source in sources {
        match inside_the_job(source, &mut collector) {
            Ok(()) => {}
            // It was there only for a moment.
            Err(_) if source.pid != sources[0].pid && has_ended(source.pid) => {}
            Err(e) => return Err(e),
        }
    }
    let seen = shared_by_processes(sources, &mut collector)
        .and_then(|()| process::capture_from_outside(sources, depth, &mut collector))
        .and_then(|outside| {
            let vmas = outside.iter().map(|o| o.vmas.as_slice());
            let seen: Vec<_> = sources.iter().copied().zip(vmas).collect();
            ipc::capture(&seen, &mut collector)
        });
    let root = sources[0].pid;
    match seen {
        // What is missing in a process that is ending is no property of it.
        Ok(_) if !collector.obstacles.is_empty() && has_ended(root) => {
            Err(TracerError::Died { tid: root.leader() }.into())
        }
        Ok(_) => Ok(collector.obstacles),
        // Another process than the root may end at any time; the frozen job will tell.
        Err(Error::Tracer(TracerError::Died { tid })) if tid != root.leader() => {
            Ok(collector.obstacles)
        }
        Err(Error::Tracer(TracerError::Proc { source, path })) => {
            let whose = sources.iter().find(|s| path.starts_with(s.dir.path()));
            match source.raw_os_error() {
                Some(libc::EACCES) => Ok(vec![denied(whose.map_or(root, |s| s.pid))]),
                Some(libc::ESRCH | libc::ENOENT) if whose.is_some_and(|s| s.pid != root) => {
                    Ok(collector.obstacles)
                }
                _ => Err(TracerError::Proc { source, path }.into()),
            }
        }
        Err(Error::Tracer(TracerError::Kernel {
            call: "pidfd_getfd",
            errno: Errno::EPERM,
            object,
        })) => {
            let whose = sources
                .iter()
                .find(|s| object.ends_with(&format!("process {}", s.pid)));
            Ok(vec![denied(whose.map_or(root, |s| s.pid))])
        }
        Err(e) => Err(e),
    }
}

/// Processes that share more than a fork leaves them sharing. What is shared with the parent, and
/// can be made again, is noted.
pub fn shared_by_processes(sources: &[&Source], collector: &mut Collector) -> Result<()> {
    if sources.len() < 2 {
        return Ok(());
    }
    let leaders: Vec<Tid> = sources.iter().map(|s| s.pid.leader()).collect();
    for (what, name) in [
        (KcmpType::Vm, "its memory (CLONE_VM)"),
        (KcmpType::Files, "its table of descriptors (CLONE_FILES)"),
        (KcmpType::Fs, "its working directory (CLONE_FS)"),
        (KcmpType::Sighand, "its signal actions (CLONE_SIGHAND)"),
    ] {
        for group in group_tasks(leaders.clone(), what)? {
            let members = group
                .iter()
                .flat_map(|tid| sources.iter().find(|s| s.pid.leader() == *tid));
            let members: Vec<&&Source> = members.collect();
            for member in &members[1..] {
                let parent = members.iter().find(|m| m.pid == member.status.ppid);
                // Over in a moment, as a rule; if not, the freeze will tell.
                if !collector.frozen && parent.is_some_and(|p| waits_in_vfork(p)) {
                    continue;
                }
                let with_parent = parent.is_some();
                let shares = collector.shares.entry(member.pid).or_default();
                match what {
                    KcmpType::Files if with_parent => shares.files = true,
                    KcmpType::Fs if with_parent => shares.fs = true,
                    _ => collector.obstacles.push(Obstacle::new(
                        member.title(),
                        format!(
                            "shares {name} with {}, which is not supported",
                            members[0].title()
                        ),
                        "try again in a moment if it has only just been started, or wait until it \
                         has ended",
                    )),
                }
            }
        }
    }
    Ok(())
}

/// Whether a thread of the process has lent its memory to a child that is about to execute a
/// program.
fn waits_in_vfork(source: &Source) -> bool {
    let threads = tasks::list_tasks(source.dir.clone()).unwrap_or_default();
    threads.into_iter().any(|tid| {
        let dir = ProcRoot::default().task(source.pid, tid);
        matches!(tasks::syscall(dir), Ok(tasks::InSyscall::Inside { nr, .. })
            if [libc::SYS_vfork, libc::SYS_clone, libc::SYS_clone3].contains(&nr))
    })
}

/// A process on its way out has no memory any more some time before it is a zombie.
fn is_ending(error: &TracerError) -> bool {
    matches!(error, TracerError::Proc { source, .. } if source.raw_os_error() == Some(libc::ESRCH))
}

fn has_ended(pid: Pid) -> bool {
    read_status(pid).map_or(true, |status| status.state.has_ended())
}

fn no_such(pid: Pid) -> Obstacle {
    Obstacle::new(
        format!("process {pid}"),
        "does not exist",
        "look for the right one with `pgrep -a NAME`",
    )
}

/// What can be said by everyone's view of the process.
fn accessible(pid: Pid) -> Result<(), Obstacle> {
    let dir = ProcRoot::default().process(pid);
    let (Ok(stat), Ok(status)) = (read_stat(dir.clone()), read_status(dir)) else {
        return Err(no_such(pid));
    };
    let object = format!("process {pid} ({})", stat.comm);
    if status.tgid != pid {
        return Err(Obstacle::new(
            format!("{pid}"),
            format!("is a thread of process {}, not a process", status.tgid),
            format!("name the process: ckpt attach {}", status.tgid),
        ));
    }
    if stat.is_kernel_thread() {
        let reason = "is a thread of the kernel, which cannot be checkpointed";
        return Err(Obstacle::without_remedy(object, reason));
    }
    if status.state.has_ended() {
        let reason = if tasks::list_tasks(pid).map_or(0, |t| t.len()) > 1 {
            "has lost its first thread while others go on, which is not supported"
        } else {
            "has already ended and waits for its parent to notice (a zombie)"
        };
        return Err(Obstacle::without_remedy(object, reason));
    }
    if pid.raw() as u32 == std::process::id() {
        return Err(Obstacle::new(
            object,
            "is ckpt itself",
            "name the process that you want to checkpoint",
        ));
    }
    if status.tracer_pid != 0 {
        return Err(Obstacle::new(
            object,
            traced_by(status.tracer_pid),
            "end that one first",
        ));
    }
    let me = geteuid().as_raw();
    if me != 0 && [status.uid.real, status.uid.effective, status.uid.saved] != [me; 3] {
        return Err(Obstacle::new(
            object,
            format!("belongs to uid {} and you are uid {me}", status.uid.real),
            "run ckpt as that user or as root",
        ));
    }
    Ok(())
}

fn traced_by(tracer: i32) -> String {
    let name = tasks::comm(Pid(tracer)).map_or_else(|_| "?".into(), |c| c.to_string());
    format!("is being traced by {name} (pid {tracer}), and a process has one tracer at most")
}

fn denied(pid: Pid) -> Obstacle {
    let (why, remedy) = refusal::why();
    let reason = format!("may not be traced by you: {why}");
    Obstacle::new(format!("process {pid}"), reason, remedy)
}

/// What of the process's own state is in the way.
fn inside_the_job(source: &Source, collector: &mut Collector) -> Result<()> {
    let object = source.title();
    let mut refuse = |reason: String, remedy: Option<&str>| {
        collector.obstacles.push(Obstacle {
            object: object.clone(),
            reason,
            remedy: remedy.map(str::to_owned),
        });
    };
    if is_32_bit(source) {
        refuse(
            "is a 32-bit program, which is not supported".into(),
            Some("use a 64-bit build"),
        );
    }
    for kind in other_namespaces(source)? {
        let remedy = format!(
            "run ckpt, and later restore, inside it: nsenter --target {} --{} ckpt …",
            source.pid,
            nsenter_option(&kind)
        );
        refuse(
            format!("is in another {kind} namespace than ckpt, which is not supported yet"),
            Some(&remedy),
        );
    }
    for tid in tasks::list_tasks(source.pid)? {
        if let Some(what) = own_table(source.pid, tid)? {
            let reason =
                format!("has a thread {tid} with {what} of its own, which is not supported");
            refuse(reason, None);
            break;
        }
    }
    for tid in tasks::list_tasks(source.pid)? {
        let Ok(status) = read_status((source.pid, tid)) else {
            continue;
        };
        if let Some(reason) = seccomp_in_the_way(&status) {
            refuse(reason, Some("run ckpt as root"));
            break;
        }
    }
    Ok(())
}

/// Kinds of namespaces in which the process is elsewhere than we are. The restored process is
/// in those of `restore`, so it would find itself in other surroundings.
fn other_namespaces(source: &Source) -> Result<Vec<String>> {
    let ours = tasks::namespaces(Pid(std::process::id() as i32))?;
    let theirs = match tasks::namespaces(source.dir.clone()) {
        Ok(theirs) => theirs,
        // Told by whatever else needs the right to look into the process.
        Err(TracerError::Proc { source, .. }) if source.raw_os_error() == Some(libc::EACCES) => {
            return Ok(Vec::new());
        }
        Err(e) => return Err(e.into()),
    };
    let differ = theirs.into_iter().filter(|namespace| {
        // Those for children say nothing of the process itself.
        !namespace.0.ends_with("_for_children") && !ours.contains(namespace)
    });
    Ok(differ.map(|(kind, _)| kind).collect())
}

/// The option of nsenter(1) for a kind of namespace.
fn nsenter_option(kind: &str) -> &str {
    match kind {
        "mnt" => "mount",
        other => other,
    }
}

/// What a thread does not share with the first one, though threads do as a rule: it was created
/// without CLONE_FILES or CLONE_FS, or left by unshare(2).
fn own_table(pid: Pid, tid: Tid) -> Result<Option<&'static str>> {
    for (what, name) in [
        (KcmpType::Files, "a table of descriptors"),
        (KcmpType::Fs, "a working directory"),
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

fn seccomp_in_the_way(status: &Status) -> Option<String> {
    match status.seccomp {
        Some(1) => Some("is under strict seccomp, which is not supported".into()),
        Some(2) if !may_suspend_seccomp() => Some(
            "has seccomp filters, which could kill it on a call made from outside; suspending \
             them needs CAP_SYS_ADMIN"
                .into(),
        ),
        _ => None,
    }
}

/// `PTRACE_O_SUSPEND_SECCOMP` wants CAP_SYS_ADMIN in the first user namespace, and a tracer that is
/// not under seccomp itself (`check_ptrace_options`, kernel/ptrace.c).
pub fn may_suspend_seccomp() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    if !map.split_whitespace().eq(["0", "0", "4294967295"]) {
        return false;
    }
    const CAP_SYS_ADMIN: u64 = 1 << 21;
    let me = read_status(Pid(std::process::id() as i32));
    me.is_ok_and(|s| s.capabilities.effective & CAP_SYS_ADMIN != 0 && s.seccomp != Some(2))
}

/// A program without a 64-bit auxiliary vector and code segment: told by the executable.
fn is_32_bit(source: &Source) -> bool {
    let mut ident = [0; 5];
    std::fs::File::open(source.dir.join("exe"))
        .and_then(|f| std::os::unix::fs::FileExt::read_exact_at(&f, &mut ident, 0))
        .is_ok_and(|()| ident[..4] == *b"\x7fELF" && ident[4] == 1)
}
