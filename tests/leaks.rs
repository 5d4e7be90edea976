//! Root restores jobs of other users: nothing of root's is in them afterwards, and nothing that
//! only root may do was done for it.

use crate::common;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::edit::edited;
use crate::common::look::assert_no_process_left;
use crate::common::refused::FAILED;
use crate::common::tool::{Output, RESTORE};
use crate::common::{
    Case, Ended, Job, Looks, attach, fixture, isolated_as_root, restore_cmd, restored, run, start,
    until,
};
use ckpt::objects::Snapshot;
use ckpt::objects::files::Kind;
use ckpt::objects::files::regular::Regular;
use nix::sys::signal::Signal;

/// Says all that it can know of itself each time it is asked by SIGUSR1, in `facts.N`; ends by SIGTERM.
const WITNESS: &str = r#"
import ctypes, json, os, resource, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def keyctl(*words): return libc.syscall(250, *[ctypes.c_long(w) for w in words])
keyctl(1, 0)                                     # a session keyring of its own
room = ctypes.create_string_buffer(64)
count = 0
def tell(*_):
    global count
    count += 1
    status = dict(l.split(':\t') for l in open('/proc/self/status').read().splitlines() if ':\t' in l)
    named = 'Uid Gid Groups CapInh CapPrm CapEff CapBnd CapAmb Seccomp NoNewPrivs Umask'.split()
    fds = sorted(int(fd) for fd in os.listdir('/proc/self/fd'))
    facts = {name: status[name] for name in named}
    facts.update(
        ids=[os.getresuid(), os.getresgid(), sorted(os.getgroups())],
        securebits=libc.prctl(27, 0, 0, 0, 0),
        dumpable=libc.prctl(3, 0, 0, 0, 0),
        environment=sorted(os.environ.items()),
        environ=open('/proc/self/environ').read(),
        cwd=os.getcwd(), root=os.readlink('/proc/self/root'),
        fds=[[fd, os.readlink('/proc/self/fd/%d' % fd)] for fd in fds if os.path.exists('/proc/self/fd/%d' % fd)],
        limits=[resource.getrlimit(r) for r in range(16)],
        score=open('/proc/self/oom_score_adj').read(),
        login=[open('/proc/self/' + f).read() for f in ('loginuid', 'sessionid')],
        nice=os.getpriority(os.PRIO_PROCESS, 0), ioprio=libc.syscall(252, 1, 0),
        personality=libc.personality(0xffffffff), cgroup=open('/proc/self/cgroup').read(),
        session=os.getsid(0) == os.getpid(), tty=open('/proc/self/stat').read().rsplit(') ', 1)[1].split()[4],
        umask=status['Umask'])
    facts['keys'] = [l for l in open('/proc/keys').read().splitlines() if 'roots-secret' in l]
    key = os.path.exists('key') and int(open('key').read())
    facts['secret'] = keyctl(11, key, ctypes.addressof(room), 64) if key else -1
    facts['shadow'] = os.access('/etc/shadow', os.R_OK)
    with open('facts.new', 'w') as f: json.dump(facts, f, indent=1, sort_keys=True)
    os.rename('facts.new', 'facts.%d' % count)
signal.signal(signal.SIGUSR1, tell)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
os.setsid()
data = open('data', 'a+')
# At once: it is asked for its descriptors from then on.
open('ready.new', 'w').close()
os.rename('ready.new', 'ready')
while True: time.sleep(0.01)
"#;

/// Root as one with much that is only root's: a keyring with a key, groups, an environment, a
/// descriptor, a directory that nobody else may enter, limits, a low priority.
const ROOT: &str = r#"
import ctypes, os, resource, sys
libc = ctypes.CDLL(None, use_errno=True)
def keyctl(*words): return libc.syscall(250, *[ctypes.c_long(w) for w in words])
if keyctl(1, 0) >= 0:
    # add_key into the session keyring; its possessor may read it.
    key = libc.syscall(248, b'user', b'roots-secret', b'secret', 6, -3)
    assert key > 0, ctypes.get_errno()
    open('key', 'w').write(str(key))
    os.chmod('key', 0o644)
