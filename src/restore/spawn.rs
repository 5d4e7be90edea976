//! The first new process: created under its old pid, with the descriptors that it needs from us,
//! executing the job's own executable up to its first instruction.
//!
//! The exec makes `/proc/PID/exe`, a clean address space and the kernel's mappings without
//! any privilege. The tracer stops the process before it executes anything of the program.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use ckpt_tracer::Tid;
use ckpt_tracer::task::{Running, Stop, Stopped};
use nix::errno::Errno;

use super::clock::Clocks;
use super::next_pid::Means;
use super::pids;
use crate::error::{Error, Result};
use crate::objects::process::Process;

/// The new processes: killed and reaped unless they were let go.
#[derive(Default)]
pub struct Brood {
    pids: Vec<i32>,
    kept: bool,
}

impl Brood {
    /// One more.
    pub fn add(&mut self, pid: i32) {
        self.pids.push(pid);
    }

    /// All are complete; they stay.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Brood {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        for pid in &self.pids {
            // SAFETY: a call without pointers; the pids are our children's or tracees', and are not
            // free for others before they have been waited for.
            unsafe { libc::kill(*pid, libc::SIGKILL) };
        }
        for pid in self.pids.iter().rev() {
            // The leader's end is told only when every thread that we trace has been waited for.
            let tasks = ckpt_tracer::proc::tasks::list_tasks(Tid(*pid)).unwrap_or_default();
            let others = tasks.into_iter().filter(|t| t.raw() != *pid);
            for tid in others.map(Tid::raw).chain([*pid]) {
                // SAFETY: the status is not asked for.
                unsafe { libc::waitpid(tid, std::ptr::null_mut(), libc::__WALL) };
            }
        }
        // Zombies that the end of their parents left to us, a subreaper.
        // SAFETY: as above.
        while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::__WALL | libc::WNOHANG) } > 0 {
        }
    }
}

/// What the child does between its creation and the exec: prepared before, since there only
/// system calls are allowed.
struct Orders {
    executable: RawFd,
    /// (our descriptor, number in the child), ascending by number; ours are above all numbers.
    descriptors: Vec<(RawFd, i32)>,
    name: CString,
    go: RawFd,
    report: RawFd,
}

#[repr(C, align(8))]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Creates the process and brings it to its exec stop.
pub fn spawn(
    process: &Process,
    executable: &File,
    descriptors: Vec<(OwnedFd, i32)>,
    clocks: Clocks,
    means: Means,
) -> Result<(Brood, Stopped)> {
    crate::host::raise_descriptor_limit();
    let highest = descriptors.iter().map(|(_, to)| *to).max().unwrap_or(2);
    let above = |fd: RawFd| duplicate_above(fd, highest + 1);
    let mut kept: Vec<OwnedFd> = Vec::new();
    let mut moved = Vec::with_capacity(descriptors.len());
    for (fd, to) in &descriptors {
        let fd = above(fd.as_raw_fd())?;
        moved.push((fd.as_raw_fd(), *to));
        kept.push(fd);
    }
    moved.sort_by_key(|(_, to)| *to);
    let executable = above(executable.as_raw_fd())?;
    let (go_read, go_write) = pipe()?;
    let (report_read, report_write) = pipe()?;
    let (go_in_child, report_in_child) = (
        above(go_read.as_raw_fd())?,
        above(report_write.as_raw_fd())?,
    );
    let orders = Orders {
        executable: executable.as_raw_fd(),
        descriptors: moved,
        name: CString::new(process.threads[0].name.clone()).unwrap_or_default(),
        go: go_in_child.as_raw_fd(),
        report: report_in_child.as_raw_fd(),
    };
    let pid = process.pid;
    let mut args = CloneArgs {
        exit_signal: libc::SIGCHLD as u64,
        set_tid: (&raw const pid) as u64,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    means.aim(pid)?;
    let r = clocks.during(|| {
        // SAFETY: without CLONE_VM this is a fork; the child runs `execute`, which makes nothing but
        // system calls on memory prepared above, and never returns.
        unsafe {
            let size = std::mem::size_of::<CloneArgs>();
            let r = match means {
                Means::SetTid => libc::syscall(libc::SYS_clone3, &raw mut args, size),
                _ => libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0),
            };
            if r == 0 {
                execute(&orders)
            }
            r
        }
    })?;
    let r = Errno::result(r).map_err(|errno| cannot_have_pid(pid, errno))?;
    let mut brood = Brood::default();
    brood.add(r as i32);
    if r != i64::from(pid) {
        return Err(Error::PidMissed { pid });
    }
    drop((go_read, report_write, go_in_child, report_in_child, kept));

    let task = Running::seize_with(Tid(pid), BIRTH_OPTIONS)?;
    // The child holds this end as well, so it waits for a byte and not for the end.
    std::io::Write::write_all(&mut File::from(go_write), b"!").map_err(|source| Error::File {
        what: "write to",
        path: "the new process".into(),
        source,
    })?;
    let mut task = match task.wait_stopped() {
        Ok(stopped) => stopped,
        Err(_) => return Err(failed_before_exec(report_read)),
    };
    while task.stop() != Stop::Exec {
        // A signal from outside that nobody asked for.
        task = match task
            .resume(ckpt_tracer::task::Resume::Cont, 0)?
            .wait_stopped()
        {
            Ok(stopped) => stopped,
            Err(_) => return Err(failed_before_exec(report_read)),
        };
    }
    leave_exec(&mut task)?;
    Ok((brood, task))
}

