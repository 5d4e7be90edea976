//! Random jobs for a while, with fresh seeds (docs/chaos.md), and those that have found something, as texts.
//!
//! `CKPT_CHAOS_SECONDS` is for how long the former run as root, and as long as an ordinary user; `CKPT_CHAOS_SEED` is where
//! they begin.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ckpt_fixtures::chaos::job::{Job, Text, kill_all, state};
use ckpt_fixtures::chaos::lives::Verdict;
use ckpt_fixtures::chaos::{self, Limits, Tools};

use crate::common::tool::{CKPT, RESTORE, restore_cmd, run as run_tool};
use crate::common::{Case, ckpt, isolated, isolated_as_user};

/// For how long fresh seeds run.
const SECONDS: u64 = 25;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn tools(case: &Case) -> Tools {
    let dir = case.path("jobs");
    std::fs::create_dir(&dir).expect("the test's directory is writable");
    Tools {
        ckpt: CKPT.into(),
        restore: RESTORE.into(),
        chaos: case.fixtures().join("chaos"),
        dir,
    }
}

fn run(case: &Case, who: &str) {
    let seconds = number("CKPT_CHAOS_SECONDS").unwrap_or(SECONDS);
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let fresh = now.map_or(1, |now| now.as_nanos() as u64 % 1_000_000_000);
    let seed = number("CKPT_CHAOS_SEED").unwrap_or(fresh);
    let tools = tools(case);
    let limits = Limits {
        jobs: u64::MAX,
        time: Duration::from_secs(seconds),
        shrink: Duration::from_secs(40),
        failures: 2,
        known: false,
    };
    let again = |seed| format!("again with: make chaos SEED={seed} SEEDS=1{who}");
    let tell = &mut |report: &str| println!("{report}");
    let tally = chaos::run(&tools, seed, 1, None, limits, tell);
    println!(
        "{} jobs from seed {seed}, {} refused",
        tally.jobs, tally.refused
    );
    assert!(tally.jobs > 0, "no job was run");
    let failed: Vec<String> = tally
        .failed
        .values()
        .flatten()
        .map(|seed| again(*seed))
        .collect();
    assert!(
        failed.is_empty(),
        "random jobs failed:\n{}",
        failed.join("\n")
    );
}

#[test]
fn as_root() {
    isolated("as_root", |case| {
        let who = if case.is_root() { "" } else { " AS=user" };
        run(case, who);
    });
}

#[test]
fn as_user() {
    isolated_as_user("as_user", |case| run(case, " AS=user"));
}

/// What stands in the way of an attach is told by a check, too.
fn refused(case: &Case, job: &str, words: &[&str]) {
    let job = Job::start(&tools(case), &Text::parse(job), "job").expect("its steps are possible");
    let pid = job.root.to_string();
    let check = ckpt(case, ["check", &pid]);
    assert_eq!(check.code(), 1, "{check:?}");
    assert!(
        words.iter().all(|word| check.stdout.contains(word)),
        "{check:?}"
    );
    ckpt(case, ["attach", &pid, "-o", "job.ckpt"]).refused(1, words);
    kill_all();
}

#[test]
fn memory_of_a_family_that_is_none() {
    isolated("memory_of_a_family_that_is_none", |case| {
        let job = "p0 mmap at=0x228000000 pages=3 of=anon share=shared prot=rw name=f0 size=1 fill=1 some=1
            p0 fork child=1
            p1 fork child=2
            p1 exec";
        refused(case, job, &["shares anonymous memory", "use a memfd"]);
    });
}

#[test]
fn behind_guard_pages() {
    isolated_as_user("behind_guard_pages", |case| {
        let job = "p0 shatter at=0x228000000 runs=3 gap=2 how=guard share=shared";
        refused(case, job, &["has guard pages", "run ckpt as root"]);
    });
}

/// mmap(2) gives a process nothing that would be locked beyond the limit.
#[test]
fn locked_up_to_the_limit() {
    isolated_as_user("locked_up_to_the_limit", |case| {
        let job = "p0 mlockall flags=3
            p0 mmap at=0x214000000 pages=1400 of=anon share=private prot=rw name=f0 size=1 fill=1 some=5
            p0 limit which=8 soft=4194304 hard=67108864";
        refused(case, job, &["remote calls need", "prlimit --memlock"]);
    });
}

/// A registration for the next message may outlive a job whose processes share descriptors.
#[test]
fn notices_with_shared_descriptors() {
    isolated("notices_with_shared_descriptors", |case| {
        let job = "p0 clone child=1 share=files
            p0 notice fd=20 name=0 how=none";
        refused(case, job, &["mq_notify", "shares its descriptors"]);
    });
}

/// One process of the job has left the namespaces of the others.
#[test]
fn other_namespaces() {
    isolated("other_namespaces", |case| {
        for kind in ["mnt", "user", "pid"] {
            let job = format!("p0 mute child=1 share=none in=pause jail=0 ns={kind}");
            let words = format!("is in another {kind} namespace");
            refused(case, &job, &[&words]);
            std::fs::remove_dir_all(case.path("jobs")).expect("it is ours");
        }
    });
}

