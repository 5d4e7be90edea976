//! The namespaces of the job's own (namespaces(7)), which a restore creates again.

use crate::bounds;
use ckpt_tracer::proc::{ProcDir, namespaces};
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// A line of `/proc/PID/uid_map`: first id inside, first id outside, count.
pub type Extent = (u32, u32, u32);

/// Namespaces of a job's own, as seen by the process that took the checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespaces {
    /// A pid namespace, with a mount namespace that has a `/proc` for it.
    pub pid: bool,
    /// A user namespace.
    pub user: Option<UserNamespace>,
    /// The names of a UTS namespace.
    #[serde(default)]
    pub uts: Option<Names>,
    /// An IPC namespace without other processes.
    #[serde(default)]
    pub ipc: bool,
    /// A cgroup namespace; its root is the group of its creator.
    #[serde(default)]
    pub cgroup: bool,
}

/// What a UTS namespace holds: uname(2).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Names {
    /// `uname -n`.
    pub host: String,
    /// Of NIS.
    pub domain: String,
}

impl Names {
    /// The names of our UTS namespace.
    pub fn here() -> Self {
        let read = |file: &str| {
            let text = std::fs::read_to_string(format!("/proc/sys/kernel/{file}"));
            text.unwrap_or_default().trim_end_matches('\n').to_owned()
        };
        Self {
            host: read("hostname"),
            domain: read("domainname"),
        }
    }
}

/// How a user namespace maps ids.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserNamespace {
    /// `/proc/PID/uid_map`: first id inside, first id outside, count.
    #[serde(deserialize_with = "bounds::few::<_, _, 340>")]
    pub uids: Vec<Extent>,
    /// `/proc/PID/gid_map`.
    #[serde(deserialize_with = "bounds::few::<_, _, 340>")]
    pub gids: Vec<Extent>,
    /// Its owner, outside.
    #[serde(default)]
    pub owner: Option<u32>,
    /// If setgroups(2) is permitted: supplementary groups of its creator, outside. A process that has not set its own
    /// has them, though they may not be mapped inside.
    #[serde(default)]
    #[serde(deserialize_with = "bounds::few::<_, _, 65536>")]
    pub inherited_groups: Vec<u32>,
    /// setgroups(2) is denied: the supplementary groups are those of its creator.
    pub groups_are_fixed: bool,
}

impl Namespaces {
    /// Reads, from outside, the namespaces of these `kinds` of a process in others than ours.
    pub fn of(process: &ProcDir, kinds: &[String]) -> Result<Self> {
        let has = |kind: &str| kinds.iter().any(|k| k == kind);
        let map = |file: &str| Ok::<_, crate::Error>(parse_map(&process.read(file)?));
        let user = match has("user") {
            true => Some(UserNamespace {
                uids: map("uid_map")?,
                gids: map("gid_map")?,
                owner: owner(process),
                inherited_groups: Vec::new(),
                groups_are_fixed: process.read("setgroups")?.starts_with(b"deny"),
            }),
            false => None,
        };
        Ok(Self {
            pid: has("pid"),
            user,
            uts: has("uts").then(Names::default),
            ipc: has("ipc"),
            cgroup: has("cgroup"),
        })
    }
}

impl UserNamespace {
    /// Maps groups outside to those inside, as the kernel shows them there. Unmapped groups cannot come from
    /// setgroups(2) inside.
    pub fn groups_inside(&self, outside: &[u32]) -> Vec<u32> {
        /// `/proc/sys/kernel/overflowgid`.
        const OVERFLOW_GID: u32 = 65534;
        let inside = |group: &u32| {
            let line = self.gids.iter().find(|line| leads_to(line, *group));
            line.map_or(OVERFLOW_GID, |(inside, first, _)| inside + (group - first))
        };
        outside.iter().map(inside).collect()
    }

    /// Whether one of these groups outside is unmapped inside.
    pub fn has_foreign(&self, outside: &[u32]) -> bool {
        let foreign = |group: &u32| !self.gids.iter().any(|line| leads_to(line, *group));
        outside.iter().any(foreign)
    }
}

fn leads_to((_, first, count): &Extent, id: u32) -> bool {
    id.checked_sub(*first).is_some_and(|above| above < *count)
}

/// The owner of a process's user namespace (ioctl_nsfs(2)), as our user namespace maps it.
fn owner(process: &ProcDir) -> Option<u32> {
    let namespace = std::fs::File::open(process.join("ns/user")).ok()?;
    ckpt_sys::namespaces::owner(namespace)
}

/// Parses `/proc/PID/uid_map`.
pub fn parse_map(text: &[u8]) -> Vec<Extent> {
    let text = String::from_utf8_lossy(text);
    let line = |line: &str| {
        let mut numbers = line.split_whitespace().map(str::parse);
        let mut next = || numbers.next()?.ok();
        Some((next()?, next()?, next()?))
    };
    text.lines().filter_map(line).collect()
}

/// Kinds of namespaces that a process does not share with us. Those for children are left out; the values of its
/// clocks are in the image.
///
/// # Errors
/// As [`namespaces::list_namespaces`].
pub fn others(process: &ProcDir) -> ckpt_tracer::Result<Vec<String>> {
    let ours = namespaces::list_namespaces(ckpt_tracer::Pid::own())?;
    let theirs = namespaces::list_namespaces(process.clone())?;
    let differ = theirs.into_iter().filter(|namespace| {
        !namespace.0.ends_with("_for_children")
            && namespace.0 != "time"
            && !ours.contains(namespace)
    });
    Ok(differ.map(|(kind, _)| kind).collect())
}

/// The kinds that can be entered from outside, and created again.
pub const OWN: [&str; 6] = ["cgroup", "ipc", "mnt", "pid", "user", "uts"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_parsed() {
        let map = b"         0       1000          1\n         1     100000      65536\n";
        assert_eq!(parse_map(map), [(0, 1000, 1), (1, 100_000, 65536)]);
        assert_eq!(parse_map(b""), []);
    }

    #[test]
    fn groups_are_seen_from_inside() {
        let user = UserNamespace {
            gids: vec![(0, 1000, 1), (1, 100_000, 65536)],
            ..UserNamespace::default()
        };
        assert_eq!(user.groups_inside(&[4, 1000, 100_032]), [65534, 0, 33]);
        assert!(user.has_foreign(&[1000, 4]) && !user.has_foreign(&[1000, 165_535]));
        assert!(user.has_foreign(&[165_536]));
    }
}
