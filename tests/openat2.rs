//! Magic links of `/proc` on the paths of a job's files, and all that `restore` guarantees of files where openat2(2) is
//! not available: before Linux 5.6, and under the seccomp filters of some containers, which answer ENOSYS or EPERM.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use nix::errno::Errno;
use nix::sys::signal::Signal;

use crate::common::container::fails_on;
use crate::common::look::assert_no_process_left;
use crate::common::refused::FAILED;
use crate::common::tool::{CKPT, RESTORE};
use crate::common::{
    Case, Ended, Job, attach, isolated, isolated_as_root, isolated_as_user, run, start, until,
};
use crate::leaks::NOBODY;
use crate::{containers, exchanged, files, leaks};

fn unavailable(error: Errno) {
    fails_on(libc::SYS_openat2, error);
}

/// Fixtures with names of files, directories, devices, FIFOs and sockets.
const FIXTURES: &[&str] = &[
    "cwd",
    "exelink",
    "fd_chardev",
    "fd_deleted",
    "fd_dir",
    "fd_hardlink",
    "fd_opath",
    "fd_proc",
    "fd_regular",
    "fifo",
    "file_private",
    "file_shared",
    "flock_self",
    "inotify",
    "sock_named",
    "tree_fifo",
];

#[test]
fn without_it_files_are_restored() {
    isolated("without_it_files_are_restored", |case| {
        unavailable(Errno::ENOSYS);
        containers::all_live_on(case, FIXTURES.iter());
    });
}

#[test]
fn without_it_files_are_restored_for_a_user() {
    isolated_as_user("without_it_files_are_restored_for_a_user", |case| {
        unavailable(Errno::EPERM);
        containers::all_live_on(case, FIXTURES.iter());
    });
}

macro_rules! without {
    ($($name:ident = $isolated:ident, $body:expr;)*) => {
        $(#[test]
        fn $name() {
            $isolated(stringify!($name), |case| {
                unavailable(Errno::ENOSYS);
                $body(case);
            });
        })*
    };
}

without! {
    without_it_what_took_the_place_of_a_file = isolated, files::places_are_taken;
    without_it_exchanged_for_a_fifo = isolated, exchanged::to_a_fifo;
    without_it_exchanged_for_a_fifo_itself = isolated, exchanged::to_a_fifo_itself;
    without_it_exchanged_for_a_link = isolated, exchanged::to_a_link;
    without_it_files_of_root = isolated_as_root, leaks::roots_files_stay;
    without_it_nothing_leaks = isolated_as_root, |case: &Case| leaks::nothing_leaks(case, &NOBODY);
    without_it_magic_links = isolated, |case: &Case| magic_links(case, &[]);
    without_it_magic_links_for_root = isolated_as_root, |case: &Case| magic_links(case, &NOBODY);
}

#[test]
fn magic_links_are_not_followed() {
    isolated("magic_links_are_not_followed", |case| {
        magic_links(case, &[])
    });
}

#[test]
fn magic_links_are_not_followed_for_root() {
    isolated_as_root("magic_links_are_not_followed_for_root", |case| {
        magic_links(case, &NOBODY)
    });
}

#[test]
fn magic_links_are_not_followed_where_it_is_forbidden() {
    isolated(
        "magic_links_are_not_followed_where_it_is_forbidden",
        |case| {
            unavailable(Errno::EPERM);
            magic_links(case, &[]);
        },
    );
}

const CODE: &str = "import mmap, os, time
os.open('files/written', os.O_WRONLY | os.O_APPEND)
os.open('files/nofollow', os.O_WRONLY | os.O_NOFOLLOW)
m = mmap.mmap(os.open('files/mapped', os.O_RDONLY), 0, prot=1)
os.close(5)
os.open('files', os.O_RDONLY | os.O_DIRECTORY)
open('ready', 'w').close()
while True: time.sleep(1000)";

/// The directory of a job's files becomes a link. Through an ordinary one they are found; a magic link leads to them
/// as well, past a directory that the job's user may not enter, and is not followed.
fn magic_links(case: &Case, user: &[&str]) {
    let files = case.path("files");
    fs::create_dir(&files).expect("the test's directory is writable");
    for name in ["written", "nofollow", "mapped"] {
        let path = files.join(name);
        fs::write(&path, [7; 5000]).expect("it is ours");
        fs::set_permissions(&path, PermissionsExt::from_mode(0o666)).expect("it is ours");
    }
    let mut command = match user {
        [] => Command::new(case.system_python()),
        _ => {
            let mut command = Command::new("setpriv");
            command.args(user).arg(case.system_python());
            command
        }
    };
    command.args(["-c", CODE]).current_dir(case.dir());
    let mut job = start(&mut command, &case.open_log("job.log"));
    until("it to begin", || case.path("ready").exists().then_some(()));
    let (image, _) = attach(case, job.pid, "job.ckpt", &["--kill"]);
    until("its end", || job.ended());

    let hidden = case.path("hidden");
    fs::create_dir(&hidden).expect("the test's directory is writable");
    let moved = hidden.join("moved");
    fs::rename(&files, &moved).expect("it is ours");
    // Relative names are those of this directory.
    let restore = |args: &[&str]| {
        let mut command = Command::new(RESTORE);
        command
            .arg(&image)
            .arg("--detach")
            .args(args)
            .current_dir(&moved);
        run(case, &mut command)
    };
    let lives = |args: &[&str]| {
        let out = restore(args);
        let mut job = Job::of(out.ok().trim().parse().expect("it is a pid"));
        job.signal(Signal::SIGKILL);
        assert_eq!(until("its end", || job.ended()), Ended::Killed(9));
        assert_no_process_left();
    };
    let link = |to: &Path| {
        let _ = fs::remove_file(&files);
        symlink(to, &files).expect("its place is free");
    };
    link(&moved);
    lives(&[]);
    // For the kernel it leads to the right files.
    fs::set_permissions(&hidden, PermissionsExt::from_mode(0o700)).expect("it is ours");
    let behind = case.path("behind");
    symlink("/proc/self/cwd", &behind).expect("its place is free");
    for to in [
        "/proc/self/cwd",
        "/proc/self/task/../cwd/.",
        "/proc/thread-self/root/proc/self/cwd",
    ]
    .map(Path::new)
    .into_iter()
    .chain([&*behind])
    {
        link(to);
        for policy in ["strict", "adopt"] {
            let out = restore(&["--files", policy]);
            out.refused(FAILED, &["cannot be opened", "link of /proc"]);
            for name in ["files/written", "files/nofollow", "files/mapped"] {
                let line = out.stderr.lines().find(|line| line.contains(name));
                let line = line.unwrap_or_else(|| panic!("{name}: {out:#?}"));
                assert!(line.contains("link of /proc"), "{line}");
            }
            assert_no_process_left();
        }
    }
    let image = image.to_str().expect("it is text");
    let out = run(
        case,
        Command::new(CKPT)
            .args(["check", image])
            .current_dir(&moved),
    );
    assert_eq!(out.code(), 1, "{out:#?}");
    assert!(out.stdout.contains("link of /proc"), "{out:#?}");
}
