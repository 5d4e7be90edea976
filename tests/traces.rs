//! Every readable file below `/proc/PID` of a job that waits, before and after an attach, and before a
//! kill and after a restore: what may differ is listed here, each with its reason.

use crate::common;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::common::look::states;
use crate::common::tool::descendants_in;
use crate::common::{Case, Job, attach, isolated, isolated_as_user, restored, start, until};

/// Exceptions: the end of a file's path, and beginnings of its keys (of `stat` whole ones; `*` is all).
type Exceptions = &'static [(&'static str, &'static str)];

/// What changes by itself, or since time passes.
const STATISTICS: Exceptions = &[
    // Whether it has ever made use of a privilege (acct(5)), page faults, processor time, the memory
    // that is resident, the processor that it ran on last.
    ("/stat", "9 10 11 12 13 14 15 16 17 24 39"),
    ("/statm", "*"),
    ("/schedstat", "*"),
    (
        "/sched",
        "se. nr_ sum_ avg_ mm-> numa_ total_ current_node clock-delta dl. core_",
    ),
    ("/io", "*"),
    ("/oom_score", "*"),
    ("/oom_adj", "*"),
    // How long ago it used AVX-512, on processors that have it.
    ("/arch_status", "AVX512_elapsed_ms"),
    ("/ksm_stat", "*"),
    // How many pages are there, whose they are, and who has looked at them; also by other processes
    // that have mapped the same file.
    ("/smaps", PAGES),
    ("/smaps_rollup", PAGES),
    (
        "/numa_maps",
        "mapped anon dirty active N0 N1 mapmax swapcache",
    ),
    // FDSize only grows; SigQ is of all processes of the user.
    (
        "/status",
        "Vm Rss voluntary_ctxt nonvoluntary_ctxt FDSize SigQ",
    ),
];
const PAGES: &str = "Rss Pss Shared_ Private_ Referenced Anonymous KSM LazyFree AnonHuge ShmemPmd \
                     FilePmd Swap Locked THPeligible";

/// What an attach leaves, and a restore as well.
const ATTACH: Exceptions = &[
    // A sleep whose remainder the kernel keeps is called by another number from then on
    // (restart_syscall(2)), as after SIGSTOP and SIGCONT.
    ("/syscall", "*"),
    ("/stack", "*"),
    ("/wchan", "*"),
    // The vDSO has a page of its own.
    ("/numa_maps", "kernelpagesize_kB"),
];

/// What a restore makes anew.
const RESTORE: Exceptions = &[
    // When it began.
    ("/stat", "22"),
    // Its clocks go on.
    ("/timens_offsets", "*"),
    // Pipes are other ones; they are descriptors 3 and 4 of the program.
    ("/fdinfo/3", "ino"),
    ("/fdinfo/4", "ino"),
];

/// Not for reading, or the same for every process of a namespace.
const SKIPPED: &[&str] = &[
    "mem",
    "pagemap",
    "clear_refs",
    "net",
    "map_files",
    "attr",
    "mountstats",
];

/// Every line of every file below a directory, under `FILE KEY`.
fn every_line(dir: &Path, name: &str, seen: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let file = entry.file_name().to_string_lossy().into_owned();
        if SKIPPED.contains(&file.as_str()) {
            continue;
        }
        let (path, name) = (entry.path(), format!("{name}/{file}"));
        let kind = entry.file_type().expect("the job waits");
        if kind.is_dir() {
            every_line(&path, &name, seen);
        } else if kind.is_symlink() {
            let target = fs::read_link(&path).map(|to| to.display().to_string());
            let target = target.unwrap_or_else(|error| error.to_string());
            // The number of a pipe is its inode's.
            let target = target.split(":[").next().unwrap_or_default().to_owned();
            seen.insert(format!("{name} "), target);
        } else {
            lines_of(&path, &name, seen);
        }
    }
}

fn lines_of(path: &Path, name: &str, seen: &mut BTreeMap<String, String>) {
    let Ok(bytes) = fs::read(path) else {
        return;
    };
    let text = String::from_utf8_lossy(&bytes);
    if name.ends_with("/stat") {
        let (_, fields) = text.rsplit_once(") ").expect("as in proc(5)");
        for (number, field) in fields.split_whitespace().enumerate() {
            seen.insert(format!("{name} {}", number + 3), field.into());
        }
        return;
    }
    let mut place = String::new();
    for (number, line) in text.lines().enumerate() {
        let key = line.split([':', ' ', '\t']).next().unwrap_or_default();
        // In smaps the mapping, else the number of the line tells lines with the same key apart.
        if name.ends_with("/smaps") && key.contains('-') {
            place = format!("@{key}");
        } else if name.ends_with("/numa_maps") {
            for field in line.split(' ').skip(1) {
                let (field, value) = field.split_once('=').unwrap_or((field, ""));
                seen.insert(format!("{name} {field}@{key}"), value.into());
            }
            continue;
        } else if !name.ends_with("/smaps") {
            place = format!("#{number}");
        }
        let value: Vec<&str> = line.split_whitespace().collect();
        seen.insert(format!("{name} {key}{place}"), value.join(" "));
    }
}

