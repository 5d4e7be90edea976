//! The job's `CLOCK_MONOTONIC` and `CLOCK_BOOTTIME`, which no two boots and no two machines have in
//! common: a time namespace lets them go on from where they stood (time_namespaces(7)).
#![allow(unsafe_code)]

use std::fmt::Write;

use ckpt_tracer::Pid;
use ckpt_tracer::proc::tasks::timens_offsets;
use nix::errno::Errno;

use crate::error::{Error, Obstacle, Result};
use crate::host;
use crate::objects::Host;

/// Which clocks the job gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClockPolicy {
    /// Its own where that is permitted, else the machine's unless they go back.
    #[default]
    Auto,
    /// Its own, which go on from where they stood at the checkpoint.
    Continue,
    /// The machine's.
    Host,
}

/// Clocks that a time namespace shifts: what `/proc/PID/timens_offsets` calls them.
const CLOCKS: [(i32, &str); 2] = [
    (libc::CLOCK_MONOTONIC, "monotonic"),
    (libc::CLOCK_BOOTTIME, "boottime"),
];

/// Puts the processes that we create from now on into a time namespace where their clocks go on, or
/// takes note in `was` that they are the machine's.
///
/// # Errors
/// [`Error::Refused`] when the clocks would go back.
pub fn enter(policy: ClockPolicy, was: &mut Host) -> Result<()> {
    match policy {
        ClockPolicy::Continue => go_on(was).map_err(denied),
        ClockPolicy::Auto if go_on(was).is_ok() => Ok(()),
        ClockPolicy::Auto | ClockPolicy::Host => take_the_machines(policy, was),
    }
}

/// As [`enter`], without a namespace being made: the one that there would be is taken for granted.
pub fn foresee(policy: ClockPolicy, was: &mut Host) -> Result<()> {
    match policy {
        ClockPolicy::Host => take_the_machines(policy, was),
        ClockPolicy::Auto | ClockPolicy::Continue => Ok(()),
    }
}

/// What a clock of a process shows, in nanoseconds, while ours shows `ours`.
pub fn as_seen_by(pid: Pid, clock: i32, ours: u64) -> u64 {
    let me = Pid(std::process::id() as i32);
    let shift = offset(pid, clock) - offset(me, clock);
    (i128::from(ours) + shift).max(0) as u64
}

/// By how much the namespace of a process shifts a clock, in nanoseconds.
fn offset(pid: Pid, clock: i32) -> i128 {
    let name = CLOCKS.iter().find(|(id, _)| *id == clock).map(|(_, n)| *n);
    let offsets = timens_offsets(pid).unwrap_or_default();
    let found = offsets.iter().find(|o| Some(o.clock.as_str()) == name);
    found.map_or(0, |o| {
        i128::from(o.seconds) * 1_000_000_000 + i128::from(o.nanoseconds)
    })
}

fn shown(was: &Host, clock: i32) -> u64 {
    match clock {
        libc::CLOCK_MONOTONIC => was.monotonic_ns,
        _ => was.boottime_ns,
    }
}

/// A new time namespace for our children.
fn go_on(was: &Host) -> Result<(), Errno> {
    let me = Pid(std::process::id() as i32);
    // SAFETY: a call without pointers; it concerns the processes that we create from now on.
    Errno::result(unsafe { libc::unshare(libc::CLONE_NEWTIME) })?;
    let mut text = String::new();
    for (clock, name) in CLOCKS {
        let now = i128::from(host::clock(clock));
        let shift = offset(me, clock) + i128::from(shown(was, clock)) - now;
        let (seconds, rest) = (
            shift.div_euclid(1_000_000_000),
            shift.rem_euclid(1_000_000_000),
        );
        let _ = writeln!(text, "{name} {seconds} {rest}");
    }
    let written = std::fs::write("/proc/self/timens_offsets", text);
    written.map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))
}

fn denied(errno: Errno) -> Error {
    Error::refuse(Obstacle::new(
        "the time namespace in which the job's clocks go on",
        format!("cannot be made: {}", errno.desc()),
        "run restore as root, or take the machine's clocks: --clock host",
    ))
}

fn take_the_machines(policy: ClockPolicy, was: &mut Host) -> Result<()> {
    for (clock, name) in CLOCKS {
        let (now, then) = (host::clock(clock), shown(was, clock));
        if now < then {
            let remedy = match policy {
                ClockPolicy::Host => "let the job's clocks go on, without --clock host",
                _ => "run restore as root, which may make a time namespace for the job",
            };
            return Err(Error::refuse(Obstacle::new(
                format!("the machine's {name} clock"),
                format!(
                    "shows {} s and showed the job {} s at the checkpoint: it would go back, and \
                     what the job waits for would come so much later",
                    now / 1_000_000_000,
                    then / 1_000_000_000
                ),
                remedy,
            )));
        }
    }
    was.monotonic_ns = host::clock(libc::CLOCK_MONOTONIC);
    was.boottime_ns = host::clock(libc::CLOCK_BOOTTIME);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspect::fixture;

    #[test]
    fn the_machines_clocks_may_not_go_back() {
        let mut was = fixture::snapshot().host;
        take_the_machines(ClockPolicy::Host, &mut was).expect("they began at 0");
        assert!(was.monotonic_ns > 0 && was.boottime_ns > 0);
        was.boottime_ns += 1_000_000_000_000;
        let error = take_the_machines(ClockPolicy::Auto, &mut was).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("boottime") && text.contains("as root"),
            "{text}"
        );
    }
}
