//! A traced task as a type state.
//!
//! A [`Running`] task may be interrupted and waited for; only a [`Stopped`] one can be inspected and changed. Neither
//! can be copied, so a request on a task in the wrong state does not compile. All requests must come from the thread
//! that attached (ptrace(2)).
#![allow(unsafe_code)]

use std::ptr;
use std::time::Duration;

use nix::errno::Errno;

use crate::proc::tasks;
use crate::{Error, Pid, Result, Tid, abi};

mod state;

pub use state::{Regs, SigInfo};

/// Why a task stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// `PTRACE_EVENT_STOP`: interrupted by us (SIGTRAP), or in a group stop by that signal.
    Event(i32),
    /// Entry or exit of a system call.
    Syscall,
    /// About to receive a signal.
    Signal(i32),
    /// After a successful exec, before its first instruction.
    Exec,
    /// Created a task; the new one is seized too.
    Clone,
    /// Any other ptrace event.
    Other(i32),
}

/// Result of waiting for a task.
#[derive(Debug)]
pub enum Waited {
    /// It stopped.
    Stopped(Stopped),
    /// It has ended; the wait status.
    Gone(i32),
}

impl Waited {
    /// Carries over what is known of the task that was waited for.
    fn of(self, task: &Running) -> Self {
        match self {
            Waited::Stopped(stopped) => Waited::Stopped(Stopped {
                others: task.others,
                ..stopped
            }),
            gone => gone,
        }
    }
}

/// Result of polling a running task.
#[derive(Debug)]
pub enum Polled {
    /// It runs.
    Runs(Running),
    /// It has stopped or ended.
    Came(Waited),
}

/// How to resume a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    /// Without further stops.
    Cont = libc::PTRACE_CONT as isize,
    /// Until the next entry or exit of a system call.
    Syscall = libc::PTRACE_SYSCALL as isize,
}

/// Our other tasks while this one is waited for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OtherTasks {
    /// Each is in a stop: all that can happen to them is their end.
    #[default]
    Stopped,
    /// None in its process.
    None,
    /// They run: their stops are for other waits.
    Running,
}

/// A seized task that is not known to be stopped.
#[derive(Debug)]
pub struct Running {
    tid: Tid,
    others: OtherTasks,
}

/// A seized task in a ptrace stop.
#[derive(Debug)]
pub struct Stopped {
    tid: Tid,
    stop: Stop,
    others: OtherTasks,
}

fn request(call: &'static str, req: u32, tid: Tid, addr: usize, data: usize) -> Result<i64> {
    // SAFETY: callers pass requests whose `data` is a value, or a pointer to memory of the
    // size that the request defines, live during the call.
    let r = unsafe { libc::ptrace(req, tid.raw(), addr, data) };
    Errno::result(r).map_err(|errno| Error::from_errno(call, tid, errno))
}

impl Running {
    /// Attaches without stopping (`PTRACE_SEIZE`). When the tracer ends, the task continues.
    pub fn seize(tid: Tid) -> Result<Self> {
        Self::seize_with(tid, libc::PTRACE_O_TRACESYSGOOD)
    }

    /// Attaches with the given options (`PTRACE_O_*`).
    pub fn seize_with(tid: Tid, options: i32) -> Result<Self> {
        request("PTRACE_SEIZE", libc::PTRACE_SEIZE, tid, 0, options as usize)?;
        Ok(Self {
            tid,
            others: OtherTasks::default(),
        })
    }

    /// A task that the kernel attached automatically (`PTRACE_O_TRACECLONE`).
    pub fn auto_attached(tid: Tid) -> Self {
        Self {
            tid,
            others: OtherTasks::default(),
        }
    }

    /// Records that it is the only task of its process, see [`wait_alone`](Self::wait_alone).
    pub fn only(self) -> Self {
        Self {
            others: OtherTasks::None,
            ..self
        }
    }

    /// The task.
    pub fn tid(&self) -> Tid {
        self.tid
    }

    /// Requests a stop (`PTRACE_INTERRUPT`); [`wait`](Self::wait) waits for it.
    pub fn interrupt(&self) -> Result<()> {
        request("PTRACE_INTERRUPT", libc::PTRACE_INTERRUPT, self.tid, 0, 0).map(drop)
    }

    /// Waits until the task stops or ends. The end of a thread group leader is reported only after all its threads
    /// that we trace have been waited for, so wait for it last.
    pub fn wait(self) -> Result<Waited> {
        let tid = self.tid;
        wait_for(tid.raw(), tid).map(|(_, waited)| waited.of(&self))
    }

    /// Waits while every other task of ours is in a stop: only the end of one of those can happen meanwhile (its
    /// process was killed), and it is reaped here. The only task of a process does not need that, which saves the
    /// kernel a walk over all of ours.
    pub fn wait_alone(self) -> Result<Waited> {
        match self.others {
            OtherTasks::None => return self.wait(),
            OtherTasks::Running => return self.wait_among_running(),
            OtherTasks::Stopped => {}
        }
        loop {
            match wait_for(-1, self.tid)? {
                (tid, waited) if tid == self.tid => return Ok(waited.of(&self)),
                _ => continue,
            }
        }
    }

