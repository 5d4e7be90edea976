//! Servers and their clients in one job, connected over TCP and UDP on the loopback interface (`tests/servers/README.md`): checkpointed
//! several times while they work, then killed and restored twice. No connection may be lost and no answer be wrong.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::isolate::open_to_all;
use crate::common::look::assert_let_go;
use crate::common::rounds::{gone, progress};
use crate::common::tool::nobody;
use crate::common::{
    Case, Ended, Job, attach, isolated, isolated_as_user, restored, run, start, until,
};
use crate::jobs::postgres;
use crate::programs::{with_go, with_own_performance_data};

/// A file of `tests/servers`.
fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/servers")
        .join(name)
}

/// A port for a server that cannot tell which one it was given. In a network namespace of our own it stays free.
fn free_port() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    listener.expect("a port is free").port().to_string()
}

/// Runs the job through attaches and two lives.
fn goes_on(case: &Case, mut command: Command) {
    let dir = case.path("run");
    fs::create_dir(&dir).expect("the test's directory is writable");
    open_to_all(&dir);
    let log = case.open_log("job.log");
    let mut job = start(command.arg(&dir).current_dir(&dir), &log);
    for _ in 1..=3 {
        works(&dir, &mut job);
        attach(case, job.pid, "job.ckpt", &[]);
        assert_let_go(job.pid);
    }
    for _ in 1..=2 {
        works(&dir, &mut job);
        let (image, _) = attach(case, job.pid, "job.ckpt", &["--kill"]);
        assert_eq!(gone(&mut job), Ended::Killed(9));
        job = restored(case, &image, &[]);
    }
    works(&dir, &mut job);
    fs::write(dir.join("finish"), "").expect("the test's directory is writable");
    assert_eq!(job.wait(), Ended::Exited(0));
    let result = fs::read_to_string(dir.join("result")).expect("it has a result");
    assert_eq!(result, "right\n");
}

/// Waits for the round after this one.
fn works(dir: &Path, job: &mut Job) {
    let before = progress(dir);
    until(&format!("round {}", before + 1), || {
        if progress(dir) > before {
            return Some(());
        }
        assert_eq!(job.ended(), None, "in round {before}");
        None
    });
}

fn python(case: &Case, file: &str) {
    let mut command = Command::new(case.system_python());
    command.arg(source(file));
    goes_on(case, command);
}

fn redis(case: &Case) {
    case.needs_program("redis-server", "redis-server");
    case.needs_program("redis-benchmark", "redis-server");
    let mut command = Command::new("bash");
    command.arg(source("redis.sh")).arg(free_port());
    goes_on(case, command);
}

#[test]
fn redis_and_its_benchmark() {
    isolated("redis_and_its_benchmark", redis);
}

#[test]
fn redis_and_its_benchmark_of_an_ordinary_user() {
    isolated_as_user("redis_and_its_benchmark_of_an_ordinary_user", redis);
}

/// It does not work for root.
#[test]
fn postgres_and_pgbench() {
    isolated("postgres_and_pgbench", |case| {
        case.needs_root();
        let path = postgres(case);
        open_to_all(case.dir());
        let mut command = nobody(case, Path::new("bash"));
        command.env("PATH", path).arg(source("postgres.sh"));
        command.arg(free_port());
        goes_on(case, command);
    });
}

fn nginx(case: &Case) {
    case.needs_program("nginx", "nginx-light");
    case.needs_program("curl", "curl");
    let python = case.system_python();
    let mut command = Command::new("bash");
    command.arg(source("nginx.sh")).arg(python).arg(free_port());
    goes_on(case, command);
}

#[test]
fn nginx_and_lasting_connections() {
    isolated("nginx_and_lasting_connections", nginx);
}

#[test]
fn nginx_and_lasting_connections_of_an_ordinary_user() {
    isolated_as_user("nginx_and_lasting_connections_of_an_ordinary_user", nginx);
}

#[test]
fn asyncio_streams() {
    isolated("asyncio_streams", |case| python(case, "echo.py"));
}

#[test]
fn asyncio_streams_of_an_ordinary_user() {
    isolated_as_user("asyncio_streams_of_an_ordinary_user", |case| {
        python(case, "echo.py");
    });
}

#[test]
fn multiprocessing_manager() {
    isolated("multiprocessing_manager", |case| python(case, "manager.py"));
}

#[test]
fn multiprocessing_manager_of_an_ordinary_user() {
    isolated_as_user("multiprocessing_manager_of_an_ordinary_user", |case| {
        python(case, "manager.py");
    });
}

#[test]
fn large_transfer() {
    isolated("large_transfer", |case| python(case, "bulk.py"));
}

#[test]
fn large_transfer_of_an_ordinary_user() {
    isolated_as_user("large_transfer_of_an_ordinary_user", |case| {
        python(case, "bulk.py");
    });
}

#[test]
fn requests_in_datagrams() {
    isolated("requests_in_datagrams", |case| python(case, "datagrams.py"));
}

#[test]
fn requests_in_datagrams_of_an_ordinary_user() {
    isolated_as_user("requests_in_datagrams_of_an_ordinary_user", |case| {
        python(case, "datagrams.py");
    });
}

fn memcached(case: &Case) {
    case.needs_program("memcached", "memcached");
    let mut command = Command::new(case.system_python());
    command.arg(source("memcached.py")).arg(free_port());
    goes_on(case, command);
}

#[test]
fn memcached_with_threads() {
    isolated("memcached_with_threads", memcached);
}

#[test]
fn memcached_with_threads_of_an_ordinary_user() {
    isolated_as_user("memcached_with_threads_of_an_ordinary_user", memcached);
}

fn node(case: &Case) {
    case.needs_program("node", "nodejs");
    let mut command = Command::new("node");
    command.arg(source("http.js"));
    goes_on(case, command);
}

#[test]
fn http_of_node() {
    isolated("http_of_node", node);
}

#[test]
fn http_of_node_of_an_ordinary_user() {
    isolated_as_user("http_of_node_of_an_ordinary_user", node);
}

fn go(case: &Case) {
    let program = with_go(case, &source("http.go"));
    goes_on(case, Command::new(program));
}

#[test]
fn http_of_go() {
    isolated("http_of_go", go);
}

#[test]
fn http_of_go_of_an_ordinary_user() {
    isolated_as_user("http_of_go_of_an_ordinary_user", go);
}

/// Its sockets are of IPv6, their addresses of IPv4.
#[test]
fn selector_of_java() {
    isolated("selector_of_java", |case| {
        case.needs_program("javac", "default-jdk-headless");
        with_own_performance_data(case);
        let classes = case.path("classes");
        let mut javac = Command::new("javac");
        javac.arg("-d").arg(&classes).arg(source("Nio.java"));
        run(case, &mut javac).ok();
        let mut command = Command::new("java");
        command.args(["-XX:+UseSerialGC", "-cp"]).arg(&classes);
        command.arg("Nio").arg(&classes);
        goes_on(case, command);
    });
}
