//! Seccomp filters: those of the job are stored and installed again, those of its surroundings
//! ([`surroundings`]) are where it is restored, or are not.

use ckpt_tracer::Result;
use ckpt_tracer::proc::status::Status;
use ckpt_tracer::task::Stopped;
use serde::{Deserialize, Serialize};

use crate::restore::plan::Builder;

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
    pub mode: u32,
    /// With mode 2.
    pub filters: Vec<Filter>,
    /// How many filters of the surroundings it was under, which are not stored. Never with
    /// filters of its own: who may read those reads all.
    #[serde(default)]
    pub around: u32,
}

/// The filters of a task. Reading them needs CAP_SYS_ADMIN; without it those that a task has are
/// those of the surroundings, as the preflight has made sure.
pub fn capture(task: &Stopped, status: &Status) -> Result<Seccomp> {
    let mode = status.seccomp.unwrap_or(0);
    if mode != 2 || !surroundings::may_suspend() {
        let around = match mode {
            2 => status.seccomp_filters.unwrap_or(0),
            _ => 0,
        };
        return Ok(Seccomp {
            mode: if mode == 2 { 0 } else { mode },
            filters: Vec::new(),
            around,
        });
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

/// `SECCOMP_SET_MODE_FILTER`.
const SET_MODE_FILTER: u64 = 1;

impl Seccomp {
    /// Installs the filters. They are not in force while the tracer suspends them.
    pub fn rebuild(&self, plan: &mut Builder) {
        for filter in &self.filters {
            let object = || "seccomp filter".to_owned();
            let program = plan.data(&filter.program);
            let mut fprog = [0u8; 16];
            let len = (filter.program.len() / 8) as u16;
            fprog[..2].copy_from_slice(&len.to_le_bytes());
            fprog[8..].copy_from_slice(&program.to_le_bytes());
            let at = plan.data(&fprog);
            // Not NEW_LISTENER and TSYNC: no listener exists here, each thread sets its own.
            let flags = filter.flags & !(1 | 8 | 16);
            plan.syscall(libc::SYS_seccomp, &[SET_MODE_FILTER, flags, at], object);
        }
    }
}
