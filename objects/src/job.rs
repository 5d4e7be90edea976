//! A job: a process and all its descendants, checkpointed together.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::{Duration, Instant};

use ckpt_tracer::freeze::Frozen;
use ckpt_tracer::proc::status::read_status;
use ckpt_tracer::proc::{ProcRoot, tasks};
use ckpt_tracer::{Error as TracerError, Pid};

use crate::cgroup::freezer::Thawed;
use crate::error::{Error, Obstacle, Result};
use crate::source::Source;

/// A fork bomb may outrun us forever, and what we have stopped stands still meanwhile. So we give up after this time
/// if that many new processes have been found since the beginning: a job that creates none is always stopped, however
/// slow the machine.
const PATIENCE: Duration = Duration::from_secs(2);
/// See [`PATIENCE`].
const NEWCOMERS: usize = 50;

/// The processes of a job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Family {
    /// Live ones; parents before their children, the root first.
    pub living: Vec<Pid>,
    /// Zombies.
    pub ended: Vec<Pid>,
}

impl Family {
    /// The process and its present descendants.
    ///
    /// # Errors
    /// As [`tasks::children`] for the root; a descendant that ends meanwhile is no error.
    pub fn of(root: Pid) -> Result<Self> {
        Self::of_all(&[root])
    }

    /// The same for several roots; the first one is the job's.
    pub fn of_all(roots: &[Pid]) -> Result<Self> {
        let proc = ProcRoot::default();
        let mut family = Self {
            living: roots.to_vec(),
            ended: Vec::new(),
        };
        let mut next = 0;
        while let Some(&pid) = family.living.get(next) {
            next += 1;
            let children = match tasks::children(&proc, pid) {
                Ok(children) => children,
                Err(e) if pid == roots[0] => return Err(e.into()),
                Err(_) => continue,
            };
            for child in children {
                if family.living.contains(&child) {
                    continue;
                }
                match read_status(child) {
                    Ok(status) if status.state.has_ended() => family.ended.push(child),
                    Ok(_) => family.living.push(child),
                    Err(_) => {}
                }
            }
        }
        Ok(family)
    }
}

/// A process whose tasks are all stopped, and its state seen from outside since then: it may have called execve(2)
/// after it was first read.
pub struct Member {
    /// Its tasks.
    pub frozen: Frozen,
    /// Its view from outside.
    pub source: Source,
}

/// A job whose tasks are all stopped. Dropping it releases them.
pub struct FrozenJob {
    /// Its control groups, if they were frozen: to be frozen again before any task is released.
    pub groups: Option<Thawed>,
    /// Its living processes, in the order of [`Family::living`].
    pub processes: Vec<Member>,
    /// Its zombies.
    pub ended: Vec<Pid>,
}

impl FrozenJob {
    /// Stops every task of every process, and rescans until there are no more. On an error everything stopped so far
    /// is released.
    pub fn freeze(roots: &[Pid]) -> Result<Self> {
        Self::freeze_until(roots, Instant::now() + PATIENCE, NEWCOMERS)
    }

    fn freeze_until(roots: &[Pid], give_up: Instant, newcomers: usize) -> Result<Self> {
        let family = Family::of_all(roots)?;
        let mut walk = Walk {
            roots: roots.to_vec(),
            give_up,
            most: family.living.len() + newcomers,
            met: 0,
            frozen: HashMap::new(),
            ended: BTreeSet::new(),
        };
        // A process that ends during a walk can leave a child to a process already visited, and need not leave a
        // zombie. Two walks without a new process are taken as proof.
        let mut quiet = 0;
        loop {
            let (living, ended, found) = walk.walk()?;
            quiet = if found { 0 } else { quiet + 1 };
            if quiet == 2 {
                let in_order = living.iter().filter_map(|pid| walk.frozen.remove(pid));
                let member = |frozen: Frozen| {
                    let source = Source::open(frozen.pid())?;
                    Ok(Member { frozen, source })
                };
                return Ok(Self {
                    groups: None,
                    processes: in_order.map(member).collect::<Result<_>>()?,
                    ended,
                });
            }
        }
    }

