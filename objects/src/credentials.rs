//! Credentials: ids, groups, capabilities. They are per thread.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::bounds;
use ckpt_tracer::capabilities::{Held, Use, set_names};
use ckpt_tracer::proc::status::{self, Status};
use serde::{Deserialize, Serialize};

use super::Snapshot;
use super::namespaces::Extent;
use super::namespaces::parse_map;
use super::process::Process;
use crate::error::Obstacle;
use crate::plan::Builder;

/// A task's credentials (credentials(7), capabilities(7)).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Real, effective, saved, file system.
    pub uid: [u32; 4],
    /// Real, effective, saved, file system.
    pub gid: [u32; 4],
    /// Supplementary groups.
    #[serde(deserialize_with = "bounds::few::<_, _, 65536>")]
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

/// `SECBIT_KEEP_CAPS`; `PR_SET_KEEPCAPS` sets and clears it.
const KEEP_CAPS: u32 = 1 << 4;

/// Whether setgroups(2) is permitted: not in a user namespace that an ordinary user created without newgidmap(1).
pub fn groups_can_be_set() -> bool {
    let setting = std::fs::read_to_string("/proc/self/setgroups").unwrap_or_default();
    setting.trim() != "deny"
}

/// The job's credentials that we may not set. `now` is what its processes get from us, `held` their capabilities,
/// `outside` our groups outside the job's user namespace.
pub fn obstacles(
    snapshot: &Snapshot,
    now: &Credentials,
    held: Held,
    outside: &[u32],
) -> Vec<Obstacle> {
    let no_groups = !groups_can_be_set();
    let ids = Ids::here();
    let mut obstacles = match no_groups {
        true => Vec::new(),
        false => foreign_groups(snapshot, outside),
    };
    for process in &snapshot.processes {
        let mut refuse = |reason: String, remedy: &str| {
            let object = format!("process {}", process.pid);
            obstacles.push(Obstacle::new(object, reason, remedy));
        };
        let threads = || process.threads.iter().map(|t| &t.credentials);
        if no_groups && threads().any(|c| c.groups != now.groups) {
            refuse(
                "has other supplementary groups than you have, and groups cannot be set in a user \
                 namespace"
                    .into(),
                "restore it as root, or as a member of exactly its groups",
            );
        }
        let reason = threads().find_map(|c| c.not_permitted(now, held, no_groups, &ids));
        if let Some(reason) = reason {
            refuse(reason, "restore it as that user, or as root");
        }
        if process.threads.iter().any(|t| t.seccomp.is_on()) && !held.allows(Use::InstallSeccomp) {
            let takes = Use::InstallSeccomp;
            refuse(
                format!("is under seccomp, and restoring that needs {takes}"),
                "restore it as root",
            );
        }
    }
    obstacles
}

/// Whether executing this file changes ids or capabilities (execve(2)).
pub fn gives_privileges(program: &Path) -> bool {
    let set_id = std::fs::metadata(program).is_ok_and(|meta| meta.mode() & 0o6000 != 0);
    set_id || ckpt_sys::attributes::has_extended(program, c"security.capability")
}

/// Undoes what an exec of such a file changed: `now` are our credentials. Root keeps its permitted set across it;
/// with a tracer that lacks CAP_SYS_PTRACE the kernel grants nothing (`cap_bprm_creds_from_file`,
/// security/commoncap.c).
pub fn as_before_exec(now: &Credentials, plan: &mut Builder) {
    let object = || "the credentials before its set-uid program".to_owned();
    let prctl = |args: [u64; 2], plan: &mut Builder| {
        plan.syscall(libc::SYS_prctl, &args, object);
    };
    prctl([libc::PR_SET_KEEPCAPS as u64, 1], plan);
    // The effective set comes from the file; the permitted one suffices for what follows.
    now.set_capabilities(plan, object);
    now.set_ids(plan, object);
    now.set_capabilities(plan, object);
    prctl([libc::PR_SET_KEEPCAPS as u64, 0], plan);
}

