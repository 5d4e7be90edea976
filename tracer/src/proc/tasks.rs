//! Tasks, relations and the small files of a process: proc(5).

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
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

/// Children of a process, of all its tasks, zombies included, in the order of their ids.
///
/// `/proc/PID/task/TID/children` is complete only while the tasks are stopped: the kernel walks the
/// list in steps, and children that come and go meanwhile make it skip others. Without that file
/// (`CONFIG_PROC_CHILDREN`) every process's parent is looked at.
///
/// # Errors
/// See [`ProcDir::read`].
pub fn children(root: &ProcRoot, pid: Pid) -> Result<Vec<Pid>> {
    // A file a task: for very many tasks the parents of all processes are looked at sooner.
    const MANY: usize = 512;
    let mut found = Vec::new();
    let tasks = list_tasks(root.process(pid))?;
    if tasks.len() > MANY {
        return children_by_parent(root, pid);
    }
    for tid in tasks {
        let dir = root.task(pid, tid);
        let text = match dir.read_optional("children") {
            // The file is missing, but so may the task be that had it.
            Ok(None) => return children_by_parent(root, pid),
            Ok(Some(text)) => text,
            Err(Error::Died { .. }) if tid != pid.leader() => continue,
            Err(error) => return Err(error),
        };
        for field in fields(&text) {
            found.push(Pid(dec(field).ok_or_else(|| dir.syntax("children", field))?));
        }
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

fn children_by_parent(root: &ProcRoot, parent: Pid) -> Result<Vec<Pid>> {
    let mut found = Vec::new();
    for pid in list_processes(root)? {
        match stat::read_stat(root.process(pid)) {
            Ok(stat) if stat.ppid == parent => found.push(pid),
            Ok(_) | Err(Error::Died { .. }) => {}
            // With hidepid, others' files cannot be read; they are not ours to checkpoint.
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

/// The arguments, each without its terminating 0. A program may have overwritten them.
///
/// # Errors
/// See [`ProcDir::read`].
pub fn cmdline(process: impl Into<ProcDir>) -> Result<Vec<Vec<u8>>> {
    Ok(strings(&process.into().read("cmdline")?))
}

/// The environment that the program was started with.
///
/// # Errors
/// See [`ProcDir::read`]; reading it takes the right to ptrace the process.
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

/// -1000 to 1000: how gladly the kernel kills the process when memory is short.
///
/// # Errors
/// See [`ProcDir::read`].
pub fn oom_score_adj(process: impl Into<ProcDir>) -> Result<i32> {
    let dir = process.into();
    let text = dir.read("oom_score_adj")?;
    dec(&text).ok_or_else(|| dir.syntax("oom_score_adj", text))
}

/// Which kinds of memory a core dump holds, see core(5); `None` without an address space.
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

/// User at login; `None` when unset or when the kernel has no audit.
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

/// The kernel function that a task waits in; empty when it runs or when we may not know.
///
/// # Errors
/// See [`ProcDir::read`].
pub fn wchan(task: impl Into<ProcDir>) -> Result<String> {
    let text = task.into().read_optional("wchan")?.unwrap_or_default();
    Ok(Some(String::from_utf8_lossy(&text).into_owned())
        .filter(|name| name != "0")
        .unwrap_or_default())
}

/// What `/proc/PID/task/TID/syscall` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InSyscall {
    /// It runs, and there is nothing to read.
    Running,
    /// It is blocked or stopped, outside a system call.
    Outside {
        /// Stack pointer.
        sp: u64,
        /// Instruction pointer.
        pc: u64,
    },
    /// It is blocked or stopped in a system call.
    Inside {
        /// Number of the call.
        nr: i64,
        /// Its arguments.
        args: [u64; 6],
        /// Stack pointer.
        sp: u64,
        /// Instruction pointer, behind the `syscall` instruction.
        pc: u64,
    },
}

/// The system call that a task is in.
///
/// # Errors
/// See [`ProcDir::read`]; `EPERM` without the right to ptrace it.
pub fn syscall(task: impl Into<ProcDir>) -> Result<InSyscall> {
    let dir = task.into();
    let text = dir.read("syscall")?;
    parse_syscall(&text).ok_or_else(|| dir.syntax("syscall", &text))
}

fn parse_syscall(text: &[u8]) -> Option<InSyscall> {
    let all: Vec<&[u8]> = fields(text).collect();
    match *all.as_slice() {
        [b"running"] => Some(InSyscall::Running),
        [b"-1", sp, pc] => Some(InSyscall::Outside {
            sp: hex(sp)?,
            pc: hex(pc)?,
        }),
        [nr, ref args @ .., sp, pc] if args.len() == 6 => {
            let mut values = [0; 6];
            for (value, text) in values.iter_mut().zip(args) {
                *value = hex(text)?;
            }
            Some(InSyscall::Inside {
                nr: dec(nr)?,
                args: values,
                sp: hex(sp)?,
                pc: hex(pc)?,
            })
        }
        _ => None,
    }
}

/// The executable; `None` for a kernel thread and a zombie. The kernel appends `" (deleted)"`
/// to the path of a file that is no longer there.
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

/// Namespaces of a process: name of the link (`pid`, `pid_for_children`, `time` …) and inode, in
/// the order of the names.
///
/// # Errors
/// See [`ProcDir::read_link`]; `EACCES` without the right to ptrace it.
pub fn namespaces(process: impl Into<ProcDir>) -> Result<Vec<(String, u64)>> {
    let dir = process.into();
    let path = dir.join("ns");
    let failed = |source| dir.error(path.clone(), source);
    std::fs::metadata(&path).map_err(failed)?;
    let mut found = Vec::new();
    // The names are ours: only its user may list the directory of a process, which whoever has its user
    // namespace need not be.
    for entry in std::fs::read_dir("/proc/self/ns").map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let link = path.join(&name);
        match std::fs::metadata(&link) {
            Ok(metadata) => found.push((name, metadata.ino())),
            // pid_for_children before the first child of a new namespace.
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(dir.error(link, source)),
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Offset of one clock in the time namespace of a process's children.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClockOffset {
    /// `monotonic` or `boottime`.
    pub clock: String,
    /// Seconds.
    pub seconds: i64,
    /// Nanoseconds, 0 to 999999999.
    pub nanoseconds: i64,
}

/// Clock offsets; empty on a kernel without time namespaces.
///
/// # Errors
/// See [`ProcDir::read`].
pub fn timens_offsets(process: impl Into<ProcDir>) -> Result<Vec<ClockOffset>> {
    let dir = process.into();
    let text = dir.read_optional("timens_offsets")?.unwrap_or_default();
    let parse = |line: &[u8]| {
        let mut parts = fields(line);
        let clock = match parts.next()? {
            // Linux before 5.7 printed the number of the clock.
            b"1" => "monotonic".to_owned(),
            b"7" => "boottime".to_owned(),
            name => String::from_utf8_lossy(name).into_owned(),
        };
        Some(ClockOffset {
            clock,
            seconds: dec(parts.next()?)?,
            nanoseconds: dec(parts.next()?)?,
        })
    };
    let present = lines(&text).filter(|line| !line.is_empty());
    present
        .map(|line| parse(line).ok_or_else(|| dir.syntax("timens_offsets", line)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Pid {
        Pid(std::process::id() as i32)
    }

    #[test]
    fn arguments_that_are_empty() {
        assert_eq!(strings(b"a\0\0b\0"), [&b"a"[..], b"", b"b"]);
        assert_eq!(strings(b"overwritten"), [b"overwritten"]);
        assert_eq!(strings(b"\0"), [b""]);
        assert!(strings(b"").is_empty());
    }

    #[test]
    fn system_calls() {
        assert_eq!(parse_syscall(b"running\n"), Some(InSyscall::Running));
        let outside = InSyscall::Outside {
            sp: 0x7ffc_0000_0000,
            pc: 0x40_1000,
        };
        assert_eq!(
            parse_syscall(b"-1 0x7ffc00000000 0x401000\n"),
            Some(outside)
        );
        let inside = InSyscall::Inside {
            nr: 35,
            args: [1, 2, 3, 4, 5, 6],
            sp: 0x7f,
            pc: 0x40,
        };
        assert_eq!(
            parse_syscall(b"35 0x1 0x2 0x3 0x4 0x5 0x6 0x7f 0x40\n"),
            Some(inside)
        );
        assert_eq!(parse_syscall(b"35 0x1 0x2\n"), None);
        assert_eq!(parse_syscall(b"0\n"), None);
    }

    #[test]
    fn what_we_know_of_ourselves() {
        assert!(list_tasks(own()).unwrap().contains(&own().leader()));
        assert_eq!(exe(own()).unwrap(), Some(std::env::current_exe().unwrap()));
        assert_eq!(cwd(own()).unwrap(), Some(std::env::current_dir().unwrap()));
        let arguments: Vec<_> = std::env::args().map(String::into_bytes).collect();
        assert_eq!(cmdline(own()).unwrap(), arguments);
        let vector = auxv(own()).unwrap();
        assert_eq!(vector.len() % 16, 0);
        assert_eq!(vector[vector.len() - 16..], [0; 16]);
        assert!(
            namespaces(own())
                .unwrap()
                .iter()
                .any(|(name, inode)| name == "pid" && *inode != 0)
        );
        assert!(oom_score_adj(own()).unwrap() >= -1000);
        personality(own()).unwrap();
        coredump_filter(own()).unwrap();
        loginuid(own()).unwrap();
        cgroup(own()).unwrap();
        timens_offsets(own()).unwrap();
        wchan(own()).unwrap();
    }

    #[test]
    fn both_ways_to_find_children_agree() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = Pid(child.id() as i32);
        let root = ProcRoot::default();
        // Other tests have children that come and go: look for this one only.
        let by_file = children(&root, own()).unwrap();
        let by_parent = children_by_parent(&root, own()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(by_file.contains(&pid) && by_parent.contains(&pid));
        assert!(matches!(children(&root, pid), Err(Error::Died { .. })));
    }

    #[test]
    fn captured_files_read_like_live_ones() {
        let root = std::env::temp_dir().join(format!("ckpt-proc-{}", own()));
        let dir = root.join("42");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("cgroup"), "0::/a:b\n4:cpu,memory:/x\n").unwrap();
        std::fs::write(dir.join("timens_offsets"), "monotonic  -5  7\n7 1 2\n").unwrap();
        std::fs::write(dir.join("loginuid"), "4294967295").unwrap();
        std::fs::write(dir.join("comm"), b"a\n)\xff\n").unwrap();
        std::fs::write(dir.join("coredump_filter"), "x").unwrap();
        let process = ProcRoot::new(&root).process(Pid(42));
        let groups = cgroup(&process).unwrap();
        let offsets = timens_offsets(&process).unwrap();
        let (login, name) = (loginuid(&process).unwrap(), comm(&process).unwrap());
        let (odd, missing) = (coredump_filter(&process), oom_score_adj(&process));
        std::fs::remove_dir_all(&root).unwrap();
        assert_eq!(groups[0].path, b"/a:b");
        assert_eq!(
            (groups[1].hierarchy, groups[1].controllers.as_str()),
            (4, "cpu,memory")
        );
        assert_eq!(
            (offsets[0].clock.as_str(), offsets[0].seconds),
            ("monotonic", -5)
        );
        assert_eq!(
            (offsets[1].clock.as_str(), offsets[1].nanoseconds),
            ("boottime", 2)
        );
        assert_eq!((login, &*name), (None, &b"a\n)\xff"[..]));
        assert!(matches!(odd, Err(Error::ProcSyntax { .. })));
        assert!(matches!(missing, Err(Error::Proc { .. })));
    }
}
