//! Whole jobs of ordinary programs: trees of processes with pipes, sockets, locks and shared memory
//! between them. Each is checkpointed from outside in the middle of its work, killed and restored;
//! what it makes of it is what it makes when nobody disturbs it.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::rounds::same_result;
use common::{Case, isolated, isolated_as_user};

/// A file of `tests/jobs`.
fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/jobs")
        .join(name)
}

fn pipeline(case: &Case) {
    case.needs_program("bash", "bash");
    same_result(case, &|| {
        let mut command = Command::new("bash");
        command.arg(source("pipeline.sh"));
        command
    });
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

fn multiprocessing(case: &Case, method: &str) {
    const PYTHON: &str = "/usr/bin/python3";
    if !Path::new(PYTHON).exists() {
        case.skip("/usr/bin/python3 (python3)");
    }
    same_result(case, &|| {
        let mut command = Command::new(PYTHON);
        command.arg(source("workers.py")).arg(method);
        command
    });
}

#[test]
fn python_processes_by_fork() {
    isolated("python_processes_by_fork", |case| {
        multiprocessing(case, "fork")
    });
}

#[test]
fn python_processes_by_spawn() {
    isolated("python_processes_by_spawn", |case| {
        multiprocessing(case, "spawn")
    });
}