os.environ['ROOTS_SECRET'] = '1'
os.setgroups([0, 7777])
os.mkdir('roots', 0o700)
os.dup2(os.open('/etc/shadow', os.O_RDONLY), 99, inheritable=True)
os.umask(0o177)
os.nice(3)
resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
open('/proc/self/oom_score_adj', 'w').write('77')
os.chdir('roots')
os.execv(sys.argv[1], sys.argv[1:])
"#;

fn witness(case: &Case, who: &[&str]) -> Job {
    let python = case.system_python();
    let mut command = Command::new("setpriv");
    command.args(who).args([python, "-c", WITNESS]);
    command.current_dir(case.dir()).env_clear();
    command
        .env("PATH", "/usr/bin:/bin")
        .env("WHOSE", "the job's");
    let job = start(&mut command, &case.open_log("job.log"));
    until("it to begin", || case.path("ready").exists().then_some(()));
    job
}

/// What it says of itself, the Nth time.
fn facts(case: &Case, job: &Job, number: u32) -> serde_json::Value {
    let path = case.path(&format!("facts.{number}"));
    job.signal(Signal::SIGUSR1);
    until("its facts", || path.exists().then_some(()));
    let text = fs::read_to_string(path).expect("it is there");
    serde_json::from_str(&text).expect("it is JSON")
}

pub(crate) fn nothing_leaks(case: &Case, who: &[&str]) {
    nothing_leaks_into(case, who, false);
}

/// `--any-owner`: from an image that belongs to the user.
fn nothing_leaks_into(case: &Case, who: &[&str], any_owner: bool) {
    let mut job = witness(case, who);
    let pid = job.pid;
    let before = facts(case, &job, 1);
    let outside = Looks::at(pid);
    let namespaces = || {
        ["mnt", "net", "ipc", "uts", "user", "cgroup", "pid"]
            .map(|kind| fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("it lives"))
    };
    let lived_in = namespaces();
    let (image, _) = attach(case, pid, "job.ckpt", &["--kill"]);
    until("its end", || job.ended());
    let mut root = Command::new(case.system_python());
    root.args(["-c", ROOT, RESTORE]).arg(&image);
    root.args(["--detach", "--pids", "keep"])
        .current_dir(case.dir());
    let task = format!("task {pid} stat");
    let mut differs = vec!["status FDSize"];
    if any_owner {
        chown(&image, Some(65534), Some(65534)).expect("we are root");
        root.arg("--any-owner");
        // The user may not lower the score and the nice value of root's shell.
        differs.extend(["score", "nice", "stat", &task]);
    }
    let out = run(case, &mut root);
    let mut job = Job::of(out.ok().trim().parse().expect("it is a pid"));
    assert_eq!(job.pid, pid);
    // Room in the table of descriptors, which only grows.
    outside.assert_same(pid, &differs);
    assert_eq!(namespaces(), lived_in);
    let after = facts(case, &job, 2);
    let keys = before.as_object().expect("it is an object").keys();
    for key in keys.filter(|key| !differs.contains(&key.as_str())) {
        assert_eq!(after[key], before[key], "{key} is another one");
    }
    assert_eq!(after["secret"], -1, "root's key can be read");
    assert_eq!(after["shadow"], false);
    job.signal(Signal::SIGTERM);
    assert_eq!(until("its end", || job.ended()), Ended::Exited(7));
    assert_no_process_left();
}

/// Options of setpriv(1).
pub(crate) const NOBODY: [&str; 3] = ["--reuid=65534", "--regid=65534", "--clear-groups"];

#[test]
fn as_the_user_nobody() {
    isolated_as_root("as_the_user_nobody", |case| {
        nothing_leaks(case, &NOBODY);
    });
}

#[test]
fn image_of_the_user() {
    isolated_as_root("image_of_the_user", |case| {
        let who = ["--reuid=65534", "--regid=65534", "--init-groups"];
        nothing_leaks_into(case, &who, true);
    });
}

#[test]
fn user_with_groups() {
    isolated_as_root("user_with_groups", |case| {
        let who = ["--reuid=12345", "--regid=12345", "--groups=4242,4243"];
        nothing_leaks(case, &who);
    });
}

