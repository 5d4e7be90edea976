//! Each test in a pid namespace of its own: a restored process wants its old pid, and no other
//! test may have taken it meanwhile.
//!
//! A test calls [`isolated`] with its own name. Outside, that runs this very test binary again
//! under `unshare`, for this one test; inside, where we are pid 1 and reap whatever is orphaned,
//! it runs the body. When we end, the kernel kills everything that is left in the namespace, and
//! the outer half removes the directory. Root needs no user namespace for it; others get one. Root gives each test a
//! network namespace as well.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::panic::Location;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

const INSIDE: &str = "CKPT_TEST_INSIDE";
const FIXTURES: &str = "CKPT_TEST_FIXTURES";
const NOBODY: u32 = 65534;

/// Whether the test runs as ordinary user, in a user namespace.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    Me,
    OrdinaryUser,
}

/// What a test's body gets.
pub struct Case {
    dir: PathBuf,
}

impl Case {
    /// An empty directory that goes with the test.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// An empty file in it that everybody may write to.
    pub fn open_log(&self, name: &str) -> PathBuf {
        let log = self.path(name);
        fs::write(&log, "").expect("the test's directory is writable");
        open_to_all(&log);
        log
    }

    /// Where the fixtures are.
    pub fn fixtures(&self) -> PathBuf {
        std::env::var_os(FIXTURES).expect("set outside").into()
    }

    /// Ends the test: it cannot run here, for this reason.
    pub fn skip(&self, lacking: &str) -> ! {
        fs::write(self.dir.join(".skip"), lacking).expect("the test's directory is writable");
        std::process::exit(0)
    }

    /// Whether we are root outside of any user namespace.
    pub fn is_root(&self) -> bool {
        let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        map.split_whitespace().next_back() == Some("4294967295") && is_root()
    }

    /// Skips unless we are.
    pub fn needs_root(&self) {
        if !self.is_root() {
            self.skip("root");
        }
    }

    /// Debian's own python, which sees Debian's modules; skips without it.
    pub fn system_python(&self) -> &'static str {
        const PYTHON: &str = "/usr/bin/python3";
        if !Path::new(PYTHON).exists() {
            self.skip("/usr/bin/python3 (python3)");
        }
        PYTHON
    }

    /// Skips unless this program is installed; `whence` says what installs it.
    pub fn needs_program(&self, program: &str, whence: &str) {
        if !installed(program) {
            self.skip(&format!("{program} ({whence})"));
        }
    }
}

/// Whether a program is in PATH.
pub fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Runs the body of test `name`, one of the caller's file, in a pid namespace.
#[track_caller]
pub fn isolated(name: &str, body: impl FnOnce(&Case)) {
    in_namespace(name, Who::Me, Box::new(body));
}

/// Runs the body of test `name` in a pid and user namespace of an ordinary user, even when we are
/// root.
#[track_caller]
pub fn isolated_as_user(name: &str, body: impl FnOnce(&Case)) {
    in_namespace(name, Who::OrdinaryUser, Box::new(body));
}

/// Runs the body of test `name` as root, in a directory that is everybody's.
#[track_caller]
pub fn isolated_as_root(name: &str, body: impl FnOnce(&Case)) {
    isolated(name, |case| {
        case.needs_root();
        case.needs_program("setpriv", "util-linux");
        open_to_all(case.dir());
        body(case);
    });
}

/// What a test does. Boxed, so that the rest of a test is compiled once and not for each of them.
type Body<'a> = Box<dyn FnOnce(&Case) + 'a>;

#[track_caller]
fn in_namespace(name: &str, who: Who, body: Body<'_>) {
    match std::env::var_os(INSIDE) {
        Some(dir) => inside(&Case { dir: dir.into() }, body),
        None => outside(&title(name, Location::caller().file()), who),
    }
}

