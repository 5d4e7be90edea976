//! Control groups, cgroups(7).

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use ckpt_tracer::Pid;
use ckpt_tracer::proc::ProcDir;
use ckpt_tracer::proc::mounts::{Mount, read_mounts};
use ckpt_tracer::proc::tasks;
use serde::{Deserialize, Serialize};

/// The group of a process in one hierarchy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// Controllers of a hierarchy of version 1, separated by commas, or its name; empty for
    /// version 2.
    pub controllers: String,
    /// Path below the root of the hierarchy.
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

/// Moves a process into the groups that it was in, as far as they exist; answers what was not
/// permitted. A new process is in those of its creator.
pub fn rebuild(groups: &[Cgroup], pid: Pid) -> Vec<String> {
    let (Ok(now), Ok(mounts)) = (capture(pid.into()), read_mounts(pid)) else {
        return Vec::new();
    };
    let elsewhere = groups.iter().filter(|group| !now.contains(group));
    let places = elsewhere.filter_map(|group| {
        let mount = mounts.all().iter().find(|mount| is_of(group, mount))?;
        let place = directory(group, mount)?;
        place.is_dir().then_some((group, place))
    });
    let refused = places.filter_map(|(group, place)| {
        let error = std::fs::write(place.join("cgroup.procs"), pid.to_string()).err()?;
        Some(not_permitted(group, pid, &error))
    });
    refused.collect()
}

fn not_permitted(group: &Cgroup, pid: Pid, error: &io::Error) -> String {
    format!(
        "process {pid} is in the control group of restore, not in {}: {error}",
        group.path.display()
    )
}

/// Whether the file system is that hierarchy.
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

/// Where the group is, when it lies below what is mounted.
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
    fn only_what_is_mounted_can_be_reached() {
        let mounted = mount("cgroup2", "/box", "rw");
        let at = |path| directory(&group("", path), &mounted);
        assert_eq!(at("/box/a/b"), Some("/sys/fs/cgroup/a/b".into()));
        assert_eq!(at("/other"), None);
        assert_eq!(at("/box/../x"), None);
    }
}
