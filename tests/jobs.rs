//! Whole jobs of ordinary programs: trees of processes with pipes, sockets, locks and shared memory
//! between them. Each is checkpointed from outside in the middle of its work, killed and restored;
//! the result equals that of an undisturbed run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::isolate::open_to_all;
use crate::common::job::spawn;
use crate::common::look::{children, states, status_field};
use crate::common::rounds::{gone, same_result, same_result_in_namespaces};
use crate::common::tool::{CKPT, RESTORE, leftovers, nobody};
use crate::common::{
    Case, Ended, Job, attach, ckpt, isolated, isolated_as_user, restored, run, start, until,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A file of `tests/jobs`.
fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/jobs")
        .join(name)
}

fn pipeline(case: &Case) {
    case.needs_program("bash", "bash");
    same_result(case, &pipeline_command);
}

fn pipeline_command() -> Command {
    let mut command = Command::new("bash");
    command.arg(source("pipeline.sh"));
    command
}

fn pipeline_in_namespaces(case: &Case) {
    case.needs_program("bash", "bash");
    same_result_in_namespaces(case, &pipeline_command);
}

#[test]
fn shell_pipelines_in_namespaces() {
    isolated("shell_pipelines_in_namespaces", pipeline_in_namespaces);
}

#[test]
fn shell_pipelines_of_an_ordinary_user_in_namespaces() {
    let name = "shell_pipelines_of_an_ordinary_user_in_namespaces";
    isolated_as_user(name, pipeline_in_namespaces);
}

#[test]
fn shell_pipelines() {
    isolated("shell_pipelines", pipeline);
}

#[test]
fn shell_pipelines_of_an_ordinary_user() {
    isolated_as_user("shell_pipelines_of_an_ordinary_user", pipeline);
}

#[test]
fn parallel_make() {
    isolated("parallel_make", |case| {
        case.needs_program("make", "make");
        case.needs_program("cc", "gcc");
        same_result(case, &|| {
            let mut command = Command::new("make");
            command.args(["-s", "-j4", "-f"]).arg(source("Makefile"));
            command.env_remove("MAKEFLAGS").env_remove("MAKELEVEL");
            command.arg("-C");
            command
        });
    });
}

type Lives = fn(&Case, &dyn Fn() -> Command);

fn multiprocessing(case: &Case, method: &str, lives: Lives) {
    let python = case.system_python();
    lives(case, &|| {
        let mut command = Command::new(python);
        command.arg(source("workers.py")).arg(method);
        command
    });
}

#[test]
fn python_processes_in_namespaces() {
    isolated("python_processes_in_namespaces", |case| {
        multiprocessing(case, "fork", same_result_in_namespaces)
    });
}

#[test]
fn python_processes_by_fork() {
    isolated("python_processes_by_fork", |case| {
        multiprocessing(case, "fork", same_result)
    });
}

#[test]
fn python_processes_by_spawn() {
    isolated("python_processes_by_spawn", |case| {
        multiprocessing(case, "spawn", same_result)
    });
}

fn wait_for(what: &str, state: impl Fn() -> bool) {
    until(what, || state().then_some(()));
}

/// Asks a server with its own client; what it says.
fn asked(case: &Case, command: &mut Command) -> String {
    run(case, command).ok().trim().to_owned()
}

/// Who takes checkpoints and restores, and where.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// We, under the old pids.
    Here,
    /// We, in a pid namespace.
    Namespace,
    /// An ordinary user, in a user and pid namespace.
    UsersNamespace,
}

/// Kills the job into an image and restores it.
fn second_life(case: &Case, job: Job) -> Job {
    second_life_in(case, Place::Here, job)
}

