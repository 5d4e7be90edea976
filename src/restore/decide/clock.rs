//! The job's `CLOCK_MONOTONIC` and `CLOCK_BOOTTIME`, which differ for every boot and machine: in a time namespace
//! they continue from their values at the checkpoint (time_namespaces(7)).

use crate::error::{Error, Obstacle, Result};
use crate::objects::Host;
use crate::objects::clock::{CLOCKS, Clocks, clock, denied};
use crate::restore::probed::Probed;

/// Which clocks the job gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClockPolicy {
    /// Its own if permitted, otherwise the machine's unless they go back.
    #[default]
    Auto,
    /// Its own, which continue from their values at the checkpoint.
    Continue,
    /// The machine's.
    Host,
}

/// Decides; if the clocks are the machine's, `was` is changed accordingly.
///
/// # Errors
/// [`Error::Refused`] if the clocks would go back.
pub(in crate::restore) fn decide(
    policy: ClockPolicy,
    was: &mut Host,
    probed: &Probed,
) -> Result<Clocks> {
    let own = Clocks::GoOn {
        monotonic_ns: was.monotonic_ns,
        boottime_ns: was.boottime_ns,
        monotonic_raw_ns: was.monotonic_raw_ns,
    };
    match policy {
        ClockPolicy::Continue => probed.may_have(own).map(|()| own).map_err(denied),
        ClockPolicy::Auto if probed.may_have(own).is_ok() => Ok(own),
        ClockPolicy::Auto | ClockPolicy::Host => {
            take_the_machines(policy, was).map(|()| Clocks::Ours)
        }
    }
}

fn shown(was: &Host, clock: i32) -> u64 {
    match clock {
        libc::CLOCK_MONOTONIC => was.monotonic_ns,
        _ => was.boottime_ns,
    }
}

fn take_the_machines(policy: ClockPolicy, was: &mut Host) -> Result<()> {
    for (id, name) in CLOCKS {
        let (now, then) = (clock(id), shown(was, id));
        if now < then {
            let remedy = match policy {
                ClockPolicy::Host => "continue the job's clocks, without --clock host",
                _ => "run restore as root, which may make a time namespace for the job",
            };
            return Err(Error::refuse(Obstacle::new(
                format!("the machine's {name} clock"),
                format!(
                    "shows {} s and showed the job {} s at the checkpoint: it would go back, and the job's \
                     timeouts would expire that much later",
                    now / 1_000_000_000,
                    then / 1_000_000_000
                ),
                remedy,
            )));
        }
    }
    was.monotonic_ns = clock(libc::CLOCK_MONOTONIC);
    was.boottime_ns = clock(libc::CLOCK_BOOTTIME);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::fixture;

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
