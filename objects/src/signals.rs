//! Signal actions and pending signals.

use ckpt_tracer::Result;
use ckpt_tracer::remote::{Call, RemoteCalls};
use ckpt_tracer::task::Stopped;
use serde::{Deserialize, Serialize};

use super::timers::PosixTimer;
use crate::bounds;
use crate::plan::Builder;

/// The action of a process for a signal (`struct kernel_sigaction`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Action {
    /// The signal.
    #[serde(deserialize_with = "bounds::signal")]
    pub signal: u32,
    /// `SIG_DFL` (0), `SIG_IGN` (1) or the handler's address.
    pub handler: u64,
    /// `SA_*`.
    pub flags: u64,
    /// Where the handler returns to.
    pub restorer: u64,
    /// Blocked while the handler runs.
    pub mask: u64,
}

/// A pending signal (`siginfo_t`, 128 bytes).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Pending(#[serde(with = "serde_bytes")] pub Vec<u8>);

impl Pending {
    /// The signal's number, `si_signo`.
    pub fn signal(&self) -> i32 {
        self.0.first_chunk().map_or(0, |b| i32::from_le_bytes(*b))
    }

    /// The id of the POSIX timer that sent it, if one did (`SI_TIMER`).
    pub fn timer(&self) -> Option<i32> {
        let id = self.0.get(16..).and_then(|b| b.first_chunk());
        id.map(|b| i32::from_le_bytes(*b))
            .filter(|_| self.code() == libc::SI_TIMER)
    }

    /// Whether it must not be pending while the restorer runs, which traps by SIGTRAP: that signal and other
    /// synchronous ones. When a trap is delivered, the kernel takes the first synchronous signal in the task's queue,
    /// even if it is blocked (kernel/signal.c, `dequeue_synchronous_signal`).
    pub fn meets_traps(&self) -> bool {
        const OF_FAULTS: [i32; 5] = [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGILL,
            libc::SIGFPE,
            libc::SIGSYS,
        ];
        self.signal() == libc::SIGTRAP || OF_FAULTS.contains(&self.signal()) && self.code() > 0
    }

    /// Whether the tracer sends it, after the restorer has gone: a synchronous signal, and SIGSTOP, which cannot be
    /// blocked.
    pub fn is_for_the_tracer(&self) -> bool {
        self.meets_traps() || self.signal() == libc::SIGSTOP
    }

    /// Its origin, `si_code`.
    pub fn code(&self) -> i32 {
        self.0
            .get(8..)
            .and_then(|b| b.first_chunk())
            .map_or(0, |b| i32::from_le_bytes(*b))
    }
}

impl Pending {
    /// Whether a timer of the process sent it: setitimer(2), timer_create(2).
    pub fn is_from_a_timer(&self) -> bool {
        const SI_TIMER: i32 = -2;
        const SI_KERNEL: i32 = 0x80;
        let interval = [libc::SIGALRM, libc::SIGVTALRM, libc::SIGPROF];
        self.code() == SI_TIMER || self.code() == SI_KERNEL && interval.contains(&self.signal())
    }
}

/// Highest signal number.
pub const SIGNALS: u32 = 64;

/// Bytes of `struct kernel_sigaction`.
const ACTION_BYTES: u64 = 32;

/// Whether a process with these actions ignores a signal.
pub fn is_ignored(actions: &[Action], signal: u32) -> bool {
    const BY_DEFAULT: [i32; 4] = [libc::SIGCHLD, libc::SIGCONT, libc::SIGURG, libc::SIGWINCH];
    let action = actions.iter().find(|action| action.signal == signal);
    match action.map_or(libc::SIG_DFL, |action| action.handler as usize) {
        libc::SIG_IGN => true,
        libc::SIG_DFL => BY_DEFAULT.contains(&(signal as i32)),
        _ => false,
    }
}

/// All actions other than the plain default.
pub fn capture_actions(calls: &mut RemoteCalls<'_>) -> Result<Vec<Action>> {
    let unchangeable = [libc::SIGKILL as u64, libc::SIGSTOP as u64];
    let signals: Vec<u64> = (1..=SIGNALS.into())
        .filter(|s| !unchangeable.contains(s))
        .collect();
    let out = |signal: u64| (signal - 1) * ACTION_BYTES;
    let list: Vec<Call> = signals
        .iter()
        .map(|&signal| {
            let args = [signal, 0, (calls.scratch() + out(signal)).raw(), 8];
            Call::new("rt_sigaction", libc::SYS_rt_sigaction, &args)
        })
        .collect();
    calls.batch_ok(u64::from(SIGNALS) * ACTION_BYTES, &list)?;
    let mut actions = Vec::new();
    for signal in signals {
        let words: [u8; ACTION_BYTES as usize] = calls.read_scratch(out(signal))?;
        let word = |i: usize| u64::from_le_bytes(words[i * 8..][..8].try_into().unwrap_or([0; 8]));
        let signal = signal as u32;
        let action = Action {
            signal,
            handler: word(0),
            flags: word(1),
            restorer: word(2),
            mask: word(3),
        };
        if action
            != (Action {
                signal,
                ..Action::default()
            })
        {
            actions.push(action);
        }
    }
    Ok(actions)
}

/// The signals pending for a task, or for its process.
pub fn capture_pending(task: &Stopped, shared: bool) -> Result<Vec<Pending>> {
    let pending = task.pending_signals(shared)?;
    Ok(pending
        .into_iter()
        .map(|info| Pending(info.to_vec()))
        .collect())
}

/// Sets the actions.
pub fn rebuild_actions(actions: &[Action], plan: &mut Builder) {
    for action in actions {
        let words = [action.handler, action.flags, action.restorer, action.mask];
        let at = plan.data(&words.map(u64::to_le_bytes).concat());
        plan.syscall(
            libc::SYS_rt_sigaction,
            &[u64::from(action.signal), at, 0, 8],
            || format!("the action of signal {}", action.signal),
        );
    }
}

/// Queues signals for the calling thread, or for its process, except those that the tracer queues or that their
/// `timers` send again. From the process itself the kernel accepts any `si_code` (kernel/signal.c,
/// `do_rt_sigqueueinfo`).
pub fn rebuild_pending(
    pending: &[Pending],
    timers: &[PosixTimer],
    pid: i32,
    thread: Option<i32>,
    plan: &mut Builder,
) {
    let again = |info: &Pending| timers.iter().any(|timer| timer.sends_again(info));
    for info in pending {
        if info.is_for_the_tracer() || again(info) {
            continue;
        }
        let at = plan.data(&info.0);
        let signal = info.signal();
        let object = || format!("pending signal {signal}");
        match thread {
            Some(tid) => {
                let args = [pid as u64, tid as u64, signal as u64, at];
                plan.syscall(libc::SYS_rt_tgsigqueueinfo, &args, object);
            }
            None => {
                plan.syscall(
                    libc::SYS_rt_sigqueueinfo,
                    &[pid as u64, signal as u64, at],
                    object,
                );
            }
        }
    }
}
