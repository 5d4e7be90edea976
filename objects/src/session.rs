//! State inherited from the login: the nice value of the autogroup (sched(7)) and the audit login uid. Neither
//! belongs to a session alone: an autogroup is created with a session and never left, the uid belongs to a task and
//! is inherited.

use std::io::ErrorKind;
use std::time::Duration;

use ckpt_tracer::Pid;
use ckpt_tracer::capabilities::Use;
use ckpt_tracer::proc::ProcDir;

use super::process::Process;
use crate::plan::Builder;

/// `/proc/PID/autogroup`: `/autogroup-25 nice 0`.
pub fn autogroup_nice(dir: &ProcDir) -> Option<i32> {
    let text = std::fs::read_to_string(dir.join("autogroup")).ok()?;
    text.trim().rsplit(' ').next()?.parse().ok()
}

/// `/proc/PID/loginuid`.
pub fn login_uid(dir: &ProcDir) -> Option<u32> {
    let text = std::fs::read_to_string(dir.join("loginuid")).ok()?;
    text.trim().parse().ok()
}

/// Sets the nice value of the autogroup of a session of the job; the autogroup of another session is left alone, with
/// a warning.
pub fn rebuild_autogroup(process: &Process, pid: Pid) -> Option<String> {
    let wanted = process.autogroup_nice?;
    let now = || autogroup_nice(&pid.into());
    if now()? == wanted {
        return None;
    }
    if process.session == process.pid {
        set_autogroup_nice(pid, wanted);
    }
    let now = now()?;
    (now != wanted).then(|| {
        format!(
            "the autogroup of process {pid} had the nice value {wanted} and has {now} now: it is that of a \
             session outside the job, or you may not set the old one"
        )
    })
}

/// Sets it, as far as permitted. Without CAP_SYS_ADMIN the kernel permits one change in 100 ms, by any process, and fails the
/// others with EAGAIN (`proc_sched_autogroup_set_nice`, kernel/sched/autogroup.c).
fn set_autogroup_nice(pid: Pid, nice: i32) {
    /// Other processes may be first as often.
    const ATTEMPTS: u32 = 100;
    const PAUSE: Duration = Duration::from_millis(20);
    for _ in 0..ATTEMPTS {
        match std::fs::write(format!("/proc/{pid}/autogroup"), nice.to_string()) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(PAUSE),
            _ => return,
        }
    }
}

/// Sets the audit login uid, as far as permitted; the result is checked afterwards.
pub fn rebuild_login_uid(process: &Process, plan: &mut Builder) {
    let (Some(wanted), Some(ours)) = (process.login_uid, plan.host().login_uid) else {
        return;
    };
    if wanted == ours {
        return;
    }
    let object = || "the audit login uid".to_owned();
    let path = plan.data(b"/proc/thread-self/loginuid\0");
    let text = wanted.to_string();
    let at = plan.data(text.as_bytes());
    let flags = (libc::O_WRONLY | libc::O_CLOEXEC) as u64;
    let set = |plan: &mut Builder| {
        let open = [libc::AT_FDCWD as u64, path, flags, 0];
        plan.attempt(libc::SYS_openat, &open, object);
        let write = [0, at, text.len() as u64];
        plan.attempt_with_answer(libc::SYS_write, (0, &write), object);
        plan.attempt_with_answer(libc::SYS_close, (1, &[0]), object);
    };
    // The file is that of the new process, which is still ours, not the job's user's.
    match plan.host().rights.clone() {
        Some(rights) => rights.as_ourselves(false, plan, set),
        None => set(plan),
    }
}

/// The warning for a process whose audit login uid differs.
pub fn other_login_uid(process: &Process, pid: Pid) -> Option<String> {
    let name = |uid: u32| match uid {
        u32::MAX => "unset".to_owned(),
        uid => uid.to_string(),
    };
    let (was, is) = (process.login_uid?, login_uid(&pid.into())?);
    (was != is).then(|| {
        format!(
            "the audit login uid of process {pid} was {} and is {} now; it may need {}",
            name(was),
            name(is),
            Use::LoginUid
        )
    })
}
