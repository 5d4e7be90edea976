//! Seccomp filters of the environment: those that a container runtime installed in the container's first process, and
//! that everything in it has inherited.
//!
//! Filters of its own could kill a task on a remote call, and without CAP_SYS_ADMIN in the initial user namespace
//! they can neither be suspended nor read. But in a container all processes are under filters, including ckpt. If the
//! job's filters are ours, they need not be suspended or stored: a call that kills there kills here first, and a
//! restore in the same environment puts the job under them again.
//!
//! When are they ours? Filters are inherited by fork and exec and can only be added, so a process has all filters of
//! its ancestors. The filters of a task are taken for ours if three numbers are equal (`Seccomp_filters`, Linux 5.9):
//! the task's, ours, and that of process 1 of our pid namespace. Then neither the job nor we have added any. This
//! assumes that the job and we inherited our filters from process 1, or, if the runtime added a process later
//! (`docker exec`), that it installed the same. A process that enters a container without its runtime, under the same
//! number of other filters, is not detected; docs/limits.md says so.
//!
//! Then a child of ours first makes each call that would be made in the job, so that a filter that kills (or traps)
//! hits only the child ([`ckpt_tracer::trial`]). A filter that returns an error makes the checkpoint fail, and the
//! job continues.

use ckpt_tracer::Pid;
use ckpt_tracer::capabilities::{Held, Use};
use ckpt_tracer::proc::status::{Status, read_status};
use ckpt_tracer::trial;

/// The filters of our environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Surroundings {
    /// We may suspend and read filters, so it does not matter.
    Master,
    /// All processes in our pid namespace have this number, and none of the filters kills on our calls.
    Same(u32),
    /// We have none, and may not suspend those of others.
    Outside,
    /// Tasks under filters must not be touched, for this reason.
    Unclear(String),
}

/// The remedy: running without filters, or with fewer than process 1.
const REMEDY: &str = "run ckpt as root outside of the filters (docker exec --privileged)";

impl Surroundings {
    /// Determines it; creates a child if we are under filters.
    pub fn look() -> Self {
        if may_suspend() {
            return Surroundings::Master;
        }
        let of = |pid: Pid| read_status(pid).ok();
        let Some(me) = of(Pid::own()) else {
            return Surroundings::Outside;
        };
        match counted(&me, of(Pid(1)).as_ref()) {
            Surroundings::Same(count) => match trial::deadly_call() {
                None => Surroundings::Same(count),
                Some(call) => Surroundings::Unclear(format!(
                    "is under seccomp filters that kill a process for calling {call}, as a test in a child \
                     of ckpt has shown"
                )),
            },
            other => other,
        }
    }

    /// Why nothing may be executed in the task, and the remedy.
    pub fn in_the_way(&self, task: &Status) -> Option<(String, &'static str)> {
        const COULD_KILL: &str = "which could kill it on a call made from outside";
        match (task.seccomp, self) {
            (None | Some(0), _) | (_, Surroundings::Master) => None,
            (Some(1), _) => {
                let takes = Use::SuspendSeccomp;
                let reason = format!(
                    "is under strict seccomp, which would kill it on a call made from outside; \
                     suspending it needs {takes}"
                );
                Some((reason, "run ckpt as root outside of any filters"))
            }
            (_, Surroundings::Same(around)) => match task.seccomp_filters.unwrap_or(u32::MAX) {
                own if own == *around => None,
                own => Some((
                    format!(
                        "has {}, where process 1 and ckpt have {around}: it has filters of its own, \
                         {COULD_KILL}",
                        filters(own)
                    ),
                    REMEDY,
                )),
            },
            (_, Surroundings::Outside) => Some((
                format!(
                    "has seccomp filters, {COULD_KILL}; suspending them needs {}",
                    Use::SuspendSeccomp
                ),
                "run ckpt as root",
            )),
            (_, Surroundings::Unclear(why)) => Some((why.clone(), REMEDY)),
        }
    }
}

/// Whether our filters are those of process 1, by their number.
fn counted(me: &Status, first: Option<&Status>) -> Surroundings {
    if me.seccomp != Some(2) {
        return Surroundings::Outside;
    }
    match (
        me.seccomp_filters,
        first.and_then(|first| first.seccomp_filters),
    ) {
        (Some(mine), Some(its)) if mine == its => Surroundings::Same(mine),
        (Some(mine), Some(its)) => Surroundings::Unclear(format!(
            "has seccomp filters of unknown origin: ckpt is under {} and process 1 under {its}",
            filters(mine)
        )),
        _ => Surroundings::Unclear(
            "has seccomp filters, whose number is not shown here (that needs Linux 5.9 and a /proc that \
             shows process 1)"
                .into(),
        ),
    }
}

fn filters(count: u32) -> String {
    match count {
        1 => "1 seccomp filter".into(),
        u32::MAX => "an unknown number of seccomp filters".into(),
        _ => format!("{count} seccomp filters"),
    }
}

/// `PTRACE_O_SUSPEND_SECCOMP` needs CAP_SYS_ADMIN in the initial user namespace, and a tracer without seccomp
/// (`check_ptrace_options`, kernel/ptrace.c).
pub fn may_suspend() -> bool {
    let me = read_status(Pid::own());
    Held::now().allows(Use::SuspendSeccomp) && me.is_ok_and(|s| s.seccomp != Some(2))
}

/// The warning for a job that was under that many filters of its environment at the checkpoint and has fewer
/// restrictions now.
pub fn fewer_here(then: u32, me: &Status) -> Option<String> {
    let now = match me.seccomp {
        Some(2) => me.seccomp_filters?,
        _ => 0,
    };
    (now < then).then(|| {
        format!(
            "the job was under {} of its environment (such as a container), and is under {now} here: calls \
             that were forbidden to it no longer are",
            filters(then)
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(mode: u32, count: Option<u32>) -> Status {
        let mut status = read_status(Pid::own()).expect("we are alive");
        status.seccomp = Some(mode as _);
        status.seccomp_filters = count;
        status
    }

    #[test]
    fn filters_are_ours_only_when_all_have_as_many() {
        let all = |me, first| counted(&me, Some(&first));
        assert_eq!(
            all(status(2, Some(1)), status(2, Some(1))),
            Surroundings::Same(1)
        );
        assert_eq!(
            all(status(0, Some(0)), status(2, Some(1))),
            Surroundings::Outside
        );
        for (me, first) in [
            (status(2, Some(2)), status(2, Some(1))),
            (status(2, Some(1)), status(0, Some(0))),
            (status(2, None), status(2, None)),
        ] {
            assert!(matches!(all(me, first), Surroundings::Unclear(_)));
        }
        assert!(matches!(
            counted(&status(2, Some(1)), None),
            Surroundings::Unclear(_)
        ));
    }

    #[test]
    fn a_filter_of_its_own_is_in_the_way() {
        let same = Surroundings::Same(1);
        assert_eq!(same.in_the_way(&status(2, Some(1))), None);
        assert_eq!(same.in_the_way(&status(0, Some(0))), None);
        for own in [status(2, Some(2)), status(2, Some(0)), status(2, None)] {
            let (reason, _) = same.in_the_way(&own).expect("it is not ours");
            assert!(reason.contains("filters of its own"), "{reason}");
        }
        assert!(same.in_the_way(&status(1, None)).is_some());
        assert!(
            Surroundings::Outside
                .in_the_way(&status(2, Some(1)))
                .is_some()
        );
        assert_eq!(Surroundings::Master.in_the_way(&status(2, Some(3))), None);
    }
}
