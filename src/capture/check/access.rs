//! Whether we may trace a process, and why not.

use std::os::unix::fs::MetadataExt;

use ckpt_tracer::capabilities::{Held, Use, set_names};
use ckpt_tracer::proc::stat::read_stat;
use ckpt_tracer::proc::status::{Ids, Status, read_status};
use ckpt_tracer::proc::{ProcDir, ProcRoot, tasks};
use ckpt_tracer::{Error as TracerError, Pid, refusal};
use nix::errno::Errno;
use nix::unistd::{getegid, geteuid};

use crate::error::{Error, Obstacle, Result};
use crate::guard;

fn no_such(pid: Pid) -> Obstacle {
    Obstacle::new(
        format!("process {pid}"),
        "does not exist",
        "look for the right one with `pgrep -a NAME`",
    )
}

/// Obstacles that are visible without permissions.
pub(super) fn accessible(pid: Pid) -> Result<(), Obstacle> {
    let dir = ProcRoot::default().process(pid);
    let (Ok(stat), Ok(status)) = (read_stat(dir.clone()), read_status(dir.clone())) else {
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
            "has threads but its thread group leader has exited, which is not supported"
        } else {
            "has already ended and was not waited for by its parent (a zombie)"
        };
        return Err(Obstacle::without_remedy(object, reason));
    }
    if pid == Pid::own() {
        return Err(Obstacle::new(
            object,
            "is ckpt itself",
            "name the process that you want to checkpoint",
        ));
    }
    // A guard of ours detaches when requested.
    if status.tracer_pid != 0 && !guard::is_one(Pid(status.tracer_pid)) {
        return Err(Obstacle::new(
            object,
            traced_by(status.tracer_pid),
            "end that one first",
        ));
    }
    let me = Me::now();
    match privileged(&dir, &status, &me) {
        Some((reason, remedy)) => Err(Obstacle::new(object, reason, remedy)),
        None => Ok(()),
    }
}

fn traced_by(tracer: i32) -> String {
    let name = tasks::name_to_tell(Pid(tracer));
    format!("is being traced by {name} (pid {tracer}), and a process has one tracer at most")
}

/// Our own ids and capabilities.
struct Me {
    uid: u32,
    gid: u32,
    permitted: u64,
    held: Held,
}

impl Me {
    fn now() -> Self {
        let own = read_status(Pid::own());
        Self {
            uid: geteuid().as_raw(),
            gid: getegid().as_raw(),
            permitted: own.map_or(0, |s| s.capabilities.permitted),
            held: Held::now(),
        }
    }
}

/// Why tracing a process needs a capability that we lack, and the remedy: in the order of `__ptrace_may_access`
/// (kernel/ptrace.c), ids, dumpability, capabilities.
fn privileged(dir: &ProcDir, status: &Status, me: &Me) -> Option<(String, String)> {
    let mem = std::fs::metadata(dir.join("mem")).ok();
    let why = why_private(status, mem.map(|meta| meta.uid()), me)?;
    let missing = [Use::Trace, Use::OthersProc]
        .into_iter()
        .find(|of| !me.held.allows(*of))?;
    let reason = match missing {
        Use::Trace => format!("{why}, so that attaching to it needs {missing}"),
        _ => format!("{why}, so that opening its files in /proc needs {missing}"),
    };
    let whole = [status.uid.real, status.uid.effective, status.uid.saved];
    let remedy = match whole == [status.uid.real; 3] && status.uid.real != me.uid {
        true => "run ckpt as that user or as root",
        false => "run ckpt as root",
    };
    Some((reason, remedy.to_owned()))
}

/// Why a process of the same user may not be traced; `owner` is the owner of its files in `/proc`.
fn why_private(status: &Status, owner: Option<u32>, me: &Me) -> Option<String> {
    let ids = foreign("uid", &status.uid, me.uid).or_else(|| foreign("gid", &status.gid, me.gid));
    if ids.is_some() {
        return ids;
    }
    if status.capabilities.permitted & !me.permitted != 0 {
        return Some(format!(
            "has capabilities that you lack ({}), as a program with file capabilities has",
            set_names(status.capabilities.permitted & !me.permitted)
        ));
    }
    // Files of an undumpable process belong to root (`task_dump_owner`, fs/proc/base.c).
    (me.uid != 0 && owner.is_some_and(|owner| owner != me.uid)).then(|| {
        "is not dumpable: you may not read its program, its program is set-user-ID or has file \
         capabilities, or it has called prctl(PR_SET_DUMPABLE, 0)"
            .to_owned()
    })
}

