//! Frozen control groups: `cgroup.freeze` of version 2, the freezer of version 1. `docker pause` and `systemctl
//! freeze` use them. Tasks in them execute nothing until they are thawed, not even a remote call.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ckpt_sys::helper::Helper;
use ckpt_tracer::Pid;
use ckpt_tracer::proc::mounts::read_mounts;
use ckpt_tracer::proc::tasks;
use nix::errno::Errno;

use super::{Cgroup, capture, directory, is_of};
use crate::error::{Error, Obstacle, Result};
use crate::outsiders::process_name;
use crate::text::Shown;

/// A frozen group: frozen itself, not only by a visible ancestor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frozen {
    /// Its directory.
    directory: PathBuf,
    version: Version,
    /// A process of the job in it or below.
    member: Pid,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Version {
    /// The control file that freezes and thaws the group.
    fn control(self) -> &'static str {
        match self {
            Version::One => "freezer.state",
            Version::Two => "cgroup.freeze",
        }
    }

    fn frozen(self) -> &'static [u8] {
        match self {
            Version::One => b"FROZEN",
            Version::Two => b"1",
        }
    }

    fn thawed(self) -> &'static [u8] {
        match self {
            Version::One => b"THAWED",
            Version::Two => b"0",
        }
    }

    /// Whether the group itself was frozen, and not only by an ancestor.
    fn holds(self, directory: &Path) -> bool {
        let file = match self {
            Version::One => "freezer.self_freezing",
            Version::Two => "cgroup.freeze",
        };
        fs::read(directory.join(file)).is_ok_and(|text| text.starts_with(b"1"))
    }
}

/// Whether a process that enters this group stops.
pub(super) fn is_frozen(directory: &Path) -> bool {
    let read = |file| fs::read_to_string(directory.join(file)).unwrap_or_default();
    let events = read("cgroup.events");
    let state = read("freezer.state");
    events.lines().any(|line| line == "frozen 1") || ["FROZEN", "FREEZING"].contains(&state.trim())
}

/// The frozen groups of tasks of these processes, as far as they are visible.
pub fn frozen(job: &[Pid]) -> Vec<Frozen> {
    let mut found: Vec<Frozen> = Vec::new();
    let Ok(mounts) = read_mounts(Pid::own()) else {
        return found;
    };
    let mut seen: Vec<Cgroup> = Vec::new();
    for &member in job {
        for task in tasks::list_tasks(member).unwrap_or_default() {
            for group in capture((member, task).into()).unwrap_or_default() {
                let freezes = group
                    .controllers
                    .split(',')
                    .any(|c| c.is_empty() || c == "freezer");
                if !freezes || seen.contains(&group) {
                    continue;
                }
                seen.push(group.clone());
                let mut mounts = mounts.all().iter().filter(|mount| is_of(&group, mount));
                let place = mounts.find_map(|mount| Some((directory(&group, mount)?, mount)));
                let Some((place, mount)) = place else {
                    continue;
                };
                if !is_frozen(&place) {
                    continue;
                }
                let version = match group.controllers.is_empty() {
                    true => Version::Two,
                    false => Version::One,
                };
                let above = place.ancestors();
                let visible = above.take_while(|d| d.starts_with(&mount.mount_point));
                for directory in visible.filter(|d| version.holds(d)) {
                    let one = Frozen {
                        directory: directory.to_owned(),
                        version,
                        member,
                    };
                    if !found.iter().any(|known| known.directory == one.directory) {
                        found.push(one);
                    }
                }
            }
        }
    }
    found
}

impl Frozen {
    /// The group as an obstacle to the checkpoint of that process.
    pub fn obstacle(&self, root: i32) -> Obstacle {
        Obstacle::new(
            process_name(self.member),
            format!(
                "is in the control group {}, which is frozen (docker pause, systemctl freeze, {})",
                self.directory.shown(),
                self.version.control()
            ),
            format!(
                "thaw it, or let ckpt thaw it for as long as the checkpoint takes: ckpt attach --thaw {root}"
            ),
        )
    }

    fn not_permitted(&self, error: &std::io::Error) -> Error {
        Error::refuse(Obstacle::new(
            process_name(self.member),
            format!(
                "is in the frozen control group {}, which you may not thaw: {error}",
                self.directory.shown()
            ),
            "run ckpt as root, or thaw it first (docker unpause, systemctl thaw)",
        ))
    }

