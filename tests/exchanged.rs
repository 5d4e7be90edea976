//! Files that are exchanged for something else all the time, while they are looked at and opened.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::common::look::{assert_no_process_left, await_rest};
use crate::common::refused::FAILED;
use crate::common::{Case, Job, attach, ckpt, isolated, restore_cmd, run, start, until};

/// What a job has open, as the first descriptors, and mapped and executed.
const OPEN: [&str; 5] = ["read", "log", "nofollow", "directory", "fifo"];
const CODE: &str = "import mmap, os, time
os.open('read', os.O_RDONLY)
os.open('log', os.O_WRONLY | os.O_APPEND)
os.open('nofollow', os.O_RDONLY | os.O_NOFOLLOW)
os.open('directory', os.O_RDONLY | os.O_DIRECTORY)
os.open('fifo', os.O_RDWR)
m = mmap.mmap(os.open('mapped', os.O_RDONLY), 0, prot=1)
os.close(8)
os.close(9)
open('ready', 'w').close()
while True: time.sleep(1000)";
/// In each, so often.
const ROUNDS: u32 = 20;

/// The inodes that the restored process has, in the order of the names.
fn inodes(pid: i32) -> Vec<u64> {
    let of = |file: &str| {
        let found = fs::metadata(format!("/proc/{pid}/{file}"));
        found.expect("it is there").ino()
    };
    let open = (3..3 + OPEN.len()).map(|fd| of(&format!("fd/{fd}")));
    let (exe, place) = (of("exe"), fs::read_link(format!("/proc/{pid}/cwd")));
    let place = place.expect("it runs");
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("it runs");
    let mut mapped = maps.lines().filter_map(|line| {
        let mut words = line.split_whitespace().skip(4);
        let inode = words.next()?.parse().ok()?;
        (Path::new(words.next()?).parent() == Some(&place) && inode != exe).then_some(inode)
    });
    let mapped = mapped.next().expect("the mapping is there");
    open.chain([mapped, exe]).collect()
}

/// The job, killed, and what its names led to.
fn job(case: &Case) -> (PathBuf, Vec<PathBuf>, Vec<u64>) {
    let python = fs::canonicalize(case.system_python()).expect("it is there");
    let program = case.path("program");
    fs::copy(python, &program).expect("the test's directory is writable");
    for name in ["read", "log", "nofollow", "mapped"] {
        fs::write(case.path(name), [7; 5000]).expect("it is ours");
    }
    fs::create_dir(case.path("directory")).expect("it is ours");
    mkfifo(&case.path("fifo"), Mode::S_IRWXU).expect("a FIFO can be made");
    let mut command = Command::new(&program);
    command.args(["-c", CODE]).current_dir(case.dir());
    let mut job = start(&mut command, &case.path("job.log"));
    until("it to begin", || case.path("ready").exists().then_some(()));
    let had = inodes(job.pid);
    let (image, _) = attach(case, job.pid, "job.ckpt", &["--kill"]);
    until("its end", || job.ended());
    let names = OPEN.iter().chain(&["mapped", "program"]);
    (image, names.map(|name| case.path(name)).collect(), had)
}

fn swap(a: &Path, b: &Path) {
    let exchange = RenameFlags::RENAME_EXCHANGE;
    renameat2(AT_FDCWD, a, AT_FDCWD, b, exchange).expect("both are there");
}

/// Exchanges two names until told to end; how often.
fn exchange(a: &Path, b: &Path, end: &AtomicBool, times: &AtomicU32) {
    while !end.load(Ordering::Relaxed) {
        swap(a, b);
        times.fetch_add(1, Ordering::Relaxed);
    }
}

/// While one name leads there and to something else in turn: a look and a restore end each time, and who is restored
/// has what it had.
fn rounds(case: &Case, (image, path, had): (&Path, &Path, &[u64]), other: &Path) {
    let (end, times) = (AtomicBool::new(false), AtomicU32::new(0));
    let text = image.to_str().expect("it is text");
    std::thread::scope(|threads| {
        threads.spawn(|| exchange(path, other, &end, &times));
        let _end = Ends(&end);
        for _ in 0..ROUNDS {
            let out = ckpt(case, ["check", text]);
            assert!(out.code() <= 1, "{out:#?}");
            let out = run(case, &mut restore_cmd(image, &["--detach"]));
            match out.code() {
                0 => {
                    let job = Job::of(out.stdout.trim().parse().expect("it is a pid"));
                    assert_eq!(inodes(job.pid), had, "{out:#?}");
                    job.kill();
                }
                code => assert_eq!(code, FAILED, "{out:#?}"),
            }
        }
    });
    assert!(times.into_inner() > ROUNDS);
    assert_no_process_left();
}

