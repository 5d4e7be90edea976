//! Control groups, cgroups(7).

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ckpt_tracer::Pid;
use ckpt_tracer::proc::ProcDir;
use ckpt_tracer::proc::mounts::{Mount, MountTable, read_mounts};
use ckpt_tracer::proc::tasks;
use serde::{Deserialize, Serialize};

use crate::text::Shown;

use super::Snapshot;
use super::process::Process;

pub mod freezer;
pub mod settings;

/// The group of a process in one hierarchy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// Controllers of a version 1 hierarchy, separated by commas, or its name; empty for version 2.
    pub controllers: String,
    /// Path below the root of the hierarchy.
    #[serde(with = "crate::raw_path")]
    pub path: PathBuf,
}

/// Reads the groups of a process.
pub fn capture(dir: ProcDir) -> ckpt_tracer::Result<Vec<Cgroup>> {
    let groups = tasks::cgroup(dir)?.into_iter().map(|group| Cgroup {
        controllers: group.controllers,
        path: PathBuf::from(OsStr::from_bytes(&group.path)),
    });
    Ok(groups.collect())
}

/// The groups of a restored job (`--cgroups`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Its previous ones, as far as they exist and may be entered.
    #[default]
    Keep,
    /// Those of `restore`.
    Ignore,
    /// Its previous ones; missing ones are created with their settings.
    Restore,
    /// The same, with this group in place of the first process's.
    Below(PathBuf),
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "keep" => Ok(Policy::Keep),
            "ignore" => Ok(Policy::Ignore),
            "restore" => Ok(Policy::Restore),
            root if root.starts_with('/')
                && !Path::new(root).components().any(|c| c.as_os_str() == "..") =>
            {
                Ok(Policy::Below(root.into()))
            }
            _ => Err(
                "keep, ignore, restore, or the path of a group as in /proc/PID/cgroup is expected"
                    .into(),
            ),
        }
    }
}

impl Policy {
    fn makes_groups(&self) -> bool {
        matches!(self, Policy::Restore | Policy::Below(_))
    }

    /// The policy for one hierarchy: without such a root, groups are kept.
    fn in_hierarchy(&self, controllers: &str, mounts: &MountTable) -> Policy {
        match self {
            Policy::Below(root) if !exists(root, controllers, mounts) => Policy::Keep,
            other => other.clone(),
        }
    }

    /// The new path of a group of the image, given the first process's.
    fn place(&self, path: &Path, top: &Path) -> PathBuf {
        match (self, path.strip_prefix(top)) {
            (Policy::Below(root), Ok(below)) if below == Path::new("") => root.clone(),
            (Policy::Below(root), Ok(below)) => root.join(below),
            _ => path.to_owned(),
        }
    }
}

impl Process {
    /// Its group in a hierarchy.
    fn cgroup_in(&self, controllers: &str) -> Option<&Cgroup> {
        self.cgroups
            .iter()
            .find(|group| group.controllers == controllers)
    }
}

/// Moves a process, and threads in other groups, into their previous groups, as far as these exist. Returns what was
/// not permitted. A new process is in the groups of its creator.
pub fn enter(process: &Process, snapshot: &Snapshot, policy: &Policy) -> Vec<String> {
    let pid = Pid(process.pid);
    // Ours: those of a process with a root directory of its own are below that.
    let (Ok(now), Ok(mounts)) = (capture(pid.into()), read_mounts(Pid::own())) else {
        return Vec::new();
    };
    if *policy == Policy::Ignore {
        return Vec::new();
    }
    let top = |controllers: &str| {
        let first = snapshot.processes.first()?;
        Some(first.cgroup_in(controllers)?.path.clone())
    };
    let place = |group: &Cgroup| Cgroup {
        path: match top(&group.controllers) {
            Some(top) => policy
                .in_hierarchy(&group.controllers, &mounts)
                .place(&group.path, &top),
            None => group.path.clone(),
        },
        controllers: group.controllers.clone(),
    };
    let mut refused = Vec::new();
    for group in process.cgroups.iter().map(place) {
        if !now.contains(&group) {
            let object = format!("process {pid}");
            refused.extend(go(&group, &mounts, &["cgroup.procs"], process.pid, &object));
        }
    }
    for hierarchy in &snapshot.cgroups {
        let own = hierarchy.threads.iter();
        let own = own.filter(|(tid, _)| process.threads.iter().any(|thread| thread.tid == *tid));
        for (tid, path) in own {
            let group = place(&Cgroup {
                controllers: hierarchy.controllers.clone(),
                path: path.clone(),
            });
            let object = format!("thread {tid} of process {pid}");
            refused.extend(go(
                &group,
                &mounts,
                &["cgroup.threads", "tasks"],
                *tid,
                &object,
            ));
        }
    }
    refused
}

