//! A process that has ended, and whose parent has not waited for it yet.

use ckpt_tracer::Pid;
use ckpt_tracer::proc::ProcRoot;
use ckpt_tracer::proc::stat::read_stat;
use ckpt_tracer::proc::status::read_status;
use serde::{Deserialize, Serialize};

use crate::bounds;
use crate::error::Result;

/// What is left of a process that has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Zombie {
    /// Its id.
    #[serde(deserialize_with = "bounds::pid")]
    pub pid: i32,
    /// Its parent, which is to wait for it.
    #[serde(deserialize_with = "bounds::pid")]
    pub parent: i32,
    /// Process group.
    #[serde(deserialize_with = "bounds::pid")]
    pub group: i32,
    /// Session.
    #[serde(deserialize_with = "bounds::pid")]
    pub session: i32,
    /// The signal that told its parent of its end, 0 for none: only `__WALL` waits for it if that is
    /// not SIGCHLD.
    #[serde(default = "super::process::sigchld")]
    #[serde(deserialize_with = "bounds::signal")]
    pub exit_signal: i32,
    /// What wait(2) will tell, as the kernel encodes it.
    #[serde(deserialize_with = "bounds::status")]
    pub status: i32,
    /// The user and group ids that it ended with, where the kernel tells.
    #[serde(default)]
    pub ids: Option<(u32, u32)>,
    /// Name.
    #[serde(with = "serde_bytes")]
    pub name: Vec<u8>,
}

/// Captures what is left; everything is in `/proc/PID/stat`.
pub fn capture(pid: Pid) -> Result<Zombie> {
    let dir = ProcRoot::default().process(pid);
    let stat = read_stat(dir.clone())?;
    let status = read_status(dir).ok();
    Ok(Zombie {
        pid: pid.raw(),
        parent: stat.ppid.raw(),
        group: stat.pgrp,
        session: stat.session,
        exit_signal: stat.exit_signal,
        status: stat.exit_code,
        ids: status.map(|s| (s.uid.real, s.gid.real)),
        name: stat.comm.0.clone(),
    })
}