    /// A process in the group or below that does not belong to the job.
    fn stranger(&self, job: &[Pid]) -> Option<Pid> {
        let mut places = vec![self.directory.clone()];
        while let Some(place) = places.pop() {
            let members = fs::read_to_string(place.join("cgroup.procs")).unwrap_or_default();
            let mut members = members
                .lines()
                .filter_map(|line| line.parse().ok().map(Pid));
            if let Some(stranger) = members.find(|pid| !job.contains(pid)) {
                return Some(stranger);
            }
            let below = fs::read_dir(&place).into_iter().flatten().flatten();
            let below = below.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir()));
            places.extend(below.map(|entry| entry.path()));
        }
        None
    }
}

/// Frozen groups that may be thawed for a checkpoint.
#[derive(Debug)]
pub struct Thawable(Vec<(Version, File)>);

impl Thawable {
    /// Opens their control files. Other processes in such a group would run too.
    ///
    /// # Errors
    /// When that is not permitted, or a process outside the job is in such a group.
    pub fn open(groups: &[Frozen], job: &[Pid]) -> Result<Self> {
        let open = |group: &Frozen| {
            if let Some(stranger) = group.stranger(job) {
                return Err(Error::refuse(Obstacle::new(
                    process_name(group.member),
                    format!(
                        "is in the frozen control group {} together with {}, which is outside the job and \
                         would run if it were thawed",
                        group.directory.shown(),
                        process_name(stranger)
                    ),
                    "checkpoint an ancestor of all in the group, or thaw it first",
                )));
            }
            let control = group.directory.join(group.version.control());
            let file = OpenOptions::new().read(true).write(true).open(control);
            Ok((group.version, file.map_err(|e| group.not_permitted(&e))?))
        };
        Ok(Self(groups.iter().map(open).collect::<Result<_>>()?))
    }
}

/// Groups that are thawed while this value lives. They are frozen again when it is dropped, and by a helper process
/// when this process is killed.
#[derive(Debug)]
pub struct Thawed {
    groups: Vec<(Version, File)>,
    keeper: Option<(Helper, OwnedFd)>,
}

impl Thawed {
    /// Thaws the groups of version 1. A task that was stopped and then frozen by such a group cannot be seized:
    /// PTRACE_SEIZE waits until it is thawed.
    ///
    /// # Errors
    /// When no helper can be created, or a group has gone.
    pub fn begin(groups: &Thawable) -> Result<Self> {
        let copies = groups
            .0
            .iter()
            .map(|(version, file)| Ok((*version, file.try_clone()?)));
        let groups = copies
            .collect::<std::io::Result<Vec<_>>>()
            .map_err(failed())?;
        let keeper = keep(&groups).map_err(failed())?;
        let thawed = Self {
            groups,
            keeper: Some(keeper),
        };
        thawed.thaw(Version::One)?;
        Ok(thawed)
    }

    /// Thaws the groups of version 2, whose tasks reach ptrace-stops while frozen. When all are in such a stop, none
    /// executes anything after the thaw.
    ///
    /// # Errors
    /// When a group has gone.
    pub fn complete(&self) -> Result<()> {
        self.thaw(Version::Two)
    }

    fn thaw(&self, version: Version) -> Result<()> {
        let wanted = self.groups.iter().filter(|(of, _)| *of == version);
        for (version, file) in wanted {
            file.write_all_at(version.thawed(), 0).map_err(failed())?;
        }
        Ok(())
    }
}

impl Drop for Thawed {
    fn drop(&mut self) {
        for (version, file) in &self.groups {
            let _ = file.write_all_at(version.frozen(), 0);
        }
        if let Some((helper, pipe)) = self.keeper.take() {
            let _ = nix::unistd::write(&pipe, b".");
            drop(pipe);
            let _ = helper.wait();
        }
    }
}

fn failed<E: Into<std::io::Error>>() -> impl Fn(E) -> Error {
    Error::file("thaw", "the job's control group")
}

/// Starts the helper, which freezes the groups again if the pipe ends without a message.
fn keep(groups: &[(Version, File)]) -> Result<(Helper, OwnedFd), Errno> {
    let (reader, writer) = ckpt_sys::pipes::pipe()?;
    let files = groups.iter().map(|(_, file)| file.as_fd());
    let kept: Vec<BorrowedFd<'_>> = files.chain([reader.as_fd()]).collect();
    let helper = Helper::start_with(&kept, || {
        if nix::unistd::read(&reader, &mut [0]) == Ok(1) {
            return 0;
        }
        for (version, file) in groups {
            let _ = file.write_at(version.frozen(), 0);
        }
        0
    })?;
    Ok((helper, writer))
}
