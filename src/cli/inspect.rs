//! `ckpt inspect`: the contents of an image.

use std::fmt::Write;
use std::path::PathBuf;

use ckpt_image::Reader;
use clap::Args;
use serde::{Serialize, Serializer};

use super::exit::Outcome;
use super::output::{self, Table, visible};
use crate::inspect::attributes::AttributeView;
use crate::inspect::fds::FdView;
use crate::inspect::maps::MapView;
use crate::inspect::summary::Summary;
use crate::inspect::threads::ThreadView;
use crate::inspect::{attributes, fds, maps, needs, summary, threads};
use crate::objects::Snapshot;
use crate::objects::need::Need;
use crate::snapshot;

/// Arguments of `ckpt inspect`.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Inspect {
    /// The image to inspect.
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
    /// Show the mappings, and how much of each the image stores.
    #[arg(long)]
    maps: bool,
    /// Show the open files.
    #[arg(long)]
    fds: bool,
    /// Show the position of each thread: its system call with arguments, function and instruction.
    #[arg(long)]
    threads: bool,
    /// Show what a restore needs on a machine: files, programs, features, privileges, limits.
    #[arg(long)]
    needs: bool,
    /// Show the other attributes of each process and thread: signals, timers, limits, control groups, switches,
    /// credentials.
    #[arg(long)]
    attributes: bool,
    /// Print all requested parts as a JSON object.
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  ckpt inspect job.ckpt             who, where, when, how large
  ckpt inspect --threads job.ckpt   what was each thread waiting for?
  ckpt inspect --needs job.ckpt     what must another machine have?
  ckpt inspect --fds --json job.ckpt | jq '.fds[].path'";

/// Output of `ckpt inspect --json`; the keys are fixed. Parts that were not requested are left out.
#[derive(Serialize)]
struct Everything<T, M, F, N, A> {
    summary: Summary,
    #[serde(skip_serializing_if = "Option::is_none")]
    threads: Option<T>,
    #[serde(skip_serializing_if = "Option::is_none")]
    maps: Option<M>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fds: Option<F>,
    #[serde(skip_serializing_if = "Option::is_none")]
    needs: Option<N>,
    #[serde(skip_serializing_if = "Option::is_none")]
    attributes: Option<A>,
}

pub(crate) fn run(args: &Inspect) -> Outcome {
    let reader = Reader::open(&args.image)?;
    let snapshot = snapshot::read(&reader, &args.image)?;
    let (reader, snapshot) = (&reader, &snapshot);
    let mut lines = output::Lines::new();
    if args.json {
        lines.json(&Everything {
            summary: summary::summary(reader, snapshot),
            threads: args
                .threads
                .then_some(List(|| threads::threads(reader, snapshot))),
            maps: args.maps.then_some(List(|| maps::maps(reader, snapshot))),
            fds: args.fds.then_some(List(|| fds::fds(snapshot))),
            needs: args.needs.then_some(List(|| needs::needs(snapshot))),
            attributes: args
                .attributes
                .then_some(List(|| attributes::attributes(snapshot))),
        });
    } else {
        text(args, reader, snapshot, &mut lines);
    }
    lines.end()?;
    Ok(0)
}

/// A list that is built when it is serialized, and dropped before the next one: for a large job each is large.
struct List<F>(F);

impl<T: Serialize, F: Fn() -> Vec<T>> Serialize for List<F> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq((self.0)())
    }
}

fn text(args: &Inspect, reader: &Reader, snapshot: &Snapshot, lines: &mut output::Lines) {
    let tables: [(bool, &dyn Fn() -> Table); 5] = [
        (args.threads, &|| {
            threads_table(&threads::threads(reader, snapshot))
        }),
        (args.maps, &|| maps_table(&maps::maps(reader, snapshot))),
        (args.fds, &|| fds_table(&fds::fds(snapshot))),
        (args.needs, &|| needs_table(&needs::needs(snapshot))),
        (args.attributes, &|| {
            attributes_table(&attributes::attributes(snapshot))
        }),
    ];
    let mut wanted = tables.into_iter().filter(|(wanted, _)| *wanted).peekable();
    if wanted.peek().is_none() {
        let text = summary_text(&summary::summary(reader, snapshot));
        return lines.add(format_args!("{}", text.trim_end_matches('\n')));
    }
    for (number, (_, table)) in wanted.enumerate() {
        if number > 0 {
            lines.add(format_args!(""));
        }
        table().print(&mut |line| lines.add(line));
    }
}