/// Everything that is to be seen of a job.
fn everything(pids: &[i32]) -> BTreeMap<String, String> {
    let mut seen = BTreeMap::new();
    for pid in pids {
        every_line(
            Path::new(&format!("/proc/{pid}")),
            &pid.to_string(),
            &mut seen,
        );
    }
    seen
}

/// What differs and may not.
fn differences(
    before: &BTreeMap<String, String>,
    now: &BTreeMap<String, String>,
    allowed: &[Exceptions],
) -> Vec<String> {
    let excepted = |name: &str| {
        let (file, key) = name.split_once(' ').expect("made so");
        let all = allowed.iter().copied().flatten();
        all.filter(|(end, _)| file.ends_with(end))
            .any(|(end, keys)| {
                keys.split_whitespace().any(|k| match *end {
                    "/stat" => k == key,
                    _ => k == "*" || key.starts_with(k),
                })
            })
    };
    let names = before
        .keys()
        .chain(now.keys().filter(|k| !before.contains_key(*k)));
    names
        .filter(|name| before.get(*name) != now.get(*name) && !excepted(name))
        .map(|name| format!("{name}: {:?}, now {:?}", before.get(name), now.get(name)))
        .collect()
}

/// Waits until all threads sleep; a restored one has to enter its call first.
fn all_wait(pids: &[i32]) {
    until("all threads to wait", || {
        let mut all = pids.iter().flat_map(|pid| states(*pid));
        all.all(|(_, state)| state == 'S').then_some(())
    });
}

fn demand_same(pids: &[i32], before: &BTreeMap<String, String>, allowed: &[Exceptions]) {
    // A thread that is on its way into its call sleeps now and then on the way.
    let mut last = Vec::new();
    for _ in 0..50 {
        all_wait(pids);
        last = differences(before, &everything(pids), allowed);
        if last.is_empty() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    panic!("looks different:\n{}", last.join("\n"));
}

const PROGRAM: &str = "
import os, signal, subprocess, sys, threading, time
lock = threading.Lock()
lock.acquire()
threading.Thread(target=time.sleep, args=(100000,)).start()
threading.Thread(target=lock.acquire).start()
child = subprocess.Popen(['sleep', '100000'])
kept = os.pipe()
open(sys.argv[1], 'w').close()
signal.pause()
";

fn no_traces(case: &Case) {
    let python = case.system_python();
    let ready = case.path("ready");
    let mut command = Command::new(python);
    command.args(["-c", PROGRAM]).arg(&ready);
    let mut job: Job = start(command.current_dir(case.dir()), &case.path("log"));
    until("the program", || ready.exists().then_some(()));
    until("its child and threads", || {
        let family = [vec![job.pid], job.descendants()].concat();
        (family.len() == 2 && states(job.pid).len() == 3).then_some(())
    });
    let family = [vec![job.pid], job.descendants()].concat();
    until("the child's program", || {
        let name = fs::read_to_string(format!("/proc/{}/comm", family[1])).ok()?;
        (name == "sleep\n").then_some(())
    });
    all_wait(&family);
    let before = everything(&family);
    assert!(before.len() > 500, "{}", before.len());
    attach(case, job.pid, "job.ckpt", &[]);
    demand_same(&family, &before, &[STATISTICS, ATTACH]);
    let (image, _) = attach(case, job.pid, "job.ckpt", &["--kill"]);
    until("its end", || job.ended());
    common::job::reap_orphans(&descendants_in(case, &image));
    let job = restored(case, &image, &[]);
    demand_same(&family, &before, &[STATISTICS, ATTACH, RESTORE]);
    job.kill();
    let _ = nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(family[1]),
        nix::sys::signal::Signal::SIGKILL,
    );
}

#[test]
fn no_file_of_proc_tells() {
    isolated("no_file_of_proc_tells", no_traces);
}

#[test]
fn no_file_of_proc_tells_an_ordinary_user() {
    isolated_as_user("no_file_of_proc_tells_an_ordinary_user", no_traces);
}
