//! A traced task as a type state.
//!
//! [`Running`] may be told to stop and be waited for; only a [`Stopped`] task can be looked
//! into and changed. Neither can be copied, so a request on a task in the wrong state does not
//! compile. All requests must come from the thread that attached (ptrace(2)).
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

/// What waiting for a task brought.
#[derive(Debug)]
pub enum Waited {
    /// It stopped.
    Stopped(Stopped),
    /// It is gone; the wait status.
    Gone(i32),
}

impl Waited {
    /// With what is known of the task that was waited for.
    fn of(self, task: &Running) -> Self {
        match self {
            Waited::Stopped(stopped) => Waited::Stopped(Stopped {
                company: task.company,
                ..stopped
            }),
            gone => gone,
        }
    }
}

/// What a look at a running task brought.
#[derive(Debug)]
pub enum Polled {
    /// Nothing; it runs.
    Runs(Running),
    /// It has stopped or ended.
    Came(Waited),
}

/// How a stopped task goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    /// Freely.
    Cont = libc::PTRACE_CONT as isize,
    /// Until the next entry or exit of a system call.
    Syscall = libc::PTRACE_SYSCALL as isize,
}

/// What else of ours there is while a task is waited for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Company {
    /// Others, each in a stop: what they come to is their end.
    #[default]
    Stopped,
    /// Nobody, in its process.
    Nobody,
    /// Others that run: their stops are for somebody else to take note of.
    Running,
}

/// A seized task that runs, or may run.
#[derive(Debug)]
pub struct Running {
    tid: Tid,
    company: Company,
}

/// A seized task in a ptrace stop.
#[derive(Debug)]
pub struct Stopped {
    tid: Tid,
    stop: Stop,
    company: Company,
}

fn request(call: &'static str, req: u32, tid: Tid, addr: usize, data: usize) -> Result<i64> {
    // SAFETY: callers pass requests whose `data` is a value, or a pointer to memory of the
    // size that the request defines, live during the call.
    let r = unsafe { libc::ptrace(req, tid.raw(), addr, data) };
    Errno::result(r).map_err(|errno| Error::from_errno(call, tid, errno))
}

impl Running {
    /// Attaches without stopping (`PTRACE_SEIZE`). When the tracer goes away the task goes on.
    pub fn seize(tid: Tid) -> Result<Self> {
        Self::seize_with(tid, libc::PTRACE_O_TRACESYSGOOD)
    }

    /// Attaches with options of one's own (`PTRACE_O_*`).
    pub fn seize_with(tid: Tid, options: i32) -> Result<Self> {
        request("PTRACE_SEIZE", libc::PTRACE_SEIZE, tid, 0, options as usize)?;
        Ok(Self {
            tid,
            company: Company::default(),
        })
    }

    /// A task that the kernel seized for us (`PTRACE_O_TRACECLONE`).
    pub fn auto_attached(tid: Tid) -> Self {
        Self {
            tid,
            company: Company::default(),
        }
    }

    /// Notes that it is the only task of its process, see [`wait_alone`](Self::wait_alone).
    pub fn only(self) -> Self {
        Self {
            company: Company::Nobody,
            ..self
        }
    }

    /// The task.
    pub fn tid(&self) -> Tid {
        self.tid
    }

    /// Asks the task to stop (`PTRACE_INTERRUPT`); [`wait`](Self::wait) tells when it has.
    pub fn interrupt(&self) -> Result<()> {
        request("PTRACE_INTERRUPT", libc::PTRACE_INTERRUPT, self.tid, 0, 0).map(drop)
    }

    /// Waits until the task stops or ends. A first thread's end is told only when all threads
    /// that we trace have been waited for, so it is to be waited for last.
    pub fn wait(self) -> Result<Waited> {
        let tid = self.tid;
        wait_for(tid.raw(), tid).map(|(_, waited)| waited.of(&self))
    }

    /// Waits while every other task of ours is in a stop: whatever else happens is the end of
    /// one of those (its process was killed), and that too is taken note of here. The only task of
    /// a process needs none of that, and the kernel need not walk over all of ours.
    pub fn wait_alone(self) -> Result<Waited> {
        match self.company {
            Company::Nobody => return self.wait(),
            Company::Running => return self.wait_among_running(),
            Company::Stopped => {}
        }
        loop {
            match wait_for(-1, self.tid)? {
                (tid, waited) if tid == self.tid => return Ok(waited.of(&self)),
                _ => continue,
            }
        }
    }

    /// Waits for it, a first thread, and takes note of the ends of others of its process, without which its own is not
    /// told; their stops are left to whoever waits next.
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

