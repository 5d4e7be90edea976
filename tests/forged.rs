//! A user may write what they like into an image of theirs. Each field of the snapshot is forged in turn, and root restores
//! it: whatever comes of that has no more than that user could have by hand.
//!
//! The fields are those that the image of a job with many kinds of objects has, so that a new one is covered by
//! itself. A run takes some of them, drawn from a seed that it prints; `CKPT_FORGE=all` takes all.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::{Command, Stdio};

use ciborium::Value;
use ckpt_image::Reader;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::common::edit::rewritten;
use crate::common::isolate::Case;
use crate::common::job::spawn;
use crate::common::look::status_field;
use crate::common::tool::{RESTORE, restore_cmd};
use crate::common::values::{Place, Random, at, forgeries, leaves};
use crate::common::{attach, isolated_as_root, start, until};

const NOBODY: u32 = 65534;
/// How many forgeries a run tries.
const SOME: usize = 40;

/// A job with an object of many kinds.
const JOB: &str = r#"
import ctypes, mmap, os, signal, socket, threading, time
libc = ctypes.CDLL(None, use_errno=True)
os.setsid()
keep = [open('data', 'a+'), os.memfd_create('m'), os.eventfd(7), os.pipe(), socket.socketpair()]
keep.append(os.open('.', os.O_RDONLY | os.O_DIRECTORY))
os.write(keep[3][1], b'unread')
gone = open('gone', 'w+'); gone.write('text'); gone.flush(); os.unlink('gone')
os.mkfifo('fifo'); keep.append(os.open('fifo', os.O_RDWR))
bound = socket.socket(socket.AF_UNIX); bound.bind('bound'); bound.listen()
client = socket.socket(socket.AF_UNIX); client.connect('bound'); accepted, _ = bound.accept()
client.send(b'unread'); socket.send_fds(client, [b'with'], [keep[2]])
watch = libc.inotify_init(); libc.inotify_add_watch(watch, b'.', 0x100)
libc.timerfd_create(1, 0); libc.epoll_create1(0)
libc.shmat(libc.shmget(1234, 4096, 0o1600), 0, 0); libc.semget(1234, 2, 0o1600); libc.msgget(1234, 0o1600)
shared = mmap.mmap(-1, 8192); mapped = mmap.mmap(keep[0].fileno(), 0) if os.stat('data').st_size else None
signal.setitimer(signal.ITIMER_REAL, 10000, 10000); signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
os.kill(os.getpid(), signal.SIGUSR2)
threading.Thread(target=time.sleep, args=(100000,), daemon=True).start()
if os.fork() == 0:
    while True: time.sleep(1000)
if os.fork() == 0: os._exit(3)
open('ready', 'w').close()
while True: time.sleep(1000)
"#;

/// What root has for itself, and must still have.
struct Roots {
    secret: std::path::PathBuf,
    ours: fs::Metadata,
}

impl Roots {
    fn new(case: &Case) -> Self {
        let secret = case.path("secret");
        fs::write(&secret, "root's").expect("the test's directory is writable");
        fs::set_permissions(&secret, PermissionsExt::from_mode(0o600)).expect("it is ours");
        let ours = fs::metadata(&secret).expect("it is there");
        Self { secret, ours }
    }

    fn untouched(&self, what: &str) {
        let now = fs::metadata(&self.secret).expect("it is there");
        assert_eq!(
            (now.mode(), now.uid(), now.mtime_nsec(), now.len()),
            (self.ours.mode(), 0, self.ours.mtime_nsec(), self.ours.len()),
            "{what}"
        );
    }
}

/// What a process has beyond its user.
fn beyond(pid: i32) -> Option<String> {
    let field = |key: &str| status_field(pid, key);
    let ids = |key: &str| field(key).unwrap_or_default();
    for key in ["Uid", "Gid", "Groups"] {
        let ids = ids(key);
        if let Some(other) = ids.split_whitespace().find(|id| **id != NOBODY.to_string()) {
            return Some(format!("process {pid} has the id {other} ({key}: {ids})"));
        }
    }
    let own = fs::read_link("/proc/self/ns/user").ok()?;
    let its = fs::read_link(format!("/proc/{pid}/ns/user")).ok()?;
    if own == its {
        for key in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            let set = field(key)?;
            if !set.trim_start_matches('0').is_empty() {
                return Some(format!("process {pid} has {key} {set}"));
            }
        }
    } else {
        let map = fs::read_to_string(format!("/proc/{pid}/uid_map")).ok()?;
        let outside = map.split_whitespace().nth(1)?.to_owned();
        let count = map.split_whitespace().nth(2)?.to_owned();
        if (outside.as_str(), count.as_str()) != ("65534", "1") {
            return Some(format!("process {pid} has other users' ids: {map}"));
        }
    }
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit(") ").next()?.split(' ').collect();
    let (nice, policy) = (fields.get(16)?.parse::<i32>().ok()?, fields.get(38)?);
    if nice < 0 || !["0", "3", "5"].contains(policy) {
        return Some(format!("process {pid} has nice {nice}, policy {policy}"));
    }
    let score = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).ok()?;
    let mine = fs::read_to_string("/proc/self/oom_score_adj").ok()?;
    if score.trim().parse::<i32>().ok()? < mine.trim().parse().ok()? {
        return Some(format!(
            "process {pid} has the OOM score adjustment {score}"
        ));
    }
    let fds = fs::read_dir(format!("/proc/{pid}/fd"))
        .ok()?
        .flatten()
        .map(|e| e.path());
    let places = ["cwd", "root"].map(|name| format!("/proc/{pid}/{name}").into());
    fds.chain(places).find_map(|link| {
        let target = fs::read_link(&link).ok()?;
        let guarded = ["/etc/shadow", "/proc/1/", "/proc/kallsyms", "/dev/kmsg"];
        let guarded = guarded.iter().any(|path| target.starts_with(path));
        (guarded && !may_open(&target))
            .then(|| format!("process {pid} has {} open", target.display()))
    })
}

