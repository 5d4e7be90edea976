//! The groups of a job below its first process's group, with their settings; `restore --cgroups restore` and
//! `--cgroups ROOT` create them again.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::bounds;
use ckpt_tracer::proc::mounts::{Mount, read_mounts};
use ckpt_tracer::{Pid, Tid};
use serde::{Deserialize, Serialize};

use super::{Cgroup, Policy, capture, directory, exists, is_of};
use crate::Snapshot;
use crate::error::{Error, Obstacle, Result};
use crate::process::Process;
use crate::text::Shown;

/// The job's groups in one hierarchy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hierarchy {
    /// As [`Cgroup::controllers`].
    pub controllers: String,
    /// The groups, parents first.
    pub groups: Vec<Group>,
    /// Threads in another group than the first thread of their process: ids and groups.
    #[serde(with = "crate::raw_path")]
    pub threads: Vec<(i32, PathBuf)>,
}

/// A group that is not the root of its hierarchy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// As [`Cgroup::path`].
    #[serde(with = "crate::raw_path")]
    pub path: PathBuf,
    /// Names of files and their contents.
    #[serde(deserialize_with = "bounds::few::<_, _, 1024>")]
    pub settings: Vec<(String, String)>,
}

/// Most groups that are read.
const MOST: usize = 4096;
/// Longest contents that count as a setting, bytes.
const LONGEST: usize = 64 * 1024;

/// The hierarchies of a frozen job, with the groups of its threads.
pub fn hierarchies(processes: &[Process]) -> Vec<Hierarchy> {
    let top = processes.first().map_or(&[][..], |p| &p.cgroups);
    let mut all: Vec<Hierarchy> = top
        .iter()
        .map(|top| Hierarchy {
            controllers: top.controllers.clone(),
            ..Hierarchy::default()
        })
        .collect();
    for process in processes {
        for thread in process.threads.iter().skip(1) {
            let groups = capture((Pid(process.pid), Tid(thread.tid)).into()).unwrap_or_default();
            for group in groups
                .into_iter()
                .filter(|group| !process.cgroups.contains(group))
            {
                let mut all = all.iter_mut();
                if let Some(h) = all.find(|h| h.controllers == group.controllers) {
                    h.threads.push((thread.tid, group.path));
                }
            }
        }
    }
    all
}

/// Adds the groups with their settings, as far as they are mounted here; the job may run meanwhile.
pub fn read_groups(snapshot: &mut Snapshot) {
    let Ok(mounts) = read_mounts(Pid::own()) else {
        return;
    };
    let processes = &snapshot.processes;
    let top = processes.first().map_or(&[][..], |p| &p.cgroups);
    for hierarchy in &mut snapshot.cgroups {
        let Some(top) = top
            .iter()
            .find(|top| top.controllers == hierarchy.controllers)
        else {
            continue;
        };
        let of_it = |p: &Process| p.cgroup_in(&top.controllers).map(|g| g.path.clone());
        let mut members: BTreeSet<PathBuf> = processes.iter().filter_map(of_it).collect();
        members.extend(hierarchy.threads.iter().map(|(_, path)| path.clone()));
        let mut mounts = mounts.all().iter().filter(|mount| is_of(top, mount));
        let read = |mount: &Mount| Some(groups(top, mount, &directory(top, mount)?, &members));
        hierarchy.groups = mounts.find_map(read).unwrap_or_default();
    }
    snapshot
        .cgroups
        .retain(|h| !h.groups.is_empty() || !h.threads.is_empty());
}

