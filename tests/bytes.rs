//! Names that are not UTF-8: directory, program, arguments, environment, comm, files that are open, mapped or
//! bound, watches. Bytes stay bytes.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;

use crate::common::look::{assert_let_go, await_rest};
use crate::common::{
    Case, Ended, Looks, attach, ckpt, isolated, isolated_as_user, restored, start, until,
};

/// Opens, maps, binds and watches what it is told, in its directory; SIGTERM ends it when all is as it was.
const PROGRAM: &str = r#"
import ctypes, mmap, os, signal, socket, sys
name = os.fsencode(sys.argv[1])
libc = ctypes.CDLL(None)
assert libc.prctl(15, name[:15], 0, 0, 0) == 0
file = open(name + b'.open', 'wb+', 0)
file.write(b'x' * 8192)
mapped = mmap.mmap(file.fileno(), 8192)
bound = socket.socket(socket.AF_UNIX)
bound.bind(name + b'.socket')
bound.listen()
os.mkfifo(name + b'.fifo')
fifo = os.open(name + b'.fifo', os.O_RDWR)
os.mkdir(name + b'.dir')
watch = libc.inotify_init1(0)
assert libc.inotify_add_watch(watch, name + b'.dir', 0x100) == 1
memfd = os.memfd_create('x' + sys.argv[1])
os.chdir(name + b'.dir')
def check(*_):
    assert os.fsencode(sys.argv[1]) == name and os.environb[b'N' + name] == name
    assert os.getcwdb().endswith(name + b'.dir')
    mapped[5:6] = b'y'
    assert os.pread(file.fileno(), 1, 5) == b'y'
    os.close(os.open(b'new', os.O_CREAT | os.O_WRONLY))
    assert b'new' in os.read(watch, 4096)
    os._exit(0)
signal.signal(signal.SIGTERM, check)
os.close(os.open(b'../ready', os.O_CREAT))
while True: signal.pause()
"#;

fn lives_again(case: &Case) {
    case.needs_program("python3", "python3");
    let name = OsStr::from_bytes(b"n\xff\xfe\\\xc3x");
    let dir = case.dir().join(name);
    fs::create_dir(&dir).expect("the test's directory is writable");
    crate::common::isolate::open_to_all(&dir);
    let python = fs::canonicalize("/usr/bin/python3").expect("it is installed");
    // The program itself, too.
    fs::copy(python, dir.join(name)).expect("the test's directory is writable");
    let mut command = Command::new(dir.join(name));
    let mut variable = b"N".to_vec();
    variable.extend_from_slice(name.as_bytes());
    command
        .args([OsStr::new("-c"), OsStr::new(PROGRAM), name])
        .env(OsStr::from_bytes(&variable), name)
        .current_dir(&dir);
    let mut job = start(&mut command, &case.path("job.log"));
    until("it to be set up", || {
        assert!(
            job.ended().is_none(),
            "{:?}",
            fs::read_to_string(case.path("job.log"))
        );
        dir.join("ready").exists().then_some(())
    });
    await_rest(job.pid);
    let before = Looks::at(job.pid);
    let image = dir.join(name).with_extension("ckpt");
    let (_, figures) = attach(case, job.pid, &image, &[]);
    assert!(
        figures["path"]
            .as_str()
            .expect("it has one")
            .contains(r"n\xff\xfe\\\xc3x")
    );
    assert_let_go(job.pid);
    before.assert_same(job.pid, &[]);
    let words = "inspect --fds --maps --threads --needs"
        .split(' ')
        .map(OsStr::new);
    ckpt(case, words.clone().chain([image.as_os_str()])).ok();
    let json = words.chain([OsStr::new("--json"), image.as_os_str()]);
    let shown = ckpt(case, json);
    assert!(
        shown.ok().contains(r"n\\xff\\xfe\\\\\\xc3x.open"),
        "{shown:?}"
    );
    ckpt(case, [OsStr::new("verify"), image.as_os_str()]).ok();
    attach(case, job.pid, &image, &["--kill"]);
    assert_eq!(until("its end", || job.ended()), Ended::Killed(9));
    // Messages, too.
    let file = |more: &str| {
        dir.join(OsStr::from_bytes(
            &[name.as_bytes(), more.as_bytes()].concat(),
        ))
    };
    fs::rename(file(".open"), file(".away")).expect("it is there");
    let out = ckpt(case, [OsStr::new("check"), image.as_os_str()]);
    assert_eq!(out.code(), 1, "{out:?}");
    assert!(out.stdout.contains(r"n\xff\xfe\\\xc3x.open"), "{out:?}");
    fs::rename(file(".away"), file(".open")).expect("it is there");
    let mut job = restored(case, &image, &[]);
    before.assert_same(job.pid, &[]);
    job.signal(Signal::SIGTERM);
    assert_eq!(until("its end", || job.ended()), Ended::Exited(0));
}

#[test]
fn names_that_are_not_utf8() {
    isolated("names_that_are_not_utf8", lives_again);
}

#[test]
fn names_that_are_not_utf8_of_a_user() {
    isolated_as_user("names_that_are_not_utf8_of_a_user", lives_again);
}

/// What `Path::display` shows of a name that is not UTF-8 could be any other one.
#[test]
fn paths_are_shown_in_one_way() {
    fn look(place: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(place).expect("the sources are there") {
            let path = entry.expect("it is readable").path();
            if path.is_dir() {
                look(&path, found);
            } else if fs::read_to_string(&path).is_ok_and(|text| {
                let code = text.split("#[cfg(test)]\nmod tests").next();
                code.is_some_and(|code| code.contains(".display()"))
            }) {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    for room in ["", "sys", "image", "tracer", "restorer", "objects"] {
        look(&top.join(room).join("src"), &mut found);
    }
    assert!(found.is_empty(), "{found:?}: use Shown of text.rs");
}

/// The image itself may have such a name.
#[test]
fn an_image_that_is_not_utf8() {
    isolated("an_image_that_is_not_utf8", |case| {
        let image = case.path("").join(OsStr::from_bytes(b"n\xff.ckpt"));
        let words = [r"n\xff.ckpt: there is no such image"];
        ckpt(case, [OsStr::new("verify"), image.as_os_str()]).refused(1, &words);
    });
}
