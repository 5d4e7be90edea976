//! What can be seen of a process from outside: the same before and after a checkpoint, and before
//! a kill and after the restore.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::time::Duration;

use super::wait::until;

/// Lines of `/proc/PID/status` that a checkpoint does not change. `FDSize` is the room in the
/// descriptor table, which only grows; the memory in use and the switches are statistics.
const STATUS: &[&str] = &[
    "Name",
    "Umask",
    "Uid",
    "Gid",
    "FDSize",
    "Groups",
    "NStgid",
    "NSpid",
    "NSpgid",
    "NSsid",
    "VmLck",
    "VmPin",
    "VmExe",
    "VmLib",
    "VmStk",
    "Threads",
    "SigIgn",
    "SigCgt",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
    "THP_enabled",
    "Cpus_allowed",
    "Mems_allowed",
    "x86_Thread_features",
];
/// Likewise of a thread.
const THREAD: &[&str] = &[
    "Name",
    "SigBlk",
    "Seccomp",
    "CapEff",
    "Cpus_allowed",
    "Uid",
    "Gid",
];
/// Fields of `/proc/PID/stat`, by their number in proc(5): priority, nice, the code, the stack's
/// start, exit signal, realtime priority, policy, then data, brk, arguments and environment.
const STAT: &[usize] = &[18, 19, 26, 27, 28, 38, 40, 41, 45, 46, 47, 48, 49, 50, 51];

/// One look: what is seen under each name.
pub type Look = BTreeMap<String, String>;

/// Looks at a process.
pub fn look(pid: i32) -> Look {
    let proc = format!("/proc/{pid}");
    let mut seen = Look::new();
    for file in [
        "cmdline",
        "environ",
        "comm",
        "limits",
        "cgroup",
        "personality",
        "oom_score_adj",
        "timers",
    ] {
        let text = fs::read(format!("{proc}/{file}")).unwrap_or_default();
        seen.insert(
            file.into(),
            String::from_utf8_lossy(&text).replace('\0', "\\0"),
        );
    }
    for file in [
        "coredump_filter",
        "timerslack_ns",
        "loginuid",
        "uid_map",
        "mountinfo",
    ] {
        let text = read_lossy(format!("{proc}/{file}")).unwrap_or_default();
        seen.insert(file.into(), text);
    }
    let auxv = fs::read(format!("{proc}/auxv")).unwrap_or_default();
    seen.insert("auxv".into(), format!("{auxv:02x?}"));
    for link in ["cwd", "exe", "root"] {
        seen.insert(link.into(), link_of(format!("{proc}/{link}")));
    }
    let smaps = read_lossy(format!("{proc}/smaps")).unwrap_or_default();
    seen.insert("maps".into(), mappings(&smaps));
    status(&mut seen, "status", &format!("{proc}/status"), STATUS);
    stat(&mut seen, "stat", &format!("{proc}/stat"));
    for tid in numbers(&format!("{proc}/task")) {
        let task = format!("{proc}/task/{tid}");
        status(
            &mut seen,
            &format!("task {tid}"),
            &format!("{task}/status"),
            THREAD,
        );
        stat(
            &mut seen,
            &format!("task {tid} stat"),
            &format!("{task}/stat"),
        );
    }
    for fd in numbers(&format!("{proc}/fd")) {
        let target = without_number(&link_of(format!("{proc}/fd/{fd}")));
        let info = read_lossy(format!("{proc}/fdinfo/{fd}")).unwrap_or_default();
        let nameless = target.contains(":[]") || target.ends_with("(deleted)");
        let of_file = |line: &str| match nameless && line.starts_with("lock:") {
            true => without_inode(line),
            false => line.to_owned(),
        };
        let info = info.lines().filter(stays).map(watched).map(of_file);
        let mut info: Vec<String> = info.collect();
        // An epoll descriptor lists what it watches in the order of kernel addresses.
        info.sort_unstable();
        seen.insert(format!("fd {fd}"), format!("{target} {}", info.join(" ")));
    }
    seen
}

