//! Files and directories of `/proc/PID` (proc(5)), and namespace files.
//!
//! The file of a task of the job is opened again when that task exists ([`super::late`]). The file of a process that
//! has ended, whose reads return ESRCH, is made by the restoring process from a child of its own that ends. A pid
//! outside the job may be reused by then: its start time is compared.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use ckpt_sys::process::{self, Fork};
use ckpt_tracer::Pid;
use ckpt_tracer::proc::fdlink::FdLink;
use ckpt_tracer::proc::stat::{Stat, read_stat};
use ckpt_tracer::proc::status::TaskState;
use nix::sys::statfs::PROC_SUPER_MAGIC;
use serde::{Deserialize, Serialize};

use super::Look;
use super::kind::{Captured, OpenFile, Opened, Place, Sight, Substitutes};
use crate::Snapshot;
use crate::bounds;
use crate::error::Obstacle;
use crate::options::FilesPolicy;
use crate::outsiders::process_name;
use crate::plan::{Builder, Inherited};
use crate::process::Process;
use crate::source::{Collector, Source};
use crate::text::Shown;

/// An open file of `/proc/PID`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcFile {
    /// Its path, which contains the pid.
    #[serde(with = "crate::raw_path")]
    pub path: PathBuf,
    /// The process in the path.
    #[serde(deserialize_with = "bounds::pid")]
    pub process: i32,
    /// The thread in the path.
    #[serde(default, deserialize_with = "bounds::pid")]
    pub thread: Option<i32>,
    /// The kind of that process.
    pub of: Of,
    /// Offset in bytes (for a directory, the file system's cookie).
    pub offset: u64,
}

/// The process of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Of {
    /// A task of the job, or an unreaped child.
    Job,
    /// A process that has ended.
    Ended,
    /// A process outside the job with that start time, `starttime` of proc_pid_stat(5).
    Outside {
        /// Clock ticks since boot.
        started: u64,
    },
}

/// The process and thread in a path of a `/proc` of our pid namespace.
fn named(path: &Path) -> Option<(i32, Option<i32>)> {
    let mut mount = PathBuf::new();
    let mut rest = path.components();
    let process = loop {
        let name = rest.next()?;
        match name.as_os_str().to_str().and_then(|n| n.parse().ok()) {
            Some(process) if is_root(&mount) => break process,
            _ => mount.push(name),
        }
    };
    let in_task = rest.next() == Some(Component::Normal("task".as_ref()));
    let thread = rest.next().filter(|_| in_task);
    let thread = thread.and_then(|t| t.as_os_str().to_str()?.parse().ok());
    Some((process, thread))
}

/// Whether this is the root of a `/proc` of our pid namespace.
fn is_root(mount: &Path) -> bool {
    // `PROC_ROOT_INO`
    let is_first = std::fs::metadata(mount).is_ok_and(|m| m.ino() == 1);
    let own = || std::fs::read_link(mount.join("self")).ok();
    let pid = PathBuf::from(std::process::id().to_string());
    is_first && own() == Some(pid)
}

/// Whether a description is a file of `/proc/PID`, in a `/proc` of our pid namespace.
fn is_of_process(look: &Look, path: &Path) -> bool {
    ckpt_sys::files::fstatfs(&look.copy).is_some_and(|(kind, _)| kind == PROC_SUPER_MAGIC.0)
        && named(path).is_some()
}

/// Captures one.
fn capture(
    source: &Source,
    look: &Look,
    path: &Path,
    deleted: bool,
    collector: &Collector,
) -> Result<ProcFile, Box<Obstacle>> {
    let refuse = |reason: &str| {
        let reason = format!("({}) {reason}", path.shown());
        let remedy = "close it before the checkpoint";
        Err(Box::new(Obstacle::new(look.object(source), reason, remedy)))
    };
    let Some((process, thread)) = named(path) else {
        return refuse("is a file of an unknown kind");
    };
    if !look.info.locks.is_empty() {
        return refuse("is locked, which is not supported of files in /proc");
    }
    // While it is open, the path through its task leads to this very inode.
    let found = std::fs::symlink_metadata(path);
    let there = found.is_ok_and(|m| (m.dev(), m.ino()) == (look.stat.st_dev, look.stat.st_ino));
    let of = match there && !deleted {
        false => Of::Ended,
        true => match owner(process, collector) {
            Some(of) => of,
            None => return refuse("is of a process that has just ended"),
        },
    };
    Ok(ProcFile {
        path: path.to_owned(),
        process,
        thread,
        of,
        offset: look.info.pos,
    })
}

