//! Resource limits of another process: prlimit(2), else `/proc/PID/limits`.

use procfs_core::FromRead;
use procfs_core::process::{LimitValue, Limits};

use super::ProcDir;
use crate::{Pid, Result};

/// No limit; the same in both sources.
pub const RLIM_INFINITY: u64 = u64::MAX;

/// One limit, in the resource's unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// `RLIMIT_*`, 0 to 15.
    pub resource: i32,
    /// Soft limit.
    pub soft: u64,
    /// Hard limit.
    pub hard: u64,
}

/// How many resources there are (`RLIM_NLIMITS`, asm-generic/resource.h).
const RESOURCES: i32 = 16;

/// All limits of a process, in the order of their numbers.
///
/// prlimit(2) requires the caller's ids to equal the target's, or `CAP_SYS_RESOURCE`, which even root may lack; the
/// file is readable wherever the process is visible.
///
/// # Errors
/// See [`ProcDir::read`]; [`crate::Error::ProcSyntax`] when the format is unknown.
pub fn read_limits(pid: Pid) -> Result<Vec<Limit>> {
    let by_call: Option<Vec<Limit>> = (0..RESOURCES)
        .map(|resource| prlimit(pid, resource))
        .collect();
    match by_call {
        Some(limits) => Ok(limits),
        None => read_limits_file(pid),
    }
}

/// The same from `/proc/PID/limits`.
///
/// # Errors
/// As [`read_limits`].
pub fn read_limits_file(process: impl Into<ProcDir>) -> Result<Vec<Limit>> {
    let dir = process.into();
    let text = dir.read("limits")?;
    let limits = Limits::from_read(&text[..]);
    limits
        .map(in_order)
        .map_err(|_| dir.syntax("limits", &text))
}

/// In the order of the resources' numbers.
fn in_order(limits: Limits) -> Vec<Limit> {
    let all = [
        limits.max_cpu_time,
        limits.max_file_size,
        limits.max_data_size,
        limits.max_stack_size,
        limits.max_core_file_size,
        limits.max_resident_set,
        limits.max_processes,
        limits.max_open_files,
        limits.max_locked_memory,
        limits.max_address_space,
        limits.max_file_locks,
        limits.max_pending_signals,
        limits.max_msgqueue_size,
        limits.max_nice_priority,
        limits.max_realtime_priority,
        limits.max_realtime_timeout,
    ];
    let value = |limit| match limit {
        LimitValue::Unlimited => RLIM_INFINITY,
        LimitValue::Value(value) => value,
    };
    let limits = all.into_iter().enumerate();
    let limits = limits.map(|(resource, limit)| Limit {
        resource: resource as i32,
        soft: value(limit.soft_limit),
        hard: value(limit.hard_limit),
    });
    limits.collect()
}

fn prlimit(pid: Pid, resource: i32) -> Option<Limit> {
    let (soft, hard) = ckpt_sys::tasks::limit(pid.raw(), resource).ok()?;
    Some(Limit {
        resource,
        soft,
        hard,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sources_agree() {
        let own = Pid::own();
        let by_call = read_limits(own).unwrap();
        assert_eq!(by_call.len(), 16);
        assert_eq!(by_call, read_limits_file(own).unwrap());
        assert_eq!(by_call[7].resource, libc::RLIMIT_NOFILE as i32);
        assert!(by_call[7].soft > 2);
    }
}