/// setgroups(2).
pub fn set_groups(groups: &[u32], plan: &mut Builder, object: impl Fn() -> String) {
    let bytes: Vec<u8> = groups.iter().flat_map(|g| g.to_le_bytes()).collect();
    let at = plan.data(&bytes);
    plan.syscall(libc::SYS_setgroups, &[groups.len() as u64, at], object);
}

/// Joins a new, empty session keyring, owned by that user: a process that kept ours could use its keys
/// (session-keyring(7)).
pub fn join_keyring((uid, gid): (u32, u32), plan: &mut Builder) {
    const KEYCTL_JOIN_SESSION_KEYRING: u64 = 1;
    const KEYCTL_CHOWN: u64 = 4;
    const KEY_SPEC_SESSION_KEYRING: i64 = -3;
    let object = || "the session keyring".to_owned();
    let session = KEY_SPEC_SESSION_KEYRING as u64;
    plan.syscall(libc::SYS_keyctl, &[KEYCTL_JOIN_SESSION_KEYRING, 0], object);
    // If it cannot be given away, the user may still use it, by possession.
    let args = [KEYCTL_CHOWN, session, uid.into(), gid.into()];
    plan.attempt(libc::SYS_keyctl, &args, object);
}

/// The ids that a user namespace maps (user_namespaces(7)); `None` if unknown.
#[derive(Default)]
struct Ids {
    users: Option<Vec<Extent>>,
    groups: Option<Vec<Extent>>,
}

impl Ids {
    /// Those of our own.
    fn here() -> Self {
        let map = |file: &str| std::fs::read(format!("/proc/self/{file}")).ok();
        Self {
            users: map("uid_map").map(|text| parse_map(&text)),
            groups: map("gid_map").map(|text| parse_map(&text)),
        }
    }

    /// An id of a task that is not mapped.
    fn lacking(&self, task: &Credentials) -> Option<u32> {
        let unknown = |ids: &[u32], map: &Option<Vec<Extent>>| {
            let map = map.as_ref()?;
            let has = |id: u32, (first, _, count): &Extent| id >= *first && id - first < *count;
            let unmapped = |id: &u32| !map.iter().any(|extent| has(*id, extent));
            ids.iter().copied().find(unmapped)
        };
        unknown(&task.uid, &self.users).or_else(|| unknown(&task.gid, &self.groups))
    }
}

