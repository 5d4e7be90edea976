//! `/proc/PID/stat` and `/proc/PID/task/TID/stat`, see proc_pid_stat(5).

use super::parse::{dec, fields};
use super::status::TaskState;
use super::{Comm, ProcDir};
use crate::{Pid, Result};

/// `PF_KTHREAD` of the kernel's `include/linux/sched.h`.
const PF_KTHREAD: u32 = 0x0020_0000;

/// The fields of `stat` that a checkpoint needs. Addresses are 0 without permission to ptrace the process, and for a
/// task without an address space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// The task (or the leader).
    pub pid: i32,
    /// Name of the task, any bytes, at most 15 (not escaped here; may contain `)` and newlines).
    pub comm: Comm,
    /// What it does.
    pub state: TaskState,
    /// Parent process, 0 when outside our pid namespace.
    pub ppid: Pid,
    /// Process group; 0 when its leader is outside our pid namespace.
    pub pgrp: i32,
    /// Session; 0 likewise.
    pub session: i32,
    /// Controlling terminal, `(minor & 0xff) | major << 8 | (minor & 0xfff00) << 12`; 0 for none.
    pub tty_nr: i32,
    /// Foreground process group of that terminal, -1 without one.
    pub tpgid: i32,
    /// `PF_*` of the kernel.
    pub flags: u32,
    /// Processor time in user mode, clock ticks.
    pub utime: u64,
    /// Processor time in the kernel, clock ticks.
    pub stime: u64,
    /// Processor time of reaped children in user mode, clock ticks.
    pub cutime: i64,
    /// Processor time of reaped children in the kernel, clock ticks.
    pub cstime: i64,
    /// Priority as the scheduler sees it.
    pub priority: i64,
    /// Nice value, -20 to 19.
    pub nice: i32,
    /// Tasks of the process.
    pub num_threads: u32,
    /// Start time after boot, clock ticks; distinguishes a process from a later one with the same pid.
    pub starttime: u64,
    /// First address of the program's code.
    pub start_code: u64,
    /// Address after the program's code.
    pub end_code: u64,
    /// Bottom of the stack.
    pub start_stack: u64,
    /// Stack pointer; 0 unless the process is ending.
    pub kstkesp: u64,
    /// Instruction pointer; 0 unless the process is ending.
    pub kstkeip: u64,
    /// Signal sent to the parent when this process ends; -1 for a thread.
    pub exit_signal: i32,
    /// Real-time priority, 0 for others.
    pub rt_priority: u32,
    /// `SCHED_*`.
    pub policy: u32,
    /// First address of data, initialized and not.
    pub start_data: u64,
    /// Address after data.
    pub end_data: u64,
    /// Start of the program break.
    pub start_brk: u64,
    /// First address of the arguments.
    pub arg_start: u64,
    /// Address after the arguments.
    pub arg_end: u64,
    /// First address of the environment.
    pub env_start: u64,
    /// Address after the environment.
    pub env_end: u64,
    /// Wait status; of a zombie only.
    pub exit_code: i32,
}

impl Stat {
    /// Whether it is a kernel thread, which cannot be checkpointed.
    pub fn is_kernel_thread(&self) -> bool {
        self.flags & PF_KTHREAD != 0
    }

    /// Major and minor device number of the controlling terminal.
    pub fn tty(&self) -> Option<(u32, u32)> {
        let number = self.tty_nr as u32;
        let minor = (number & 0xff) | ((number >> 12) & 0xf_ff00);
        (number != 0).then_some(((number >> 8) & 0xfff, minor))
    }
}

/// Reads `stat` of a process (`Pid`; times are sums over its tasks) or of a task (`(Pid, Tid)`).
///
/// # Errors
/// See [`ProcDir::read`]; [`crate::Error::ProcSyntax`] when the format is unknown.
pub fn read_stat(task: impl Into<ProcDir>) -> Result<Stat> {
    let dir = task.into();
    let text = dir.read("stat")?;
    parse(&text).ok_or_else(|| dir.syntax("stat", &text))
}