/// Describes ids of one kind that are not all ours.
fn foreign(kind: &str, ids: &Ids, own: u32) -> Option<String> {
    let all @ [real, effective, saved] = [ids.real, ids.effective, ids.saved];
    if all == [own; 3] {
        return None;
    }
    let what = match all == [real; 3] {
        true => format!("belongs to {kind} {real}"),
        false => format!(
            "runs a set-{kind} program (real {kind} {real}, effective {effective}, saved {saved}),"
        ),
    };
    Some(format!("{what} and you are {kind} {own}"))
}

/// Turns an error for missing permission to trace one of the processes into an obstacle.
pub(super) fn denial(error: Error, pids: &[Pid]) -> Result<Vec<Obstacle>> {
    let whose = |is: &dyn Fn(Pid) -> bool| pids.iter().copied().find(|pid| is(*pid));
    let pid = match &error {
        Error::Tracer(TracerError::Proc { source, path })
            if source.raw_os_error() == Some(libc::EACCES) =>
        {
            whose(&|pid| path.starts_with(ProcRoot::default().process(pid).path()))
        }
        Error::Tracer(TracerError::Kernel {
            call: "pidfd_getfd",
            errno: Errno::EPERM,
            object,
        }) => whose(&|pid| object.ends_with(&format!("process {pid}"))),
        _ => None,
    };
    pid.map_or(Err(error), |pid| Ok(vec![denied(pid)]))
}

fn denied(pid: Pid) -> Obstacle {
    let (why, remedy) = refusal::why(pid);
    let reason = format!("may not be traced by you: {why}");
    Obstacle::new(format!("process {pid}"), reason, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_status(edit: impl FnOnce(&mut Status)) -> Status {
        let mut status = read_status(Pid::own()).expect("we run");
        let ids = |id| Ids {
            real: id,
            effective: id,
            saved: id,
            fs: id,
        };
        (status.uid, status.gid) = (ids(1000), ids(1000));
        status.capabilities.permitted = 0;
        edit(&mut status);
        status
    }

    const ME: Me = Me {
        uid: 1000,
        gid: 1000,
        permitted: 0,
        held: Held::NONE,
    };

    #[test]
    fn each_reason_is_named() {
        let why = |status: &Status, owner| why_private(status, Some(owner), &ME);
        assert_eq!(why(&of_status(|_| {}), 1000), None);
        let said = why(&of_status(|_| {}), 0).expect("it is not dumpable");
        assert!(said.contains("not dumpable") && said.contains("PR_SET_DUMPABLE"));
        let said = why(&of_status(|s| s.uid.effective = 0), 0).expect("it is set-uid");
        assert!(
            said.contains("set-uid program (real uid 1000, effective 0, saved 1000)"),
            "{said}"
        );
        let said = why(&of_status(|s| s.gid.saved = 5), 0).expect("it is set-gid");
        assert!(
            said.contains("set-gid program (real gid 1000, effective 1000, saved 5)"),
            "{said}"
        );
        let said = why(&of_status(|s| s.capabilities.permitted = 1 << 13), 0).expect("it has one");
        assert!(
            said.contains("(net_raw), as a program with file capabilities"),
            "{said}"
        );
    }

    #[test]
    fn both_capabilities_are_asked_for_one_after_the_other() {
        let dir = ProcRoot::default().process(Pid::own());
        let other = of_status(|s| {
            s.uid = Ids {
                real: 7,
                effective: 7,
                saved: 7,
                fs: 7,
            }
        });
        let with = |set| Me {
            held: Held::NONE.with(set),
            ..ME
        };
        let said = |set| privileged(&dir, &other, &with(set));
        let (reason, remedy) = said(0).expect("nothing is held");
        assert!(
            reason.contains("uid 7") && reason.contains("CAP_SYS_PTRACE"),
            "{reason}"
        );
        assert!(remedy.contains("as that user or as root"));
        let (reason, _) = said(1 << 19).expect("one is lacking");
        assert!(reason.contains("/proc needs CAP_DAC_OVERRIDE"), "{reason}");
        assert_eq!(said(1 << 19 | 1 << 1), None);
    }
}