/// Also when an assertion fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn inode(path: &Path) -> u64 {
    fs::symlink_metadata(path).expect("it is there").ino()
}

/// For each name of a job, what `other` makes, in its turn. What is at `watched` is not opened.
fn exchanged_for(case: &Case, watched: Option<&Path>, other: impl Fn(&Path, &Path)) {
    let (image, names, had) = job(case);
    let opened = Inotify::init(InitFlags::IN_NONBLOCK).expect("inotify");
    for (index, path) in names.iter().enumerate() {
        let aside = case.path("aside");
        other(path, &aside);
        if let Some(watched) = watched {
            let watch = opened.add_watch(watched, AddWatchFlags::IN_OPEN);
            watch.expect("it is there");
        }
        // Our own.
        let _ = opened.read_events();
        rounds(case, (&image, path, &had), &aside);
        assert_eq!(opened.read_events().err(), Some(Errno::EAGAIN), "{path:?}");
        if inode(path) != had[index] {
            swap(path, &aside);
        }
        fs::remove_file(&aside).expect("it is there");
    }
}

/// Opening it waits for the other end.
#[test]
fn for_a_fifo() {
    isolated("for_a_fifo", to_a_fifo);
}

pub(crate) fn to_a_fifo(case: &Case) {
    let fifo = case.path("other");
    mkfifo(&fifo, Mode::S_IRWXU).expect("a FIFO can be made");
    exchanged_for(case, Some(&fifo), |_, aside| {
        symlink(&fifo, aside).expect("its place is free")
    });
}

/// The same itself, and not behind a link.
#[test]
fn for_a_fifo_itself() {
    isolated("for_a_fifo_itself", to_a_fifo_itself);
}

pub(crate) fn to_a_fifo_itself(case: &Case) {
    exchanged_for(case, None, |path, aside| match path.ends_with("fifo") {
        // Another FIFO is as good.
        true => symlink("/dev/zero", aside).expect("its place is free"),
        false => mkfifo(aside, Mode::S_IRWXU).expect("a FIFO can be made"),
    });
}

/// A link to a file that looks as the old one did.
#[test]
fn for_a_link() {
    isolated("for_a_link", to_a_link);
}

pub(crate) fn to_a_link(case: &Case) {
    let other = case.path("other");
    fs::write(&other, [9; 5000]).expect("it is ours");
    exchanged_for(case, Some(&other), |path, aside| {
        let was = fs::metadata(path).expect("it is there");
        let file = fs::File::options()
            .write(true)
            .open(&other)
            .expect("it is ours");
        file.set_len(was.len()).expect("it is ours");
        file.set_modified(was.modified().expect("it has one"))
            .expect("it is ours");
        symlink(&other, aside).expect("its place is free");
    });
}

/// Root's image and one of a user's, whose job would be root's: whose it is, is asked of the file that is read.
#[test]
fn an_image_for_a_users() {
    isolated("an_image_for_a_users", |case| {
        case.needs_root();
        let image = |name: &str| {
            let mut job = start(Command::new("sleep").arg("1000"), &case.path("job.log"));
            await_rest(job.pid);
            let (image, _) = attach(case, job.pid, name, &["--kill"]);
            until("its end", || job.ended());
            (job.pid, image)
        };
        let (pid, own) = image("own.ckpt");
        let (_, users) = image("users.ckpt");
        chown(&users, Some(65534), Some(65534)).expect("we are root");
        let (end, times) = (AtomicBool::new(false), AtomicU32::new(0));
        let mut restored = 0;
        std::thread::scope(|threads| {
            threads.spawn(|| exchange(&own, &users, &end, &times));
            let _end = Ends(&end);
            for _ in 0..3 * ROUNDS {
                let out = run(case, &mut restore_cmd(&own, &["--detach"]));
                match out.code() {
                    0 => {
                        assert_eq!(out.stdout.trim(), pid.to_string(), "{out:#?}");
                        Job::of(pid).kill();
                        restored += 1;
                    }
                    _ => out.refused(FAILED, &["own.ckpt", "belongs to uid 65534"]),
                }
            }
        });
        eprintln!("{restored} times it was root's");
        assert_no_process_left();
    });
}
