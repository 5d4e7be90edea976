//! Seccomp: strict mode and filters. Filters of the job are stored and installed again; those of its environment
//! ([`surroundings`]) exist where it is restored, or do not.
//!
//! A filter is a kernel object that a thread inherits from its creator. Whether two threads share it matters when one
//! of them synchronizes all others (`SECCOMP_FILTER_FLAG_TSYNC`): the kernel refuses unless each of their filters is
//! one of its own. So the filters that a thread shares with the first one are installed by the first one before it
//! creates the thread. All are traced from the beginning, with seccomp suspended.

use std::ops::Range;

use ckpt_tracer::Result;
use ckpt_tracer::proc::status::Status;
use ckpt_tracer::task::Stopped;
use serde::{Deserialize, Serialize};

use super::process::Process;
use crate::bounds;
use crate::plan::Builder;

pub mod surroundings;

/// One installed filter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// The classic BPF program, 8 bytes an instruction.
    #[serde(with = "serde_bytes")]
    pub program: Vec<u8>,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub flags: u64,
}

/// A task's seccomp state, oldest filter first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seccomp {
    /// 0 off, 1 strict, 2 filters.
    #[serde(deserialize_with = "bounds::choice")]
    pub mode: u32,
    /// In mode 2.
    pub filters: Vec<Filter>,
    /// Number of inherited filters of the environment, which are not stored; only without filters of its own, since
    /// permission to read filters covers all.
    #[serde(default)]
    pub around: u32,
}

/// The filters of a task. Reading them needs CAP_SYS_ADMIN; without it the preflight has ensured that the task has
/// only the environment's.
pub fn capture(task: &Stopped, status: &Status) -> Result<Seccomp> {
    let mode = status.seccomp.unwrap_or(0);
    if mode != 2 || !surroundings::may_suspend() {
        return Ok(Seccomp::seen(status));
    }
    let filters = task.seccomp_filters()?;
    let filters = filters
        .into_iter()
        .map(|(program, flags)| Filter { program, flags })
        .collect();
    Ok(Seccomp {
        mode,
        filters,
        around: 0,
    })
}

impl Seccomp {
    /// From the task's status, if filters cannot be read: then they are those of the environment.
    pub fn seen(status: &Status) -> Self {
        let mode = status.seccomp.unwrap_or(0);
        let filters = status.seccomp_filters.unwrap_or(0);
        Self {
            mode: if mode == 2 { 0 } else { mode },
            filters: Vec::new(),
            around: if mode == 2 { filters } else { 0 },
        }
    }
}

/// `SECCOMP_SET_MODE_FILTER`.
const SET_MODE_FILTER: u64 = 1;
/// `SECCOMP_FILTER_FLAG_SPEC_ALLOW`: speculation is a switch of the thread.
const SPEC_ALLOW: u64 = 4;
/// `SECCOMP_FILTER_FLAG_LOG`, the only flag that a filter keeps.
const LOG: u64 = 2;
/// `BPF_RET | BPF_K` (linux/bpf_common.h).
const RETURN_CONSTANT: u16 = 0x06;
/// `SECCOMP_RET_USER_NOTIF`, and the mask of an action.
const USER_NOTIF: u32 = 0x7fc0_0000;
const ACTION: u32 = 0xffff_0000;

impl Filter {
    /// Whether it passes calls to a listener, which cannot be restored. An action computed by the program is not
    /// detected.
    pub fn notifies(&self) -> bool {
        self.program.chunks_exact(8).any(|instruction| {
            let code = u16::from_le_bytes([instruction[0], instruction[1]]);
            let operand = instruction[4..8].first_chunk().copied();
            let operand = operand.map_or(0, u32::from_le_bytes);
            code == RETURN_CONSTANT && operand & ACTION == USER_NOTIF
        })
    }
}

impl Seccomp {
    /// Whether it restricts anything.
    pub fn is_on(&self) -> bool {
        self.mode != 0
    }