    /// Looks whether it has stopped or ended. With `all` the ends of other tasks are taken note of
    /// as in [`wait_alone`](Self::wait_alone).
    pub fn poll(self, all: bool) -> Result<Polled> {
        let which = if all && self.company == Company::Stopped {
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

    /// Waits and expects a stop.
    pub fn wait_stopped(self) -> Result<Stopped> {
        let tid = self.tid;
        match self.wait()? {
            Waited::Stopped(stopped) => Ok(stopped),
            Waited::Gone(_) => Err(Error::Died { tid }),
        }
    }
}

/// waitpid(2) for one task or, with -1, for any; ECHILD means that `expected` is gone: it was a
/// thread that ended, or was swept away by exec.
fn wait_for(which: i32, expected: Tid) -> Result<(Tid, Waited)> {
    loop {
        if let Some(waited) = wait_with(which, expected, 0)? {
            return Ok(waited);
        }
    }
}

/// The same with options; nothing, with `WNOHANG`, if nothing has come.
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
        company: Company::default(),
    };
    Ok(Some((tid, Waited::Stopped(stopped))))
}

/// Waits for threads of ours that have ended. A wait for ends is also told of a traced task's stop, and
/// that would be lost (`wait_task_stopped`, kernel/exit.c), so it looks first.
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

/// What has come of all our tasks.
#[derive(Debug)]
pub enum News {
    /// Nothing.
    None,
    /// We have no task.
    NoTasks,
    /// One has stopped or ended. What is done with it is done while others run.
    Of(Tid, Waited),
}

/// Looks for the next stop or end of any task, without waiting.
pub fn news() -> Result<News> {
    let nobody = Tid(-1);
    Ok(match wait_with(-1, nobody, libc::WNOHANG)? {
        None => News::None,
        Some((tid, _)) if tid == nobody => News::NoTasks,
        Some((tid, Waited::Stopped(stopped))) => News::Of(
            tid,
            Waited::Stopped(Stopped {
                company: Company::Running,
                ..stopped
            }),
        ),
        Some((tid, gone)) => News::Of(tid, gone),
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
    /// Stands in for a task while it is resumed in place; every request on it answers ESRCH,
    /// since the task runs.
    fn absent(tid: Tid) -> Self {
        Self {
            tid,
            stop: Stop::Other(0),
            company: Company::default(),
        }
    }

    /// The task.
    pub fn tid(&self) -> Tid {
        self.tid
    }

    /// Notes whether it is the only task of its process that we trace, see
    /// [`Running::wait_alone`].
    pub fn note_only(&mut self, only: bool) {
        self.company = match only {
            true => Company::Nobody,
            false => Company::Stopped,
        };
    }

    /// Why it stopped.
    pub fn stop(&self) -> Stop {
        self.stop
    }

    /// Whether the whole process is stopped by a signal (SIGSTOP, SIGTSTP …), not only by us.
    pub fn stopped_by_signal(&self) -> bool {
        matches!(self.stop, Stop::Event(signal) if signal != libc::SIGTRAP)
    }

    /// Lets it go on, delivering `signal` (0: none).
    pub fn resume(self, how: Resume, signal: i32) -> Result<Running> {
        request("PTRACE_CONT", how as u32, self.tid, 0, signal as usize)?;
        Ok(Running {
            tid: self.tid,
            company: self.company,
        })
    }

    /// Lets it go on freely, and leaves in its place what answers ESRCH to every request.
    pub fn go_on(&mut self) -> Result<Running> {
        let tid = self.tid();
        std::mem::replace(self, Stopped::absent(tid)).resume(Resume::Cont, 0)
    }

    /// Resumes the task, of that process, and waits for its next stop, in place; every other task
    /// of ours is in a stop. If the process is killed now, a first thread's end is told only when
    /// the others have been waited for, so for that one they are waited for as well. For the
    /// others that would be a walk over all tasks at each stop.
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

    /// Resumes the task and waits for its next stop, in place, and for nothing else: other tasks
    /// may come to their stops meanwhile.
    pub fn advance_among_others(&mut self, how: Resume, signal: i32) -> Result<()> {
        let tid = self.tid();
        let taken = std::mem::replace(self, Stopped::absent(tid));
        *self = taken.resume(how, signal)?.wait_stopped()?;
        Ok(())
    }

    /// Asks for an event stop, to be reached on the next resume.
    pub fn interrupt(&self) -> Result<()> {
        Running::auto_attached(self.tid()).interrupt()
    }

    /// Lets it stay in the group stop that it is in, until that is over, which is a stop again
    /// (`PTRACE_LISTEN`).
    pub fn listen(self) -> Result<()> {
        request("PTRACE_LISTEN", libc::PTRACE_LISTEN, self.tid, 0, 0).map(drop)
    }

    /// Lets it go for good, delivering `signal` (0: none). A process in a group stop stays
    /// stopped (`__ptrace_unlink` in kernel/ptrace.c reinstates it).
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
