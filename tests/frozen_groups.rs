//! Jobs in frozen control groups (docker pause, systemctl freeze), of both versions: refused at once, or with
//! --thaw checkpointed and frozen again, whatever happens.

use std::process::Command;

use crate::common::group::Group;
use crate::common::tool::{CKPT, leftovers};
use crate::common::{
    Case, Ended, Fixture, attach, ckpt, fixture, isolated, restore_cmd, restored, run, start, until,
};

/// How a version freezes.
struct Version {
    /// The file, and what freezes and thaws.
    control: (&'static str, &'static str, &'static str),
    /// The file that tells, and the line that it then has.
    tells: (&'static str, &'static str),
}

const TWO: Version = Version {
    control: ("cgroup.freeze", "1", "0"),
    tells: ("cgroup.events", "frozen 1"),
};
const ONE: Version = Version {
    control: ("freezer.state", "FROZEN", "THAWED"),
    tells: ("freezer.state", "FROZEN"),
};

impl Version {
    /// A job of several processes in a group that is frozen.
    fn frozen(&self, case: &Case) -> (Fixture, Group) {
        let group = Group::with(case, &[self.control.0, "cgroup.procs"]);
        let job = fixture(case, "tree_deep");
        group.take(&[vec![job.pid()], job.job.descendants()].concat());
        group.write(self.control.0, self.control.1);
        self.await_frozen(&group);
        (job, group)
    }

    fn await_frozen(&self, group: &Group) {
        until("the group to be frozen", || {
            let text = group.read(self.tells.0);
            text.lines().any(|line| line == self.tells.1).then_some(())
        });
    }

    fn thaw(&self, group: &Group) {
        group.write(self.control.0, self.control.2);
    }

    /// It is frozen, and when it is thawed the job passes.
    fn ends_well(&self, job: Fixture, group: Group) {
        self.await_frozen(&group);
        self.thaw(&group);
        job.passes();
        group.remove();
    }
}

fn refused(case: &Case, version: &Version) {
    let (job, group) = version.frozen(case);
    let pid = job.pid().to_string();
    let words = ["control group", "frozen", version.control.0, "--thaw"];
    ckpt(case, ["attach", &pid, "-o", "job.ckpt"]).refused(1, &words);
    let out = ckpt(case, ["check", &pid]);
    assert_eq!(out.code(), 1);
    assert!(
        words.iter().all(|word| out.stdout.contains(word)),
        "{out:?}"
    );
    assert!(leftovers(case.dir()).is_empty());
    version.ends_well(job, group);
}

#[test]
fn refused_of_version_2() {
    isolated("refused_of_version_2", |case| refused(case, &TWO));
}

#[test]
fn refused_of_version_1() {
    isolated("refused_of_version_1", |case| refused(case, &ONE));
}

fn thawed(case: &Case, version: &Version) {
    let (job, group) = version.frozen(case);
    attach(case, job.pid(), "job.ckpt", &["--thaw"]);
    version.ends_well(job, group);
}

#[test]
fn thawed_of_version_2() {
    isolated("thawed_of_version_2", |case| thawed(case, &TWO));
}

#[test]
fn thawed_of_version_1() {
    isolated("thawed_of_version_1", |case| thawed(case, &ONE));
}

/// The group outlives the job, frozen as it was; a restored job stays out of it.
fn ended(case: &Case, version: &Version) {
    let (mut job, group) = version.frozen(case);
    let (image, _) = attach(case, job.pid(), "job.ckpt", &["--thaw", "--kill"]);
    assert_eq!(until("its end", || job.job.ended()), Ended::Killed(9));
    crate::common::job::reap_orphans(&crate::common::tool::descendants_in(case, &image));
    assert_eq!(group.read("cgroup.procs"), "");
    assert_eq!(group.read(version.control.0), version.control.1);
    let out = run(case, restore_cmd(&image, &[]).arg("--detach"));
    let pid: i32 = out.ok().trim().parse().expect("it prints the pid");
    assert!(out.stderr.contains("that one is frozen"), "{out:?}");
    job.continued_by(crate::common::Job::of(pid));
    job.passes();
    group.remove();
}

#[test]
fn ended_in_version_2() {
    isolated("ended_in_version_2", |case| ended(case, &TWO));
}

#[test]
fn ended_in_version_1() {
    isolated("ended_in_version_1", |case| ended(case, &ONE));
}

/// A ckpt that is killed leaves the job frozen, at each step.
#[cfg(feature = "faults")]
fn killed(case: &Case, version: &Version) {
    let (job, group) = version.frozen(case);
    for step in ["seized", "frozen", "state-captured", "release-half"] {
        let mut command = Command::new(CKPT);
        command.args(["attach", &job.pid().to_string(), "--thaw", "-o", "job.ckpt"]);
        command
            .env("CKPT_FAULT", format!("{step}:kill"))
            .current_dir(case.dir());
        let out = run(case, &mut command);
        assert_eq!(out.ended, Ended::Killed(9), "{step}: {out:?}");
        version.await_frozen(&group);
    }
    let mut command = Command::new(CKPT);
    command.args(["attach", &job.pid().to_string(), "--thaw", "-o", "job.ckpt"]);
    command
        .env("CKPT_FAULT", "state-captured")
        .current_dir(case.dir());
    assert_eq!(run(case, &mut command).code(), 1);
    version.ends_well(job, group);
}

#[cfg(feature = "faults")]
#[test]
fn killed_in_version_2() {
    isolated("killed_in_version_2", |case| killed(case, &TWO));
}

#[cfg(feature = "faults")]
#[test]
fn killed_in_version_1() {
    isolated("killed_in_version_1", |case| killed(case, &ONE));
}

#[test]
fn other_frozen_groups_are_not_thawed() {
    isolated("other_frozen_groups_are_not_thawed", |case| {
        let (job, group) = TWO.frozen(case);
        let stranger = start(Command::new("sleep").arg("1000"), &case.path("sleep.log"));
        group.take(&[stranger.pid]);
        TWO.await_frozen(&group);
        let pid = job.pid().to_string();
        let words = ["control group", "together with", "sleep"];
        ckpt(case, ["attach", "--thaw", &pid, "-o", "job.ckpt"]).refused(1, &words);
        TWO.await_frozen(&group);
        stranger.kill();
        TWO.ends_well(job, group);
    });
}

/// With a frozen group above its own.
#[test]
fn frozen_from_above() {
    isolated("frozen_from_above", |case| {
        let group = Group::with(case, &["cgroup.freeze"]);
        let below = Group(group.file("below"));
        std::fs::create_dir(&below.0).expect("root may");
        let mut job = fixture(case, "counter");
        below.take(&[job.pid()]);
        group.write("cgroup.freeze", "1");
        TWO.await_frozen(&below);
        let image = job.killed_frozen(case);
        group.write("cgroup.freeze", "0");
        job.continued_by(restored(case, &image, &[]));
        assert_eq!(below.read("cgroup.procs"), job.pid().to_string());
        job.passes();
        group.remove();
    });
}

impl Fixture {
    fn killed_frozen(&mut self, case: &Case) -> std::path::PathBuf {
        let (image, _) = attach(case, self.pid(), "job.ckpt", &["--thaw", "--kill"]);
        assert_eq!(until("its end", || self.job.ended()), Ended::Killed(9));
        image
    }
}