fn second_life_in(case: &Case, place: Place, mut job: Job) -> Job {
    if place == Place::UsersNamespace {
        let pid = job.pid.to_string();
        let mut command = nobody(case, Path::new(CKPT));
        run(
            case,
            command.args(["attach", &pid, "--kill", "-o", "job.ckpt"]),
        )
        .ok();
        assert!(gone(&mut job) != Ended::Exited(0));
        let mut command = nobody(case, Path::new(RESTORE));
        command.args(["job.ckpt", "--detach", "--pids", "namespace"]);
        let pid = run(case, &mut command).ok().trim().parse().expect("a pid");
        return behind_its_init(pid);
    }
    // What a copy beside it comes back as, it comes back as itself.
    let (image, _) = attach(case, job.pid, "job.ckpt", &["--kill", "--rehearse"]);
    match place {
        Place::Here => {
            assert_eq!(gone(&mut job), Ended::Killed(9));
            restored(case, &image, &[])
        }
        _ => {
            assert!(gone(&mut job) != Ended::Exited(0));
            restored(case, &image, &["--pids", "namespace"])
        }
    }
}

fn behind_its_init(pid: i32) -> Job {
    let init = status_field(pid, "PPid").and_then(|pid| pid.parse().ok());
    Job::behind(pid, init.expect("it lives"))
}

#[test]
fn redis_while_it_saves() {
    isolated("redis_while_it_saves", |case| redis(case, Place::Here));
}

#[test]
fn redis_in_namespaces() {
    isolated("redis_in_namespaces", |case| redis(case, Place::Namespace));
}

#[test]
fn redis_of_an_ordinary_user_in_namespaces() {
    isolated("redis_of_an_ordinary_user_in_namespaces", |case| {
        case.needs_root();
        open_to_all(case.dir());
        redis(case, Place::UsersNamespace);
    });
}

/// `redis-server` with a child that writes its data.
fn redis(case: &Case, place: Place) {
    case.needs_program("redis-server", "redis-server");
    let socket = case.path("redis.sock");
    let cli = |words: &[&str]| {
        let mut command = Command::new("redis-cli");
        asked(case, command.arg("-s").arg(&socket).args(words))
    };
    let mut server = match place {
        Place::UsersNamespace => nobody(case, Path::new("redis-server")),
        _ => Command::new("redis-server"),
    };
    server.args(["--port", "0", "--save", "", "--rdb-key-save-delay", "60"]);
    server
        .arg("--unixsocket")
        .arg(&socket)
        .arg("--dir")
        .arg(case.dir());
    let log = case.open_log("redis.log");
    let mut job = start(&mut server, &log);
    wait_for("the socket", || socket.exists());
    let fill = "for i = 1, 20000 do redis.call('SET', 'key:' .. i, i * i) end";
    cli(&["EVAL", fill, "0"]);
    cli(&["RPUSH", "list", "one", "two", "three"]);
    for life in 1..=3 {
        cli(&["INCR", "lives"]);
        assert_eq!(cli(&["BGSAVE"]), "Background saving started");
        assert_eq!(job.descendants().len(), 1, "nobody saves");
        job = second_life_in(case, place, job);
        assert_eq!(job.descendants().len(), 1, "nobody saves any more");
        assert_eq!(cli(&["GET", "lives"]), life.to_string());
        assert_eq!(cli(&["LRANGE", "list", "0", "-1"]), "one\ntwo\nthree");
        assert_eq!(cli(&["GET", "key:20000"]), "400000000");
        assert_eq!(cli(&["DBSIZE"]), "20002");
        wait_for("the end of saving", || {
            cli(&["INFO", "persistence"]).contains("rdb_bgsave_in_progress:0")
        });
        assert!(cli(&["INFO", "persistence"]).contains("rdb_last_bgsave_status:ok"));
    }
    let check = asked(
        case,
        Command::new("redis-check-rdb").arg(case.path("dump.rdb")),
    );
    assert!(check.contains("20002 keys read"), "{check}");
    job.signal(Signal::SIGTERM);
    assert_eq!(job.wait(), Ended::Exited(0));
}