fn parse(text: &[u8]) -> Option<Stat> {
    // No field after comm has a parenthesis; comm may have any number of them.
    let open = text.iter().position(|&byte| byte == b'(')?;
    let close = text.iter().rposition(|&byte| byte == b')')?;
    let comm = text.get(open + 1..close)?.to_vec();
    let comm = Comm(comm);
    let rest: Vec<&[u8]> = fields(&text[close + 1..]).collect();
    // Numbered as in the man page, where state is field 3.
    let field = |number: usize| rest.get(number - 3).copied();
    Some(Stat {
        pid: dec(&text[..open])?,
        comm,
        state: TaskState::from_letter(*field(3)?.first()?),
        ppid: Pid(dec(field(4)?)?),
        pgrp: dec(field(5)?)?,
        session: dec(field(6)?)?,
        tty_nr: dec(field(7)?)?,
        tpgid: dec(field(8)?)?,
        flags: dec(field(9)?)?,
        utime: dec(field(14)?)?,
        stime: dec(field(15)?)?,
        cutime: dec(field(16)?)?,
        cstime: dec(field(17)?)?,
        priority: dec(field(18)?)?,
        nice: dec(field(19)?)?,
        num_threads: dec(field(20)?)?,
        starttime: dec(field(22)?)?,
        start_code: dec(field(26)?)?,
        end_code: dec(field(27)?)?,
        start_stack: dec(field(28)?)?,
        kstkesp: dec(field(29)?)?,
        kstkeip: dec(field(30)?)?,
        exit_signal: dec(field(38)?)?,
        rt_priority: dec(field(40)?)?,
        policy: dec(field(41)?)?,
        start_data: dec(field(45)?)?,
        end_data: dec(field(46)?)?,
        start_brk: dec(field(47)?)?,
        arg_start: dec(field(48)?)?,
        arg_end: dec(field(49)?)?,
        env_start: dec(field(50)?)?,
        env_end: dec(field(51)?)?,
        exit_code: dec(field(52)?)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fields from the third on.
    const REST: &str = "S 5623 5626 5231 34817 -1 4194560 3085 6532 23 3 5 2 -1 -2 39 19 7 0 140044 \
        18935808 3686 18446744073709551615 94525806936064 94525806936405 140722568173040 11 12 0 0 \
        16781312 2 0 0 0 17 1 9 2 0 0 0 94525806947760 94525806948376 94526584950784 \
        140722568173812 140722568173863 140722568173864 140722568175567 256\n";

    #[test]
    fn every_field() {
        let stat = parse(format!("5626 (python3) {REST}").as_bytes()).unwrap();
        assert_eq!((stat.pid, stat.state), (5626, TaskState::Sleeping));
        assert_eq!(
            (stat.ppid, stat.pgrp, stat.session),
            (Pid(5623), 5626, 5231)
        );
        assert_eq!(
            (stat.tty_nr, stat.tty(), stat.tpgid),
            (34817, Some((136, 1)), -1)
        );
        assert_eq!(
            (stat.utime, stat.stime, stat.cutime, stat.cstime),
            (5, 2, -1, -2)
        );
        assert_eq!((stat.priority, stat.nice, stat.num_threads), (39, 19, 7));
        assert_eq!(stat.starttime, 140_044);
        assert_eq!(
            (stat.start_code, stat.end_code),
            (94_525_806_936_064, 94_525_806_936_405)
        );
        assert_eq!(stat.start_stack, 140_722_568_173_040);
        assert_eq!((stat.kstkesp, stat.kstkeip), (11, 12));
        assert_eq!(
            (stat.exit_signal, stat.rt_priority, stat.policy),
            (17, 9, 2)
        );
        assert_eq!(
            (stat.start_data, stat.end_data),
            (94_525_806_947_760, 94_525_806_948_376)
        );
        assert_eq!(stat.start_brk, 94_526_584_950_784);
        assert_eq!(
            (stat.arg_start, stat.arg_end),
            (140_722_568_173_812, 140_722_568_173_863)
        );
        assert_eq!(
            (stat.env_start, stat.env_end),
            (140_722_568_173_864, 140_722_568_175_567)
        );
        assert_eq!(stat.exit_code, 256);
        assert!(!stat.is_kernel_thread());
    }

    #[test]
    fn names_that_look_like_fields() {
        for name in [&b"a) S 1 (b"[..], b")", b"", b"\n\xff )(", b" "] {
            let text = [b"7 (", name, b") ", REST.as_bytes()].concat();
            let stat = parse(&text).unwrap();
            assert_eq!((&*stat.comm, stat.ppid), (name, Pid(5623)));
        }
    }

    #[test]
    fn odd_text_is_no_stat() {
        for text in ["", "1", "1 (a", ")1 (a", "1 (a) S 1 2", "x (a) S 1 2 3 4"] {
            assert_eq!(parse(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn the_kernel_s_own_threads_are_recognised() {
        let own = read_stat(Pid::own()).unwrap();
        assert!(!own.is_kernel_thread());
        assert!(
            Stat {
                flags: 0x0020_8040,
                ..own
            }
            .is_kernel_thread()
        );
    }
}
