//! Who a task is: ids, groups, capabilities. Threads have their own each.

use ckpt_tracer::proc::status::{Ids, Status};
use serde::{Deserialize, Serialize};

use super::Snapshot;
use super::process::Process;
use crate::error::Obstacle;
use crate::restore::plan::Builder;

/// A task's credentials (credentials(7), capabilities(7)).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Real, effective, saved, file system.
    pub uid: [u32; 4],
    /// Real, effective, saved, file system.
    pub gid: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Inheritable capabilities.
    pub inheritable: u64,
    /// Permitted capabilities.
    pub permitted: u64,
    /// Effective capabilities.
    pub effective: u64,
    /// Bounding set.
    pub bounding: u64,
    /// Ambient set.
    pub ambient: u64,
    /// `PR_GET_SECUREBITS`.
    pub securebits: u32,
    /// `PR_GET_NO_NEW_PRIVS`.
    pub no_new_privs: bool,
}

/// Whether setgroups(2) is permitted: it is not in user namespaces that an ordinary user has made alone.
pub fn groups_can_be_set() -> bool {
    let setting = std::fs::read_to_string("/proc/self/setgroups").unwrap_or_default();
    setting.trim() != "deny"
}

/// Groups that a job has and that nobody can give it; `outside` are ours outside of the job's user
/// namespace.
pub fn obstacles(snapshot: &Snapshot, now: &Credentials, outside: &[u32]) -> Vec<Obstacle> {
    if groups_can_be_set() {
        return foreign_groups(snapshot, outside);
    }
    let lacks = |p: &&Process| p.threads.iter().any(|t| t.credentials.groups != now.groups);
    let processes = snapshot.processes.iter().filter(lacks);
    let obstacle = |p: &Process| {
        Obstacle::new(
            format!("process {}", p.pid),
            "has other supplementary groups than you have, and groups cannot be set in a user namespace",
            "restore it as root, or as a member of exactly its groups",
        )
    };
    processes.map(obstacle).collect()
}

/// Groups that came into the job's user namespace from outside, and that lead nowhere inside: only
/// whoever has exactly these can make such a namespace again.
fn foreign_groups(snapshot: &Snapshot, outside: &[u32]) -> Vec<Obstacle> {
    let user = snapshot.namespaces.user.as_ref();
    let Some(user) = user.filter(|u| !u.inherited_groups.is_empty()) else {
        return Vec::new();
    };
    let inherited = user.groups_inside(&user.inherited_groups);
    let has = |p: &&Process| p.threads.iter().any(|t| t.credentials.groups == inherited);
    let processes = snapshot.processes.iter().filter(has);
    let processes = processes.filter(|_| outside != user.inherited_groups);
    let obstacle = |p: &Process| {
        Obstacle::new(
            format!("process {}", p.pid),
            format!(
                "has supplementary groups from outside its user namespace, {:?}, and yours are {outside:?}",
                user.inherited_groups
            ),
            "restore it as root, or as a member of exactly its groups",
        )
    };
    processes.map(obstacle).collect()
}

impl Credentials {
    /// From a task's status; the securebits are asked from inside.
    pub fn of(status: &Status, securebits: u32) -> Self {
        let ids = |i: &Ids| [i.real, i.effective, i.saved, i.fs];
        Self {
            uid: ids(&status.uid),
            gid: ids(&status.gid),
            groups: status.groups.clone(),
            inheritable: status.capabilities.inheritable,
            permitted: status.capabilities.permitted,
            effective: status.capabilities.effective,
            bounding: status.capabilities.bounding,
            ambient: status.capabilities.ambient,
            securebits,
            no_new_privs: status.no_new_privs,
        }
    }

    /// What differs from what a process started by us has now is set, in an order in which
    /// each step is still permitted: groups, bounding set, ids with capabilities kept, then the
    /// capability sets themselves, securebits last.
    pub fn rebuild(&self, now: &Credentials, plan: &mut Builder) {
        let object = || "credentials".to_owned();
        if self.groups != now.groups {
            let bytes: Vec<u8> = self.groups.iter().flat_map(|g| g.to_le_bytes()).collect();
            let at = plan.data(&bytes);
            plan.syscall(libc::SYS_setgroups, &[self.groups.len() as u64, at], object);
        }
        for cap in 0..64 {
            let bit = 1 << cap;
            if now.bounding & bit != 0 && self.bounding & bit == 0 {
                plan.syscall(
                    libc::SYS_prctl,
                    &[libc::PR_CAPBSET_DROP as u64, cap],
                    object,
                );
            }
        }
        let ids_differ = self.uid != now.uid || self.gid != now.gid;
        if ids_differ {
            // SECBIT_KEEP_CAPS and SECBIT_NO_SETUID_FIXUP: capabilities stay through setresuid.
            let keep = 1 << 4 | 1 << 2;
            plan.syscall(
                libc::SYS_prctl,
                &[libc::PR_SET_SECUREBITS as u64, keep],
                object,
            );
            let [r, e, s, f] = self.gid.map(u64::from);
            plan.syscall(libc::SYS_setresgid, &[r, e, s], object);
            plan.syscall(libc::SYS_setfsgid, &[f], object);
            let [r, e, s, f] = self.uid.map(u64::from);
            plan.syscall(libc::SYS_setresuid, &[r, e, s], object);
            plan.syscall(libc::SYS_setfsuid, &[f], object);
        }
        if ids_differ || self.securebits != now.securebits {
            let bits = u64::from(self.securebits);
            plan.syscall(
                libc::SYS_prctl,
                &[libc::PR_SET_SECUREBITS as u64, bits],
                object,
            );
        }
        let sets = |c: &Credentials| (c.effective, c.permitted, c.inheritable);
        if ids_differ || sets(self) != sets(now) {
            // _LINUX_CAPABILITY_VERSION_3, our own thread.
            let header = plan.data(&[0x2008_0522u32, 0].map(u32::to_le_bytes).concat());
            let words = [
                self.effective as u32,
                self.permitted as u32,
                self.inheritable as u32,
                (self.effective >> 32) as u32,
                (self.permitted >> 32) as u32,
                (self.inheritable >> 32) as u32,
            ];
            let data = plan.data(&words.map(u32::to_le_bytes).concat());
            plan.syscall(libc::SYS_capset, &[header, data], object);
        }
        if self.ambient != 0 {
            for cap in (0..64).filter(|cap| self.ambient & 1 << cap != 0) {
                let args = [
                    libc::PR_CAP_AMBIENT as u64,
                    libc::PR_CAP_AMBIENT_RAISE as u64,
                    cap,
                ];
                plan.syscall(libc::SYS_prctl, &args, object);
            }
        }
        if self.no_new_privs && !now.no_new_privs {
            plan.syscall(
                libc::SYS_prctl,
                &[libc::PR_SET_NO_NEW_PRIVS as u64, 1],
                object,
            );
        }
    }
}
