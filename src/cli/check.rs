//! `ckpt check`: what is possible here, with one process, or with one image.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use ckpt_tracer::Pid;
use ckpt_tracer::capabilities::{Held, Use};
use ckpt_tracer::features::{FeatureRow, KernelFeatures};
use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};
use serde::Serialize;

use super::exit::{self, Failure, Outcome, Role};
use super::output::Table;
use super::places::Places;
use super::{attach, output, progress};
use crate::capture::check;
use crate::capture::seen::Planned;
use crate::error::Obstacle;
use crate::isolate::Visited;
use crate::objects::cgroup::freezer;
use crate::objects::files::left::Choices;
use crate::objects::findings::Findings;
use crate::objects::job::Family;
use crate::objects::outsiders;
use crate::rehearse::Prover;
use crate::{isolate, restore};

/// Arguments of `ckpt check`.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Check {
    /// The process (a number) or the image (a path) to check; by default the kernel and the user's permissions are
    /// checked.
    #[arg(value_name = "PID|IMAGE", value_parser = OsStringValueParser::new().try_map(parse_subject))]
    subject: Option<Subject>,
    /// Print the result as a JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    places: Places,
}

/// The subject of the check.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Subject {
    Process(i32),
    Image(PathBuf),
}

/// All digits are a pid; write ./ before the name of such a file.
fn parse_subject(word: OsString) -> Result<Subject, String> {
    match word.to_str() {
        Some(text) if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) => {
            let pid = text.parse().ok().filter(|pid| *pid > 0);
            let pid = pid.ok_or("no process has that id; write ./ before the name of an image");
            Ok(Subject::Process(pid?))
        }
        _ => Ok(Subject::Image(word.into())),
    }
}

const EXAMPLES: &str = "\
Nothing is changed, and no process is stopped. The exit code is 0 when a checkpoint, or a restore
of the image, is possible, else 1. Options about files are those of restore, and for images only.

Examples:
  ckpt check             what this kernel and this user can do
  ckpt check 4242        the obstacles to a checkpoint of process 4242
  ckpt check job.ckpt    the obstacles to a restore on this machine
  ckpt check --map-path /home/me/run=/scratch/run job.ckpt";

/// Output of `ckpt check --json`; the keys are fixed.
#[derive(Serialize)]
struct Here<'a> {
    /// Whether checkpoints are possible at all.
    possible: bool,
    /// All features that were probed.
    features: Vec<Feature<'a>>,
    /// Every use of a capability.
    capabilities: Vec<Privilege>,
}

/// One use of capabilities.
#[derive(Serialize)]
struct Privilege {
    /// Which ones.
    takes: String,
    /// The user namespace in which they must be held.
    user_namespace: String,
    /// Whether the user holds them.
    held: bool,
    /// Purpose.
    needed_for: &'static str,
    /// What happens without it.
    without: &'static str,
}

impl Privilege {
    fn all(held: Held) -> Vec<Self> {
        let uses = Use::ALL.iter().map(|of| {
            let row = of.row();
            Self {
                takes: of.to_string(),
                user_namespace: row.held_in.to_string(),
                held: held.allows(*of),
                needed_for: row.what,
                without: row.without,
            }
        });
        uses.collect()
    }
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
    /// Further details.
    detail: &'a str,
}

/// Output of `ckpt check --json PID`; the keys are fixed.
#[derive(Serialize)]
struct Process<'a> {
    /// The process.
    pid: i32,
    /// Whether it can be checkpointed and restored.
    possible: bool,
    /// The obstacles: `object`, `reason`, and `remedy` (null if there is none).
    obstacles: &'a [Obstacle],
    /// What it shares with processes outside the job, one sentence each.
    shared: Vec<String>,
    /// Further notes: what an option of restore will have to resolve, what is not visible; one sentence each.
    notes: &'a [String],
}

/// Output of `ckpt check --json IMAGE`; the keys are fixed.
#[derive(Serialize)]
struct Image<'a> {
    /// Its path.
    image: &'a str,
    /// Whether it can be restored here.
    possible: bool,
    /// The obstacles, as above.
    obstacles: &'a [Obstacle],
}

pub(crate) fn run(args: &Check) -> Outcome {
    match &args.subject {
        Some(Subject::Image(path)) => image(path, args),
        _ if args.places.any() => Err(Failure::Usage(
            "the options about files are for an image; name one".into(),
        )),
        Some(Subject::Process(pid)) => process(*pid, args),
        None => here(args.json),
    }
}