/// While processes create others: the loss of the tracer ends them, and what they create is
/// traced from its beginning.
pub const BIRTH_OPTIONS: i32 = libc::PTRACE_O_EXITKILL
    | libc::PTRACE_O_TRACEEXEC
    | libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACECLONE;

/// The exec stop is inside the system call; its exit would be taken for that of the first
/// remote call. The event stop is behind it, still before the program's first instruction.
pub fn leave_exec(task: &mut Stopped) -> Result<()> {
    task.interrupt()?;
    while !matches!(task.stop(), Stop::Event(_)) {
        task.advance_among_others(ckpt_tracer::task::Resume::Cont, 0)?;
    }
    Ok(())
}

/// Whether processes can be created under chosen pids in our pid namespace: by us, and `by_others`
/// also by our children after an exec.
pub fn may_choose_pids(by_others: bool) -> bool {
    // Ours is taken, which is found only when it may be chosen.
    let taken = std::process::id();
    let mut args = CloneArgs {
        exit_signal: libc::SIGCHLD as u64,
        set_tid: (&raw const taken) as u64,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    let size = std::mem::size_of::<CloneArgs>();
    // SAFETY: a fork that fails in any case, since the pid is that of the caller.
    let r = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size) };
    if Errno::result(r) != Err(Errno::EEXIST) {
        return false;
    }
    let status = ckpt_tracer::proc::status::read_status(Tid(taken as i32));
    !by_others
        || status.is_ok_and(|s| s.uid.effective == 0 || s.capabilities.ambient & MAY_CHOOSE != 0)
}

/// CAP_CHECKPOINT_RESTORE and CAP_SYS_ADMIN.
const MAY_CHOOSE: u64 = 1 << 40 | 1 << 21;

fn cannot_have_pid(pid: i32, errno: Errno) -> Error {
    match errno {
        Errno::EEXIST => Error::refuse(pids::pid_taken(pid)),
        Errno::EPERM => Error::refuse(pids::not_permitted(pid, "")),
        Errno::EINVAL => Error::refuse(pids::above_the_highest(pid)),
        other => Error::Restore(format!("process {pid} cannot be created: {}", other.desc())),
    }
}

fn failed_before_exec(report: OwnedFd) -> Error {
    let mut bytes = [0; 8];
    let n = std::io::Read::read(&mut File::from(report), &mut bytes).unwrap_or(0);
    let text = match n {
        8 => {
            let step = i32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            let errno = i32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
            let step = ["placing descriptors", "executing the program's file"]
                .get(step as usize)
                .unwrap_or(&"starting");
            format!(
                "the new process failed at {step}: {}",
                Errno::from_raw(errno).desc()
            )
        }
        _ => "the new process was killed before it could start".to_owned(),
    };
    Error::Restore(text)
}

/// SAFETY: only to be called in the child of a fork; makes only system calls.
unsafe fn execute(orders: &Orders) -> ! {
    let fail = |step: i32| -> ! {
        // SAFETY: as the function's.
        unsafe {
            let errno = *libc::__errno_location();
            let mut report = [0u8; 8];
            report[..4].copy_from_slice(&step.to_ne_bytes());
            report[4..].copy_from_slice(&errno.to_ne_bytes());
            libc::write(orders.report, report.as_ptr().cast(), 8);
            libc::_exit(127)
        }
    };
    // SAFETY: system calls on values and on memory that was prepared before the fork.
    unsafe {
        // All but SIGTRAP: the restorer's breakpoints must not find it blocked, since the
        // kernel then resets its action (force_sig_info_to_task).
        let mask: u64 = !(1 << (libc::SIGTRAP - 1));
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const mask,
            0,
            8,
        );
        for signal in 1..=64 {
            if signal != libc::SIGKILL && signal != libc::SIGSTOP {
                let default = [0u64; 4];
                libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), 0, 8);
            }
        }
        let mut first = 0;
        for &(fd, to) in &orders.descriptors {
            if libc::dup3(fd, to, 0) < 0 {
                fail(0);
            }
            if to > first {
                libc::close_range(
                    first as u32,
                    to as u32 - 1,
                    libc::CLOSE_RANGE_CLOEXEC as i32,
                );
            }
            first = to + 1;
        }
        libc::close_range(first as u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32);
        // Until the tracer has attached.
        let mut byte = 0u8;
        libc::read(orders.go, (&raw mut byte).cast(), 1);
        let argv = [orders.name.as_ptr(), std::ptr::null()];
        let envp = [std::ptr::null::<libc::c_char>()];
        libc::syscall(
            libc::SYS_execveat,
            orders.executable,
            c"".as_ptr(),
            argv.as_ptr(),
            envp.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
        fail(1)
    }
}

fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: the kernel writes two ints.
    let r = unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) };
    Errno::result(r).map_err(|e| Error::Restore(format!("cannot make a pipe: {}", e.desc())))?;
    // SAFETY: the kernel just gave us these descriptors.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

fn duplicate_above(fd: RawFd, lowest: i32) -> Result<OwnedFd> {
    // SAFETY: a call without pointers.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, lowest) };
    let copy = Errno::result(copy).map_err(|e| {
        Error::Restore(format!(
            "cannot place descriptors above {lowest}: {}; raise the limit with ulimit -n",
            e.desc()
        ))
    })?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}