fn summary_text(summary: &Summary) -> String {
    let size = format!(
        "{}, codec {}, ratio {:.2}",
        output::bytes(summary.image_bytes),
        summary.codec,
        summary.ratio
    );
    let memory = format!(
        "{} in {}",
        output::bytes(summary.memory_bytes),
        output::count(summary.pages, "page")
    );
    let mut processor = format!("{}: {}", summary.cpu, summary.cpu_features.join(" "));
    if let Some(level) = summary.cpu_baseline {
        let _ = write!(processor, "; the job uses no more than {level}");
    }
    let rows = [
        ("image", summary.image.clone()),
        (
            "format",
            format!(
                "{} for {}, id {}",
                summary.format, summary.arch, summary.image_id
            ),
        ),
        ("job", format!("{}, pid {}", summary.name, summary.pid)),
        ("command line", summary.command_line.clone()),
        ("host", summary.host.clone()),
        ("kernel", summary.kernel.clone()),
        ("boot id", summary.boot_id.clone()),
        ("processor", processor),
        ("taken", output::time(summary.created_unix_ns)),
        ("taken by", summary.checkpoint_command.join(" ")),
        ("processes", summary.processes.to_string()),
        ("threads", summary.threads.to_string()),
        (
            "bundled",
            output::count(summary.bundled_files as u64, "file"),
        ),
        (
            "seccomp",
            format!(
                "{} of the environment",
                output::count(summary.filters_around.into(), "filter")
            ),
        ),
        ("memory", memory),
        ("size", size),
    ];
    let mut text = String::new();
    for (name, value) in rows {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{name:<14}{}", visible(value.as_bytes()));
    }
    for process in summary
        .process_list
        .iter()
        .filter(|p| !p.security.is_empty())
    {
        let of = format!("security of {}", process.pid);
        let value = process.security.join(", ");
        let _ = writeln!(text, "{of:<14} {}", visible(value.as_bytes()));
    }
    if summary.process_list.len() + summary.zombies.len() > 1 {
        let mut table = Table::new(&[
            "pid",
            "parent",
            "threads",
            "fds",
            "mappings",
            "command line",
        ]);
        for process in &summary.process_list {
            table.add_row([
                process.pid.to_string(),
                process.parent.to_string(),
                process.threads.to_string(),
                process.fds.to_string(),
                process.mappings.to_string(),
                visible(process.command_line.join(" ").as_bytes()),
            ]);
        }
        for zombie in &summary.zombies {
            table.add_row([
                zombie.pid.to_string(),
                zombie.parent.to_string(),
                String::new(),
                String::new(),
                String::new(),
                format!("({}, ended)", visible(zombie.name.as_bytes())),
            ]);
        }
        let _ = write!(text, "\n{table}");
    }
    text
}

fn threads_table(threads: &[ThreadView]) -> Table {
    let head = [
        "pid",
        "tid",
        "name",
        "state",
        "at",
        "instruction",
        "system call",
    ];
    let mut table = Table::new(&head);
    for thread in threads {
        let place = thread
            .symbol
            .clone()
            .unwrap_or_else(|| format!("{:#x}", thread.address));
        let call = match (&thread.call, &thread.result) {
            (Some(call), Some(result)) => format!("{call} = {result}"),
            (Some(call), None) => call.clone(),
            (None, _) => "-".into(),
        };
        table.add_row([
            thread.pid.to_string(),
            thread.tid.to_string(),
            visible(thread.name.as_bytes()),
            thread.state.into(),
            visible(place.as_bytes()),
            thread.instruction.clone().unwrap_or_else(|| "?".into()),
            visible(call.as_bytes()),
        ]);
    }
    table
}

fn maps_table(maps: &[MapView]) -> Table {
    let mut table = Table::new(&["pid", "range", "perm", "offset", "size", "stored", "path"]);
    for map in maps {
        table.add_row([
            map.pid.to_string(),
            format!("{:08x}-{:08x}", map.start, map.end),
            map.permissions.clone(),
            format!("{:08x}", map.offset),
            output::bytes(map.end.saturating_sub(map.start)),
            output::bytes(map.stored_bytes),
            visible(map.path.as_bytes()),
        ]);
    }
    table.right(&[4, 5])
}

fn fds_table(fds: &[FdView]) -> Table {
    let mut table = Table::new(&[
        "pid",
        "fd",
        "kind",
        "path",
        "offset",
        "saved",
        "flags",
        "shared with",
    ]);
    for fd in fds {
        let names: Vec<_> = fd.shared_with.iter().map(ToString::to_string).collect();
        let mut shared = names.join(" ");
        if fd.shared_with_count > fd.shared_with.len() {
            let _ = write!(
                shared,
                " and {} more",
                fd.shared_with_count - fd.shared_with.len()
            );
        }
        table.add_row([
            fd.pid.to_string(),
            fd.fd.to_string(),
            fd.kind.into(),
            visible(fd.path.as_bytes()),
            fd.offset
                .map_or_else(|| "-".into(), |offset| offset.to_string()),
            fd.saved_bytes.map_or_else(|| "-".into(), output::bytes),
            fd.flags.clone(),
            if shared.is_empty() {
                "-".into()
            } else {
                shared
            },
        ]);
    }
    table.right(&[1, 4, 5])
}

fn needs_table(needs: &[Need]) -> Table {
    let mut table = Table::new(&["kind", "name", "size", "changed", "inode", "detail"]);
    let cell = |number: Option<u64>| number.map_or_else(|| "-".into(), |n| n.to_string());
    for need in needs {
        let changed = need.modified_ns.and_then(|ns| u64::try_from(ns).ok());
        table.add_row([
            need.kind.into(),
            visible(need.name.as_bytes()),
            cell(need.size),
            changed.map_or_else(|| "-".into(), output::time),
            cell(need.inode),
            visible(need.detail.as_bytes()),
        ]);
    }
    table.right(&[2, 4])
}

fn attributes_table(attributes: &[AttributeView]) -> Table {
    let mut table = Table::new(&["pid", "tid", "attribute", "value"]);
    let cell = |id: Option<i32>| id.map_or_else(|| "-".into(), |id| id.to_string());
    for attribute in attributes {
        table.add_row([
            cell(attribute.pid),
            cell(attribute.tid),
            visible(attribute.name.as_bytes()),
            visible(attribute.value.as_bytes()),
        ]);
    }
    table
}
