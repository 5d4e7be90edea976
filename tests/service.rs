//! Under `systemd --user`: a service is checkpointed while it runs, killed, and started again by a
//! restore, in the same control group, with its socket to the service manager.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::isolate::open_to_all;
use crate::common::look::status_field;
use crate::common::tool::{CKPT, RESTORE, nobody};
use crate::common::{Case, Job, isolated, run, start, until};

/// Tells the service manager how far it has come, by a socket that stays connected.
const PROGRAM: &str = r#"
import os, socket, time
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.connect(os.environ['NOTIFY_SOCKET'])
begun = os.environ['INVOCATION_ID']
n = 0
while True:
    n += 1
    s.send(b'READY=1\nWATCHDOG=1\nSTATUS=%d of %s' % (n, begun.encode()))
    time.sleep(0.02)
"#;

/// A service manager of an ordinary user, with a runtime directory and control group of its own.
struct Manager {
    job: Option<Job>,
    runtime: PathBuf,
    group: PathBuf,
}

fn mount(what: &str, at: &Path) -> bool {
    let (what, at) = (
        CString::new(what),
        CString::new(at.to_str().expect("a text")),
    );
    let (what, at) = (what.expect("no NUL"), at.expect("no NUL"));
    // SAFETY: C strings and no data; we are in a mount namespace of our own.
    #[expect(unsafe_code, reason = "nix is built without mount")]
    let r = unsafe {
        libc::mount(
            what.as_ptr(),
            at.as_ptr(),
            what.as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    r == 0
}

impl Manager {
    fn start(case: &Case) -> Self {
        const SYSTEMD: &str = "/usr/lib/systemd/systemd";
        if !Path::new(SYSTEMD).exists() {
            case.skip("systemd");
        }
        if !mount("tmpfs", Path::new("/run")) || !mount("cgroup2", Path::new("/sys/fs/cgroup")) {
            case.skip("control groups of version 2");
        }
        fs::create_dir_all("/run/systemd/system").expect("it is ours");
        let runtime = PathBuf::from("/run/user");
        let mut builder = fs::DirBuilder::new();
        builder.mode(0o700).create(&runtime).expect("it is ours");
        chown(&runtime, Some(65534), Some(65534)).expect("we are root");
        let name = case.dir().file_name().expect("it has a name");
        let group = Path::new("/sys/fs/cgroup").join(name);
        if fs::create_dir(&group).is_err() {
            case.skip("control groups that may be made");
        }
        let inner = group.join("manager");
        fs::create_dir(&inner).expect("its parent is ours");
        for path in [&group, &inner] {
            for file in [
                "",
                "cgroup.procs",
                "cgroup.subtree_control",
                "cgroup.threads",
            ] {
                chown(path.join(file), Some(65534), Some(65534)).expect("we are root");
            }
        }
        let script = format!("echo 0 > {}/cgroup.procs; exec \"$@\"", inner.display());
        let mut command = Command::new("sh");
        command.args([
            "-c",
            &script,
            "sh",
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
        ]);
        command.args(["--clear-groups", SYSTEMD, "--user"]);
        command
            .env("HOME", &runtime)
            .env("XDG_RUNTIME_DIR", &runtime);
        command.env("SYSTEMD_LOG_TARGET", "console");
        command.current_dir("/");
        let job = start(&mut command, &case.path("systemd.log"));
        let mut manager = Self {
            job: Some(job),
            runtime,
            group,
        };
        until("the service manager", || {
            if manager
                .job
                .as_mut()
                .is_some_and(|job| job.ended().is_some())
            {
                case.skip("systemd --user that starts");
            }
            let out = manager.ctl(case, &["is-system-running"]);
            (out == "running" || out == "degraded").then_some(())
        });
        manager
    }

    fn ctl(&self, case: &Case, args: &[&str]) -> String {
        let mut command = nobody(case, Path::new("systemctl"));
        command.env("XDG_RUNTIME_DIR", &self.runtime).arg("--user");
        run(case, command.args(args)).stdout.trim().to_owned()
    }

    fn property(&self, case: &Case, name: &str) -> String {
        self.ctl(case, &["show", "job.service", "--value", "-p", name])
    }

    /// How far the service says it is, and in whose environment it began.
    fn progress(&self, case: &Case) -> Option<(u32, String)> {
        let text = self.property(case, "StatusText");
        let (number, begun) = text.split_once(" of ")?;
        Some((number.parse().ok()?, begun.to_owned()))
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        // With everybody that is in it, and then the empty groups, the innermost first.
        let _ = fs::write(self.group.join("cgroup.kill"), "1");
        drop(self.job.take());
        fn remove(group: &Path) {
            for entry in fs::read_dir(group).into_iter().flatten().flatten() {
                if entry.path().is_dir() {
                    remove(&entry.path());
                }
            }
            let _ = fs::remove_dir(group);
        }
        until("its control groups to be gone", || {
            remove(&self.group);
            (!self.group.exists()).then_some(())
        });
    }
}

#[test]
fn of_a_user() {
    isolated("of_a_user", |case| {
        case.needs_root();
        case.needs_program("systemctl", "systemd");
        let python = case.system_python();
        open_to_all(case.dir());
        fs::write(case.path("job.py"), PROGRAM).expect("the test's directory is writable");
        let manager = Manager::start(case);
        let dir = case.dir().display();
        // The same unit starts it, and from then on restores it.
        let line = format!(
            "if [ -e {dir}/job.ckpt ]; then exec {RESTORE} {dir}/job.ckpt; else exec {python} {dir}/job.py; fi"
        );
        let units = manager.runtime.join("systemd/user");
        fs::create_dir_all(&units).expect("it is there");
        let unit = format!(
            "[Service]\nType=notify\nNotifyAccess=all\nWatchdogSec=60\nWorkingDirectory={dir}\n\
             ExecStart=/bin/sh -c '{line}'\nStandardOutput=append:{dir}/job.log\n\
             StandardError=append:{dir}/job.log\n"
        );
        fs::write(units.join("job.service"), unit).expect("it is there");
        manager.ctl(case, &["daemon-reload"]);
        manager.ctl(case, &["start", "job.service"]);
        assert_eq!(manager.property(case, "ActiveState"), "active");
        let pid = manager.property(case, "MainPID");
        let group = || fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("it lives");
        assert!(group().contains("job.service"), "{}", group());
        let (_, begun) = until("its progress", || manager.progress(case));
        let args = ["attach", &pid, "-o", "job.ckpt", "--kill"];
        run(case, nobody(case, Path::new(CKPT)).args(args)).ok();
        until("its end to be seen", || {
            (manager.property(case, "ActiveState") == "failed").then_some(())
        });
        let (reached, _) = manager.progress(case).unwrap_or_default();
        manager.ctl(case, &["reset-failed", "job.service"]);
        manager.ctl(case, &["start", "job.service"]);
        assert_eq!(manager.property(case, "ActiveState"), "active");
        // It goes on where it was, and is what it was, by its own account.
        let (now, who) = until("its progress", || {
            manager.progress(case).filter(|(now, _)| *now > reached + 2)
        });
        assert_eq!(who, begun, "after {now}");
        let front = manager.property(case, "MainPID");
        let all = fs::read_to_string(
            manager
                .group
                .join("manager/app.slice/job.service/cgroup.procs"),
        );
        let all = all.expect("its group is there again");
        assert!(all.lines().any(|line| line == front), "{all}");
        let job = all.lines().find(|line| {
            let pid: i32 = line.parse().expect("it is a pid");
            status_field(pid, "Name").is_some_and(|name| name.starts_with("python"))
        });
        assert!(job.is_some(), "the job is in another control group: {all}");
        manager.ctl(case, &["stop", "job.service"]);
        until("its end", || {
            (manager.property(case, "ActiveState") == "inactive"
                || manager.property(case, "ActiveState") == "failed")
                .then_some(())
        });
    });
}
