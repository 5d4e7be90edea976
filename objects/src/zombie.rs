//! A zombie: a process that has ended and is not reaped yet.

use ckpt_tracer::Pid;
use ckpt_tracer::proc::ProcRoot;
use ckpt_tracer::proc::stat::read_stat;
use ckpt_tracer::proc::status::read_status;
use serde::{Deserialize, Serialize};

use crate::bounds;
use crate::error::Result;

/// The record of a zombie.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Zombie {
    /// Its id.
    #[serde(deserialize_with = "bounds::pid")]
    pub pid: i32,
    /// Its parent, which has to reap it.
    #[serde(deserialize_with = "bounds::pid")]
    pub parent: i32,
    /// Process group.
    #[serde(deserialize_with = "bounds::pid")]
    pub group: i32,
    /// Session.
    #[serde(deserialize_with = "bounds::pid")]
    pub session: i32,
    /// Its exit signal, 0 for none: unless it is SIGCHLD, only `__WALL` waits for it.
    #[serde(default = "super::process::sigchld")]
    #[serde(deserialize_with = "bounds::signal")]
    pub exit_signal: i32,
    /// Its wait status, as the kernel encodes it.
    #[serde(deserialize_with = "bounds::status")]
    pub status: i32,
    /// The user and group ids with which it ended, if known.
    #[serde(default)]
    pub ids: Option<(u32, u32)>,
    /// Name.
    #[serde(with = "serde_bytes")]
    pub name: Vec<u8>,
}

/// Captures a zombie from `/proc/PID/stat`.
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