fn inside(case: &Case, body: Body<'_>) {
    assert_eq!(
        std::process::id(),
        1,
        "this test runs in a namespace of its own"
    );
    close_inherited();
    // The job's session is then inside of the namespace, like its processes.
    nix::unistd::setsid().expect("pid 1 leads no process group yet");
    // Its other end is held by the outer half alone: whatever ends that ends us.
    std::thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(3);
    });
    body(case);
    fs::write(case.dir.join(".done"), "").expect("the test's directory is writable");
}

/// Closes what we inherited beyond the standard streams (make's job server, say): a process
/// under test would have it as well.
fn close_inherited() {
    let fds = fs::read_dir("/proc/self/fd")
        .expect("/proc is mounted")
        .flatten();
    let fds = fds.filter_map(|fd| fd.file_name().to_str()?.parse::<i32>().ok());
    for fd in fds.filter(|fd| *fd > 2).collect::<Vec<_>>() {
        // The one that listed them is closed already.
        let _ = nix::unistd::close(fd);
    }
}

/// The name by which the test binary knows a test: `tests/FILE.rs` is the module FILE.
fn title(name: &str, file: &str) -> String {
    let module = Path::new(file).file_stem().unwrap_or_default();
    format!("{}::{name}", module.display())
}

fn outside(title: &str, who: Who) {
    if let Err(lacking) = namespaces(who) {
        return skipped(title, &lacking);
    }
    let dir = Scratch::new(title, who);
    let fixtures = ckpt_fixtures::path("counter");
    let log = File::create(dir.0.join("test.log")).expect("the test's directory is writable");
    let mut inner = unshare(who)
        .arg(std::env::current_exe().expect("we have a name"))
        .args(["--exact", title, "--nocapture", "--test-threads=1"])
        .env(INSIDE, &dir.0)
        .env(FIXTURES, fixtures.parent().expect("it is in a directory"))
        .env("TMPDIR", &dir.0)
        .env("XDG_RUNTIME_DIR", &dir.0)
        .env("RUST_BACKTRACE", "0")
        .env_remove("CKPT_FAULT")
        .current_dir(&dir.0)
        .stdin(Stdio::piped())
        .stdout(log.try_clone().expect("a descriptor is free"))
        .stderr(log)
        .spawn()
        .expect("util-linux is installed");
    let ended = wait(&mut inner);
    if let Ok(lacking) = fs::read_to_string(dir.0.join(".skip")) {
        return skipped(title, &lacking);
    }
    let trouble = match ended {
        None => format!("not finished after {:?}", limit()),
        Some(status) if !status.success() => format!("{status}"),
        Some(_) if !dir.0.join(".done").exists() => "ran nothing: is its name right?".into(),
        Some(_) => return,
    };
    panic!("{title}: {trouble}\n{}", dir.logs());
}

