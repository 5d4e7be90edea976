//! Credentials of the peer of a socket (`SO_PEERCRED`), and of the sender of a message.
//!
//! The kernel records the process that makes a pair, listens, or connects, and this cannot be overridden
//! (`init_peercred` in net/unix/af_unix.c). So the recorded process makes the call: the root itself, or an envoy with
//! that pid ([`Builder::envoy`]), if the process does not exist yet or any more.

use ckpt_sys::sockets;
use ckpt_tracer::capabilities::Use;
use serde::{Deserialize, Serialize};

use crate::Snapshot;
use crate::bounds;
use crate::credentials::Credentials;
use crate::files::FdEntry;
use crate::index::DescriptionId;
use crate::plan::Builder;

/// `struct ucred`: the credentials of a sending process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ucred {
    /// Process id.
    #[serde(deserialize_with = "bounds::pid")]
    pub pid: i32,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

impl From<ckpt_sys::control::Credentials> for Ucred {
    fn from(of: ckpt_sys::control::Credentials) -> Self {
        let ckpt_sys::control::Credentials { pid, uid, gid } = of;
        Self { pid, uid, gid }
    }
}

impl Ucred {
    /// From a socket; `None` where the kernel has none, or none that can be shown here.
    pub fn of_peer(socket: &impl std::os::fd::AsFd) -> Option<Self> {
        let peer = sockets::peer_credentials(socket).ok()?;
        (peer.pid > 0).then_some(peer.into())
    }

    /// A process that holds a description, the best guess for its creator.
    pub fn holder(description: DescriptionId, snapshot: &Snapshot) -> Option<Self> {
        let has = |entry: &FdEntry| entry.description == description;
        let process = snapshot.processes.iter().find(|p| p.fds.iter().any(has))?;
        let credentials = &process.threads.first()?.credentials;
        Some(Self {
            pid: process.pid,
            uid: credentials.uid[1],
            gid: credentials.gid[1],
        })
    }
}

/// The process under whose credentials calls are made.
pub(super) struct Names {
    /// Pid of the root.
    pub(super) root: i32,
}

impl Names {
    /// Makes the call `act` under the credentials `who`; `what` describes it for messages. Without `who` any
    /// credentials will do.
    pub(super) fn act(
        &self,
        who: Option<Ucred>,
        what: &str,
        plan: &mut Builder,
        act: impl Fn(Option<Ucred>, &mut Builder),
    ) {
        let Some(mut who) = who else {
            return act(None, plan);
        };
        let now = plan.host().credentials.clone();
        let permitted = may_be(who, plan);
        let others = who.uid != now.uid[1] || who.gid != now.gid[1];
        if others && !permitted {
            plan.warn(format!(
                "{what} shows uid {} now and not uid {}, which only root can set",
                now.uid[1], who.uid
            ));
            (who.uid, who.gid) = (now.uid[1], now.gid[1]);
        }
        let change = others && permitted;
        if who.pid == self.root {
            if change {
                become_other(who, &now, plan);
            }
            act(Some(who), plan);
            if change {
                become_self(&now, plan);
            }
            return;
        }
        let warning = format!(
            "{what} shows pid {} now and not pid {}, which another process has",
            self.root, who.pid
        );
        let as_other = |plan: &mut Builder| {
            if change {
                become_other(who, &now, plan);
            }
            act(Some(who), plan);
        };
        let root = Ucred {
            pid: self.root,
            uid: now.uid[1],
            gid: now.gid[1],
        };
        plan.envoy(who.pid, &warning, as_other, |plan| act(Some(root), plan));
    }
}

/// Whether the new process may take those ids.
fn may_be(who: Ucred, plan: &Builder) -> bool {
    let (now, held) = (&plan.host().credentials, plan.host().held);
    let may = |of, ids: &[u32; 4], id: u32| held.allows(of) || ids[..3].contains(&id);
    may(Use::SetUser, &now.uid, who.uid) && may(Use::SetGroups, &now.gid, who.gid)
}

const KEEP: u64 = u32::MAX as u64;

/// Takes the effective ids, but keeps the file system ids.
fn become_other(who: Ucred, now: &Credentials, plan: &mut Builder) {
    let object = || "the ids of a unix socket's peer".to_owned();
    let (uid, gid) = (u64::from(who.uid), u64::from(who.gid));
    plan.syscall(libc::SYS_setresgid, &[KEEP, gid, KEEP], object);
    plan.syscall(libc::SYS_setfsgid, &[now.gid[3].into()], object);
    plan.syscall(libc::SYS_setresuid, &[KEEP, uid, KEEP], object);
    plan.syscall(libc::SYS_setfsuid, &[now.uid[3].into()], object);
}

fn become_self(now: &Credentials, plan: &mut Builder) {
    let object = || "the ids of a unix socket's peer".to_owned();
    let (uid, gid) = (u64::from(now.uid[1]), u64::from(now.gid[1]));
    plan.syscall(libc::SYS_setresuid, &[KEEP, uid, KEEP], object);
    plan.syscall(libc::SYS_setresgid, &[KEEP, gid, KEEP], object);
    plan.syscall(libc::SYS_setfsgid, &[now.gid[3].into()], object);
    plan.syscall(libc::SYS_setfsuid, &[now.uid[3].into()], object);
}
