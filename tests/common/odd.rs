//! `tests/programs/odd.c`: a target in an unusual situation.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::fixture::{Fixture, start_in};
use super::isolate::Case;
use super::tool::{run, source};

/// Builds it into the test's directory.
pub fn build(case: &Case) -> PathBuf {
    let program = case.path("odd");
    if !program.exists() {
        let mut command = Command::new("gcc");
        command
            .args(["-O1", "-g", "-pthread", "-o"])
            .arg(&program)
            .arg(source("odd.c"));
        run(case, &mut command).ok();
    }
    program
}

/// Starts it in this situation, with this file.
pub fn odd(case: &Case, situation: &str, file: Option<&Path>) -> Fixture {
    let mut command = Command::new(build(case));
    command
        .env("ODD", situation)
        .envs(file.map(|file| ("ODD_FILE", file)));
    start_in(case, situation, &format!("run-{situation}"), command)
}
