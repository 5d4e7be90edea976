//! `/proc/PID/status` and `/proc/PID/task/TID/status`, see proc_pid_status(5).

use super::parse::{dec, fields, hex, key_value, lines, oct};
use super::{Comm, ProcDir};
use crate::{Pid, Result, Tid};

/// State of a task, the letter of `State:` and of `stat`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TaskState {
    /// `R`: running or runnable.
    Running,
    /// `S`: interruptible sleep.
    Sleeping,
    /// `D`: uninterruptible sleep.
    DiskSleep,
    /// `T`: stopped by a signal.
    Stopped,
    /// `t`: stopped by its tracer.
    TracingStop,
    /// `Z`: ended, not yet reaped.
    Zombie,
    /// `X` or `x`: dead.
    Dead,
    /// `I`: an idle kernel thread.
    Idle,
    /// `P`: a parked kernel thread.
    Parked,
    /// Another letter.
    #[default]
    Unknown,
}

impl TaskState {
    /// The meaning of the letter.
    pub fn from_letter(letter: u8) -> Self {
        match letter {
            b'R' => Self::Running,
            b'S' => Self::Sleeping,
            b'D' => Self::DiskSleep,
            b'T' => Self::Stopped,
            b't' => Self::TracingStop,
            b'Z' => Self::Zombie,
            b'X' | b'x' => Self::Dead,
            b'I' => Self::Idle,
            b'P' => Self::Parked,
            _ => Self::Unknown,
        }
    }

    /// Whether the task has ended and can only be reaped.
    pub fn has_ended(self) -> bool {
        matches!(self, Self::Zombie | Self::Dead)
    }
}

/// Real, effective, saved and file system id, in the order of the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ids {
    /// Real.
    pub real: u32,
    /// Effective.
    pub effective: u32,
    /// Saved.
    pub saved: u32,
    /// File system.
    pub fs: u32,
}

/// Signal sets: bit N-1 stands for signal N.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SignalSets {
    /// `SigPnd`: pending for this task.
    pub pending: u64,
    /// `ShdPnd`: pending for the process.
    pub shared_pending: u64,
    /// `SigBlk`: blocked in this task.
    pub blocked: u64,
    /// `SigIgn`: ignored by the process.
    pub ignored: u64,
    /// `SigCgt`: with a handler.
    pub caught: u64,
}

/// Capability sets: bit N stands for capability N, see capabilities(7).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// `CapInh`
    pub inheritable: u64,
    /// `CapPrm`
    pub permitted: u64,
    /// `CapEff`
    pub effective: u64,
    /// `CapBnd`
    pub bounding: u64,
    /// `CapAmb`
    pub ambient: u64,
}

/// The fields of `status` that a checkpoint needs. Fields that an older kernel does not print are `None`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// `Name`: comm of the task, any bytes, at most 15 (escapes undone).
    pub name: Comm,
    /// `Umask`; absent for a zombie.
    pub umask: Option<u32>,
    /// `State`
    pub state: TaskState,
    /// `Tgid`: the process that the task belongs to.
    pub tgid: Pid,
    /// `Pid`: the task.
    pub tid: Tid,
    /// `PPid`; 0 when the parent is outside our pid namespace.
    pub ppid: Pid,
    /// `TracerPid`: its tracer, 0 without one (or with one outside our pid namespace).
    pub tracer_pid: i32,
    /// `Uid`
    pub uid: Ids,
    /// `Gid`
    pub gid: Ids,
    /// `Groups`: supplementary groups.
    pub groups: Vec<u32>,
    /// `NStgid`: the process's pid, from our pid namespace inwards; one entry when it is in ours.
    pub ns_tgid: Vec<i32>,
    /// `NSpid`: the task's, likewise.
    pub ns_pid: Vec<i32>,
    /// `NSpgid`: the process group's, likewise.
    pub ns_pgid: Vec<i32>,
    /// `NSsid`: the session's, likewise.
    pub ns_sid: Vec<i32>,
    /// `Kthread` (Linux 6.8); [`super::stat::Stat::is_kernel_thread`] works on every kernel.
    pub kernel_thread: Option<bool>,
    /// `VmLck`: locked memory in bytes; absent without an address space.
    pub locked: Option<u64>,
    /// `untag_mask`: the bits of a pointer that are its address (linear address masking).
    pub untag_mask: Option<u64>,
    /// `CoreDumping`
    pub core_dumping: Option<bool>,
    /// `THP_enabled`: false after `PR_SET_THP_DISABLE`.
    pub thp_enabled: Option<bool>,
    /// `Threads`: tasks of the process.
    pub threads: u32,
    /// `SigPnd` … `SigCgt`
    pub signals: SignalSets,
    /// `CapInh` … `CapAmb`
    pub capabilities: Capabilities,
    /// `NoNewPrivs`
    pub no_new_privs: bool,
    /// `Seccomp`: 0 none, 1 strict, 2 filters; `None` when the kernel has no seccomp.
    pub seccomp: Option<u32>,
    /// `Seccomp_filters`: how many (Linux 5.9).
    pub seccomp_filters: Option<u32>,
}