fn link_of(path: String) -> String {
    fs::read_link(path).map_or_else(|error| error.to_string(), |to| to.display().to_string())
}

/// Names in a directory that are numbers: in /proc, pids.
pub fn numbers(dir: &str) -> Vec<i32> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// `pipe:[123]` and `socket:[123]` without the number; a deleted file is another after a restore,
/// nameless from the beginning.
fn without_number(target: &str) -> String {
    match target.split_once(":[") {
        Some((kind @ ("pipe" | "socket"), _)) => format!("{kind}:[]"),
        // Other tests take such numbers, too.
        _ if target.starts_with("/dev/pts/") => "/dev/pts/*".into(),
        _ => without_name(target),
    }
}

fn without_name(target: &str) -> String {
    match target.rsplit_once('/') {
        Some((dir, name)) if name.ends_with("(deleted)") => format!("{dir}/* (deleted)"),
        _ => target.into(),
    }
}

/// What an epoll descriptor watches, without the inode's number.
fn watched(line: &str) -> &str {
    line.split_once(" ino:")
        .filter(|_| line.starts_with("tfd:"))
        .map_or(line, |(start, _)| start)
}

/// A lock of what has no name, which is another file after a restore.
fn without_inode(lock: &str) -> String {
    let words = lock
        .split(' ')
        .filter(|word| word.matches(':').count() != 2);
    words.collect::<Vec<_>>().join(" ")
}

/// A line of fdinfo that stays. The inode and mount of a pipe or memfd are others after a restore,
/// as are the machine's numbers of eventfds, and what remains of a timer shrinks.
fn stays(line: &&str) -> bool {
    let change = "mnt_id: ino: it_value: ticks: tty-index: eventfd-id:";
    !change.split(' ').any(|key| line.starts_with(key))
}

/// The lines of maps, out of smaps. Anonymous neighbours that are alike are one: the kernel keeps them
/// apart where each had pages before they touched (their `anon_vma` is not the same), which makes no
/// difference to a program. A restore maps them before it fills them, so that they are joined.
fn mappings(smaps: &str) -> String {
    let mut all: Vec<(String, String)> = Vec::new();
    for line in smaps.lines() {
        if !line.starts_with(|c: char| c.is_ascii_uppercase()) {
            all.push((mapping(line), String::new()));
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            let flags = flags
                .split_whitespace()
                .filter(|flag| !["ac", "sd"].contains(flag));
            let flags = flags.collect::<Vec<_>>().join(" ");
            let (here, _) = all.pop().expect("flags come after their mapping");
            match all.last_mut() {
                Some((last, its)) if *its == flags && joined(last, &here).is_some() => {
                    *last = joined(last, &here).expect("it was tried");
                }
                _ => all.push((here, flags)),
            }
        }
    }
    all.into_iter().map(|(line, _)| line + "\n").collect()
}

/// One line for two mappings of private anonymous memory that touch, with the same protection.
fn joined(lower: &str, upper: &str) -> Option<String> {
    let (lower, kind) = lower.split_once(' ')?;
    let (upper, other) = upper.split_once(' ')?;
    let (start, between) = lower.split_once('-')?;
    let (from, end) = upper.split_once('-')?;
    let anonymous = kind.ends_with("p 00000000 00:00 0");
    (anonymous && kind == other && between == from).then(|| format!("{start}-{end} {kind}"))
}

/// A line of maps; shared memory and deleted files get new inodes (and devices) by a restore.
fn mapping(line: &str) -> String {
    let mut parts: Vec<&str> = line.split_whitespace().collect();
    let remade = line.ends_with("(deleted)") || line.contains("/SYSV");
    if remade && parts.len() > 5 {
        (parts[3], parts[4]) = ("*", "*");
    }
    without_name(&parts.join(" "))
}

