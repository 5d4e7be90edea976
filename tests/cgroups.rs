//! Control groups of a job: where it is after a restore, and what is made again (`restore --cgroups`).

use std::collections::BTreeMap;
use std::fs;

use crate::common::group::Group;
use crate::common::{Case, Fixture, fixture, isolated, restore_cmd, restored, run};

/// The lines of `cgroup` of each task of a job.
fn groups(job: &Fixture) -> BTreeMap<String, String> {
    let pids = [vec![job.pid()], job.job.descendants()].concat();
    let tasks = pids.iter().flat_map(|pid| {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("it lives");
        tasks.flatten().map(|task| task.path())
    });
    tasks
        .map(|task| {
            let text = fs::read_to_string(task.join("cgroup")).expect("it lives");
            (task.display().to_string(), text)
        })
        .collect()
}

/// A job whose processes are in a group and in one below it, each with a setting.
fn in_two(case: &Case, setting: &str) -> (Fixture, Group, Group) {
    let group = Group::with(case, &[setting, "cgroup.procs"]);
    let below = Group(group.file("below"));
    fs::create_dir(&below.0).expect("root may");
    group.write(setting, "1007");
    below.write(setting, "1003");
    let job = fixture(case, "tree_deep");
    group.take(&[job.pid()]);
    below.take(&job.job.descendants());
    (job, group, below)
}

fn made_again(case: &Case, setting: &str) {
    let (mut job, group, below) = in_two(case, setting);
    fs::create_dir(group.file("empty")).expect("root may");
    let before = groups(&job);
    let image = job.killed_into(case, "job.ckpt");
    let Group(place) = group;
    Group(place.clone()).remove();
    #[cfg(feature = "faults")]
    {
        let mut fails = restore_cmd(&image, &["--cgroups=restore"]);
        assert_eq!(
            run(case, fails.env("CKPT_FAULT", "restore-threads")).code(),
            99
        );
        assert!(!place.exists(), "a restore that failed has left its groups");
    }
    job.continued_by(restored(case, &image, &["--cgroups=restore"]));
    assert_eq!(groups(&job), before);
    let group = Group(place);
    assert_eq!(
        (&*group.read(setting), &*below.read(setting)),
        ("1007", "1003")
    );
    assert!(group.file("empty").is_dir());
    job.passes();
    group.remove();
}

#[test]
fn made_again_of_version_2() {
    isolated("made_again_of_version_2", |case| {
        made_again(case, "cgroup.max.descendants")
    });
}

#[test]
fn made_again_of_version_1() {
    isolated("made_again_of_version_1", |case| {
        made_again(case, "pids.max")
    });
}

/// What is there already keeps its settings, and that is told.
#[test]
fn changed_since() {
    isolated("changed_since", |case| {
        let setting = "cgroup.max.descendants";
        let (mut job, group, _) = in_two(case, setting);
        let image = job.killed_into(case, "job.ckpt");
        group.write(setting, "1005");
        let out = run(
            case,
            restore_cmd(&image, &["--cgroups=restore"]).arg("--detach"),
        );
        let pid: i32 = out.ok().trim().parse().expect("it prints the pid");
        let line = out.stderr.lines().find(|line| line.contains(setting));
        let line = line.unwrap_or_else(|| panic!("no warning: {out:?}"));
        assert!(
            line.contains("1007") && line.contains("is 1005 there"),
            "{line}"
        );
        job.continued_by(crate::common::Job::of(pid));
        job.passes();
        group.remove();
    });
}

#[test]
fn below_another_group() {
    isolated("below_another_group", |case| {
        let setting = "cgroup.max.descendants";
        let (mut job, group, _) = in_two(case, setting);
        let image = job.killed_into(case, "job.ckpt");
        let name = group
            .0
            .file_name()
            .expect("it has one")
            .to_string_lossy()
            .into_owned();
        let root = Group(group.0.with_file_name(format!("{name}.new")));
        run(
            case,
            &mut restore_cmd(&image, &[&format!("--cgroups=/{name}.new")]),
        )
        .refused(99, &["control group", ".new", "make it first"]);
        fs::create_dir(&root.0).expect("root may");
        group.remove();
        job.continued_by(restored(case, &image, &[&format!("--cgroups=/{name}.new")]));
        assert_eq!(root.read("cgroup.procs"), job.pid().to_string());
        let below = Group(root.file("below"));
        assert_eq!(
            below.read("cgroup.procs").lines().count(),
            job.job.descendants().len()
        );
        assert_eq!(below.read(setting), "1003");
        job.passes();
        root.remove();
    });
}

#[test]
fn ignored() {
    isolated("ignored", |case| {
        let (mut job, group, below) = in_two(case, "cgroup.max.descendants");
        let image = job.killed_into(case, "job.ckpt");
        job.continued_by(restored(case, &image, &["--cgroups=ignore"]));
        assert_eq!(group.read("cgroup.procs") + &below.read("cgroup.procs"), "");
        job.passes();
        group.remove();
    });
}

/// Threads in groups of their own, without any option.
#[test]
fn of_threads() {
    isolated("of_threads", |case| {
        let group = Group::with(case, &["cgroup.threads", "cgroup.type"]);
        let below = Group(group.file("below"));
        fs::create_dir(&below.0).expect("root may");
        let mut job = fixture(case, "threads");
        group.take(&[job.pid()]);
        below.write("cgroup.type", "threaded");
        let threads = groups(&job);
        let second = threads.keys().filter_map(|task| task.rsplit('/').next());
        let second = second
            .filter(|tid| **tid != job.pid().to_string())
            .max()
            .expect("it has threads");
        below.write("cgroup.threads", second);
        let before = groups(&job);
        assert_ne!(before, threads);
        let image = job.killed_into(case, "job.ckpt");
        job.continued_by(restored(case, &image, &[]));
        assert_eq!(groups(&job), before);
        let image = job.killed_into(case, "job.ckpt");
        let place = group.0.clone();
        group.remove();
        job.continued_by(restored(case, &image, &["--cgroups=restore"]));
        assert_eq!(groups(&job), before);
        assert_eq!(below.read("cgroup.type"), "threaded");
        job.passes();
        Group(place).remove();
    });
}
