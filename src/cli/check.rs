//! `ckpt check`: what can be done here, or with one process.

use ckpt_tracer::Pid;
use ckpt_tracer::features::{FeatureRow, KernelFeatures};
use clap::Args;
use serde::Serialize;

use super::exit::{self, Failure, Outcome, Role};
use super::output;
use crate::check;
use crate::error::Obstacle;
use crate::isolate;

/// Arguments of `ckpt check`.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Check {
    /// The process to look at; without it the kernel and the user are looked at.
    #[arg(value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
    /// Print the answer as a JSON object.
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Nothing is touched, and no process is stopped. The exit code is 0 when a checkpoint is possible,
else 1.

Examples:
  ckpt check         what this kernel and this user can do
  ckpt check 4242    what stands in the way of a checkpoint of process 4242";

/// What `ckpt check --json` prints; the keys stay as they are.
#[derive(Serialize)]
struct Here<'a> {
    /// Whether checkpoints are possible at all.
    possible: bool,
    /// Everything that was looked at.
    features: Vec<Feature<'a>>,
}

/// One feature of the kernel, or permission of the user.
#[derive(Serialize)]
struct Feature<'a> {
    /// Its name.
    name: &'a str,
    /// Whether it is there.
    available: bool,
    /// What does not work, or not as well, without it.
    needed_for: &'a str,
    /// What else is known.
    detail: &'a str,
}

/// What `ckpt check --json PID` prints; the keys stay as they are.
#[derive(Serialize)]
struct Process<'a> {
    /// The process.
    pid: i32,
    /// Whether it can be checkpointed and restored.
    possible: bool,
    /// What stands in the way: `object`, `reason`, and `remedy` (null when there is none).
    obstacles: &'a [Obstacle],
}

pub(crate) fn run(args: &Check) -> Outcome {
    match args.pid {
        None => here(args.json),
        Some(pid) => process(pid, args.json),
    }
}

fn here(json: bool) -> Outcome {
    let rows = KernelFeatures::probe().table();
    let possible = rows
        .iter()
        .all(|row| row.available || row.needed_for != "everything");
    let text = if json {
        let features = rows.iter().map(|row| Feature {
            name: row.name,
            available: row.available,
            needed_for: row.needed_for,
            detail: &row.detail,
        });
        output::json(&Here {
            possible,
            features: features.collect(),
        })?
    } else {
        features_table(&rows)
    };
    output::print(text)?;
    verdict(possible)
}

fn features_table(rows: &[FeatureRow]) -> String {
    let mut table = output::table(&["feature", "here", "needed for", "detail"]);
    for row in rows {
        let here = if row.available { "yes" } else { "no" };
        let detail = output::visible(row.detail.as_bytes());
        table.add_row([row.name, here, row.needed_for, &detail]);
    }
    output::table_text(table)
}

/// Looks at it from where its pids are.
fn process(pid: i32, json: bool) -> Outcome {
    Ok(isolate::visit(Pid(pid), |visited| {
        let outcome = match visited {
            Ok(visited) => look(pid, visited.pid, json),
            Err(error) => Err(error.into()),
        };
        exit::report(Role::Tool, outcome)
    })?)
}

fn look(pid: i32, inner: Pid, json: bool) -> Outcome {
    let obstacles = check::obstacles(inner)?;
    let text = if json {
        output::json(&Process {
            pid,
            possible: obstacles.is_empty(),
            obstacles: &obstacles,
        })?
    } else if obstacles.is_empty() {
        format!("process {pid} can be checkpointed and restored\n")
    } else {
        let lines = obstacles
            .iter()
            .map(|obstacle| format!("{}\n", output::visible(obstacle.to_string().as_bytes())));
        lines.collect()
    };
    output::print(text)?;
    verdict(obstacles.is_empty())
}

fn verdict(possible: bool) -> Outcome {
    if possible { Ok(0) } else { Err(Failure::Told) }
}
