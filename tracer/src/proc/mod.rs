//! Typed readers of `/proc`: one module for each subject, one function for each file of the kernel.
//!
//! Every reader takes `impl Into<ProcDir>`: a [`Pid`], a [`Tid`], a `(Pid, Tid)` pair for
//! `/proc/PID/task/TID`, or a [`ProcDir`] of another [`ProcRoot`] (a `/proc` mounted elsewhere, or a
//! directory of captured files in a test).
//!
//! The parsers work on bytes. Names of programs and files are arbitrary, and `comm` is cut at 15 bytes, possibly
//! inside a UTF-8 character; readers of UTF-8 lines fail on such a job.
//!
//! A missing file of a task that has gone is [`Error::Died`]; a missing file of an existing task (an older kernel, or
//! a zombie) is [`Error::Proc`] with `NotFound`.

mod comm;
pub mod fdinfo;
pub mod fdlink;
pub mod limits;
pub mod maps;
pub mod mounts;
pub mod namespaces;
pub mod pagemap;
mod parse;
pub mod silly;
pub mod stat;
pub mod status;
pub mod syscall;
pub mod tasks;
pub mod timers;
mod vmflags;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

pub use comm::Comm;

use crate::{Error, Pid, Result, Tid};

/// The mount point of procfs. Default: `/proc`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcRoot(PathBuf);

impl Default for ProcRoot {
    fn default() -> Self {
        Self(PathBuf::from("/proc"))
    }
}

impl ProcRoot {
    /// Another mount of procfs (for example of an inner pid namespace), or captured files.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// `/proc/PID`.
    pub fn process(&self, pid: Pid) -> ProcDir {
        ProcDir {
            path: self.0.join(pid.to_string()),
            tid: pid.leader(),
        }
    }

    /// `/proc/PID/task/TID`.
    pub fn task(&self, pid: Pid, tid: Tid) -> ProcDir {
        ProcDir {
            path: self.0.join(format!("{pid}/task/{tid}")),
            tid,
        }
    }
}

/// The directory of one process (`/proc/PID`) or of one task (`/proc/PID/task/TID`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcDir {
    path: PathBuf,
    tid: Tid,
}

impl From<Pid> for ProcDir {
    fn from(pid: Pid) -> Self {
        ProcRoot::default().process(pid)
    }
}

/// `/proc/TID`: not listed for threads other than the leader, but present. Its `stat` sums up the whole process;
/// `(Pid, Tid)` gives the task alone.
impl From<Tid> for ProcDir {
    fn from(tid: Tid) -> Self {
        ProcRoot::default().process(Pid(tid.raw()))
    }
}

impl From<(Pid, Tid)> for ProcDir {
    fn from((pid, tid): (Pid, Tid)) -> Self {
        ProcRoot::default().task(pid, tid)
    }
}

impl From<&ProcDir> for ProcDir {
    fn from(dir: &ProcDir) -> Self {
        dir.clone()
    }
}

impl ProcDir {
    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The task that the directory belongs to; the leader for `/proc/PID`.
    pub fn tid(&self) -> Tid {
        self.tid
    }

    /// Path of a file in the directory.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// Reads a whole file.
    ///
    /// # Errors
    /// [`Error::Died`] when the task is gone, else [`Error::Proc`].
    pub fn read(&self, name: impl AsRef<Path>) -> Result<Vec<u8>> {
        let path = self.join(name);
        let mut text = Vec::new();
        self.read_into(&path, &mut text)
            .map_err(|source| self.error(path, source))?;
        Ok(text)
    }

    /// Reads a whole file; `None` where this kernel has no such file.
    ///
    /// # Errors
    /// [`Error::Died`] when the task is gone, else [`Error::Proc`].
    pub fn read_optional(&self, name: impl AsRef<Path>) -> Result<Option<Vec<u8>>> {
        match self.read(name) {
            Err(Error::Proc { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            other => other.map(Some),
        }
    }

    fn read_into(&self, path: &Path, text: &mut Vec<u8>) -> io::Result<()> {
        // The size of files in /proc is 0, so it is not queried (as std::fs::read would); a seq_file gives about a
        // page for each read.
        text.reserve(16 << 10);
        File::open(path)?.take(u64::MAX).read_to_end(text)?;
        Ok(())
    }

    /// Target of a symbolic link, as the kernel prints it (`" (deleted)"` included).
    ///
    /// # Errors
    /// [`Error::Died`] when the task is gone, else [`Error::Proc`].
    pub fn read_link(&self, name: impl AsRef<Path>) -> Result<Vec<u8>> {
        let path = self.join(name);
        match std::fs::read_link(&path) {
            Ok(target) => Ok(OsString::from(target).into_vec()),
            Err(source) => Err(self.error(path, source)),
        }
    }

    /// The numeric names in a subdirectory, ascending.
    pub(crate) fn numbers_in(&self, name: &str) -> Result<Vec<i32>> {
        let path = self.join(name);
        let numbers = numbers_in(&path).map_err(|source| self.error(path, source))?;
        // The kernel lists a directory of a task that has died as empty.
        if numbers.is_empty() && !self.path.exists() {
            return Err(Error::Died { tid: self.tid });
        }
        Ok(numbers)
    }

    /// Distinguishes a dead task from a missing file.
    pub(crate) fn error(&self, path: PathBuf, source: io::Error) -> Error {
        let gone = match source.raw_os_error() {
            Some(libc::ESRCH) => true,
            Some(libc::ENOENT) => !self.path.exists(),
            _ => false,
        };
        if gone {
            Error::Died { tid: self.tid }
        } else {
            Error::Proc { path, source }
        }
    }

    /// An error for a part of a file that was not understood.
    pub(crate) fn syntax(&self, name: impl AsRef<Path>, what: impl AsRef<[u8]>) -> Error {
        let what = String::from_utf8_lossy(what.as_ref()).trim_end().to_owned();
        Error::ProcSyntax {
            path: self.join(name),
            what,
        }
    }
}

fn numbers_in(path: &Path) -> io::Result<Vec<i32>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(path)? {
        if let Some(number) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_process_died_but_a_missing_file_did_not() {
        let own = Pid::own();
        // pid_max is at most 4 Mi.
        let no_process = ProcDir::from(Pid(0x7fff_fff0));
        assert!(matches!(
            no_process.read("status"),
            Err(Error::Died {
                tid: Tid(0x7fff_fff0)
            })
        ));
        assert!(matches!(
            ProcDir::from(own).read("no-such-file"),
            Err(Error::Proc { .. })
        ));
        assert!(
            ProcDir::from(own)
                .read_optional("no-such-file")
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn numbers_of_own_tasks_include_the_own_one() {
        let own = Pid::own();
        assert!(
            ProcDir::from(own)
                .numbers_in("task")
                .unwrap()
                .contains(&own.raw())
        );
    }
}