    /// Waits for a thread group leader, and reaps other threads of its process that end, without which its own end is
    /// not reported; their stops are left to other waits.
    fn wait_among_running(self) -> Result<Waited> {
        const LONGEST_NAP: Duration = Duration::from_millis(1);
        let mut nap = Duration::from_micros(5);
        loop {
            if let Some((_, waited)) = wait_with(self.tid.raw(), self.tid, libc::WNOHANG)? {
                return Ok(waited.of(&self));
            }
            note_ends_beside(self.tid);
            std::thread::sleep(nap);
            nap = (nap * 2).min(LONGEST_NAP);
        }
    }

    /// Whether it has stopped or ended. With `all`, other tasks that end are reaped as in
    /// [`wait_alone`](Self::wait_alone).
    pub fn poll(self, all: bool) -> Result<Polled> {
        let which = if all && self.others == OtherTasks::Stopped {
            -1
        } else {
            self.tid.raw()
        };
        loop {
            match wait_with(which, self.tid, libc::WNOHANG)? {
                None => return Ok(Polled::Runs(self)),
                Some((tid, waited)) if tid == self.tid => {
                    return Ok(Polled::Came(waited.of(&self)));
                }
                Some(_) => {}
            }
        }
    }

    /// Waits for a stop; an end is an error.
    pub fn wait_stopped(self) -> Result<Stopped> {
        let tid = self.tid;
        match self.wait()? {
            Waited::Stopped(stopped) => Ok(stopped),
            Waited::Gone(_) => Err(Error::Died { tid }),
        }
    }
}

/// waitpid(2) for one task or, with -1, for any; ECHILD means that `expected` has gone: a thread that ended, or that
/// an exec killed.
fn wait_for(which: i32, expected: Tid) -> Result<(Tid, Waited)> {
    loop {
        if let Some(waited) = wait_with(which, expected, 0)? {
            return Ok(waited);
        }
    }
}

/// The same with options; `None`, with `WNOHANG`, if there is nothing to report.
fn wait_with(which: i32, expected: Tid, options: i32) -> Result<Option<(Tid, Waited)>> {
    let mut status = 0;
    let tid = loop {
        // SAFETY: `status` is a live int.
        let r = unsafe { libc::waitpid(which, &mut status, libc::__WALL | options) };
        match Errno::result(r) {
            Err(Errno::EINTR) => continue,
            Err(Errno::ECHILD) => return Ok(Some((expected, Waited::Gone(0)))),
            Err(errno) => return Err(Error::from_errno("waitpid", expected, errno)),
            Ok(0) => return Ok(None),
            Ok(tid) => break Tid(tid),
        }
    };
    if !libc::WIFSTOPPED(status) {
        return Ok(Some((tid, Waited::Gone(status))));
    }
    let stop = decode_stop(status);
    let stopped = Stopped {
        tid,
        stop,
        others: OtherTasks::default(),
    };
    Ok(Some((tid, Waited::Stopped(stopped))))
}

/// Reaps threads of ours that have ended. A wait for ends also consumes the stop of a traced task, which would be
/// lost (`wait_task_stopped`, kernel/exit.c), so it peeks first.
fn note_ends_beside(leader: Tid) {
    let others = tasks::list_tasks(Pid(leader.raw())).unwrap_or_default();
    for tid in others.into_iter().filter(|tid| *tid != leader) {
        let options = libc::WEXITED | libc::WNOHANG | libc::__WALL;
        let id = tid.raw() as libc::id_t;
        // SAFETY: plain integers, for which zero is valid; the kernel writes one siginfo.
        unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let looked = libc::waitid(libc::P_PID, id, &mut info, options | libc::WNOWAIT);
            let ended = [libc::CLD_EXITED, libc::CLD_KILLED, libc::CLD_DUMPED];
            if looked == 0 && info.si_pid() != 0 && ended.contains(&info.si_code) {
                libc::waitid(libc::P_PID, id, &mut info, options);
            }
        }
    }
}

/// Result of polling all our tasks.
#[derive(Debug)]
pub enum AnyTask {
    /// Nothing happened.
    None,
    /// We have no task.
    NoTasks,
    /// One has stopped or ended. The others run meanwhile.
    Changed(Tid, Waited),
}

/// Looks for the next stop or end of any task, without waiting.
pub fn poll_any() -> Result<AnyTask> {
    let no_task = Tid(-1);
    Ok(match wait_with(-1, no_task, libc::WNOHANG)? {
        None => AnyTask::None,
        Some((tid, _)) if tid == no_task => AnyTask::NoTasks,
        Some((tid, Waited::Stopped(stopped))) => AnyTask::Changed(
            tid,
            Waited::Stopped(Stopped {
                others: OtherTasks::Running,
                ..stopped
            }),
        ),
        Some((tid, gone)) => AnyTask::Changed(tid, gone),
    })
}

