//! Ways to give a new task a chosen id.
//!
//! 1. `set_tid` of clone3(2): with CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN.
//! 2. Writing the preceding id to `/proc/sys/kernel/ns_last_pid`: with the same capabilities, where clone3 is not
//!    available (docker's seccomp profile) but that file is.
//! 3. Ids are assigned in ascending order, wrapping around from the highest to 300 (`alloc_pid`, kernel/pid.c). So
//!    children that end at once use up all ids before the wanted one: without any privilege. Ids below 300 are
//!    assigned only once in the life of a pid namespace.
//!
//! For another user's image, root does 2 for us, on request.
//!
//! With 2 and 3 another process may get the id just before the task is created. That is detected, and the restore
//! starts again ([`Error::PidMissed`]).

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;

use ckpt_sys::process;
use ckpt_tracer::capabilities::Use;
use ckpt_tracer::features::KernelFeatures;
use ckpt_tracer::proc::status::Status;
use nix::errno::Errno;

use crate::error::{Error, Result};
use crate::objects::plan::PidMethod;

const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";
/// Smaller ids are assigned only once (`RESERVED_PIDS`, kernel/pid.c).
const RESERVED: i32 = 300;
/// Most children for one wanted id, or for all of a job: some 25 µs each, up to four times that on a busy machine.
const PATIENCE: u64 = 500_000;

/// Whether children of our children, created after an exec, may choose ids if we may.
pub(in crate::restore) fn others_may_choose(ours: &Status) -> bool {
    ours.uid.effective == 0
        || Use::ChoosePids
            .row()
            .takes
            .are_in(ours.capabilities.ambient)
}

/// Makes the next task created in our pid namespace get this id.
///
/// # Errors
/// [`Error::PidMissed`] when that is not possible.
pub fn aim(pid_method: PidMethod, wanted: i32) -> Result<()> {
    let done = match pid_method {
        PidMethod::SetTid => true,
        PidMethod::LastPid => match BROKER.get() {
            Some(broker) => ask(broker, wanted).is_ok(),
            None => set_last(wanted).is_ok(),
        },
        PidMethod::UseUp => use_up_ids(wanted),
    };
    done.then_some(()).ok_or(Error::PidMissed { pid: wanted })
}

/// The connection to root, which writes the next id for us ([`serve`]).
static BROKER: OnceLock<UnixStream> = OnceLock::new();

/// From now on another process, which is permitted to, writes the next id.
pub fn ask_there(broker: UnixStream) {
    let _ = BROKER.set(broker);
}

/// Writes the next id whenever the other end requests it, until that is closed. It accepts only a number: this is
/// root, and the other end another user, whose messages must not be decoded (`ckpt_sys::channel`).
pub fn serve(mut stream: UnixStream) {
    let mut wanted = [0; 4];
    while stream.read_exact(&mut wanted).is_ok() {
        let wanted = i32::from_le_bytes(wanted);
        let done = wanted > 1 && set_last(wanted).is_ok();
        if stream.write_all(&[done.into()]).is_err() {
            break;
        }
    }
}

fn ask(mut broker: &UnixStream, wanted: i32) -> io::Result<()> {
    let mut done = [0];
    broker.write_all(&wanted.to_le_bytes())?;
    broker.read_exact(&mut done)?;
    match done {
        [0] => Err(io::ErrorKind::PermissionDenied.into()),
        _ => Ok(()),
    }
}

fn set_last(wanted: i32) -> io::Result<()> {
    fs::write(LAST_PID, (wanted - 1).to_string())
}

/// Number of ids that are used up until tasks with these ids have been created in order; `Err` is the first that
/// cannot be reached, and the last assigned id.
pub fn ids_before(order: &[i32]) -> Result<u64, (i32, i32)> {
    let mut last = last_pid().unwrap_or(i32::MAX);
    let highest = highest();
    let mut all = 0;
    for &wanted in order {
        all += distance(last, wanted, highest).ok_or((wanted, last))?;
        last = wanted;
    }
    Ok(all)
}

/// Whether the next id can be predicted.
pub fn can_be_awaited() -> bool {
    last_pid().is_some()
}

/// Whether that many ids can be used up in acceptable time.
pub fn is_bearable(turns: u64) -> bool {
    turns <= PATIENCE
}

/// If ids can only be awaited, uses up those that are assigned only once: a process created now can get its id again,
/// in this pid namespace and in a new one.
pub fn leave_the_first_ids() {
    let early = last_pid().is_some_and(|last| last <= RESERVED);
    let chosen = || process::may_choose_pids() || may_set_last();
    if early && !chosen() && !KernelFeatures::probe().pid_namespace {
        use_up_ids(RESERVED + ROOM);
    }
}

/// A restore in a new namespace uses some ids before the job's.
const ROOM: i32 = 50;

/// Number of ids between the last assigned one and the wanted one.
fn distance(last: i32, wanted: i32, highest: i32) -> Option<u64> {
    match wanted {
        _ if wanted > last => Some((wanted - last - 1) as u64),
        _ if wanted < RESERVED => None,
        _ => Some((highest.max(last) - last) as u64 + (wanted - RESERVED) as u64),
    }
}

/// The last assigned id in our pid namespace: from that file, or the last word of another one, which exists without
/// CONFIG_CHECKPOINT_RESTORE too.
fn last_pid() -> Option<i32> {
    let number = |path: &str| {
        let text = fs::read_to_string(path).ok()?;
        text.split_whitespace().next_back()?.parse().ok()
    };
    number(LAST_PID).or_else(|| number("/proc/loadavg"))
}

fn highest() -> i32 {
    let text = fs::read_to_string("/proc/sys/kernel/pid_max").ok();
    text.and_then(|text| text.trim().parse().ok())
        .unwrap_or(32768)
}

/// Tries to write the present value.
pub(in crate::restore) fn may_set_last() -> bool {
    BROKER.get().is_some()
        || fs::read_to_string(LAST_PID).is_ok_and(|last| fs::write(LAST_PID, last.trim()).is_ok())
}

fn use_up_ids(wanted: i32) -> bool {
    let Some(mut last) = last_pid() else {
        return false;
    };
    let Some(distance) = distance(last, wanted, highest()) else {
        return false;
    };
    // Other processes use some too.
    let most = distance + distance / 4 + 64;
    if distance > PATIENCE {
        return false;
    }
    for _ in 0..=most {
        if last < wanted && all_taken(last + 1, wanted) {
            return true;
        }
        match process::take_pid() {
            Ok(id) => last = id,
            Err(_) => return false,
        }
    }
    false
}

/// Whether every id of that range is taken, so that the next assigned one is its end.
fn all_taken(from: i32, to: i32) -> bool {
    const NEAR: i32 = 64;
    // A group or session keeps the id of a leader that has gone.
    let free = |id: i32| [id, -id].map(|id| process::kill(id, 0)) == [Err(Errno::ESRCH); 2];
    to - from < NEAR && !(from..to).any(free)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_ids_come_only_once() {
        assert_eq!(distance(10, 11, 32768), Some(0));
        assert_eq!(distance(10, 42, 32768), Some(31));
        assert_eq!(distance(42, 42, 32768), None);
        assert_eq!(distance(4000, 299, 32768), None);
        assert_eq!(distance(4000, 300, 32768), Some(28768));
        assert_eq!(distance(32767, 301, 32768), Some(2));
    }

    #[test]
    fn a_turn_takes_an_id_and_leaves_no_child() {
        let id = process::take_pid().expect("a process can be created");
        assert!(id > 0 && process::kill(id, 0).is_err());
        assert!(last_pid().is_some_and(|last| last > 0));
    }
}