/// The directory of one test, removed at its end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(title: &str, who: Who) -> Self {
        let name = format!(
            "ckpt-test.{}.{}",
            std::process::id(),
            title.replace("::", ".")
        );
        let dir = std::env::temp_dir().join(name);
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir(&dir).expect("the temporary directory is writable");
        if who == Who::OrdinaryUser && is_root() {
            chown(&dir, Some(NOBODY), Some(NOBODY)).expect("root may give a directory away");
        }
        let canonical = dir.canonicalize().expect("it was just made");
        Scratch(canonical)
    }

    fn logs(&self) -> String {
        let mut text = String::new();
        let mut files: Vec<PathBuf> = Vec::new();
        collect(&self.0, &mut files);
        files.sort();
        for file in files {
            let content = fs::read(&file).unwrap_or_default();
            if content.is_empty() {
                continue;
            }
            let tail = &content[content.len().saturating_sub(6000)..];
            let name = file
                .strip_prefix(&self.0)
                .unwrap_or(&file)
                .display()
                .to_string();
            text += &format!("--- {name}\n{}\n", String::from_utf8_lossy(tail).trim_end());
        }
        text
    }
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        match path.extension() {
            _ if path.is_dir() && !path.is_symlink() => collect(&path, files),
            Some(extension) if extension == "log" => files.push(path),
            _ if path.ends_with("verdict") => files.push(path),
            _ => {}
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::env::var_os("CKPT_TEST_KEEP").is_some() {
            return eprintln!("kept: {}", self.0.display());
        }
        if fs::remove_dir_all(&self.0).is_err() {
            // Tests take permissions away from directories.
            let _ = Command::new("chmod")
                .args(["-R", "u+rwx"])
                .arg(&self.0)
                .status();
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

/// One test in all, 280 seconds or `CKPT_TEST_LIMIT`; single states have the deadline of [`super::wait`].
fn limit() -> Duration {
    let given = std::env::var("CKPT_TEST_LIMIT").ok();
    Duration::from_secs(given.and_then(|s| s.parse().ok()).unwrap_or(280))
}

fn wait(inner: &mut Child) -> Option<ExitStatus> {
    let (begun, limit) = (Instant::now(), limit());
    loop {
        if let Some(status) = inner.try_wait().expect("it is our child") {
            return Some(status);
        }
        if begun.elapsed() > limit {
            // With the pipe to it goes the namespace.
            drop(inner.stdin.take());
            let _ = inner.wait();
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn unshare(who: Who) -> Command {
    let mut command = match who {
        _ if !is_root() => Command::new("unshare"),
        Who::Me => within_own_network("unshare"),
        Who::OrdinaryUser => {
            let mut command = within_own_network("setpriv");
            let nobody = NOBODY.to_string();
            command.args([
                "--reuid",
                &nobody,
                "--regid",
                &nobody,
                "--clear-groups",
                "unshare",
            ]);
            command
        }
    };
    if who == Who::OrdinaryUser || !is_root() {
        command.arg("--map-root-user");
    }
    // System V objects outlive their processes; in a namespace of their own they go with it.
    command.args(["--pid", "--ipc", "--mount-proc", "--kill-child", "--"]);
    command
}

/// A command in a network namespace of root's: a restored socket wants its old port. An ordinary user cannot make one
/// without having capabilities in it, and stays in ours.
fn within_own_network(program: &str) -> Command {
    let mut command = Command::new("unshare");
    let up = "ip link set lo up && ip route add 224.0.0.0/4 dev lo && exec \"$0\" \"$@\"";
    command.args(["--net", "--", "sh", "-c", up, program]);
    command
}

/// What is lacking for the namespaces, if anything is.
fn namespaces(who: Who) -> Result<(), String> {
    let out = unshare(who).arg("/bin/true").output();
    let out = out.map_err(|e| format!("unshare or setpriv (util-linux): {e}"))?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        return Err(format!("a pid namespace of its own ({})", said.trim()));
    }
    let me = std::env::current_exe().expect("we have a name");
    if who == Who::OrdinaryUser && is_root() {
        let out = unshare(who)
            .args([Path::new("test"), Path::new("-x"), &me])
            .status();
        if !out.is_ok_and(|status| status.success()) {
            return Err(format!(
                "{} that an ordinary user may execute",
                me.display()
            ));
        }
    }
    Ok(())
}

/// Tells of a skipped test, on standard error and in the list that `make test` shows at its end.
pub fn skipped(title: &str, lacking: &str) {
    let line = format!("SKIP {title}: {}\n", lacking.trim().replace('\n', " "));
    eprint!("{line}");
    let list = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/test-skips");
    let file = OpenOptions::new().create(true).append(true).open(&list);
    if let Err(error) = file.and_then(|mut file| file.write_all(line.as_bytes())) {
        eprintln!("cannot note it in {}: {error}", list.display());
    }
}

/// Makes a file or directory accessible to everybody; in the directory, everybody's files remain theirs.
pub fn open_to_all(path: &Path) {
    let mode = if path.is_dir() { 0o1777 } else { 0o777 };
    let permissions = fs::Permissions::from_mode(mode);
    fs::set_permissions(path, permissions).expect("it is ours");
}