    /// Number of tasks.
    pub fn tasks(&self) -> usize {
        self.processes.iter().map(|p| p.frozen.tasks().len()).sum()
    }

    /// The views of its processes from outside.
    pub fn sources(&self) -> Vec<&Source> {
        self.processes.iter().map(|p| &p.source).collect()
    }

    /// The tasks of its processes, for remote calls, and the views from outside.
    pub fn split(&mut self) -> (Vec<&mut Frozen>, Vec<&Source>) {
        let both = self.processes.iter_mut();
        both.map(|Member { frozen, source }| (frozen, &*source))
            .unzip()
    }

    /// Resumes every process; returns their views.
    pub fn thaw(mut self) -> Result<Vec<Source>> {
        drop(self.groups.take());
        each(self.processes, Frozen::thaw)
    }

    /// Leaves every task to be killed when this process ends, which must be soon. Used for the first process of our
    /// pid namespace, which ignores our SIGKILL and whose end is ours.
    pub fn end_with_us(self) -> Result<()> {
        const OPTIONS: i32 = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD;
        for task in self.processes.iter().flat_map(|p| p.frozen.tasks()) {
            match task.set_options(OPTIONS) {
                Ok(()) | Err(TracerError::Died { .. }) => {}
                Err(e) => return Err(e.into()),
            }
        }
        std::mem::forget(self);
        Ok(())
    }

    /// Detaches every process but leaves it stopped, as `kill -STOP` would.
    pub fn leave_stopped(mut self) -> Result<Vec<Source>> {
        drop(self.groups.take());
        each(self.processes, Frozen::leave_stopped)
    }
}

/// Stops processes one after the other.
struct Walk {
    /// The job's first process, and adopted ones while they live.
    roots: Vec<Pid>,
    /// After this time more than `most` processes are too many.
    give_up: Instant,
    most: usize,
    /// Processes found so far, including ended ones.
    met: usize,
    frozen: HashMap<Pid, Frozen>,
    ended: BTreeSet<Pid>,
}

impl Walk {
    /// Walks from each process to its children, which are read only after the process is stopped and can have no
    /// more. Returns live ones, parents first; ended ones; both in the kernel's order of children; and whether any
    /// was new.
    fn walk(&mut self) -> Result<(Vec<Pid>, Vec<Pid>, bool)> {
        let proc = ProcRoot::default();
        let mut found = false;
        let mut ended = Vec::new();
        let mut living = Vec::with_capacity(self.frozen.len());
        let mut next: VecDeque<Pid> = self.roots.iter().copied().collect();
        while let Some(pid) = next.pop_front() {
            let is_new = !ended.contains(&pid);
            if self.ended.contains(&pid) {
                ended.extend(Some(pid).filter(|_| is_new));
                continue;
            }
            if !self.frozen.contains_key(&pid) {
                found = true;
                if !self.stop(pid)? {
                    self.roots.retain(|root| *root != pid);
                    ended.extend(Some(pid).filter(|pid| self.ended.contains(pid)));
                    continue;
                }
            }
            living.push(pid);
            let children = match tasks::children(&proc, pid) {
                Ok(children) => children,
                Err(e) if pid == self.roots[0] => return Err(e.into()),
                // It has been killed.
                Err(_) => continue,
            };
            let new = |child: &Pid| !self.roots.contains(child);
            next.extend(children.into_iter().filter(new));
        }
        Ok((living, ended, found))
    }

    /// Stops a process, unless it has ended.
    fn stop(&mut self, pid: Pid) -> Result<bool> {
        self.met += 1;
        if self.met > self.most && Instant::now() > self.give_up {
            return Err(self.outrun());
        }
        match Frozen::freeze(pid) {
            Ok(frozen) => {
                self.frozen.insert(pid, frozen);
                Ok(true)
            }
            Err(TracerError::Died { .. }) if pid != self.roots[0] => {
                if read_status(pid).is_ok_and(|status| status.state.has_ended()) {
                    self.ended.insert(pid);
                }
                Ok(false)
            }
            Err(e) => Err(e.into()),
        }
    }

