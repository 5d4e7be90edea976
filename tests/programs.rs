//! Ordinary programs: checkpointed from outside in the middle of their work, killed, restored,
//! three times in a row. The result equals that of an undisturbed run.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::job::start;
use crate::common::look::assert_let_go;
use crate::common::rounds::same_result;
use crate::common::tool::source;
use crate::common::{Case, Ended, Job, attach, isolated, isolated_as_user, restored, run, until};

/// Builds a program into the test's directory.
fn built(case: &Case, command: &mut Command) -> PathBuf {
    let program = case.path("program");
    run(case, command.arg("-o").arg(&program)).ok();
    program
}

fn with_interpreter(case: &Case, interpreter: &str, whence: &str, file: &str) {
    case.needs_program(interpreter, whence);
    same_result(case, &|| {
        let mut command = Command::new(interpreter);
        command.arg(source(file));
        command
    });
}

/// Debian's Python: numpy is installed for that one.
fn python(case: &Case, file: &str, module: &str) {
    let python = case.system_python();
    let import = run(
        case,
        Command::new(python).args(["-c", &format!("import {module}")]),
    );
    if import.code() != 0 {
        case.skip(&format!("the module {module} (python3-{module})"));
    }
    same_result(case, &|| {
        let mut command = Command::new(python);
        command.arg(source(file));
        command
    });
}

#[test]
fn python_threads() {
    isolated("python_threads", |case| python(case, "threads.py", "queue"));
}

#[test]
fn python_threads_of_an_ordinary_user() {
    isolated_as_user("python_threads_of_an_ordinary_user", |case| {
        python(case, "threads.py", "queue");
    });
}

#[test]
fn python_arrays() {
    isolated("python_arrays", |case| python(case, "arrays.py", "numpy"));
}

#[test]
fn sqlite_transaction() {
    isolated("sqlite_transaction", |case| {
        python(case, "ledger.py", "sqlite3")
    });
}

#[test]
fn perl() {
    isolated("perl", |case| {
        with_interpreter(case, "perl", "perl", "hashes.pl")
    });
}

#[test]
fn bash() {
    isolated("bash", |case| {
        with_interpreter(case, "bash", "bash", "count.sh")
    });
}

#[test]
fn node() {
    isolated("node", |case| {
        with_interpreter(case, "node", "nodejs", "sums.js")
    });
}

#[test]
fn node_of_an_ordinary_user() {
    isolated_as_user("node_of_an_ordinary_user", |case| {
        with_interpreter(case, "node", "nodejs", "sums.js");
    });
}

/// Every Java machine removes the files of those of its user that have ended, by their pids; it sees
/// only those of its own pid namespace.
pub(crate) fn with_own_performance_data(case: &Case) {
    let (shared, own) = (Path::new("/tmp/hsperfdata_root"), case.path("hsperfdata"));
    let made = std::fs::create_dir_all(shared).and_then(|()| std::fs::create_dir(&own));
    made.expect("both places are writable");
    let mut mount = Command::new("mount");
    run(case, mount.arg("--bind").args([own.as_path(), shared])).ok();
}

fn java(case: &Case, class: &str, options: &[&str]) {
    case.needs_program("javac", "default-jdk-headless");
    with_own_performance_data(case);
    let classes = case.path("classes");
    run(
        case,
        Command::new("javac")
            .arg("-d")
            .arg(&classes)
            .arg(source(&format!("{class}.java"))),
    )
    .ok();
    same_result(case, &|| {
        let mut command = Command::new("java");
        command.args(options).arg("-cp").arg(&classes).arg(class);
        command
    });
}

#[test]
fn java_virtual_machine() {
    isolated("java_virtual_machine", |case| java(case, "Sums", &[]));
}

#[test]
fn java_channels() {
    isolated("java_channels", |case| java(case, "Channels", &[]));
}

#[test]
fn java_with_children() {
    isolated("java_with_children", |case| java(case, "Children", &[]));
}

/// Without the file /tmp/hsperfdata_USER/PID, which has the same name in every pid namespace.
#[test]
fn java_of_an_ordinary_user() {
    isolated_as_user("java_of_an_ordinary_user", |case| {
        java(case, "Sums", &["-XX:-UsePerfData", "-XX:+UseParallelGC"]);
    });
}