#[test]
fn requests_that_cannot_be_seen() {
    isolated("requests_that_cannot_be_seen", |case| {
        let job = "p0 clone child=1 share=files
            p0 aio events=3 done=0 name=a0 inherit=0";
        refused(case, job, &["AIO context", "share descriptors and not"]);
    });
}

/// Each process opens files of /proc for itself, in its own root directory.
#[test]
fn a_file_of_proc_in_another_root() {
    isolated("a_file_of_proc_in_another_root", |case| {
        case.needs_root();
        let job = "p0 fork child=1
            p0 procfile fd=12 of=1 name=fd at=74
            p0 mute child=3 share=none in=pause jail=1 ns=none";
        refused(case, job, &["/fd, which is not below its root directory"]);
    });
}

/// The first checkpoint has them; the second one is not shown the last any more.
#[test]
fn empty_messages_with_descriptors() {
    isolated("empty_messages_with_descriptors", |case| {
        let job = "p0 sockpair fd=47 to=17 type=seqpacket
            p0 send fd=17 bytes=0 times=2 pass=17";
        let job = Job::start(&tools(case), &Text::parse(job), "job").expect("it is possible");
        let attach = || ckpt(case, ["attach", &job.root.to_string(), "-o", "job.ckpt"]);
        assert_eq!(attach().code(), 0);
        attach().refused(1, &["fd 47", "empty messages", "read them"]);
        kill_all();
    });
}

/// What root could open and the job's user cannot ends no job.
#[test]
fn opened_with_privileges() {
    isolated("opened_with_privileges", |case| {
        case.needs_root();
        let job = "p0 fifo fd=21 name=q1 way=rw
            p0 ids real=1000 effective=1001 saved=1002 group=1003 groups=3";
        let job = Job::start(&tools(case), &Text::parse(job), "job").expect("it is possible");
        let attach = ["attach", &job.root.to_string(), "--kill", "-o", "job.ckpt"];
        ckpt(case, attach).refused(1, &["the FIFO", "by the job's user", "chmod"]);
        let runs = matches!(state(job.root), Some('R' | 'S' | 'D'));
        assert!(runs, "it has been harmed: {:?}", state(job.root));
        kill_all();
    });
}

/// The child of a program that has executed another one is created by an exec, which sets its exit signal.
#[test]
fn exit_signal_of_an_executed_child() {
    isolated("exit_signal_of_an_executed_child", |case| {
        let job = "p0 mute child=1 share=none in=pause jail=0 ns=none exit=12
            p0 exec of=itself";
        let job = Job::start(&tools(case), &Text::parse(job), "job").expect("it is possible");
        let pid = job.root.to_string();
        ckpt(case, ["attach", &pid, "--kill", "-o", "job.ckpt"]).ok();
        let out = run_tool(
            case,
            &mut restore_cmd(&case.path("job.ckpt"), &["--detach"]),
        );
        assert!(out.stderr.contains("the exit signal of process"), "{out:?}");
        kill_all();
    });
}

/// At a restore another process takes a lock whose taker has it no more, which is no difference to a rehearsed copy.
#[test]
fn rehearsed_with_gone_takers() {
    isolated("rehearsed_with_gone_takers", |case| {
        let job = "p0 file fd=50 name=g5 kind=named way=rw flags=none size=164 at=28 mode=777
            p0 file fd=51 name=g6 kind=named way=rw flags=none size=164 at=28 mode=777
            p0 file fd=52 name=g7 kind=named way=rw flags=cloexec size=164 at=28 mode=777
            p0 clone child=1 share=files
            p0 lock fd=52 kind=posix type=w start=1 len=5
            p0 exec
            p0 lease fd=50 type=w
            p0 fork child=2
            p2 lock fd=51 kind=flock type=w start=0 len=0
            p0 close fd=50
            p2 exit code=3";
        let job = Job::start(&tools(case), &Text::parse(job), "job").expect("it is possible");
        let pid = job.root.to_string();
        let attach = ["attach", &pid, "--rehearse", "-o", "job.ckpt"];
        ckpt(case, attach).ok();
        kill_all();
    });
}

/// Every job of `fixtures/chaos/found.txt`, three lives long.
fn found(case: &Case) {
    let jobs = include_str!("../fixtures/chaos/found.txt").split("\n\n");
    let jobs: Vec<&str> = jobs.filter(|job| job.contains("\np0 ")).collect();
    assert!(jobs.len() > 8, "they are separated by empty lines");
    let tools = tools(case);
    for job in jobs {
        if let Verdict::Failed(failure) = chaos::run_text(&tools, job) {
            panic!("{failure}\n--- the job:\n{job}");
        }
    }
}

#[test]
fn jobs_that_failed_once() {
    isolated("jobs_that_failed_once", found);
}

#[test]
fn jobs_that_failed_once_as_user() {
    isolated_as_user("jobs_that_failed_once_as_user", found);
}