    fn outrun(&self) -> Error {
        let root = self.roots[0];
        Error::refuse(Obstacle::new(
            format!("process {root}"),
            format!(
                "has descendants that create processes faster than they can be stopped (gave up after {} \
                 processes)",
                self.met
            ),
            format!("try again, or stop it first with kill -STOP {root}"),
        ))
    }
}

/// Releases all, regardless of errors of single ones.
fn each(
    processes: Vec<Member>,
    let_go: impl Fn(Frozen) -> ckpt_tracer::Result<()>,
) -> Result<Vec<Source>> {
    let one = |p: Member| let_go(p.frozen).map(|()| p.source);
    let results: Vec<_> = processes.into_iter().map(one).collect();
    Ok(results.into_iter().collect::<ckpt_tracer::Result<_>>()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};

    /// A shell with two children, which are killed with it.
    struct Shell(Child);

    impl Shell {
        fn start() -> Self {
            let mut command = Command::new("sh");
            command.args(["-c", "sleep 1000 & sleep 1000 & wait"]);
            let shell = Shell(command.stdout(Stdio::null()).spawn().expect("sh"));
            while shell.family().len() != 3 {
                std::thread::yield_now();
            }
            shell
        }

        fn pid(&self) -> Pid {
            Pid(self.0.id() as i32)
        }

        fn family(&self) -> Vec<Pid> {
            Family::of(self.pid()).expect("it lives").living
        }
    }

    impl Drop for Shell {
        fn drop(&mut self) {
            for pid in self.family().into_iter().rev() {
                let pid = nix::unistd::Pid::from_raw(pid.raw());
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
            let _ = self.0.wait();
        }
    }

    fn tracers(pids: &[Pid]) -> Vec<i32> {
        let tracer = |pid: &Pid| read_status(*pid).expect("it lives").tracer_pid;
        pids.iter().map(tracer).collect()
    }

    #[test]
    fn a_whole_tree_is_stopped_and_goes_on() {
        let shell = Shell::start();
        let family = shell.family();
        let job = FrozenJob::freeze(&[shell.pid()]).expect("nothing is in the way");
        let frozen: Vec<Pid> = job.processes.iter().map(|p| p.frozen.pid()).collect();
        assert_eq!(frozen, family);
        assert!(tracers(&family).iter().all(|tracer| *tracer != 0));
        job.thaw().expect("all live");
        assert_eq!(tracers(&family), [0, 0, 0]);
    }

    #[test]
    fn an_adopted_one_that_has_ended_is_no_obstacle() {
        let shell = Shell::start();
        let mut gone = Command::new("true").spawn().expect("true");
        gone.wait().expect("it ends");
        let roots = [shell.pid(), Pid(gone.id() as i32)];
        let job = FrozenJob::freeze(&roots);
        let job = job.expect("nothing is in the way");
        assert_eq!(job.processes.len(), 3);
        job.thaw().expect("all live");
    }

    #[test]
    fn a_job_that_grows_too_fast_is_refused_and_released() {
        let shell = Shell::start();
        // The time is over at once; two of three count as existing before.
        let all = FrozenJob::freeze_until(&[shell.pid()], Instant::now(), 0);
        all.expect("no new process").thaw().expect("all live");
        let mut walk = Walk {
            roots: vec![shell.pid()],
            give_up: Instant::now(),
            most: 2,
            met: 0,
            frozen: HashMap::new(),
            ended: BTreeSet::new(),
        };
        let error = walk.walk();
        drop(walk);
        let error = error.expect_err("the time is over").to_string();
        assert!(error.contains("faster than they can be stopped"), "{error}");
        assert_eq!(tracers(&shell.family()), [0, 0, 0]);
    }
}