impl Status {
    /// The values of missing lines.
    fn empty() -> Self {
        Self {
            name: Comm::default(),
            umask: None,
            state: TaskState::Unknown,
            tgid: Pid(0),
            tid: Tid(0),
            ppid: Pid(0),
            tracer_pid: 0,
            uid: Ids::default(),
            gid: Ids::default(),
            groups: Vec::new(),
            ns_tgid: Vec::new(),
            ns_pid: Vec::new(),
            ns_pgid: Vec::new(),
            ns_sid: Vec::new(),
            kernel_thread: None,
            locked: None,
            untag_mask: None,
            core_dumping: None,
            thp_enabled: None,
            threads: 0,
            signals: SignalSets::default(),
            capabilities: Capabilities::default(),
            no_new_privs: false,
            seccomp: None,
            seccomp_filters: None,
        }
    }
}

/// Reads `status` of a process's leader (`Pid`) or of a task (`(Pid, Tid)`).
///
/// # Errors
/// See [`ProcDir::read`]; [`crate::Error::ProcSyntax`] when the format is unknown.
pub fn read_status(task: impl Into<ProcDir>) -> Result<Status> {
    let dir = task.into();
    let text = dir.read("status")?;
    parse(&text).map_err(|what| dir.syntax("status", what))
}

/// Reads `/proc/PID/task/TID/status`.
///
/// # Errors
/// As [`read_status`].
pub fn read_task(pid: Pid, tid: Tid) -> Result<Status> {
    read_status((pid, tid))
}

fn parse(text: &[u8]) -> Result<Status, Vec<u8>> {
    let mut status = Status::empty();
    for line in lines(text) {
        // A newline in a name is escaped, so a line without a colon is a syntax error.
        let Some(colon) = line.iter().position(|&byte| byte == b':') else {
            continue;
        };
        if &line[..colon] == b"Name" {
            status.name = name(line[colon + 1..].strip_prefix(b"\t").unwrap_or_default());
            continue;
        }
        let (key, value) = key_value(line, b':').unwrap_or_default();
        field(&mut status, key, value).ok_or(line)?;
    }
    if status.tid.raw() == 0 {
        return Err(b"no line \"Pid:\"".to_vec());
    }
    Ok(status)
}

fn field(status: &mut Status, key: &[u8], value: &[u8]) -> Option<()> {
    match key {
        b"Umask" => status.umask = Some(oct(value)? as u32),
        b"State" => status.state = TaskState::from_letter(*value.first()?),
        b"Tgid" => status.tgid = Pid(dec(value)?),
        b"Pid" => status.tid = Tid(dec(value)?),
        b"PPid" => status.ppid = Pid(dec(value)?),
        b"TracerPid" => status.tracer_pid = dec(value)?,
        b"Uid" => status.uid = ids(value)?,
        b"Gid" => status.gid = ids(value)?,
        b"Groups" => status.groups = list(value)?,
        b"NStgid" => status.ns_tgid = list(value)?,
        b"NSpid" => status.ns_pid = list(value)?,
        b"NSpgid" => status.ns_pgid = list(value)?,
        b"NSsid" => status.ns_sid = list(value)?,
        b"Kthread" => status.kernel_thread = Some(dec::<u32>(value)? != 0),
        b"VmLck" => status.locked = Some(dec::<u64>(fields(value).next()?)?.saturating_mul(1024)),
        b"CoreDumping" => status.core_dumping = Some(dec::<u32>(value)? != 0),
        b"THP_enabled" => status.thp_enabled = Some(dec::<u32>(value)? != 0),
        b"Threads" => status.threads = dec(value)?,
        b"SigPnd" => status.signals.pending = hex(value)?,
        b"ShdPnd" => status.signals.shared_pending = hex(value)?,
        b"SigBlk" => status.signals.blocked = hex(value)?,
        b"SigIgn" => status.signals.ignored = hex(value)?,
        b"SigCgt" => status.signals.caught = hex(value)?,
        b"CapInh" => status.capabilities.inheritable = hex(value)?,
        b"CapPrm" => status.capabilities.permitted = hex(value)?,
        b"CapEff" => status.capabilities.effective = hex(value)?,
        b"CapBnd" => status.capabilities.bounding = hex(value)?,
        b"CapAmb" => status.capabilities.ambient = hex(value)?,
        b"NoNewPrivs" => status.no_new_privs = dec::<u32>(value)? != 0,
        b"untag_mask" => status.untag_mask = Some(hex(value.strip_prefix(b"0x")?)?),
        b"Seccomp" => status.seccomp = Some(dec(value)?),
        b"Seccomp_filters" => status.seccomp_filters = Some(dec(value)?),
        _ => {}
    }
    Some(())
}

fn ids(value: &[u8]) -> Option<Ids> {
    let mut all = fields(value).map(dec::<u32>);
    let mut next = || all.next()?;
    Some(Ids {
        real: next()?,
        effective: next()?,
        saved: next()?,
        fs: next()?,
    })
}

