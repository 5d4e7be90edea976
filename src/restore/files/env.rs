//! Values for a restored job (`--env NAME=VALUE`): lines in the file that the job's environment names in
//! `CKPT_RESTORE_ENV`. The environment itself is in the program's memory, and is not changed.
//!
//! In a namespace the file is a mount that only this job sees, so that each clone has its own; otherwise it replaces
//! the file of that name when the job is released.

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use ckpt_sys::mounts;
use nix::fcntl::AtFlags;
use nix::unistd::{AccessFlags, faccessat};

use crate::error::{Error, Obstacle, Result};
use crate::objects::memory::image::{ImageMemory, TargetMemory};
use crate::objects::memory::mapped::MappedFiles;
use crate::objects::open::Handle;
use crate::objects::rights::{self, Rights};
use crate::restore::Opened;

/// The variable that names the file.
const VARIABLE: &[u8] = b"CKPT_RESTORE_ENV=";

/// The values and their file.
#[derive(Debug)]
pub struct HandOver {
    path: PathBuf,
    text: String,
    uid: u32,
    gid: u32,
    rights: Option<Rights>,
}

/// A file with a temporary name until the job is released; removed unless it got its own.
#[derive(Debug)]
pub struct Prepared {
    at: PathBuf,
    path: PathBuf,
    rights: Option<Rights>,
}

/// Parses `NAME=VALUE`.
///
/// # Errors
/// One sentence on what is wrong with it.
pub fn parse(text: &str) -> Result<(String, String), String> {
    let (name, value) = text
        .split_once('=')
        .ok_or("NAME=VALUE is expected, such as SEED=7")?;
    let letter = |c: char| c.is_ascii_alphabetic() || c == '_';
    let right = name.starts_with(letter) && name.chars().all(|c| letter(c) || c.is_ascii_digit());
    match right {
        true if !value.contains(['\n', '\0']) => Ok((name.into(), value.into())),
        true => Err("the value has more than one line".into()),
        false => Err(format!("{name:?} is not the name of a variable")),
    }
}

impl HandOver {
    /// The values for a job; `None` without values.
    ///
    /// # Errors
    /// When the job's environment does not name a file.
    pub fn of(opened: &Opened<'_>, values: &[(String, String)]) -> Result<Option<Self>> {
        if values.is_empty() {
            return Ok(None);
        }
        let Some(path) = path_of(opened) else {
            return Err(Error::refuse(Obstacle::new(
                "--env",
                "has no file to be written to: the job's environment has no CKPT_RESTORE_ENV with an \
                 absolute path",
                "start the program with CKPT_RESTORE_ENV=PATH next time, and leave --env out for \
                 this image",
            )));
        };
        let who = &opened.snapshot.processes[0].threads[0].credentials;
        let lines = values
            .iter()
            .map(|(name, value)| format!("{name}={value}\n"));
        Ok(Some(Self {
            path,
            text: lines.collect(),
            uid: who.uid[1],
            gid: who.gid[1],
            rights: opened.rights(),
        }))
    }

    /// Writes the file under a temporary name in the same directory.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn prepare(&self) -> Result<Prepared> {
        let mut name = self.path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".ckpt-{}", std::process::id()));
        let prepared = Prepared {
            at: self.path.with_file_name(name),
            path: self.path.clone(),
            rights: self.rights.clone(),
        };
        let written = rights::with(self.rights.as_ref(), || self.write(&prepared.at));
        written.map_err(self.failed())?;
        Ok(prepared)
    }

    fn failed(&self) -> impl Fn(io::Error) -> Error {
        Error::file("write", &self.path)
    }

    /// Readable by the job's user only. The job chose the path, so the directory must be writable for its user.
    fn write(&self, at: &Path) -> io::Result<()> {
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let mut file = options.open(at)?;
        if nix::unistd::geteuid().is_root() {
            fchown(&file, Some(self.uid), Some(self.gid))?;
        }
        file.write_all(self.text.as_bytes())
    }

    /// Mounts the file over its path in a mount namespace of the job's own. The file below is unchanged; a missing
    /// one is created empty.
    ///
    /// # Errors
    /// When that is refused.
    pub fn mount(&self) -> Result<()> {
        self.mounted().map_err(self.failed())
    }

    fn mounted(&self) -> io::Result<()> {
        let place = rights::with(self.rights.as_ref(), || self.place())?;
        // A temporary mount point: no other process is in this namespace yet.
        let over = c"/proc";
        let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
        mounts::mount(c"tmpfs", over, c"tmpfs", flags)?;
        let tree = self
            .write(Path::new("/proc/env"))
            .and_then(|()| Ok(mounts::copy_of(c"/proc/env")?));
        mounts::detach(over)?;
        Ok(mounts::put(tree?, place)?)
    }

    /// The existing file, if its user may write to it; otherwise a new, empty one.
    fn place(&self) -> io::Result<Handle> {
        let mut options = OpenOptions::new();
        match options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&self.path)
        {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            made => drop(made?),
        }
        let place = Handle::of_regular(&self.path)?;
        // /proc is not mounted for us yet.
        let itself = AtFlags::AT_EACCESS | AtFlags::AT_EMPTY_PATH;
        faccessat(&place, "", AccessFlags::W_OK, itself)?;
        Ok(place)
    }
}

/// The value in the initial environment of the root, as its memory has it now.
fn path_of(opened: &Opened<'_>) -> Option<PathBuf> {
    const LARGEST: u64 = 1 << 22;
    let process = &opened.snapshot.processes[0];
    let layout = &process.memory.layout;
    let len = layout.env_end.checked_sub(layout.env_start)?.min(LARGEST);
    let mut environment = vec![0; len as usize];
    let files = MappedFiles::new(&opened.snapshot);
    let memory = ImageMemory::new(&opened.image, &opened.snapshot, process, &files);
    let read = memory.read(layout.env_start, &mut environment);
    let mut words = environment[..read].split(|byte| *byte == 0);
    let value = words.find_map(|word| word.strip_prefix(VARIABLE))?;
    let path = PathBuf::from(OsStr::from_bytes(value));
    path.is_absolute().then_some(path)
}

impl Prepared {
    /// Gives it its name.
    ///
    /// # Errors
    /// When that is refused.
    pub fn publish(self) -> Result<()> {
        let rename = || fs::rename(&self.at, &self.path);
        rights::with(self.rights.as_ref(), rename).map_err(Error::file("rename", &self.at))
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        let _ = rights::with(self.rights.as_ref(), || fs::remove_file(&self.at));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_parsed() {
        assert_eq!(parse("SEED=7").unwrap(), ("SEED".into(), "7".into()));
        assert_eq!(parse("a_1==").unwrap(), ("a_1".into(), "=".into()));
        for bad in ["", "=1", "1a=2", "a b=1", "a", "a=1\n2"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