fn decode_stop(status: i32) -> Stop {
    let signal = libc::WSTOPSIG(status);
    match status >> 16 {
        abi::PTRACE_EVENT_STOP => Stop::Event(signal),
        libc::PTRACE_EVENT_EXEC => Stop::Exec,
        libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK => {
            Stop::Clone
        }
        0 if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
        0 => Stop::Signal(signal),
        event => Stop::Other(event),
    }
}

impl Stopped {
    /// Placeholder for a task that is resumed in place; every request on it returns ESRCH, since the task runs.
    fn absent(tid: Tid) -> Self {
        Self {
            tid,
            stop: Stop::Other(0),
            others: OtherTasks::default(),
        }
    }

    /// The task.
    pub fn tid(&self) -> Tid {
        self.tid
    }

    /// Records whether it is the only task of its process that we trace, see [`Running::wait_alone`].
    pub fn note_only(&mut self, only: bool) {
        self.others = match only {
            true => OtherTasks::None,
            false => OtherTasks::Stopped,
        };
    }

    /// The reason of the stop.
    pub fn stop(&self) -> Stop {
        self.stop
    }

    /// Whether the process is in a group stop (SIGSTOP, SIGTSTP …).
    pub fn stopped_by_signal(&self) -> bool {
        matches!(self.stop, Stop::Event(signal) if signal != libc::SIGTRAP)
    }

    /// Resumes it, delivering `signal` (0: none).
    pub fn resume(self, how: Resume, signal: i32) -> Result<Running> {
        request("PTRACE_CONT", how as u32, self.tid, 0, signal as usize)?;
        Ok(Running {
            tid: self.tid,
            others: self.others,
        })
    }

    /// Resumes it without further stops, and leaves a placeholder that returns ESRCH to every request.
    pub fn go_on(&mut self) -> Result<Running> {
        let tid = self.tid();
        std::mem::replace(self, Stopped::absent(tid)).resume(Resume::Cont, 0)
    }

    /// Resumes the task, of process `pid`, and waits for its next stop, in place; every other task of ours is in a
    /// stop. If the process is killed now, the leader's end is reported only after the others have been waited for,
    /// so for the leader they are waited for as well. For other tasks that would be a walk over all tasks at each
    /// stop.
    pub fn advance(&mut self, pid: Pid, how: Resume, signal: i32) -> Result<()> {
        let tid = self.tid();
        let taken = std::mem::replace(self, Stopped::absent(tid));
        let running = taken.resume(how, signal)?;
        let waited = if tid == pid.leader() {
            running.wait_alone()?
        } else {
            running.wait()?
        };
        match waited {
            Waited::Stopped(stopped) => {
                *self = stopped;
                Ok(())
            }
            Waited::Gone(_) => Err(Error::Died { tid }),
        }
    }

    /// Resumes the task and waits for its next stop, in place, and for nothing else: other tasks may stop meanwhile.
    pub fn advance_among_others(&mut self, how: Resume, signal: i32) -> Result<()> {
        let tid = self.tid();
        let taken = std::mem::replace(self, Stopped::absent(tid));
        *self = taken.resume(how, signal)?.wait_stopped()?;
        Ok(())
    }

    /// Requests an event stop, reached on the next resume.
    pub fn interrupt(&self) -> Result<()> {
        Running::auto_attached(self.tid()).interrupt()
    }

    /// Leaves it in its group stop until that ends, which is a stop again (`PTRACE_LISTEN`).
    pub fn listen(self) -> Result<()> {
        request("PTRACE_LISTEN", libc::PTRACE_LISTEN, self.tid, 0, 0).map(drop)
    }

    /// Detaches it, delivering `signal` (0: none). A process in a group stop stays stopped (`__ptrace_unlink` in
    /// kernel/ptrace.c reinstates it).
    pub fn detach(self, signal: i32) -> Result<()> {
        request(
            "PTRACE_DETACH",
            libc::PTRACE_DETACH,
            self.tid,
            0,
            signal as usize,
        )
        .map(drop)
    }

    /// Changes the `PTRACE_O_*` options.
    pub fn set_options(&self, options: i32) -> Result<()> {
        request(
            "PTRACE_SETOPTIONS",
            libc::PTRACE_SETOPTIONS,
            self.tid,
            0,
            options as usize,
        )
        .map(drop)
    }

    /// Suspends the task's seccomp filters for as long as it is traced
    /// (`PTRACE_O_SUSPEND_SECCOMP`). Needs CAP_SYS_ADMIN.
    pub fn suspend_seccomp(&self) -> Result<()> {
        self.set_options(libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_SUSPEND_SECCOMP)
    }

    /// The message of the current event: for [`Stop::Clone`] the new task's tid.
    pub fn event_message(&self) -> Result<u64> {
        let mut message: libc::c_ulong = 0;
        let data = ptr::addr_of_mut!(message) as usize;
        request(
            "PTRACE_GETEVENTMSG",
            libc::PTRACE_GETEVENTMSG,
            self.tid,
            0,
            data,
        )?;
        Ok(message)
    }
}