    /// Number of filters, from the oldest on, that both have.
    pub fn in_common(&self, other: &Seccomp) -> usize {
        let pairs = self.filters.iter().zip(&other.filters);
        pairs.take_while(|(mine, its)| mine == its).count()
    }

    /// Enters strict mode; afterwards only calls under suspended seccomp are possible.
    pub fn rebuild_strict(&self, plan: &mut Builder) {
        const STRICT: u64 = 1;
        if self.mode == 1 {
            let args = [libc::PR_SET_SECCOMP as u64, STRICT];
            plan.syscall(libc::SYS_prctl, &args, || "strict seccomp".into());
        }
    }

    /// Installs some of the filters. They are inactive while the tracer suspends them.
    pub fn install(&self, which: Range<usize>, plan: &mut Builder) {
        for filter in &self.filters[which] {
            let object = || "seccomp filter".to_owned();
            let program = plan.data(&filter.program);
            let mut fprog = [0u8; 16];
            let len = (filter.program.len() / 8) as u16;
            fprog[..2].copy_from_slice(&len.to_le_bytes());
            fprog[8..].copy_from_slice(&program.to_le_bytes());
            let at = plan.data(&fprog);
            let flags = filter.flags & LOG | SPEC_ALLOW;
            plan.syscall(libc::SYS_seccomp, &[SET_MODE_FILTER, flags, at], object);
        }
    }
}

/// The warning for filters that threads shared with each other but not with the first one: each thread gets its own.
pub fn separated(process: &Process) -> Option<String> {
    let first = &process.threads[0].seccomp;
    let others: Vec<&Seccomp> = process.threads[1..].iter().map(|t| &t.seccomp).collect();
    let mut beyond: Vec<&[Filter]> = others
        .iter()
        .map(|other| &other.filters[first.in_common(other)..])
        .filter(|filters| !filters.is_empty())
        .collect();
    beyond.sort_by(|a, b| a[0].program.cmp(&b[0].program));
    let twice = beyond.windows(2).any(|pair| pair[0][0] == pair[1][0]);
    twice.then(|| {
        format!(
            "threads of process {} shared a seccomp filter that its first thread did not have, and now have \
             one each: SECCOMP_FILTER_FLAG_TSYNC fails in them",
            process.pid
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture;

    fn filter(action: u32) -> Filter {
        let mut program = vec![0x06, 0, 0, 0];
        program.extend_from_slice(&action.to_le_bytes());
        Filter { program, flags: 0 }
    }

    fn of(actions: &[u32]) -> Seccomp {
        Seccomp {
            mode: 2,
            filters: actions.iter().map(|action| filter(*action)).collect(),
            around: 0,
        }
    }

    #[test]
    fn a_listener_is_seen() {
        assert!(filter(0x7fc0_0000).notifies());
        assert!(filter(0x7fc0_0001).notifies());
        assert!(!filter(0x7fff_0000).notifies());
    }

    #[test]
    fn what_threads_have_in_common() {
        assert_eq!(of(&[1, 2, 3]).in_common(&of(&[1, 2, 4])), 2);
        assert_eq!(of(&[1]).in_common(&of(&[1, 2])), 1);
        assert_eq!(of(&[2]).in_common(&of(&[1, 2])), 0);
    }

    #[test]
    fn filters_that_come_apart_are_told() {
        let mut process = fixture::snapshot().processes.remove(0);
        let another = process.threads[1].clone();
        process.threads.push(another);
        let mut told = |filters: [&[u32]; 3]| {
            for (thread, filters) in process.threads.iter_mut().zip(filters) {
                thread.seccomp = of(filters);
            }
            separated(&process).is_some()
        };
        assert!(!told([&[1, 2], &[1], &[1, 2]]));
        assert!(!told([&[1], &[1, 2], &[1, 3]]));
        assert!(told([&[1], &[1, 2], &[1, 2, 3]]));
    }
}