#[test]
fn nginx_with_workers() {
    isolated("nginx_with_workers", |case| {
        case.needs_program("nginx", "nginx-light");
        case.needs_program("curl", "curl");
        let socket = case.path("nginx.sock");
        let page = "a page\n".repeat(1000);
        fs::write(case.path("page"), &page).expect("the test's directory is writable");
        open_to_all(case.dir());
        let config = format!(
            "daemon off; worker_processes 3; pid {dir}/pid; error_log {dir}/nginx.log;\n\
             events {{ }}\n\
             http {{ access_log {dir}/access.log; client_body_temp_path {dir}/body;\n\
             proxy_temp_path {dir}/proxy; fastcgi_temp_path {dir}/fast;\n\
             uwsgi_temp_path {dir}/uwsgi; scgi_temp_path {dir}/scgi;\n\
             server {{ listen unix:{socket}; root {dir}; }} }}\n",
            dir = case.dir().display(),
            socket = socket.display()
        );
        fs::write(case.path("conf"), config).expect("the test's directory is writable");
        let fetch = || {
            let mut curl = Command::new("curl");
            curl.args(["-sSf", "--unix-socket"]).arg(&socket);
            run(case, curl.arg("http://job/page")).ok().to_owned()
        };
        let mut server = Command::new("nginx");
        server.args(["-e", "stderr", "-c"]).arg(case.path("conf"));
        let mut job = start(&mut server, &case.path("output.log"));
        wait_for("the workers", || {
            job.descendants().len() == 3 && socket.exists()
        });
        for _ in 1..=3 {
            assert_eq!(fetch(), page);
            let workers = job.descendants();
            job = second_life(case, job);
            assert_eq!(job.descendants(), workers);
            assert_eq!(fetch(), page);
        }
        // The master replaces a worker that dies, and all of them on SIGHUP.
        let before = job.descendants();
        job.signal(Signal::SIGHUP);
        wait_for("new workers", || {
            let now = job.descendants();
            now.len() == 3 && now.iter().all(|pid| !before.contains(pid))
        });
        assert_eq!(fetch(), page);
        job.signal(Signal::SIGQUIT);
        assert_eq!(job.wait(), Ended::Exited(0));
    });
}

