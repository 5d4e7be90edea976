//! `ckpt attach`, `inspect` and `verify` on a live process, as a user calls them.

use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

const CKPT: &str = env!("CARGO_BIN_EXE_ckpt");

/// A sleeping process, and a directory for its images.
struct Job {
    child: Child,
    directory: PathBuf,
}

impl Job {
    /// Waits until it sleeps in its own code.
    fn new(name: &str) -> Self {
        let directory =
            std::env::temp_dir().join(format!("ckpt-image-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let mut command = Command::new("sleep");
        command
            .arg("1000")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = command.spawn().unwrap();
        let stat = format!("/proc/{}/stat", child.id());
        while !std::fs::read_to_string(&stat)
            .unwrap()
            .contains("(sleep) S")
        {
            std::thread::yield_now();
        }
        Job { child, directory }
    }

    fn pid(&self) -> String {
        self.child.id().to_string()
    }

    fn ckpt(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(CKPT);
        command
            .args(arguments)
            .current_dir(&self.directory)
            .stdin(Stdio::null());
        command.output().unwrap()
    }

    fn success(&self, arguments: &[&str]) -> String {
        let output = self.ckpt(arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, arguments: &[&str]) -> serde_json::Value {
        serde_json::from_str(&self.success(arguments)).unwrap()
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

#[test]
fn an_image_has_the_default_name_and_one_line_says_so() {
    let mut job = Job::new("name");
    let pid = job.pid();
    let line = job.success(&["attach", &pid]);
    assert_eq!(line.lines().count(), 1, "{line}");
    let name = format!("sleep.{pid}.ckpt");
    for part in [
        &format!("sleep: pid {pid}, 1 process, 1 thread, memory "),
        &name,
    ] {
        assert!(line.contains(part), "{line} lacks {part}");
    }
    assert!(job.child.try_wait().unwrap().is_none(), "it goes on");
    assert!(
        job.success(&["verify", &name])
            .starts_with(&format!("{name}: ok, "))
    );
    assert_eq!(job.success(&["verify", "-q", &name]), "");
    assert_eq!(job.success(&["attach", "-q", &pid]), "");
}

#[test]
fn figures_are_the_same_as_json() {
    let job = Job::new("json");
    let figures = job.json(&[
        "attach",
        &job.pid(),
        "--json",
        "-o",
        "a.ckpt",
        "--codec",
        "lz4",
    ]);
    assert_eq!(figures["name"], "sleep");
    assert_eq!(figures["pid"].to_string(), job.pid());
    assert_eq!(
        (&figures["processes"], &figures["threads"]),
        (&1.into(), &1.into())
    );
    let size = std::fs::metadata(job.directory.join("a.ckpt"))
        .unwrap()
        .len();
    assert_eq!(figures["image_bytes"], size);
    for key in ["memory_bytes", "total_seconds", "paused_seconds", "path"] {
        assert!(!figures[key].is_null(), "{key}");
    }
}

#[test]
fn an_image_can_go_to_standard_output() {
    let job = Job::new("stdout");
    let output = job.ckpt(&["attach", &job.pid(), "-o", "-"]);
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("standard output"));
    std::fs::write(job.directory.join("copy.ckpt"), &output.stdout).unwrap();
    job.success(&["verify", "copy.ckpt"]);
}

#[test]
fn kill_ends_the_process_after_its_checkpoint() {
    let mut job = Job::new("kill");
    job.success(&["attach", &job.pid(), "--kill", "-o", "a.ckpt"]);
    let status = job.child.wait().unwrap();
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&status),
        Some(9)
    );
    job.success(&["verify", "a.ckpt"]);
}

#[test]
fn inspection_shows_where_a_thread_waits_and_what_it_has() {
    let job = Job::new("inspect");
    let pid = job.pid();
    job.success(&["attach", &pid, "-o", "a.ckpt"]);
    let text = job.success(&["inspect", "a.ckpt"]);
    assert!(
        text.contains(&format!("sleep, pid {pid}")) && text.contains("sleep 1000"),
        "{text}"
    );
    let all = job.json(&[
        "inspect",
        "a.ckpt",
        "--threads",
        "--maps",
        "--fds",
        "--json",
    ]);
    assert_eq!(all["summary"]["name"], "sleep");
    let thread = &all["threads"][0];
    assert_eq!(thread["state"], "waiting", "{thread}");
    let call = thread["call"].as_str().unwrap();
    assert!(
        call.contains("nanosleep(") && call.contains(" s}"),
        "{call}"
    );
    assert!(
        thread["instruction"].is_string(),
        "the code is in the C library's file: {thread}"
    );
    let maps = all["maps"].as_array().unwrap();
    let stored: u64 = maps
        .iter()
        .map(|map| map["stored_bytes"].as_u64().unwrap())
        .sum();
    assert_eq!(
        all["summary"]["memory_bytes"], stored,
        "every stored page is in a mapping"
    );
    assert!(maps.iter().any(|map| map["path"] == "[stack]"));
    let fd = &all["fds"][0];
    assert_eq!(
        (&fd["fd"], &fd["path"]),
        (&0.into(), &"/dev/null".into()),
        "{fd}"
    );
}

#[test]
fn damage_is_found() {
    let job = Job::new("damage");
    job.success(&["attach", &job.pid(), "-o", "a.ckpt"]);
    let path = job.directory.join("a.ckpt");
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let output = job.ckpt(&["verify", "a.ckpt"]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        text.starts_with("ckpt: a.ckpt: the image is corrupted"),
        "{text}"
    );
}

#[test]
fn a_process_that_can_be_checkpointed_is_said_to() {
    let job = Job::new("check");
    let answer = job.json(&["check", &job.pid(), "--json"]);
    assert_eq!(answer["possible"], true, "{answer}");
    assert_eq!(answer["obstacles"], serde_json::json!([]));
    assert!(
        job.success(&["check", &job.pid()])
            .contains("can be checkpointed")
    );
}