fn owner(process: i32, collector: &Collector) -> Option<Of> {
    if is_of_the_job(process, collector) {
        return Some(Of::Job);
    }
    let stat = read_stat(Pid(process)).ok()?;
    Some(Of::Outside {
        started: stat.starttime,
    })
}

/// Whether that is a task of the job, or a zombie of it.
pub(super) fn is_of_the_job(task: i32, collector: &Collector) -> bool {
    let has_ended_in_it = |stat: Stat| {
        matches!(stat.state, TaskState::Zombie) && collector.tasks.contains(&stat.ppid.raw())
    };
    collector.tasks.contains(&task) || read_stat(Pid(task)).is_ok_and(has_ended_in_it)
}

/// Captures a namespace file (`/proc/PID/ns/KIND`, namespaces(7)) of a namespace of the job; the restored job has one
/// of that kind too.
fn namespace(
    source: &Source,
    look: &Look,
    (kind, inode): (&str, u64),
    collector: &Collector,
) -> Result<ProcFile, Box<Obstacle>> {
    let own = std::fs::metadata(source.dir.join("ns").join(kind));
    let process = collector
        .first
        .filter(|_| own.is_ok_and(|m| m.ino() == inode));
    let Some(process) = process else {
        return Err(Box::new(Obstacle::new(
            look.object(source),
            format!("is a handle of another {kind} namespace than its own, which is not supported"),
            "close it before the checkpoint",
        )));
    };
    Ok(ProcFile {
        path: format!("/proc/{process}/ns/{kind}").into(),
        process,
        thread: None,
        of: Of::Job,
        offset: 0,
    })
}

/// Whether a directory is in `/proc/PID` of a process of the job, and so exists when that process does.
pub fn is_of_job(path: &Path, snapshot: &Snapshot) -> bool {
    let below = path.strip_prefix("/proc").ok();
    let number = below.and_then(|path| path.iter().next()?.to_str()?.parse().ok());
    number.is_some_and(|pid: i32| snapshot.processes.iter().any(|p| p.pid == pid))
}

impl OpenFile for ProcFile {
    fn capture(sight: &Sight, collector: &mut Collector) -> Captured {
        let captured = match &sight.look.link {
            FdLink::File { path, deleted } if is_of_process(sight.look, path) => {
                capture(sight.source, sight.look, path, *deleted, collector)
            }
            FdLink::Namespace(kind, inode) => {
                namespace(sight.source, sight.look, (kind, *inode), collector)
            }
            _ => return None,
        };
        Some(captured.map(Into::into))
    }

    fn class(&self) -> &'static str {
        "proc"
    }

    fn label(&self) -> String {
        self.path.shown()
    }

    fn object(&self) -> String {
        format!("the open file {}", self.path.shown())
    }

    fn offset(&self) -> Option<u64> {
        Some(self.offset)
    }

    /// For the copy, processes outside the job count as ended.
    fn substitute(&mut self, _: &mut u32, _: &mut dyn Substitutes) -> crate::Result<()> {
        if matches!(self.of, Of::Outside { .. }) {
            self.of = Of::Ended;
        }
        Ok(())
    }

    fn opened(&self) -> Opened {
        Opened::WithFlags
    }

    /// It may need other tasks, or the first process with its own descriptors.
    fn is_late(&self, first: Option<i32>) -> bool {
        self.of == Of::Job
            && (Some(self.process) != first || self.below().starts_with("task") || self.is_link())
    }

    fn open(&self, place: &Place, plan: &mut Builder) -> Result<(), Vec<Obstacle>> {
        let Place {
            index,
            flags,
            at,
            snapshot,
            ..
        } = *place;
        if self.is_late(snapshot.processes.first().map(|p| p.pid)) {
            let root = plan.path(Path::new("/"));
            let handle = (libc::O_PATH | libc::O_DIRECTORY) as u64;
            let args = [libc::AT_FDCWD as u64, root, handle, 0];
            plan.expect(libc::SYS_openat, &args, 0, || self.object());
            super::place(0, at, plan, || self.object());
            return Ok(());
        }
        let is_there = match self.of {
            Of::Job => true,
            Of::Ended => false,
            Of::Outside { started } => {
                let same = read_stat(Pid(self.process)).is_ok_and(|s| s.starttime == started);
                let taken = place.options.files == FilesPolicy::Adopt && self.path.exists();
                if !same && !taken {
                    plan.warn(format!(
                        "{} is of {}, which is another process now: reads fail as of an ended process",
                        self.object(),
                        process_name(Pid(self.process))
                    ));
                }
                same || taken
            }
        };
        match is_there {
            true => {
                let args = self.open_args(&self.path, flags, plan);
                plan.expect(libc::SYS_openat, &args, 0, || self.object());
                super::place(0, at, plan, || self.object());
            }
            false => plan.inherit(at, Inherited::EndedProcFile(index)),
        }
        self.seek(at, flags, plan);
        Ok(())
    }

    fn open_late(&self, flags: u32, at: i32, process: &Process, plan: &mut Builder) {
        let inside = self.path.strip_prefix(&process.root);
        let path = inside.map_or_else(|_| self.path.clone(), |path| Path::new("/").join(path));
        let args = self.open_args(&path, flags, plan);
        plan.expect(libc::SYS_openat, &args, at as u64, || self.object());
        self.seek(at, flags, plan);
    }
}