/// The first process's group and those below it, except groups of other processes. In the root of a hierarchy only
/// the groups that lead to the job's.
fn groups(top: &Cgroup, mount: &Mount, place: &Path, members: &BTreeSet<PathBuf>) -> Vec<Group> {
    let is_root = top.path == Path::new("/");
    let leads = |path: &Path| members.iter().any(|member| member.starts_with(path));
    let mut found = Vec::new();
    let mut next = vec![(top.path.clone(), place.to_owned())];
    while let Some((path, place)) = next.pop() {
        if !leads(&path) && (is_root || is_populated(&place)) || found.len() == MOST {
            continue;
        }
        let below = fs::read_dir(&place).into_iter().flatten().flatten();
        let below = below.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir()));
        next.extend(below.map(|e| (path.join(e.file_name()), e.path())));
        let visible = path != Path::new("/") && place != mount.mount_point;
        found.extend(visible.then(|| Group {
            settings: settings(&place),
            path,
        }));
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

fn is_populated(place: &Path) -> bool {
    match fs::read_to_string(place.join("cgroup.events")) {
        Ok(events) => events.lines().any(|line| line == "populated 1"),
        Err(_) => fs::read(place.join("cgroup.procs")).is_ok_and(|procs| !procs.is_empty()),
    }
}

/// Excludes files that trigger an action when written, and counters.
fn is_setting(name: &str) -> bool {
    const NOT: [&str; 12] = [
        "cgroup.procs",
        "cgroup.threads",
        "cgroup.freeze",
        "cgroup.kill",
        "cgroup.event_control",
        "tasks",
        "freezer.state",
        "memory.reclaim",
        "memory.force_empty",
        "cpuacct.usage",
        "release_agent",
        "devices.list",
    ];
    const ENDS: [&str; 5] = [
        ".pressure",
        ".peak",
        ".failcnt",
        ".max_usage_in_bytes",
        ".stat",
    ];
    let counts = ENDS.iter().any(|end| name.ends_with(end));
    // `cgroup.pressure` enables pressure accounting.
    !NOT.contains(&name) && (!counts || name == "cgroup.pressure")
}

fn settings(place: &Path) -> Vec<(String, String)> {
    const READ_AND_WRITTEN: u32 = 0o600;
    let files = fs::read_dir(place).into_iter().flatten().flatten();
    let mut found: Vec<(String, String)> = files
        .filter_map(|file| {
            let name = file.file_name().into_string().ok()?;
            let meta = file.metadata().ok().filter(fs::Metadata::is_file)?;
            let both = meta.permissions().mode() & READ_AND_WRITTEN == READ_AND_WRITTEN;
            let value =
                (both && is_setting(&name)).then(|| fs::read_to_string(file.path()).ok())??;
            (value.len() <= LONGEST).then(|| (name, value.trim_end().to_owned()))
        })
        .collect();
    found.sort();
    found
}

/// Groups created for a restore; removed again if this value is dropped before the job runs.
#[derive(Debug, Default)]
pub struct Made {
    directories: Vec<PathBuf>,
    warnings: Vec<String>,
}

impl Made {
    /// Keeps the groups, since the job runs in them. Returns the differences, one sentence each.
    pub fn keep(mut self) -> Vec<String> {
        self.directories.clear();
        std::mem::take(&mut self.warnings)
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for directory in self.directories.iter().rev() {
            let _ = fs::remove_dir(directory);
        }
    }
}

/// Creates the missing groups, with their settings, if the policy says so.
///
/// # Errors
/// When none can be created below the given root.
pub fn make(snapshot: &Snapshot, policy: &Policy) -> Result<Made> {
    let mut made = Made::default();
    if !policy.makes_groups() {
        return Ok(made);
    }
    let mounts = read_mounts(Pid::own())?;
    let tops = snapshot.processes.first().map_or(&[][..], |p| &p.cgroups);
    if let Policy::Below(root) = policy
        && !tops
            .iter()
            .any(|top| exists(root, &top.controllers, &mounts))
    {
        return Err(Error::refuse(Obstacle::new(
            format!("the control group {}", root.shown()),
            "is in none of the hierarchies that the job was in",
            "make it first, with mkdir below /sys/fs/cgroup",
        )));
    }
    for hierarchy in &snapshot.cgroups {
        let policy = policy.in_hierarchy(&hierarchy.controllers, &mounts);
        if !policy.makes_groups() {
            continue;
        }
        let Some(top) = tops
            .iter()
            .find(|top| top.controllers == hierarchy.controllers)
        else {
            continue;
        };
        let mut places = Vec::new();
        for group in &hierarchy.groups {
            let there = Cgroup {
                controllers: hierarchy.controllers.clone(),
                path: policy.place(&group.path, &top.path),
            };
            let mut mounts = mounts.all().iter().filter(|mount| is_of(&there, mount));
            match mounts.find_map(|mount| directory(&there, mount)) {
                Some(place) => places.push((group, there.path, place)),
                None => made.warnings.push(format!(
                    "the control group {} is not made again: its hierarchy is not mounted here",
                    there.path.shown()
                )),
            }
        }
        made.hierarchy(&places);
    }
    Ok(made)
}