fn list<T: std::str::FromStr>(value: &[u8]) -> Option<Vec<T>> {
    fields(value).map(dec).collect()
}

/// `Name:` escapes newline and backslash as C does (`proc_task_name` in the kernel's `fs/proc/array.c`).
fn name(text: &[u8]) -> Comm {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        let (byte, used) = match rest {
            [b'\\', b'n', ..] => (b'\n', 2),
            [b'\\', b'\\', ..] => (b'\\', 2),
            _ => (first, 1),
        };
        plain.push(byte);
        rest = &tail[used - 1..];
    }
    Comm(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"\
Name:\ta\\nb\\\\n :\xff\n\
Umask:\t0027\n\
State:\tt (tracing stop)\n\
Tgid:\t5583\n\
Ngid:\t0\n\
Pid:\t5584\n\
PPid:\t5573\n\
TracerPid:\t77\n\
Uid:\t1000\t1001\t1002\t4294967295\n\
Gid:\t1\t2\t3\t4\n\
FDSize:\t256\n\
Groups:\t4 24 4294967294 \n\
NStgid:\t5583\t1\n\
NSpid:\t5584\t2\n\
NSpgid:\t5583\t1\n\
NSsid:\t5231\t0\n\
Kthread:\t0\n\
VmPeak:\t    3060 kB\n\
VmLck:\t       8 kB\n\
CoreDumping:\t0\n\
THP_enabled:\t1\n\
Threads:\t3\n\
SigQ:\t0/96365\n\
SigPnd:\t0000000000000001\n\
ShdPnd:\t8000000000000000\n\
SigBlk:\t0000000000010000\n\
SigIgn:\t0000000000001000\n\
SigCgt:\t0000000180000000\n\
CapInh:\t0000000000000000\n\
CapPrm:\t000001fffeffffff\n\
CapEff:\t0000000000200000\n\
CapBnd:\t000001fffeffffff\n\
CapAmb:\t0000000000000001\n\
NoNewPrivs:\t1\n\
untag_mask:\t0x81ffffffffffffff\n\
Seccomp:\t2\n\
Seccomp_filters:\t3\n\
Speculation_Store_Bypass:\tthread vulnerable\n\
Cpus_allowed_list:\t0-1\n";

    #[test]
    fn every_field() {
        let status = parse(TEXT).unwrap();
        let ids = |real, effective, saved, fs| Ids {
            real,
            effective,
            saved,
            fs,
        };
        let expected = Status {
            name: Comm(b"a\nb\\n :\xff".to_vec()),
            umask: Some(0o27),
            state: TaskState::TracingStop,
            tgid: Pid(5583),
            tid: Tid(5584),
            ppid: Pid(5573),
            tracer_pid: 77,
            uid: ids(1000, 1001, 1002, u32::MAX),
            gid: ids(1, 2, 3, 4),
            groups: vec![4, 24, 4_294_967_294],
            ns_tgid: vec![5583, 1],
            ns_pid: vec![5584, 2],
            ns_pgid: vec![5583, 1],
            ns_sid: vec![5231, 0],
            kernel_thread: Some(false),
            locked: Some(8192),
            untag_mask: Some(0x81ff_ffff_ffff_ffff),
            core_dumping: Some(false),
            thp_enabled: Some(true),
            threads: 3,
            signals: SignalSets {
                pending: 1,
                shared_pending: 1 << 63,
                blocked: 0x10000,
                ignored: 0x1000,
                caught: 0x1_8000_0000,
            },
            capabilities: Capabilities {
                inheritable: 0,
                permitted: 0x1ff_feff_ffff,
                effective: 1 << 21,
                bounding: 0x1ff_feff_ffff,
                ambient: 1,
            },
            no_new_privs: true,
            seccomp: Some(2),
            seccomp_filters: Some(3),
        };
        assert_eq!(status, expected);
    }

    #[test]
    fn an_old_kernel_and_a_zombie_say_less() {
        let status =
            parse(b"Name:\tsh\nState:\tZ (zombie)\nTgid:\t5\nPid:\t5\nPPid:\t1\n").unwrap();
        assert!(status.state.has_ended());
        assert_eq!(
            (status.umask, status.locked, status.seccomp_filters),
            (None, None, None)
        );
    }

    #[test]
    fn odd_text_is_an_error_that_names_the_line() {
        assert_eq!(parse(b"Pid:\tx\n"), Err(b"Pid:\tx".to_vec()));
        assert_eq!(
            parse(b"Pid:\t1\nUid:\t1 2 3\n"),
            Err(b"Uid:\t1 2 3".to_vec())
        );
        assert!(parse(b"").is_err());
        assert!(parse(b"State:\t\n").is_err());
    }

    #[test]
    fn a_thread_of_ours() {
        let own = Pid::own();
        let status = read_task(own, own.leader()).unwrap();
        assert_eq!((status.tgid, status.tid), (own, own.leader()));
        assert!(status.threads >= 1 && !status.ns_pid.is_empty());
    }
}
