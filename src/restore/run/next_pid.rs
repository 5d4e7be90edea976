//! How a new task comes by a chosen id, and which ways there are for us.
//!
//! 1. clone3(2) is told the id (`set_tid`): with CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN.
//! 2. The kernel is told which id it gave last (`/proc/sys/kernel/ns_last_pid`), and gives the next: with
//!    the same capabilities, where clone3 is withheld (docker's seccomp profile) but that file
//!    is not.
//! 3. Ids are given in ascending order, and begin again at 300 behind the highest
//!    (`alloc_pid`, kernel/pid.c). So children that end at once take all ids up to the wanted one: without
//!    any privilege. Ids below 300 come only once in the life of a pid namespace.
//!
//! For an image of another user's, root does 2 for us, on request.
//!
//! With 2 and 3 somebody else may be given the id in the moment before the task is created. That is
//! seen, and the restore is begun anew ([`Error::PidMissed`]).

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
use crate::objects::plan::Means;

const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";
/// Below, the kernel gives ids only once (`RESERVED_PIDS`, kernel/pid.c).
const RESERVED: i32 = 300;
/// Children for one wanted id, or for all of a job: some 25 µs each, up to four times that on a busy
/// machine.
const PATIENCE: u64 = 500_000;

/// Whether children of our children, which were executed by them, may choose ids if we may.
pub(in crate::restore) fn others_may_choose(ours: &Status) -> bool {
    ours.uid.effective == 0
        || Use::ChoosePids
            .row()
            .takes
            .are_in(ours.capabilities.ambient)
}

/// Sees to it that the next task that is created in our pid namespace gets this id.
///
/// # Errors
/// [`Error::PidMissed`] when it cannot be brought about.
pub fn aim(means: Means, wanted: i32) -> Result<()> {
    let done = match means {
        Means::SetTid => true,
        Means::LastPid => match BROKER.get() {
            Some(broker) => ask(broker, wanted).is_ok(),
            None => set_last(wanted).is_ok(),
        },
        Means::Turns => take_turns(wanted),
    };
    done.then_some(()).ok_or(Error::PidMissed { pid: wanted })
}

/// Where root tells the kernel for us which id comes next ([`serve`]).
static BROKER: OnceLock<UnixStream> = OnceLock::new();

/// From now on another process is asked which may tell the kernel.
pub fn ask_there(broker: UnixStream) {
    let _ = BROKER.set(broker);
}

/// Tells the kernel which id it shall give next, whenever the other end asks for it, until that is closed. A number
/// is all that it takes: this is root, and the other end another user, whose messages are not to be decoded
/// (`ckpt_sys::channel`).
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

/// How many ids are taken in vain until tasks with these ids have been created one after the other;
/// `Err` is the first that cannot be reached at all, and the last id that was given.
pub fn turns(order: &[i32]) -> Result<u64, (i32, i32)> {
    let mut last = last_pid().unwrap_or(i32::MAX);
    let highest = highest();
    let mut all = 0;
    for &wanted in order {
        all += distance(last, wanted, highest).ok_or((wanted, last))?;
        last = wanted;
    }
    Ok(all)
}

/// Whether it can be told which id comes next.
pub fn can_be_awaited() -> bool {
    last_pid().is_some()
}

/// Whether so many turns can be waited for.
pub fn is_bearable(turns: u64) -> bool {
    turns <= PATIENCE
}

/// Where ids can only be awaited, takes those that come only once: whoever is created now can have its
/// id again, in this pid namespace and in a new one.
pub fn leave_the_first_ids() {
    let early = last_pid().is_some_and(|last| last <= RESERVED);
    let chosen = || process::may_choose_pids() || may_set_last();
    if early && !chosen() && !KernelFeatures::probe().pid_namespace {
        take_turns(RESERVED + ROOM);
    }
}

/// A restore in a new namespace takes some ids before the job's.
const ROOM: i32 = 50;

/// Ids between the last one that was given and the wanted one.
fn distance(last: i32, wanted: i32, highest: i32) -> Option<u64> {
    match wanted {
        _ if wanted > last => Some((wanted - last - 1) as u64),
        _ if wanted < RESERVED => None,
        _ => Some((highest.max(last) - last) as u64 + (wanted - RESERVED) as u64),
    }
}

/// The id that was given last in our pid namespace: that file, and the last word of another one, which
/// is there without CONFIG_CHECKPOINT_RESTORE too.
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

/// Tried with what is there already.
pub(in crate::restore) fn may_set_last() -> bool {
    BROKER.get().is_some()
        || fs::read_to_string(LAST_PID).is_ok_and(|last| fs::write(LAST_PID, last.trim()).is_ok())
}

fn take_turns(wanted: i32) -> bool {
    let Some(mut last) = last_pid() else {
        return false;
    };
    let Some(distance) = distance(last, wanted, highest()) else {
        return false;
    };
    // Others take some, too.
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

/// Whether somebody has every id of that range, so that the next one given is its end.
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
