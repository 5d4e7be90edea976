//! Tasks, relations and the small files of a process: proc(5).

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::parse::{dec, fields, hex, lines};
use super::{Comm, ProcDir, ProcRoot, stat};
use crate::{Error, Pid, Result, Tid};

/// All tasks of a process, in the order of their ids.
///
/// # Errors
/// See [`ProcDir::read`].
pub fn list_tasks(process: impl Into<ProcDir>) -> Result<Vec<Tid>> {
    Ok(process
        .into()
        .numbers_in("task")?
        .into_iter()
        .map(Tid)
        .collect())
}

/// All processes that this `/proc` shows.
///
/// # Errors
/// [`Error::Proc`] when the directory cannot be read.
pub fn list_processes(root: &ProcRoot) -> Result<Vec<Pid>> {
    super::numbers_in(root.path())
        .map(|pids| pids.into_iter().map(Pid).collect())
        .map_err(|source| Error::Proc {
            path: root.path().to_owned(),
            source,
        })
}

/// Children of a process, of all its tasks, zombies included, in the kernel's order: wait(2) takes the first that has
/// ended, and adopted children come last.
///
/// `/proc/PID/task/TID/children` is complete only while the tasks are stopped: the kernel walks the list in steps,
/// and children that come and go meanwhile make it skip others. Without that file (`CONFIG_PROC_CHILDREN`) the
/// parents of all processes are read, in the order of ids.
///
/// # Errors
/// See [`ProcDir::read`].
pub fn children(root: &ProcRoot, pid: Pid) -> Result<Vec<Pid>> {
    // There is one file for each task: with very many tasks, reading the parents of all processes is faster.
    const MANY: usize = 512;
    let mut found = Vec::new();
    let tasks = list_tasks(root.process(pid))?;
    if tasks.len() > MANY {
        return children_by_parent(root, pid);
    }
    for tid in tasks {
        let dir = root.task(pid, tid);
        let text = match dir.read_optional("children") {
            // The file is missing, or its task has ended.
            Ok(None) => return children_by_parent(root, pid),
            Ok(Some(text)) => text,
            Err(Error::Died { .. }) if tid != pid.leader() => continue,
            Err(error) => return Err(error),
        };
        for field in fields(&text) {
            found.push(Pid(dec(field).ok_or_else(|| dir.syntax("children", field))?));
        }
    }
    // A child may have passed from thread to thread meanwhile.
    let mut known = HashSet::new();
    found.retain(|pid| known.insert(*pid));
    Ok(found)
}