/// An image of a job of the user nobody, owned by that user.
fn image_of_nobody(case: &Case, args: &[&str]) -> PathBuf {
    let who = ["--reuid=65534", "--regid=65534", "--init-groups"];
    let mut job = witness(case, &who);
    let (image, _) = attach(case, job.pid, "job.ckpt", &[&["--kill"], args].concat());
    until("its end", || job.ended());
    chown(&image, Some(65534), Some(65534)).expect("we are root");
    image
}

/// The owner of an image may write anything into it.
fn forged(case: &Case, image: &Path, name: &str, edit: impl FnOnce(&mut Snapshot)) -> PathBuf {
    let image = edited(case, image, name, edit);
    chown(&image, Some(65534), Some(65534)).expect("we are root");
    image
}

fn any_owner(case: &Case, image: &Path, args: &[&str]) -> Output {
    let args = [&["--any-owner", "--pids", "keep", "--detach"], args].concat();
    run(case, &mut restore_cmd(image, &args))
}

fn regular<'a>(snapshot: &'a mut Snapshot, name: &str) -> &'a mut Regular {
    let mut kinds = snapshot.descriptions.iter_mut().map(|d| &mut d.kind);
    let found = kinds.find_map(|kind| match kind {
        Kind::Regular(file) if file.path.ends_with(name) => Some(file),
        _ => None,
    });
    found.expect("it is open")
}

/// An image whose owner could not have had what is in it is restored as the owner, who has no right to it; `forged.rs`
/// has all fields.
#[test]
fn more_than_its_owner() {
    isolated_as_root("more_than_its_owner", |case| {
        let image = image_of_nobody(case, &[]);
        let forged = forged(case, &image, "forged.ckpt", |snapshot| {
            snapshot.processes[0].threads[0].credentials.uid[2] = 0;
        });
        let words = ["has the uid 0", "you are uid 65534", "CAP_SETUID"];
        any_owner(case, &forged, &[]).refused(FAILED, &words);
        assert_no_process_left();
        let mut job = Job::of(
            any_owner(case, &image, &[])
                .ok()
                .trim()
                .parse()
                .expect("a pid"),
        );
        job.signal(Signal::SIGTERM);
        assert_eq!(until("its end", || job.ended()), Ended::Exited(7));
        assert_no_process_left();
    });
}

#[test]
fn files_of_root() {
    isolated_as_root("files_of_root", roots_files_stay);
}

/// Root's own files are neither opened nor written for it, wherever its paths lead.
pub(crate) fn roots_files_stay(case: &Case) {
    let image = image_of_nobody(case, &["--save-files", "**/data"]);
    let root = case.path("root");
    fs::create_dir(&root).expect("the test's directory is writable");
    fs::set_permissions(&root, PermissionsExt::from_mode(0o755)).expect("it is ours");
    let target = root.join("passwd");
    fs::write(&target, "").expect("it is ours");
    let same = fs::metadata(case.path("data"))
        .expect("it is there")
        .modified();
    let file = fs::File::options()
        .append(true)
        .open(&target)
        .expect("it is ours");
    file.set_modified(same.expect("it has one"))
        .expect("it is ours");
    let untouched = || {
        assert_eq!(fs::read(&target).expect("it is there"), b"");
        assert_eq!(fs::read_dir(&root).expect("it is there").count(), 1);
        assert_no_process_left();
    };
    // As open, as cut, and as put back.
    let elsewhere = forged(case, &image, "open.ckpt", |snapshot| {
        regular(snapshot, "data").path = target.clone();
    });
    let refused = any_owner(case, &elsewhere, &["--files", "adopt"]);
    refused.refused(FAILED, &["passwd", "ermission denied"]);
    untouched();
    let new = forged(case, &image, "put.ckpt", |snapshot| {
        regular(snapshot, "data").path = root.join("new");
    });
    any_owner(case, &new, &["--put-files"]).refused(FAILED, &["put back", "root/new", "denied"]);
    untouched();
    // The other user's directory leads elsewhere: also with an image that root owns.
    let own = case.path("own.ckpt");
    fs::copy(&image, &own).expect("the test's directory is writable");
    fs::rename(case.path("data"), case.path("aside")).expect("it is there");
    std::os::unix::fs::symlink(&target, case.path("data")).expect("its place is free");
    let args = ["--pids", "keep", "--detach"];
    let refused = run(case, &mut restore_cmd(&own, &args));
    refused.refused(FAILED, &["data", "is a symbolic link by now"]);
    untouched();
    let args = ["--pids", "keep", "--detach", "--files", "adopt"];
    let refused = run(case, &mut restore_cmd(&own, &args));
    refused.refused(FAILED, &["data", "may not be opened by the job's user"]);
    untouched();
    fs::remove_file(case.path("data")).expect("it is there");
    fs::rename(case.path("aside"), case.path("data")).expect("its place is free");
    // What the job opened when it might, and may not any more, root opens for it.
    chown(case.path("data"), Some(0), Some(0)).expect("we are root");
    fs::set_permissions(case.path("data"), PermissionsExt::from_mode(0o600)).expect("we are root");
    let mut job = restored(case, &own, &["--pids", "keep"]);
    job.signal(Signal::SIGTERM);
    assert_eq!(until("its end", || job.ended()), Ended::Exited(7));
    untouched();
}