fn status(seen: &mut Look, name: &str, file: &str, wanted: &[&str]) {
    let text = read_lossy(file).unwrap_or_default();
    for (key, value) in text.lines().filter_map(|line| line.split_once(':')) {
        if wanted.contains(&key) {
            seen.insert(format!("{name} {key}"), value.trim().into());
        }
    }
}

fn stat(seen: &mut Look, name: &str, file: &str) {
    let text = read_lossy(file).unwrap_or_default();
    let Some((_, rest)) = text.rsplit_once(") ") else {
        return;
    };
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let wanted = STAT
        .iter()
        .filter_map(|n| Some(format!("{n}={}", fields.get(n - 3)?)));
    seen.insert(name.into(), wanted.collect::<Vec<_>>().join(" "));
}

/// The children of a process's first thread.
pub fn children(pid: i32) -> Vec<i32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let text = read_lossy(path).unwrap_or_default();
    text.split_whitespace().flat_map(str::parse).collect()
}

/// A field of `/proc/PID/status`.
pub fn status_field(pid: i32, key: &str) -> Option<String> {
    let text = read_lossy(format!("/proc/{pid}/status")).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    Some(line.trim().into())
}

/// The state letter of every thread.
pub fn states(pid: i32) -> Vec<(i32, char)> {
    let state = |tid: i32| {
        let stat = read_lossy(format!("/proc/{pid}/task/{tid}/stat")).ok()?;
        Some((tid, stat.rsplit_once(") ")?.1.chars().next()?))
    };
    numbers(&format!("/proc/{pid}/task"))
        .into_iter()
        .filter_map(state)
        .collect()
}

/// Waits until a process of one thread has come to its last call, in which it sleeps or pauses: what it has done before is
/// done then, such as to close a file by whose name it is known to be ready.
pub fn await_rest(pid: i32) {
    let last = [
        libc::SYS_clock_nanosleep,
        libc::SYS_nanosleep,
        libc::SYS_pause,
    ]
    .map(|nr| nr.to_string());
    until("it to rest", || {
        let call = read_lossy(format!("/proc/{pid}/syscall")).ok()?;
        let number = call.split_whitespace().next()?;
        last.iter().any(|nr| nr == number).then_some(())
    });
}

/// Waits until the kernel has let go of a job whose tracer died, which it does some time after the
/// death is told; then demands that no trace of a tracer is left.
pub fn await_let_go(job: &super::Job) {
    until("its tasks to be let go", || {
        let all = [vec![job.pid], job.descendants()].concat();
        let stopped = all
            .into_iter()
            .flat_map(states)
            .any(|(_, state)| "tT".contains(state));
        (!stopped).then_some(())
    });
    assert_let_go(job.pid);
    job.descendants().into_iter().for_each(assert_let_go);
}

/// Whether every thread is stopped by a signal, and by no tracer.
pub fn all_stopped(pid: i32) -> bool {
    let states = states(pid);
    !states.is_empty() && states.iter().all(|(_, state)| *state == 'T')
}

/// Asserts that no thread of the process is traced or stopped.
pub fn assert_let_go(pid: i32) {
    for (tid, _) in states(pid) {
        let file = format!("/proc/{pid}/task/{tid}/status");
        let text = read_lossy(file).unwrap_or_default();
        let tracer = text
            .lines()
            .find_map(|line| line.strip_prefix("TracerPid:"));
        // A thread may end meanwhile, and then there is no line.
        assert_eq!(tracer.map_or("0", str::trim), "0", "task {tid} is traced");
    }
    let stopped: Vec<_> = states(pid)
        .into_iter()
        .filter(|(_, s)| "tTZX".contains(*s))
        .collect();
    assert!(stopped.is_empty(), "stopped or dead tasks: {stopped:?}");
    assert!(!states(pid).is_empty(), "process {pid} is gone");
}

/// Several looks at a running process, which cover what it changes itself all the time.
pub struct Looks(BTreeMap<String, BTreeSet<String>>, usize);