fn image(path: &Path, args: &Check) -> Outcome {
    let progress = progress::on_terminal("check", false);
    let obstacles = restore::obstacles(&args.places.request(path, &*progress)?)?;
    let name = path.to_string_lossy();
    let text = if args.json {
        output::json(&Image {
            image: &name,
            possible: obstacles.is_empty(),
            obstacles: &obstacles,
        })?
    } else if obstacles.is_empty() {
        format!(
            "{} can be restored here\n",
            output::visible(name.as_bytes())
        )
    } else {
        lines(&obstacles)
    };
    output::print(text)?;
    verdict(obstacles.is_empty())
}

fn here(json: bool) -> Outcome {
    let kernel = KernelFeatures::probe();
    let (rows, privileges) = (kernel.table(), Privilege::all(kernel.capabilities));
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
            capabilities: privileges,
        })?
    } else {
        features_table(&rows) + "\n" + &privileges_table(&privileges)
    };
    output::print(text)?;
    verdict(possible)
}

fn features_table(rows: &[FeatureRow]) -> String {
    let mut table = Table::new(&["feature", "here", "needed for", "detail"]);
    for row in rows {
        let here = if row.available { "yes" } else { "no" };
        let detail = output::visible(row.detail.as_bytes());
        table.add_row([row.name, here, row.needed_for, &detail]);
    }
    table.to_string()
}

fn privileges_table(privileges: &[Privilege]) -> String {
    let mut table = Table::new(&["capability", "held", "for", "without it"]);
    for row in privileges {
        let held = if row.held { "yes" } else { "no" };
        table.add_row([&row.takes, held, row.needed_for, row.without]);
    }
    table.to_string()
}

/// Inspects it inside its pid namespace, and plans its restore here.
fn process(pid: i32, args: &Check) -> Outcome {
    let choices = args.places.descriptors.choices_to_store()?;
    let prover = Prover::start(Pid(pid), None)?;
    // Inside the job's namespaces control groups have other paths.
    let job = Family::of(Pid(pid)).unwrap_or_default().living;
    let groups = freezer::frozen(&job);
    let groups: Vec<Obstacle> = groups.iter().map(|group| group.obstacle(pid)).collect();
    Ok(isolate::visit(Pid(pid), |visited| {
        let outcome = match visited {
            Ok(visited) => look((pid, visited), groups, (&choices, &prover), args.json),
            Err(error) => Err(error.into()),
        };
        exit::report(Role::Tool, outcome)
    })?)
}

fn look(
    (pid, visited): (i32, &Visited),
    groups: Vec<Obstacle>,
    (choices, prover): (&Choices, &Prover),
    json: bool,
) -> Outcome {
    let mut roots = vec![visited.pid];
    if let Some(by) = visited.init {
        roots.extend(attach::adopted(visited.pid.raw(), by)?);
    }
    let planned = Planned {
        prover,
        namespaces: &visited.namespaces,
        groups: &visited.groups,
    };
    let mut found = Findings::from(groups);
    let of_the_job = check::findings(&roots, choices, &planned)?;
    found.extend(of_the_job.obstacles);
    found.notes = of_the_job.notes;
    let job = Family::of_all(&roots).unwrap_or_default().living;
    let shared = outsiders::shared(&job).into_iter();
    let shared: Vec<String> = shared.map(|s| s.sentence).collect();
    let text = if json {
        output::json(&Process {
            pid,
            possible: found.is_clear(),
            obstacles: &found.obstacles,
            shared,
            notes: &found.notes,
        })?
    } else if found.is_clear() {
        let mut text = format!("process {pid} can be checkpointed and restored\n");
        for sentence in shared.iter().chain(&found.notes) {
            text.push_str(&format!("{}\n", output::visible(sentence.as_bytes())));
        }
        text
    } else {
        lines(&found.obstacles)
    };
    output::print(text)?;
    verdict(found.is_clear())
}

fn lines(obstacles: &[Obstacle]) -> String {
    let lines = obstacles
        .iter()
        .map(|obstacle| format!("{}\n", output::visible(obstacle.to_string().as_bytes())));
    lines.collect()
}

fn verdict(possible: bool) -> Outcome {
    if possible { Ok(0) } else { Err(Failure::Told) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_a_process_and_all_else_an_image() {
        let parse = |word: &str| parse_subject(word.into());
        assert_eq!(parse("4242"), Ok(Subject::Process(4242)));
        for path in ["job.ckpt", "./4242", "-1", "4242.ckpt"] {
            assert_eq!(parse(path), Ok(Subject::Image(path.into())));
        }
        assert!(parse("0").is_err() && parse("99999999999").is_err());
    }
}