/// `--env` writes where the job says, and so with its user's rights.
#[test]
fn values_are_not_written_for_it() {
    isolated_as_root("values_are_not_written_for_it", |case| {
        let root = case.path("root");
        fs::create_dir(&root).expect("the test's directory is writable");
        fs::set_permissions(&root, PermissionsExt::from_mode(0o755)).expect("it is ours");
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        command.args(["sleep", "1000"]).current_dir(case.dir());
        command.env("CKPT_RESTORE_ENV", root.join("values"));
        let mut job = start(&mut command, &case.open_log("job.log"));
        until("it to sleep", || {
            (common::look::status_field(job.pid, "Name")? == "sleep").then_some(())
        });
        let (image, _) = attach(case, job.pid, "job.ckpt", &["--kill"]);
        until("its end", || job.ended());
        for place in ["keep", "namespace"] {
            let args = ["--detach", "--env", "A=b", "--pids", place];
            let out = run(case, &mut restore_cmd(&image, &args));
            out.refused(FAILED, &["root/values", "ermission denied"]);
            assert_eq!(fs::read_dir(&root).expect("it is there").count(), 0);
            assert_no_process_left();
        }
    });
}

/// What a process has from the one that made it, over fork and exec, is the job's own, whatever `restore` itself
/// happens to have. (Switches that cannot be seen from outside are in the table of `objects/switches.rs`.)
#[test]
fn what_restore_itself_has_inherited() {
    const WRAPPER: &str = "import ctypes, os, signal, sys
libc = ctypes.CDLL(None)
prctl = lambda *words: libc.prctl(*map(ctypes.c_ulong, words))
assert prctl(41, 1, 0, 0, 0) == 0  # PR_SET_THP_DISABLE
prctl(67, 1, 0, 0, 0)              # PR_SET_MEMORY_MERGE
assert prctl(33, 1, 1, 0, 0) == 0  # PR_MCE_KILL
assert prctl(29, 12345, 0, 0, 0) == 0
node = ctypes.c_ulong(1)
libc.syscall(238, 2, ctypes.byref(node), ctypes.c_ulong(64)) # MPOL_BIND
os.nice(3); os.umask(0o77); os.sched_setaffinity(0, {0}); os.chdir('/')
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
open('/proc/self/oom_score_adj', 'w').write('100')
open('/proc/self/coredump_filter', 'w').write('1')
os.execv(sys.argv[1], sys.argv[1:])";
    isolated_as_root("what_restore_itself_has_inherited", |case| {
        let python = case.system_python();
        let mut target = fixture(case, "tree_pipe");
        let look = |pid: i32| {
            let file = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}"));
            let names = ["timerslack_ns", "oom_score_adj", "coredump_filter"];
            let bound = file("numa_maps").is_ok_and(|maps| maps.contains(" bind:"));
            (names.map(|name| file(name).ok()), bound)
        };
        let (before, seen) = (Looks::at(target.pid()), look(target.pid()));
        let image = target.killed_into(case, "job.ckpt");
        let mut command = Command::new(python);
        command
            .args(["-c", WRAPPER, RESTORE, "--detach"])
            .arg(&image);
        let out = run(case, &mut command);
        target.continued_by(Job::of(out.ok().trim().parse().expect("a pid")));
        before.assert_same(target.pid(), &[]);
        assert_eq!(look(target.pid()), seen);
        target.passes();
    });
}