impl Looks {
    /// Looks a few times at a process.
    pub fn at(pid: i32) -> Self {
        let mut looks = Looks(BTreeMap::new(), 0);
        for _ in 0..6 {
            for (name, value) in look(pid) {
                looks.0.entry(name).or_default().insert(value);
            }
            looks.1 += 1;
            // Not a wait for a state: time for the process to change by itself.
            std::thread::sleep(Duration::from_millis(4));
        }
        looks
    }

    /// Everything in a look that was never seen before, except under the names in `except`
    /// (beginnings of names).
    pub fn differences(&self, now: &Look, except: &[&str]) -> String {
        let mut text = String::new();
        let names: BTreeSet<&String> = self.0.keys().chain(now.keys()).collect();
        for name in names {
            if except.iter().any(|prefix| name.starts_with(prefix)) {
                continue;
            }
            match (self.0.get(name), now.get(name)) {
                (Some(before), Some(now)) if before.contains(now) => {}
                (Some(before), Some(now)) => {
                    let before = before.first().expect("it was seen at least once");
                    let _ = writeln!(text, "{name}:{}", line_diff(before, now));
                }
                (Some(before), None) => {
                    let _ = writeln!(text, "{name}: gone, was {:?}", before.first());
                }
                (None, now) => {
                    let _ = writeln!(text, "{name}: new, {now:?}");
                }
            }
        }
        text
    }

    /// Demands that the process looks as it did. What it changes itself may take a few looks.
    pub fn assert_same(&self, pid: i32, except: &[&str]) {
        let mut last = String::new();
        // A list of calls that a killed tracer has left behind may be long, and the machine busy.
        for _ in 0..500 {
            last = self.differences(&look(pid), except);
            if last.is_empty() {
                return;
            }
            std::thread::sleep(Duration::from_millis(4));
        }
        panic!("process {pid} does not look as before:\n{last}");
    }
}

fn line_diff(before: &str, now: &str) -> String {
    if !before.contains('\n') && !now.contains('\n') {
        return format!(" {before:?}, now {now:?}");
    }
    let (old, new): (Vec<_>, Vec<_>) = (before.lines().collect(), now.lines().collect());
    let gone = old
        .iter()
        .filter(|line| !new.contains(line))
        .map(|line| format!("\n  - {line}"));
    let come = new
        .iter()
        .filter(|line| !old.contains(line))
        .map(|line| format!("\n  + {line}"));
    gone.chain(come).collect()
}

/// All processes of the namespace, for the message of a wait that ended in vain.
pub fn everybody() -> String {
    let mut text = String::from("processes:\n");
    for pid in numbers("/proc") {
        let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let command = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
        let tracer = status_field(pid, "TracerPid").unwrap_or_default();
        let _ = writeln!(text, "  {pid} {:?} tracer {tracer} {command}", states(pid));
        for (tid, _) in states(pid) {
            let read = |file: &str| {
                read_lossy(Path::new(&format!("/proc/{pid}/task/{tid}/{file}"))).unwrap_or_default()
            };
            let _ = writeln!(
                text,
                "    {tid}: in {} {}",
                read("wchan"),
                read("syscall").trim()
            );
        }
    }
    text
}

/// Waits until no process but us is in the namespace.
pub fn assert_no_process_left() {
    let others = || {
        numbers("/proc")
            .into_iter()
            .filter(|pid| *pid != 1)
            .collect::<Vec<_>>()
    };
    until("the other processes to be gone", || {
        while let Ok(status) =
            nix::sys::wait::waitpid(None, Some(nix::sys::wait::WaitPidFlag::WNOHANG))
        {
            if status == nix::sys::wait::WaitStatus::StillAlive {
                break;
            }
        }
        others().is_empty().then_some(())
    });
}

/// A file of /proc as text: names in it are bytes.
fn read_lossy(path: impl AsRef<Path>) -> std::io::Result<String> {
    let bytes = fs::read(path)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