/// Whether a hierarchy has a group with that path.
fn exists(path: &Path, controllers: &str, mounts: &MountTable) -> bool {
    let group = Cgroup {
        controllers: controllers.to_owned(),
        path: path.to_owned(),
    };
    let mut mounts = mounts.all().iter().filter(|mount| is_of(&group, mount));
    mounts.any(|mount| directory(&group, mount).is_some_and(|place| place.is_dir()))
}

/// Writes an id to the first of these files that the group has; otherwise returns why not.
fn go(
    group: &Cgroup,
    mounts: &MountTable,
    files: &[&str],
    id: i32,
    object: &str,
) -> Option<String> {
    let mount = mounts.all().iter().find(|mount| is_of(group, mount))?;
    let place = directory(group, mount).filter(|place| place.is_dir())?;
    let elsewhere = |why: &str| {
        Some(format!(
            "{object} is in the control group of restore, not in {}: {why}",
            group.path.shown()
        ))
    };
    if freezer::is_frozen(&place) {
        return elsewhere("that one is frozen");
    }
    let file = files
        .iter()
        .map(|file| place.join(file))
        .find(|file| file.exists())?;
    let error = std::fs::write(file, id.to_string()).err()?;
    elsewhere(&error.to_string())
}

/// Whether the mount is that hierarchy.
fn is_of(group: &Cgroup, mount: &Mount) -> bool {
    if group.controllers.is_empty() {
        return mount.fs_type == "cgroup2";
    }
    let mut options = mount.super_options.split(',');
    mount.fs_type == "cgroup"
        && group
            .controllers
            .split(',')
            .all(|c| options.any(|o| o == c))
}

/// The directory of the group, if it is below the mount's root.
fn directory(group: &Cgroup, mount: &Mount) -> Option<PathBuf> {
    let below = group.path.strip_prefix(&mount.root).ok()?;
    let outside = below.components().any(|c| c.as_os_str() == "..");
    (!outside).then(|| Path::new(&mount.mount_point).join(below))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(fs_type: &str, root: &str, options: &str) -> Mount {
        Mount {
            id: 1,
            parent: 0,
            dev: (0, 1),
            root: root.into(),
            mount_point: "/sys/fs/cgroup".into(),
            options: String::new(),
            propagation: Vec::new(),
            fs_type: fs_type.into(),
            source: Vec::new(),
            super_options: options.into(),
        }
    }

    fn group(controllers: &str, path: &str) -> Cgroup {
        Cgroup {
            controllers: controllers.into(),
            path: path.into(),
        }
    }

    #[test]
    fn a_group_is_found_in_its_hierarchy() {
        let two = mount("cgroup2", "/", "rw");
        let one = mount("cgroup", "/", "rw,cpu,cpuacct");
        assert!(is_of(&group("", "/a"), &two) && !is_of(&group("", "/a"), &one));
        assert!(is_of(&group("cpu,cpuacct", "/a"), &one));
        assert!(!is_of(&group("memory", "/a"), &one) && !is_of(&group("cpu", "/a"), &two));
    }

    #[test]
    fn groups_move_with_that_of_the_first_process() {
        let policy: Policy = "/jobs/1".parse().expect("it is a path");
        let place = |path: &str| policy.place(path.as_ref(), "/a".as_ref());
        assert_eq!(place("/a"), Path::new("/jobs/1"));
        assert_eq!(place("/a/b/c"), Path::new("/jobs/1/b/c"));
        assert_eq!(place("/other"), Path::new("/other"));
        assert_eq!(
            Policy::Restore.place("/a/b".as_ref(), "/a".as_ref()),
            Path::new("/a/b")
        );
        assert!("jobs".parse::<Policy>().is_err() && "/a/../b".parse::<Policy>().is_err());
    }

    #[test]
    fn only_what_is_mounted_can_be_reached() {
        let mounted = mount("cgroup2", "/box", "rw");
        let at = |path| directory(&group("", path), &mounted);
        assert_eq!(at("/box/a/b"), Some("/sys/fs/cgroup/a/b".into()));
        assert_eq!(at("/other"), None);
        assert_eq!(at("/box/../x"), None);
    }
}