impl ProcFile {
    /// Whether it has a name in that root directory.
    pub(super) fn is_below(&self, root: &Path) -> bool {
        self.path.starts_with(root)
    }

    /// Whether it belongs to a descriptor or a mapping.
    fn is_link(&self) -> bool {
        let rest = self.below();
        let parents = ["fd", "fdinfo", "map_files"];
        rest.components().count() > 1 && parents.iter().any(|name| rest.starts_with(name))
    }

    /// Its path in the directory of its process.
    fn below(&self) -> &Path {
        let number = self.process.to_string();
        let mut rest = self.path.components();
        match rest.find(|c| c.as_os_str() == number.as_str()) {
            Some(_) => rest.as_path(),
            None => Path::new(""),
        }
    }

    /// Only the kernel creates names in a /proc, so it may be opened by name.
    fn open_args(&self, path: &Path, flags: u32, plan: &mut Builder) -> [u64; 4] {
        let path = plan.path(path);
        let flags = super::reopen_flags(flags);
        [libc::AT_FDCWD as u64, path, flags.into(), 0]
    }

    fn seek(&self, at: i32, flags: u32, plan: &mut Builder) {
        if self.offset != 0 && flags as i32 & libc::O_PATH == 0 && self.of != Of::Ended {
            let args = [at as u64, self.offset, libc::SEEK_SET as u64];
            let warning = format!("{} is read from its beginning again", self.object());
            plan.try_syscall(libc::SYS_lseek, &args, &warning);
        }
    }

    /// Makes a description of it for a process that has ended: with the same pid if possible.
    ///
    /// # Errors
    /// Those of clone3(2) and open(2).
    pub fn of_ended(&self, flags: u32) -> std::io::Result<OwnedFd> {
        let last = self.thread.unwrap_or(self.process);
        let open = |pid: i32| {
            let rest = self.below();
            let mut mount = self.path.ancestors().skip(1 + rest.components().count());
            let mut path = mount
                .next()
                .unwrap_or(Path::new("/proc"))
                .join(pid.to_string());
            match self.thread {
                // A single-threaded process substitutes for a multithreaded one.
                Some(thread) => {
                    path.extend(["task", &pid.to_string()]);
                    let task = Path::new("task").join(thread.to_string());
                    path.push(rest.strip_prefix(task).unwrap_or(Path::new("")));
                }
                None => path.push(rest),
            }
            let access = flags as i32 & libc::O_ACCMODE;
            let others = super::reopen_flags(flags) as i32 & !libc::O_ACCMODE;
            OpenOptions::new()
                .read(access != libc::O_WRONLY)
                .write(access != libc::O_RDONLY)
                .custom_flags(others)
                .open(path)
                .map(File::into)
        };
        with_child(last, open)
    }
}

/// The result of `open` for a child of ours, which is then ended and reaped. The child has the pid `wanted` if that
/// is free and we may choose; `open` gets its pid.
fn with_child<T>(wanted: i32, open: impl FnOnce(i32) -> std::io::Result<T>) -> std::io::Result<T> {
    let (wait, go) = ckpt_sys::pipes::pipe()?;
    let child = match process::fork_under(wanted).or_else(|_| process::fork())? {
        Fork::Parent(child) => child,
        Fork::Child => {
            drop(go);
            ckpt_sys::events::wait_for_hangup(wait);
            process::leave(0)
        }
    };
    let opened = open(child);
    drop(go);
    let _ = process::end_of(child);
    opened
}