/// Whether that user may open it for reading.
fn may_open(path: &Path) -> bool {
    let mut command = Command::new("setpriv");
    command.args([
        "--reuid=65534",
        "--regid=65534",
        "--init-groups",
        "sh",
        "-c",
        ": <\"$0\"",
    ]);
    command.arg(path).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

fn all_but_us() -> Vec<i32> {
    let all = fs::read_dir("/proc").expect("it is mounted").flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| *pid != 1).collect()
}

/// Kills and reaps all.
fn end_all() {
    until("all to be gone", || {
        for pid in all_but_us() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        while let Ok(WaitStatus::Signaled(..) | WaitStatus::Exited(..)) =
            waitpid(None, Some(WaitPidFlag::WNOHANG))
        {}
        all_but_us().is_empty().then_some(())
    });
}

fn is_alive(pid: i32) -> bool {
    status_field(pid, "State").is_some_and(|state| !state.starts_with('Z'))
}

/// Restores it, looks at all that is there then, and ends it.
fn judged(case: &Case, image: &Path, pids: &str) -> Option<String> {
    // Root with a priority, and with a descriptor, that are root's alone.
    let mut command = Command::new("bash");
    command.args([
        "-c",
        "exec 99</etc/shadow; exec nice -n -5 \"$@\"",
        "bash",
        RESTORE,
    ]);
    command
        .args(["--any-owner", "--quiet", "--detach", "--pids", pids])
        .arg(image);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(crate::common::job::appended(&case.path("restore.log")));
    let _ = spawn(&mut command).wait();
    let pids = all_but_us();
    let found = pids
        .iter()
        .filter(|pid| is_alive(**pid))
        .find_map(|pid| beyond(*pid));
    end_all();
    found
}

#[test]
fn each_field() {
    isolated_as_root("each_field", |case| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--init-groups"]);
        command
            .args([case.system_python(), "-c", JOB])
            .current_dir(case.dir());
        fs::write(case.path("data"), [7; 5000]).expect("the test's directory is writable");
        chown(case.path("data"), Some(NOBODY), Some(NOBODY)).expect("we are root");
        let mut job = start(&mut command, &case.open_log("job.log"));
        until("it to begin", || case.path("ready").exists().then_some(()));
        let (image, _) = attach(case, job.pid, "job.ckpt", &["--kill"]);
        until("its end", || job.ended());
        end_all();
        // As it is, it runs.
        chown(&image, Some(NOBODY), Some(NOBODY)).expect("we are root");
        let out = crate::common::run(
            case,
            &mut restore_cmd(&image, &["--any-owner", "--detach", "--pids", "keep"]),
        );
        out.ok();
        end_all();
        let roots = Roots::new(case);
        let reader = Reader::open(&image).expect("it was just written");
        let bytes = reader
            .section(ckpt::snapshot::SECTION, 1 << 30)
            .expect("it has one");
        let snapshot: Value = ciborium::from_reader(&bytes[..]).expect("it is CBOR");
        let mut found = BTreeMap::new();
        leaves(&snapshot, "", &mut Vec::new(), &mut found);
        assert!(found.len() > 150, "only {} fields", found.len());
        let mut all: Vec<(String, Place, Value)> = Vec::new();
        for (name, place) in found {
            let was = at(&mut snapshot.clone(), &place).clone();
            all.extend(
                forgeries(&was)
                    .into_iter()
                    .map(|new| (name.clone(), place.clone(), new)),
            );
        }
        let mut random = Random::seeded();
        println!("{} forgeries of {} bytes", all.len(), bytes.len());
        if std::env::var("CKPT_FORGE").as_deref() != Ok("all") {
            for number in 0..SOME.min(all.len()) {
                let other = number + random.below(all.len() - number);
                all.swap(number, other);
            }
            all.truncate(SOME);
        }
        let forged = case.path("forged.ckpt");
        for (number, (name, place, new)) in all.into_iter().enumerate() {
            let mut snapshot = snapshot.clone();
            let what = format!("{name} = {new:?}");
            *at(&mut snapshot, &place) = new;
            let mut bytes = Vec::new();
            ciborium::into_writer(&snapshot, &mut bytes).expect("to memory");
            rewritten(&reader, reader.header().pid, &bytes, &forged);
            chown(&forged, Some(NOBODY), Some(NOBODY)).expect("we are root");
            let pids = ["keep", "auto"][number % 2];
            if let Some(found) = judged(case, &forged, pids) {
                panic!("{what} (--pids {pids}): {found}");
            }
            roots.untouched(&what);
        }
    });
}
