//! Resource limits of another process: prlimit(2), else `/proc/PID/limits`.

use super::ProcDir;
use super::parse::{dec, fields, lines};
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

/// Names in the file, in the order of the resource's numbers (`lnames` in the kernel's
/// `fs/proc/base.c`).
const NAMES: [&str; 16] = [
    "Max cpu time",
    "Max file size",
    "Max data size",
    "Max stack size",
    "Max core file size",
    "Max resident set",
    "Max processes",
    "Max open files",
    "Max locked memory",
    "Max address space",
    "Max file locks",
    "Max pending signals",
    "Max msgqueue size",
    "Max nice priority",
    "Max realtime priority",
    "Max realtime timeout",
];

/// All limits of a process, in the order of their numbers.
///
/// prlimit(2) requires the caller's ids to equal the target's, or `CAP_SYS_RESOURCE`, which even root may lack; the
/// file is readable wherever the process is visible.
///
/// # Errors
/// See [`ProcDir::read`]; [`crate::Error::ProcSyntax`] when the format is unknown.
pub fn read_limits(pid: Pid) -> Result<Vec<Limit>> {
    let by_call: Option<Vec<Limit>> = (0..NAMES.len() as i32)
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
    parse(&text).map_err(|line| dir.syntax("limits", line))
}

fn prlimit(pid: Pid, resource: i32) -> Option<Limit> {
    let (soft, hard) = ckpt_sys::tasks::limit(pid.raw(), resource).ok()?;
    Some(Limit {
        resource,
        soft,
        hard,
    })
}

fn parse(text: &[u8]) -> Result<Vec<Limit>, &[u8]> {
    let mut limits = Vec::with_capacity(NAMES.len());
    for line in lines(text).skip(1) {
        let known = NAMES
            .iter()
            .enumerate()
            .find_map(|(number, name)| Some((number as i32, line.strip_prefix(name.as_bytes())?)));
        // A resource that a newer kernel adds could not be set by number either.
        let Some((resource, rest)) = known else {
            continue;
        };
        let mut values = fields(rest).map(|value| match value {
            b"unlimited" => Some(RLIM_INFINITY),
            number => dec(number),
        });
        let (Some(Some(soft)), Some(Some(hard))) = (values.next(), values.next()) else {
            return Err(line);
        };
        limits.push(Limit {
            resource,
            soft,
            hard,
        });
    }
    limits.sort_by_key(|limit| limit.resource);
    Ok(limits)
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

    #[test]
    fn the_file_s_columns() {
        let text =
            b"Limit                     Soft Limit           Hard Limit           Units     \n\
            Max open files            1024                 unlimited            files     \n\
            Max cpu time              unlimited            7                    seconds   \n\
            Max nice priority         0                    0                    \n\
            Max of something new      1                    2                    apples    \n";
        let limit = |resource, soft, hard| Limit {
            resource,
            soft,
            hard,
        };
        let expected = [
            limit(0, RLIM_INFINITY, 7),
            limit(7, 1024, RLIM_INFINITY),
            limit(13, 0, 0),
        ];
        assert_eq!(parse(text).unwrap(), expected);
        assert_eq!(
            parse(b"\nMax cpu time  few many\n"),
            Err(&b"Max cpu time  few many"[..])
        );
    }
}
