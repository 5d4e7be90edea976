//! Edited images are really restored, by an ordinary user: whatever is in one, `restore` comes to its end, does not take
//! itself for broken, and of a restore that fails nothing is left.
//!
//! A run takes a time; `CKPT_RESTORED_FORGERIES` names a number instead.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ciborium::Value;
use ckpt_image::Reader;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::edit::rewritten;
use crate::common::fixture::start_in;
use crate::common::forging::{changes, encoded, snapshot};
use crate::common::job::{Ended, appended, spawn};
use crate::common::look::{assert_no_process_left, everybody};
use crate::common::tool::restore_cmd;
use crate::common::values::Random;
use crate::common::{Case, isolated_as_user};

/// Fixtures that have objects of many kinds between them, and few pages.
const FIXTURES: [&str; 12] = [
    "maps",
    "threads",
    "tree_session",
    "tree_zombie",
    "tree_futex",
    "pipe",
    "sock_rights_kinds",
    "sock_named",
    "timers_posix",
    "sysv_sem",
    "sysv_shm",
    "inotify",
];
/// How long a run takes unless a number is given.
const TIME: Duration = Duration::from_secs(12);
/// By then a restore has ended, also on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// What may be left of a restore: files, and objects of System V.
fn left(case: &Case) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    collect(case.dir(), &mut found);
    for table in ["shm", "sem", "msg"] {
        let text = fs::read_to_string(format!("/proc/sysvipc/{table}")).unwrap_or_default();
        let ids = text.lines().skip(1).map(|line| {
            let words: Vec<&str> = line.split_whitespace().take(2).collect();
            Path::new(table).join(words.join(" "))
        });
        found.extend(ids);
    }
    found
}

fn collect(dir: &Path, found: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && !path.is_symlink() {
            collect(&path, found);
        }
        found.insert(path);
    }
}

/// Ends all processes but us, and removes what they have left.
fn clear(case: &Case, before: &BTreeSet<PathBuf>) {
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    assert_no_process_left();
    for path in left(case).difference(before) {
        match path.to_str().and_then(|text| text.split_once('/')) {
            Some((table @ ("shm" | "sem" | "msg"), ids)) => {
                let id = ids.split(' ').nth(1).unwrap_or_default();
                remove_ipc(table, id);
            }
            _ if path.is_dir() => drop(fs::remove_dir_all(path)),
            _ => drop(fs::remove_file(path)),
        }
    }
}

fn remove_ipc(table: &str, id: &str) {
    let option = match table {
        "shm" => "--shmem-id",
        "sem" => "--semaphore-id",
        _ => "--queue-id",
    };
    let mut command = Command::new("ipcrm");
    let ended = spawn(command.arg(option).arg(id).stderr(Stdio::null())).wait();
    assert_eq!(ended, Ended::Exited(0), "{table} {id} goes");
}

#[test]
fn leave_nothing() {
    isolated_as_user("leave_nothing", |case| {
        let images: Vec<PathBuf> = FIXTURES
            .into_iter()
            .map(|name| {
                let program = Command::new(case.fixtures().join(name));
                start_in(case, name, name, program).killed_into(case, &format!("{name}.ckpt"))
            })
            .collect();
        assert_no_process_left();
        let bases: Vec<(Reader, Value)> = images
            .iter()
            .map(|image| {
                let reader = Reader::open(image).expect("it was just written");
                let value = snapshot(&reader).1;
                (reader, value)
            })
            .collect();
        let number = std::env::var("CKPT_RESTORED_FORGERIES").ok();
        let number: Option<u64> = number.map(|text| text.parse().expect("a number"));
        let mut random = Random::seeded();
        let (begun, mut tried) = (Instant::now(), 0);
        let (image, now, log) = (
            case.path("forged.ckpt"),
            case.path("now.log"),
            case.path("restore.log"),
        );
        for path in [&image, &now, &log, &case.path("so_far")] {
            fs::write(path, "").expect("the test's directory is writable");
        }
        let before = left(case);
        let mut endings: BTreeMap<String, u64> = BTreeMap::new();
        while number.map_or_else(|| begun.elapsed() < TIME, |number| tried < number) {
            let which = random.below(bases.len());
            let (reader, base) = &bases[which];
            let mut value = base.clone();
            let what = format!("{}, {}", FIXTURES[which], changes(&mut value, &mut random));
            fs::write(&now, &what).expect("the test's directory is writable");
            rewritten(reader, reader.header().pid, &encoded(&value), &image);
            drop(value);
            fs::write(&log, "").expect("the test's directory is writable");
            let mut command = restore_cmd(&image, &["--detach", "--files", "adopt"]);
            command.current_dir(case.dir()).stdin(Stdio::null());
            let mut restore = spawn(command.stdout(appended(&log)).stderr(appended(&log)));
            let (started, mut ended) = (Instant::now(), None);
            while ended.is_none() {
                assert!(
                    started.elapsed() < DEADLINE,
                    "{what}: restore goes on\n{}",
                    everybody()
                );
                std::thread::sleep(Duration::from_millis(1));
                ended = restore.ended();
            }
            let said = fs::read(&log).expect("it was written");
            let said = String::from_utf8_lossy(&said);
            for word in ["panicked", "; this is a bug"] {
                assert!(!said.contains(word), "{what}: {said}");
            }
            let ending = format!("{:?}", ended.expect("it has ended"));
            if ended != Some(Ended::Exited(0)) {
                assert_no_process_left();
                let now = left(case);
                let more: Vec<_> = now.difference(&before).collect();
                assert!(more.is_empty(), "{what}: {more:?} is left: {said}");
                assert!(
                    matches!(ended, Some(Ended::Exited(_))),
                    "{what}: {ending}: {said}"
                );
            }
            *endings.entry(ending).or_default() += 1;
            // For who waits for a long run.
            fs::write(case.path("so_far"), format!("{tried} {endings:?}\n"))
                .expect("it is writable");
            clear(case, &before);
            tried += 1;
        }
        println!("{tried} forgeries: {endings:?}");
        fs::remove_file(&now).expect("it is ours");
    });
}