/// A process of the job traces another one, which therefore cannot be frozen.
fn traced_inside(case: &Case, program: &str, tracer: &mut Command) {
    case.needs_program(program, program);
    let marker = case.path("ready");
    let script = format!("echo > {}; while :; do sleep 0.1; done", marker.display());
    let job = start(
        tracer.args(["sh", "-c", &script]).current_dir(case.dir()),
        &case.path("tracer.log"),
    );
    wait_for("the traced shell", || marker.exists());
    for pid in [vec![job.pid], job.descendants()]
        .concat()
        .into_iter()
        .take(2)
    {
        let out = ckpt(case, ["attach", &pid.to_string(), "-o", "job.ckpt"]);
        out.refused(1, &["is being traced by", program, "end that one first"]);
    }
    assert!(leftovers(case.dir()).is_empty());
    let children = job.descendants();
    job.kill();
    for pid in children {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

#[test]
fn strace_inside() {
    isolated("strace_inside", |case| {
        let mut strace = Command::new("strace");
        strace.args(["-f", "-o"]).arg(case.path("calls"));
        traced_inside(case, "strace", &mut strace);
    });
}

#[test]
fn gdb_inside() {
    isolated("gdb_inside", |case| {
        let mut gdb = Command::new("gdb");
        gdb.args(["-q", "-nx", "-batch", "-ex", "run", "--args"]);
        traced_inside(case, "gdb", &mut gdb);
    });
}

/// Where postgres keeps its programs.
pub(crate) fn postgres(case: &Case) -> String {
    let versions = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten();
    let mut dirs = versions.map(|entry| entry.path().join("bin"));
    let Some(dir) = dirs.find(|dir| dir.join("initdb").exists()) else {
        case.skip("initdb (postgresql)");
    };
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{}:{path}", dir.display())
}

#[test]
fn postgres_under_load() {
    isolated("postgres_under_load", |case| {
        busy_postgres(case, Place::Here)
    });
}

#[test]
fn postgres_under_load_in_namespaces() {
    isolated("postgres_under_load_in_namespaces", |case| {
        busy_postgres(case, Place::Namespace);
    });
}

#[test]
fn postgres_under_load_of_an_ordinary_user_in_namespaces() {
    isolated(
        "postgres_under_load_of_an_ordinary_user_in_namespaces",
        |case| {
            open_to_all(case.dir());
            busy_postgres(case, Place::UsersNamespace);
        },
    );
}

/// A server with its clients, which are of the job.
fn busy_postgres(case: &Case, place: Place) {
    case.needs_root();
    let path = postgres(case);
    let dir = case.path("bank");
    fs::create_dir(&dir).expect("the test's directory is writable");
    open_to_all(&dir);
    let mut command = nobody(case, Path::new("bash"));
    command.env("PATH", path).arg(source("bank.sh")).arg(&dir);
    let log = case.open_log("bank.log");
    let mut job = start(&mut command, &log);
    let count = || {
        let text = fs::read_to_string(dir.join("count")).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    for _ in 1..=3 {
        let before: u32 = count();
        wait_for("transactions", || count() > before);
        job = second_life_in(case, place, job);
    }
    let before = count();
    wait_for("more transactions", || count() > before);
    fs::write(dir.join("finish"), "").expect("the test's directory is writable");
    assert_eq!(job.wait(), Ended::Exited(0));
    let result = fs::read_to_string(dir.join("result")).expect("it has a result");
    assert_eq!(result.trim(), "t|t|t|0");
}

#[test]
fn sqlite_writers() {
    isolated("sqlite_writers", |case| {
        let python = case.system_python();
        same_result(case, &|| {
            let mut command = Command::new(python);
            command.arg(source("ledgers.py"));
            command
        });
    });
}

#[test]
fn postgres_alone() {
    isolated("postgres_alone", |case| lonely_postgres(case, Place::Here));
}

#[test]
fn postgres_alone_of_an_ordinary_user_in_namespaces() {
    isolated("postgres_alone_of_an_ordinary_user_in_namespaces", |case| {
        open_to_all(case.dir());
        lonely_postgres(case, Place::UsersNamespace);
    });
}

/// A parent and its child; with the parent as root nothing is shared with anybody.
const RELATIVES: &str = "
import mmap, os, time
log = open('log', 'w')
memory = mmap.mmap(-1, 4096)
child = os.fork()
if child:
    with open('child.new', 'w') as f: f.write(str(child))
    os.rename('child.new', 'child')
    os.waitpid(child, 0)
time.sleep(10000)
";

#[test]
fn what_is_shared_with_the_outside_is_told() {
    isolated("what_is_shared_with_the_outside_is_told", |case| {
        case.needs_program("python3", "python3");
        let mut command = Command::new("python3");
        command.args(["-c", RELATIVES]).current_dir(case.dir());
        let parent = start(&mut command, &case.path("python.log"));
        let child = until("the child", || fs::read_to_string(case.path("child")).ok());
        let other = format!(
            "process {} (python3), which is not part of the job",
            parent.pid
        );
        let words = |out: &str| {
            out.contains(&format!("/log) is the same open file as in {other}"))
                && out.contains(&format!(
                    "of process {child} (python3) is shared with {other}"
                ))
        };
        let check = ckpt(case, ["check", &child]);
        assert!(words(check.ok()), "{check:?}");
        let json = ckpt(case, ["check", "--json", &child]);
        let json: serde_json::Value = serde_json::from_str(json.ok()).expect("it is JSON");
        assert!(
            json["shared"].as_array().is_some_and(|all| all.len() >= 2),
            "{json}"
        );
        let out = ckpt(case, ["attach", &child, "-o", "child.ckpt"]);
        out.ok();
        assert!(words(&out.stderr), "{out:?}");
        // The standard streams are everybody's, and only told on request.
        assert!(!out.stderr.contains("fd 1 "), "{out:?}");
        let out = ckpt(case, ["attach", &parent.pid.to_string(), "-o", "all.ckpt"]);
        out.ok();
        assert_eq!(out.stderr, "");
        kill(
            Pid::from_raw(child.parse().expect("a pid")),
            Signal::SIGKILL,
        )
        .expect("it is there");
        parent.kill();
    });
}

/// A server whose clients are outside of the job.
fn lonely_postgres(case: &Case, place: Place) {
    case.needs_root();
    let path = postgres(case);
    let dir = case.path("bank");
    fs::create_dir(&dir).expect("the test's directory is writable");
    open_to_all(&dir);
    let as_nobody = |program: &str, args: &[&str]| {
        let mut command = nobody(case, Path::new(program));
        command.env("PATH", &path).env("PGHOST", &dir).args(args);
        command
    };
    let data = dir.join("data").display().to_string();
    let args = ["-D", &data, "-U", "tester", "-A", "trust", "--no-sync"];
    run(case, &mut as_nobody("initdb", &args)).ok();
    let sockets = dir.display().to_string();
    let args = ["-D", &data, "-k", &sockets, "-c", "listen_addresses="];
    let log = case.open_log("postgres.log");
    let mut job = start(&mut as_nobody("postgres", &args), &log);
    let psql = |sql: &str| {
        let args = ["-U", "tester", "-d", "postgres", "-qtAc", sql];
        run(case, &mut as_nobody("psql", &args))
    };
    wait_for("the server", || psql("SELECT 1").code() == 0);
    psql("CREATE TABLE lives AS SELECT 0 AS number").ok();
    // A client outside the job: its connection cannot come along.
    let args = [
        "-U",
        "tester",
        "-d",
        "postgres",
        "-qtAc",
        "SELECT pg_sleep(600)",
    ];
    let client = start(&mut as_nobody("psql", &args), &case.path("psql.log"));
    let sleeping = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
    wait_for("the client", || psql(sleeping).stdout.trim() == "1");
    let out = ckpt(case, ["attach", &job.pid.to_string(), "-o", "job.ckpt"]);
    out.refused(1, &["unix socket", "(psql), outside the job", "close it"]);
    psql("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'PgSleep'").ok();
    client.wait();
    for life in 1..=3 {
        psql("UPDATE lives SET number = number + 1").ok();
        wait_for("no backends", || {
            !job.descendants().iter().any(|pid| {
                let line = fs::read_to_string(format!("/proc/{pid}/cmdline"));
                line.unwrap_or_default().contains("tester")
            })
        });
        job = second_life_in(case, place, job);
        assert_eq!(
            psql("SELECT number FROM lives").ok().trim(),
            life.to_string()
        );
    }
    job.signal(Signal::SIGINT);
    assert_eq!(job.wait(), Ended::Exited(0));
}

/// A process that waits in vfork(2) longer than one attempt lasts: its child is held up before the exec by a
/// pipe without a writer.
#[test]
fn a_vfork_that_takes_its_time() {
    isolated("a_vfork_that_takes_its_time", |case| {
        const PROGRAM: &str = "import os, time
os.mkfifo('pipe')
action = (os.POSIX_SPAWN_OPEN, 9, 'pipe', os.O_RDONLY, 0)
os.waitpid(os.posix_spawn('/bin/true', ['true'], {}, file_actions=[action]), 0)
open('over', 'w').close()
while True: time.sleep(1)";
        let python = case.system_python();
        // The shell is stopped, and let go, in each attempt.
        let mut command = Command::new("sh");
        command.args(["-c", "\"$0\" -c \"$1\"; :", python, PROGRAM]);
        let mut job = start(command.current_dir(case.dir()), &case.path("job.log"));
        until("it to wait in vfork", || {
            assert!(job.ended().is_none());
            let child = *children(job.pid).first()?;
            let waits = states(child).iter().any(|(_, state)| *state == 'D');
            (waits && !children(child).is_empty()).then_some(())
        });
        let mut tool = Command::new(CKPT);
        tool.args(["attach", "-q", "-o", "job.ckpt", &job.pid.to_string()]);
        let tool = spawn(tool.current_dir(case.dir()));
        let traced = || status_field(job.pid, "TracerPid").is_some_and(|tracer| tracer != "0");
        until("the first attempt", || traced().then_some(()));
        until("its end", || (!traced()).then_some(()));
        let mut pipe = std::fs::File::options();
        drop(
            pipe.write(true)
                .open(case.path("pipe"))
                .expect("it is there"),
        );
        assert_eq!(tool.wait(), Ended::Exited(0));
        ckpt(case, ["verify", "-q", "job.ckpt"]).ok();
        until("it to go on", || case.path("over").exists().then_some(()));
        let program = children(job.pid);
        job.kill();
        program.into_iter().for_each(|pid| drop(Job::of(pid)));
    });
}