/// It writes blocks with a checksum each, reads them back and compares them; it takes events out of
/// the ring by itself.
#[test]
fn fio_with_native_aio() {
    isolated("fio_with_native_aio", |case| {
        case.needs_program("fio", "fio");
        let file = case.path("blocks");
        let report = case.path("report.json");
        let mut fio = Command::new("fio");
        fio.args(["--name=blocks", "--ioengine=libaio", "--userspace_reap=1"])
            .args([
                "--iodepth=32",
                "--iodepth_batch_complete_min=4",
                "--direct=1",
            ])
            .args(["--rw=randwrite", "--bs=4k", "--size=8m", "--rate=1500k"])
            .args(["--verify=crc32c", "--verify_fatal=1", "--thread"])
            .args(["--output-format=json", "--fallocate=none"])
            .arg(format!("--filename={}", file.display()))
            .arg(format!("--output={}", report.display()));
        let mut job = start(fio.current_dir(case.dir()), &case.path("fio.log"));
        let written = || std::fs::metadata(&file).map_or(0, |m| m.blocks() * 512);
        let grown = |job: &mut Job, bytes: u64| {
            until("fio's file", || {
                assert_eq!(job.ended(), None, "fio ended early");
                (written() >= bytes).then_some(())
            });
        };
        grown(&mut job, 1 << 20);
        // At this rate it has something in flight all the time until it has written 8 MiB.
        while written() < 3 << 20 {
            attach(case, job.pid, "job.ckpt", &[]);
            assert_let_go(job.pid);
        }
        for bytes in [3 << 20, 5 << 20] {
            grown(&mut job, bytes);
            let (image, _) = attach(case, job.pid, "job.ckpt", &["--kill"]);
            until("fio's end", || job.ended());
            job = restored(case, &image, &[]);
        }
        assert_eq!(job.wait(), Ended::Exited(0));
        let report = std::fs::read_to_string(&report).expect("fio writes a report");
        let report: serde_json::Value = serde_json::from_str(&report).expect("it is JSON");
        let of_it = &report["jobs"][0];
        assert_eq!(of_it["error"], 0, "{report}");
        // What it wrote it has read again.
        assert_eq!(of_it["write"]["total_ios"], of_it["read"]["total_ios"]);
        assert!(
            of_it["write"]["total_ios"].as_u64() >= Some(2048),
            "{report}"
        );
    });
}

#[test]
fn goroutines() {
    isolated("goroutines", |case| {
        let program = pool(case);
        same_result(case, &|| Command::new(&program));
    });
}

/// `pool.go`, built.
pub(crate) fn pool(case: &Case) -> PathBuf {
    with_go(case, &source("pool.go"))
}

/// A program in Go, built without C.
pub(crate) fn with_go(case: &Case, source: &Path) -> PathBuf {
    case.needs_program("go", "golang-go");
    let cache = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/go-cache");
    let mut command = Command::new("go");
    command
        .env("CGO_ENABLED", "0")
        .env("GOCACHE", cache)
        .env("GOPATH", case.path("go"))
        .env("GOFLAGS", "-modcacherw")
        .env("GO111MODULE", "off")
        .arg("build");
    let program = case.path("program");
    let build = command.arg("-o").arg(&program).arg(source);
    run(case, build).ok();
    program
}

fn compiled(case: &Case, compiler: &str, whence: &str, options: &[&str], file: &str) {
    case.needs_program(compiler, whence);
    let program = built(case, Command::new(compiler).args(options).arg(source(file)));
    same_result(case, &|| Command::new(&program));
}

#[test]
fn c() {
    isolated("c", |case| {
        compiled(case, "gcc", "gcc", &["-O2", "-pthread"], "waves.c")
    });
}

#[test]
fn c_static() {
    isolated("c_static", |case| {
        compiled(
            case,
            "gcc",
            "gcc",
            &["-O2", "-pthread", "-static"],
            "waves.c",
        );
    });
}

#[test]
fn c_stripped() {
    isolated("c_stripped", |case| {
        compiled(
            case,
            "gcc",
            "gcc",
            &["-O2", "-pthread", "-static-pie", "-s"],
            "waves.c",
        );
    });
}

#[test]
fn c_static_of_an_ordinary_user() {
    isolated_as_user("c_static_of_an_ordinary_user", |case| {
        compiled(
            case,
            "gcc",
            "gcc",
            &["-O2", "-pthread", "-static"],
            "waves.c",
        );
    });
}

#[test]
fn musl_static() {
    isolated("musl_static", |case| {
        compiled(
            case,
            "musl-gcc",
            "musl-tools",
            &["-O2", "-static"],
            "waves.c",
        );
    });
}

#[test]
fn rust_threads() {
    isolated("rust_threads", |case| {
        compiled(
            case,
            "rustc",
            "the Rust toolchain",
            &["-O", "--edition=2024"],
            "pool.rs",
        );
    });
}
