//! Linux AIO contexts of jobs that may not run on every CPU, each of which keeps free places of a context in reserve.

use std::fs;
use std::process::Command;

use crate::common::fixture::{killed, start_in};
use crate::common::group::Group;
use crate::common::look::assert_let_go;
use crate::common::tool::RESTORE;
use crate::common::{Case, Job, attach, ckpt, isolated, run};

/// The first and the last CPU; skips the test if that is the same one.
fn two_cpus(case: &Case) -> [String; 2] {
    let online = fs::read_to_string("/sys/devices/system/cpu/online").expect("Linux lists CPUs");
    let mut numbers = online.trim().split([',', '-']).map(str::to_owned);
    let first = numbers.next().expect("there is a CPU");
    let last = numbers.next_back();
    [first, last.unwrap_or_else(|| case.skip("two CPUs"))]
}

/// `taskset -c CPU PROGRAM`
fn on(cpu: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", cpu]).arg(program);
    command
}

/// The fixture may run on the first CPU only: places that restore leaves in the reserve of the last one are lost to it.
#[test]
fn restored_from_another_cpu() {
    isolated("restored_from_another_cpu", |case| {
        let [_, last] = two_cpus(case);
        let (mut fixture, image) = killed(case, "aio_pinned");
        let restored = run(case, on(&last, RESTORE).arg(&image).arg("--detach"));
        let pid = restored.ok().trim().parse().expect("it prints a pid");
        fixture.continued_by(Job::of(pid));
        fixture.passes();
    });
}

/// The last CPU has places in reserve when the cpuset takes it away from the job. They cannot be told from requests.
#[test]
fn reserve_outside_the_cpuset() {
    isolated("reserve_outside_the_cpuset", |case| {
        let [first, last] = two_cpus(case);
        let group = Group::with(case, &["cpuset.cpus", "cpuset.mems", "cgroup.procs"]);
        group.write("cpuset.cpus", &first);
        group.write("cpuset.mems", "0");
        let command = on(&last, case.fixtures().join("aio"));
        let fixture = start_in(case, "aio", "run", command);
        group.take(&[fixture.pid()]);
        let pid = fixture.pid().to_string();
        let refused = ckpt(case, ["attach", &pid, "-o", "job.ckpt"]);
        refused.refused(
            1,
            &[
                "AIO context",
                "outside its cpuset",
                "let its cpuset have all CPUs",
            ],
        );
        assert_let_go(fixture.pid());
        group.write("cpuset.cpus", &format!("{first}-{last}"));
        attach(case, fixture.pid(), "job.ckpt", &[]);
        fixture.passes();
        group.remove();
    });
}
