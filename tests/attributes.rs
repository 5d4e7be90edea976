//! Attributes of processes: docs/attributes.md against the running kernel and the code, and warnings of what
//! cannot be as it was.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;

use ckpt::objects::memory_policy::MemoryPolicy;

use crate::common::edit::edited;
use crate::common::look::assert_nobody_left;
use crate::common::refused::FAILED;
use crate::common::{
    Case, Job, ckpt, fixture, isolated, isolated_as_user, odd, restore_cmd, restored, run,
};

fn page() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/attributes.md");
    fs::read_to_string(path).expect("the page is there")
}

/// Those of `words` that no row of the page has in backquotes.
fn missing(words: impl Iterator<Item = String>) -> Vec<String> {
    let page = page();
    let words: Vec<String> = words.collect();
    assert!(words.len() > 5, "{words:?}");
    let rows: Vec<&str> = page.lines().filter(|l| l.starts_with("| ")).collect();
    let has = |word: &String| rows.iter().any(|row| row.contains(&format!("`{word}`")));
    words.into_iter().filter(|word| !has(word)).collect()
}

#[test]
fn every_field_of_status_has_its_row() {
    let status = fs::read_to_string("/proc/self/status").expect("we run");
    let fields = status
        .lines()
        .filter_map(|l| Some(l.split_once(':')?.0.to_owned()));
    assert_eq!(missing(fields), [""; 0], "name it in docs/attributes.md");
}

#[test]
fn every_file_of_a_process_has_its_row() {
    let files = fs::read_dir("/proc/self").expect("we run");
    let names = files.filter_map(|f| f.ok()?.file_name().into_string().ok());
    assert_eq!(missing(names), [""; 0], "name it in docs/attributes.md");
}

#[test]
fn every_switch_has_its_row() {
    let names = ckpt::objects::switches::names();
    let words = names.flat_map(|name| name.split('/')).map(str::to_owned);
    assert_eq!(missing(words), [""; 0], "name it in docs/attributes.md");
}

#[test]
fn fixtures_in_the_tables_exist() {
    let page = page();
    let rows = page.lines().filter(|l| l.starts_with("| "));
    let last = rows.filter_map(|row| row.trim_end_matches(['|', ' ']).rsplit_once('|'));
    let named = last.filter(|(row, _)| row.matches('|').count() == 2);
    let words = named.flat_map(|(_, cell)| cell.split('`').skip(1).step_by(2));
    let all: Vec<String> = ckpt_fixtures::all().into_iter().map(|f| f.name).collect();
    let unknown: Vec<&str> = words.filter(|w| !all.iter().any(|f| f == w)).collect();
    assert_eq!(unknown, [""; 0], "no such file in fixtures/");
}

/// A policy of a node that this machine has not.
#[test]
fn a_missing_node_is_told() {
    isolated("a_missing_node_is_told", |case| {
        let mut target = fixture(case, "counter");
        let image = target.killed_into(case, "job.ckpt");
        let edited = edited(case, &image, "edited.ckpt", |snapshot| {
            let policy = |mode| {
                Some(MemoryPolicy {
                    mode,
                    nodes: vec![1000],
                })
            };
            let process = &mut snapshot.processes[0];
            process.threads[0].memory_policy = policy(3);
            let mut mappings = process.memory.mappings.iter_mut();
            let heap = mappings.find(|m| m.prot == 3 && m.policy.is_none());
            heap.expect("it has memory").policy = policy(2);
        });
        let out = run(case, restore_cmd(&edited, &[]).arg("--detach"));
        let pid = out.ok().trim().parse().expect("it prints the pid");
        for words in [
            "memory policy of a thread (interleave on nodes [1000]) is not kept",
            "(bind on nodes [1000]) is not kept",
        ] {
            assert!(out.stderr.contains(words), "{out:?}");
        }
        target.continued_by(Job::of(pid));
        target.passes();
    });
}

/// Nothing tells of a Landlock domain, but what is in one may not look out of it.
fn landlock_is_told(case: &Case) {
    let mut target = odd(case, "landlocked", None);
    let pid = target.pid().to_string();
    let told = ckpt(case, ["attach", &pid, "-o", "first.ckpt"]);
    told.ok();
    assert!(told.stderr.contains("restricted by Landlock"), "{told:?}");
    let image = target.killed_into(case, "job.ckpt");
    let out = run(case, restore_cmd(&image, &[]).arg("--detach"));
    let pid = out.ok().trim().parse().expect("it prints the pid");
    assert!(out.stderr.contains("restricted by Landlock"), "{out:?}");
    target.continued_by(Job::of(pid));
    target.passes();
}

#[test]
fn landlock() {
    isolated("landlock", landlock_is_told);
}

#[test]
fn landlock_of_a_user() {
    isolated_as_user("landlock_of_a_user", landlock_is_told);
}

/// `restore` under PR_SET_MDWE cannot make the restorer executable.
#[test]
#[allow(unsafe_code)]
fn mdwe_of_restore_is_refused() {
    isolated("mdwe_of_restore_is_refused", |case| {
        let mut target = fixture(case, "counter");
        let image = target.killed_into(case, "job.ckpt");
        let mut command = restore_cmd(&image, &[]);
        // SAFETY: one system call without pointers.
        unsafe {
            command.pre_exec(|| match libc::prctl(65, 1, 0, 0, 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        let out = run(case, &mut command);
        out.refused(FAILED, &["PR_SET_MDWE", "MemoryDenyWriteExecute=no"]);
        assert_nobody_left();
        target.continued_by(restored(case, &image, &[]));
        target.passes();
    });
}