/// A group of the image, its new path, and its directory.
type Placed<'a> = (&'a Group, PathBuf, PathBuf);

impl Made {
    /// A controller's files exist after the parent group has enabled it.
    fn hierarchy(&mut self, places: &[Placed<'_>]) {
        for (group, path, place) in places {
            let is_new = match fs::create_dir_all(place.parent().unwrap_or(place))
                .and_then(|()| fs::create_dir(place))
            {
                Ok(()) => true,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
                Err(error) => {
                    self.warnings.push(format!(
                        "the control group {} cannot be made again: {error}",
                        path.shown()
                    ));
                    continue;
                }
            };
            if is_new {
                self.directories.push(place.clone());
            }
            self.settings(group, path, place, is_new);
        }
    }

    fn settings(&mut self, group: &Group, path: &Path, place: &Path, is_new: bool) {
        // cgroup.subtree_control comes last: it may depend on the type.
        let last = |name: &str| name == "cgroup.subtree_control";
        let mut all: Vec<&(String, String)> = group.settings.iter().collect();
        all.sort_by_key(|(name, _)| (last(name), name != "cgroup.type"));
        for (name, value) in all {
            // The names come from an image and are untrusted.
            if name.contains('/') || !is_setting(name) {
                continue;
            }
            let file = place.join(name);
            let now = fs::read_to_string(&file);
            if now.as_ref().is_ok_and(|now| now.trim_end() == value) {
                continue;
            }
            let failed = match (is_new, now) {
                (false, Ok(now)) => {
                    format!("is {} there, and the group was there already", shown(&now))
                }
                (false, Err(error)) => format!("is not there: {error}"),
                (true, _) => match write(&file, name, value) {
                    Ok(()) => continue,
                    Err(error) => format!("cannot be set: {error}"),
                },
            };
            self.warnings.push(format!(
                "{name} of the control group {} was {} and {failed}",
                path.shown(),
                shown(value)
            ));
        }
    }
}

/// On one line, for messages.
fn shown(value: &str) -> String {
    match value.trim() {
        "" => "empty".into(),
        value => value.replace('\n', ", "),
    }
}

/// Writes line by line, as these files require; controllers are enabled with a leading plus.
fn write(file: &Path, name: &str, value: &str) -> io::Result<()> {
    if name == "cgroup.subtree_control" {
        let words: Vec<String> = value
            .split_whitespace()
            .map(|word| format!("+{word}"))
            .collect();
        return fs::write(file, words.join(" "));
    }
    if name == "cgroup.type" && value != "threaded" {
        // "domain threaded" results from the groups below.
        return Ok(());
    }
    value.lines().try_for_each(|line| fs::write(file, line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_what_can_be_put_back() {
        for name in [
            "pids.max",
            "cpu.weight",
            "cgroup.type",
            "cgroup.pressure",
            "io.max",
        ] {
            assert!(is_setting(name), "{name}");
        }
        for name in [
            "tasks",
            "cgroup.freeze",
            "cpu.pressure",
            "memory.peak",
            "memory.failcnt",
        ] {
            assert!(!is_setting(name), "{name}");
        }
    }
}
