//! Random jobs of fresh seeds (`docs/chaos.md`). `CKPT_CHAOS_SECONDS` is for how long (75),
//! `CKPT_SEED` repeats a run.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ckpt_fixtures::chaos::{self, Limits, Tools};

use crate::common::tool::{CKPT, RESTORE};
use crate::common::{Case, isolated, isolated_as_user};

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn random_jobs(case: &Case) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let fresh = now.map_or(1, |now| now.as_nanos() as u64 % 1_000_000_000);
    let seed = variable("CKPT_SEED").unwrap_or(fresh);
    let seconds = variable("CKPT_CHAOS_SECONDS").unwrap_or(75);
    let dir = case.path("jobs");
    std::fs::create_dir(&dir).expect("the test's directory is writable");
    let tools = Tools {
        ckpt: CKPT.into(),
        restore: RESTORE.into(),
        chaos: case.fixtures().join("chaos"),
        dir,
    };
    let limits = Limits {
        // One that failed is enough.
        failures: 1,
        known: false,
        jobs: u64::MAX,
        time: Duration::from_secs(seconds),
        shrink: Duration::from_secs(100),
    };
    let tally = chaos::run(
        &tools,
        seed,
        1,
        Some(chaos::SETTLED),
        limits,
        &mut |report| {
            eprintln!("{report}");
        },
    );
    eprintln!(
        "{} jobs from seed {seed}, {} refused as their steps declare",
        tally.jobs, tally.refused
    );
    assert!(tally.failed.is_empty(), "{:?}", tally.failed);
    assert!(tally.jobs > 0, "no job was run");
}

#[test]
fn of_root() {
    isolated("of_root", random_jobs);
}

#[test]
fn of_a_user() {
    isolated_as_user("of_a_user", random_jobs);
}