fn children_by_parent(root: &ProcRoot, parent: Pid) -> Result<Vec<Pid>> {
    let mut found = Vec::new();
    for pid in list_processes(root)? {
        match stat::read_stat(root.process(pid)) {
            Ok(stat) if stat.ppid == parent => found.push(pid),
            Ok(_) | Err(Error::Died { .. }) => {}
            // With hidepid, other users' files cannot be read.
            Err(Error::Proc { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// Name of a task: any bytes, at most 15.
///
/// # Errors
/// See [`ProcDir::read`].
pub fn comm(task: impl Into<ProcDir>) -> Result<Comm> {
    let mut name = task.into().read("comm")?;
    if name.last() == Some(&b'\n') {
        name.pop();
    }
    Ok(Comm(name))
}

/// Its name for a message; need not be known.
pub fn name_to_tell(task: impl Into<ProcDir>) -> String {
    comm(task).map_or_else(|_| "?".into(), |name| name.to_string())
}

/// The arguments, each without its terminating 0. A program may have overwritten them.
///
/// # Errors
/// See [`ProcDir::read`].
pub fn cmdline(process: impl Into<ProcDir>) -> Result<Vec<Vec<u8>>> {
    Ok(strings(&process.into().read("cmdline")?))
}

/// The initial environment of the program.
///
/// # Errors
/// See [`ProcDir::read`]; needs permission to ptrace the process.
pub fn environ(process: impl Into<ProcDir>) -> Result<Vec<Vec<u8>>> {
    Ok(strings(&process.into().read("environ")?))
}

fn strings(text: &[u8]) -> Vec<Vec<u8>> {
    if text.is_empty() {
        return Vec::new();
    }
    let body = text.strip_suffix(b"\0").unwrap_or(text);
    body.split(|&byte| byte == 0).map(<[u8]>::to_vec).collect()
}

/// The auxiliary vector as the kernel keeps it: pairs of 64-bit words, `AT_NULL` included.
///
/// # Errors
/// See [`ProcDir::read`].
pub fn auxv(process: impl Into<ProcDir>) -> Result<Vec<u8>> {
    process.into().read("auxv")
}

/// Value of personality(2).
///
/// # Errors
/// See [`ProcDir::read`].
pub fn personality(task: impl Into<ProcDir>) -> Result<u32> {
    let dir = task.into();
    let text = dir.read("personality")?;
    hex(&text)
        .and_then(|value| value.try_into().ok())
        .ok_or_else(|| dir.syntax("personality", text))
}

/// -1000 to 1000: bias of the OOM killer.
///
/// # Errors
/// See [`ProcDir::read`].
pub fn oom_score_adj(process: impl Into<ProcDir>) -> Result<i32> {
    let dir = process.into();
    let text = dir.read("oom_score_adj")?;
    dec(&text).ok_or_else(|| dir.syntax("oom_score_adj", text))
}

/// The kinds of memory in a core dump, see core(5); `None` without an address space.
///
/// # Errors
/// See [`ProcDir::read`].
pub fn coredump_filter(process: impl Into<ProcDir>) -> Result<Option<u32>> {
    let dir = process.into();
    let Some(text) = dir.read_optional("coredump_filter")? else {
        return Ok(None);
    };
    if text.is_empty() {
        return Ok(None);
    }
    let value = hex(&text).and_then(|value| value.try_into().ok());
    value
        .map(Some)
        .ok_or_else(|| dir.syntax("coredump_filter", text))
}

/// Audit login uid; `None` when unset or when the kernel has no audit.
///
/// # Errors
/// See [`ProcDir::read`].
pub fn loginuid(process: impl Into<ProcDir>) -> Result<Option<u32>> {
    let dir = process.into();
    let Some(text) = dir.read_optional("loginuid")? else {
        return Ok(None);
    };
    let uid: u32 = dec(&text).ok_or_else(|| dir.syntax("loginuid", text))?;
    Ok(Some(uid).filter(|&uid| uid != u32::MAX))
}

/// One line of `cgroup`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    /// Hierarchy, 0 for version 2.
    pub hierarchy: u32,
    /// Controllers, empty for version 2.
    pub controllers: String,
    /// Path below the mount of the hierarchy, seen from our cgroup namespace.
    pub path: Vec<u8>,
}

/// Control groups of a process.
///
/// # Errors
/// See [`ProcDir::read`].
pub fn cgroup(process: impl Into<ProcDir>) -> Result<Vec<Cgroup>> {
    let dir = process.into();
    let text = dir.read_optional("cgroup")?.unwrap_or_default();
    let parse = |line: &[u8]| {
        let mut parts = line.splitn(3, |&byte| byte == b':');
        Some(Cgroup {
            hierarchy: dec(parts.next()?)?,
            controllers: String::from_utf8_lossy(parts.next()?).into_owned(),
            path: parts.next()?.to_vec(),
        })
    };
    let present = lines(&text).filter(|line| !line.is_empty());
    present
        .map(|line| parse(line).ok_or_else(|| dir.syntax("cgroup", line)))
        .collect()
}

/// The executable; `None` for a kernel thread and a zombie. The kernel appends `" (deleted)"` to the path of an
/// unlinked file.
///
/// # Errors
/// See [`ProcDir::read_link`].
pub fn exe(process: impl Into<ProcDir>) -> Result<Option<PathBuf>> {
    link(process.into(), "exe")
}

/// The working directory; `None` for a zombie.
///
/// # Errors
/// See [`ProcDir::read_link`].
pub fn cwd(process: impl Into<ProcDir>) -> Result<Option<PathBuf>> {
    link(process.into(), "cwd")
}

/// The root directory; `None` for a zombie.
///
/// # Errors
/// See [`ProcDir::read_link`].
pub fn root(process: impl Into<ProcDir>) -> Result<Option<PathBuf>> {
    link(process.into(), "root")
}

fn link(dir: ProcDir, name: &str) -> Result<Option<PathBuf>> {
    match dir.read_link(name) {
        Ok(target) => Ok(Some(PathBuf::from(OsStr::from_bytes(&target)))),
        Err(Error::Proc { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_that_are_empty() {
        assert_eq!(strings(b"a\0\0b\0"), [&b"a"[..], b"", b"b"]);
        assert_eq!(strings(b"overwritten"), [b"overwritten"]);
        assert_eq!(strings(b"\0"), [b""]);
        assert!(strings(b"").is_empty());
    }

    #[test]
    fn what_we_know_of_ourselves() {
        assert!(
            list_tasks(Pid::own())
                .unwrap()
                .contains(&Pid::own().leader())
        );
        assert_eq!(
            exe(Pid::own()).unwrap(),
            Some(std::env::current_exe().unwrap())
        );
        assert_eq!(
            cwd(Pid::own()).unwrap(),
            Some(std::env::current_dir().unwrap())
        );
        let arguments: Vec<_> = std::env::args().map(String::into_bytes).collect();
        assert_eq!(cmdline(Pid::own()).unwrap(), arguments);
        let vector = auxv(Pid::own()).unwrap();
        assert_eq!(vector.len() % 16, 0);
        assert_eq!(vector[vector.len() - 16..], [0; 16]);
        assert!(oom_score_adj(Pid::own()).unwrap() >= -1000);
        personality(Pid::own()).unwrap();
        coredump_filter(Pid::own()).unwrap();
        loginuid(Pid::own()).unwrap();
        cgroup(Pid::own()).unwrap();
    }

    #[test]
    fn both_ways_to_find_children_agree() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = Pid(child.id() as i32);
        let root = ProcRoot::default();
        // Other tests have children too: look for this one only.
        let by_file = children(&root, Pid::own()).unwrap();
        let by_parent = children_by_parent(&root, Pid::own()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(by_file.contains(&pid) && by_parent.contains(&pid));
        assert!(matches!(children(&root, pid), Err(Error::Died { .. })));
    }

    #[test]
    fn captured_files_read_like_live_ones() {
        let root = std::env::temp_dir().join(format!("ckpt-proc-{}", Pid::own()));
        let dir = root.join("42");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("cgroup"), "0::/a:b\n4:cpu,memory:/x\n").unwrap();
        std::fs::write(dir.join("loginuid"), "4294967295").unwrap();
        std::fs::write(dir.join("comm"), b"a\n)\xff\n").unwrap();
        std::fs::write(dir.join("coredump_filter"), "x").unwrap();
        let process = ProcRoot::new(&root).process(Pid(42));
        let groups = cgroup(&process).unwrap();
        let (login, name) = (loginuid(&process).unwrap(), comm(&process).unwrap());
        let (odd, missing) = (coredump_filter(&process), oom_score_adj(&process));
        std::fs::remove_dir_all(&root).unwrap();
        assert_eq!(groups[0].path, b"/a:b");
        assert_eq!(
            (groups[1].hierarchy, groups[1].controllers.as_str()),
            (4, "cpu,memory")
        );
        assert_eq!((login, &*name), (None, &b"a\n)\xff"[..]));
        assert!(matches!(odd, Err(Error::ProcSyntax { .. })));
        assert!(matches!(missing, Err(Error::Proc { .. })));
    }
}