/// Supplementary groups that the job's user namespace inherited and does not map: only a user with exactly these
/// groups can create such a namespace again.
pub fn foreign_groups(snapshot: &Snapshot, outside: &[u32]) -> Vec<Obstacle> {
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
    /// From a task's status; the securebits are read from inside.
    pub fn of(status: &Status, securebits: u32) -> Self {
        let ids = |i: &status::Ids| [i.real, i.effective, i.saved, i.fs];
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

    /// Why a process with the credentials `now` cannot change to these.
    fn not_permitted(
        &self,
        now: &Credentials,
        held: Held,
        no_groups: bool,
        ids: &Ids,
    ) -> Option<String> {
        let foreign = |ids: &[u32; 4], own: &[u32; 4]| {
            let other = ids.iter().find(|id| !own[..3].contains(id));
            other.copied()
        };
        if let Some(uid) = foreign(&self.uid, &now.uid).filter(|_| !held.allows(Use::SetUser)) {
            let (us, takes) = (now.uid[1], Use::SetUser);
            return Some(format!(
                "has the uid {uid}, and you are uid {us}: becoming it needs {takes}"
            ));
        }
        if let Some(gid) = foreign(&self.gid, &now.gid).filter(|_| !held.allows(Use::SetGroups)) {
            let (us, takes) = (now.gid[1], Use::SetGroups);
            return Some(format!(
                "has the gid {gid}, and you have gid {us}: becoming it needs {takes}"
            ));
        }
        if self.groups != now.groups && !no_groups && !held.allows(Use::SetGroups) {
            let takes = Use::SetGroups;
            return Some(format!(
                "has other supplementary groups than you have, and setting them needs {takes}"
            ));
        }
        if self.ids_differ(now) && !held.allows(Use::RebuildOthers) {
            let takes = Use::RebuildOthers;
            return Some(format!(
                "has other ids than you have, and looking into it while it is rebuilt needs {takes}"
            ));
        }
        if let Some(id) = ids.lacking(self) {
            return Some(format!(
                "has the id {id}, which does not exist in this user namespace"
            ));
        }
        let bits = now.bounding & !self.bounding != 0 || self.securebits_differ(now);
        if (bits || self.leaves_root(now)) && !held.allows(Use::Setpcap) {
            let takes = Use::Setpcap;
            return Some(format!(
                "has a smaller bounding set of capabilities than you have, other securebits, or is \
                 not root as you are, and setting that needs {takes}"
            ));
        }
        let lacking = self.permitted & !now.permitted | self.inheritable & !now.bounding;
        (lacking != 0).then(|| {
            format!(
                "has capabilities that you cannot give it: {}",
                set_names(lacking)
            )
        })
    }

    /// Whether a change of ids changes capabilities too (`cap_emulate_setxuid`, security/commoncap.c).
    fn leaves_root(&self, now: &Credentials) -> bool {
        self.ids_differ(now) && (now.uid.contains(&0) || self.uid.contains(&0))
    }

    /// Whether securebits differ, apart from the one that needs no capability.
    fn securebits_differ(&self, now: &Credentials) -> bool {
        (self.securebits ^ now.securebits) & !KEEP_CAPS != 0
    }

    fn ids_differ(&self, now: &Credentials) -> bool {
        self.uid != now.uid || self.gid != now.gid
    }

    /// Sets what differs from `now`, the credentials of a process started by us, in an order that keeps each step
    /// permitted: groups, inheritable capabilities outside the bounding set, bounding set, ids with capabilities
    /// kept, ambient capabilities (securebits may forbid raising them), securebits, and last the capability sets.
    pub fn rebuild(&self, now: &Credentials, plan: &mut Builder) {
        let object = || "credentials".to_owned();
        if self.groups != now.groups {
            set_groups(&self.groups, plan, object);
        }
        if self.inheritable & !now.inheritable != 0 {
            let more = Credentials {
                inheritable: now.inheritable | self.inheritable,
                ..now.clone()
            };
            more.set_capabilities(plan, object);
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
        let (ids_differ, leaves_root) = (self.ids_differ(now), self.leaves_root(now));
        if leaves_root {
            // SECBIT_KEEP_CAPS and SECBIT_NO_SETUID_FIXUP: setresuid keeps capabilities.
            let keep = u64::from(KEEP_CAPS) | 1 << 2;
            plan.syscall(
                libc::SYS_prctl,
                &[libc::PR_SET_SECUREBITS as u64, keep],
                object,
            );
        }
        if ids_differ {
            self.set_ids(plan, object);
        }
        let mut ambient = |how: i32, caps: u64| {
            for cap in (0..64).filter(|cap| caps & 1 << cap != 0) {
                let args = [libc::PR_CAP_AMBIENT as u64, how as u64, cap];
                plan.syscall(libc::SYS_prctl, &args, object);
            }
        };
        ambient(libc::PR_CAP_AMBIENT_LOWER, now.ambient & !self.ambient);
        ambient(libc::PR_CAP_AMBIENT_RAISE, self.ambient);
        if leaves_root || self.securebits_differ(now) {
            let bits = u64::from(self.securebits);
            plan.syscall(
                libc::SYS_prctl,
                &[libc::PR_SET_SECUREBITS as u64, bits],
                object,
            );
        } else if self.securebits != now.securebits {
            let keep = u64::from(self.securebits & KEEP_CAPS != 0);
            plan.syscall(
                libc::SYS_prctl,
                &[libc::PR_SET_KEEPCAPS as u64, keep],
                object,
            );
        }
        let sets = |c: &Credentials| (c.effective, c.permitted, c.inheritable);
        if ids_differ || sets(self) != sets(now) {
            self.set_capabilities(plan, object);
        }
    }

    /// Whether [`rebuild_no_new_privs`](Self::rebuild_no_new_privs) sets a flag that we do not have.
    pub fn takes_no_new_privs(&self, now: &Credentials) -> bool {
        self.no_new_privs && !now.no_new_privs
    }

    /// Sets `no_new_privs`, after all that needs privileges, and before seccomp filters, which need it.
    pub fn rebuild_no_new_privs(&self, now: &Credentials, plan: &mut Builder) {
        if self.takes_no_new_privs(now) {
            plan.syscall(
                libc::SYS_prctl,
                &[libc::PR_SET_NO_NEW_PRIVS as u64, 1],
                || "credentials".to_owned(),
            );
        }
    }

    /// Groups first: the permission to set them is lost with the user id.
    fn set_ids(&self, plan: &mut Builder, object: impl Fn() -> String + Copy) {
        let [r, e, s, f] = self.gid.map(u64::from);
        plan.syscall(libc::SYS_setresgid, &[r, e, s], object);
        plan.syscall(libc::SYS_setfsgid, &[f], object);
        let [r, e, s, f] = self.uid.map(u64::from);
        plan.syscall(libc::SYS_setresuid, &[r, e, s], object);
        plan.syscall(libc::SYS_setfsuid, &[f], object);
    }

    /// capset(2).
    pub fn set_capabilities(&self, plan: &mut Builder, object: impl Fn() -> String) {
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use ckpt_tracer::capabilities::Capability;

    fn of(id: u32) -> Credentials {
        Credentials {
            uid: [id; 4],
            gid: [id; 4],
            ..Credentials::default()
        }
    }

    #[test]
    fn missing_capabilities_are_named() {
        let why = |job: &Credentials, now: &Credentials, set| {
            job.not_permitted(now, Held::NONE.with(set), false, &Ids::default())
        };
        let (me, root) = (of(1000), of(0));
        assert_eq!(why(&me, &me, 0), None);
        let said = why(&root, &me, 0).expect("it is another user");
        assert!(
            said.contains("uid 0, and you are uid 1000") && said.contains("CAP_SETUID"),
            "{said}"
        );
        let both = Capability::Setuid.bit() | Capability::Setgid.bit();
        let said = why(&of(7), &me, both).expect("it has another uid");
        assert!(
            said.contains("CAP_SYS_PTRACE and CAP_DAC_OVERRIDE"),
            "{said}"
        );
        let both = both | Capability::SysPtrace.bit() | Capability::DacOverride.bit();
        let said = why(&of(7), &me, Capability::Setuid.bit()).expect("it has another group");
        assert!(
            said.contains("gid 7") && said.contains("CAP_SETGID"),
            "{said}"
        );
        assert_eq!(why(&of(7), &me, both), None);
        let said = why(&me, &root, both).expect("the change is root's");
        assert!(said.contains("CAP_SETPCAP"), "{said}");
        assert_eq!(why(&me, &root, both | Capability::Setpcap.bit()), None);
        let capable = Credentials {
            permitted: Capability::NetAdmin.bit(),
            ..me.clone()
        };
        let said = why(&capable, &me, both).expect("the capability cannot be given");
        assert!(said.ends_with("cannot give it: net_admin"), "{said}");
        let ids = Ids {
            users: Some(vec![(0, 0, 1), (1000, 5000, 2)]),
            groups: None,
        };
        assert_eq!(
            [0, 1001, 1002].map(|id| ids.lacking(&of(id))),
            [None, None, Some(1002)]
        );
    }
}
