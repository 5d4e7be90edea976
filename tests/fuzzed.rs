//! Snapshots that are no program's: other values, references, counts and orders, with right digests. Whatever is in one,
//! `verify`, `inspect`, `check` and `--dry-run` end soon, take memory in proportion to the image and to its metadata as they are
//! unpacked, and do not panic.
//!
//! A run takes a time; `CKPT_FORGERIES` names a number instead.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use ciborium::Value;
use ckpt::inspect;
use ckpt::progress::Silent;
use ckpt::restore::{self, Request};
use ckpt_image::Reader;

use crate::common::edit::rewritten;
use crate::common::fixture::start_in;
use crate::common::isolated;
use crate::common::values::{Place, Random, at, forgeries};
use crate::measure::{processor_time, within};

/// Fixtures that have objects of many kinds between them.
const FIXTURES: [&str; 12] = [
    "maps",
    "threads",
    "tree_session",
    "tree_zombie",
    "pipe",
    "sock_rights_kinds",
    "timers_posix",
    "sysv_sem",
    "epoll",
    "inotify",
    "pty_session",
    "xstate",
];
/// How long a run takes unless a number is given.
const TIME: Duration = Duration::from_secs(40);
/// For one image, on a processor of its own; and for each MiB of it and its metadata.
const SOON: [Duration; 2] = [Duration::from_secs(2), Duration::from_millis(200)];
/// Besides some times what the image and its metadata take.
const MEMORY: usize = 64 << 20;

/// All places of a value: those that hold others, and those that do not.
fn places(value: &Value, here: &mut Place, leaves: &mut Vec<Place>, lists: &mut Vec<Place>) {
    match value {
        Value::Map(entries) => {
            for (number, (_, value)) in entries.iter().enumerate() {
                here.push(number);
                places(value, here, leaves, lists);
                here.pop();
            }
        }
        Value::Array(elements) => {
            lists.push(here.clone());
            for (number, value) in elements.iter().enumerate() {
                here.push(number);
                places(value, here, leaves, lists);
                here.pop();
            }
        }
        _ => leaves.push(here.clone()),
    }
}

/// A place by its fields' names.
fn name(value: &Value, place: &[usize]) -> String {
    let mut here = value;
    let mut name = String::new();
    for &number in place {
        here = match here {
            Value::Map(entries) => {
                let (key, value) = &entries[number];
                let _ = write!(name, ".{}", key.as_text().unwrap_or("?"));
                value
            }
            Value::Array(elements) => {
                let _ = write!(name, "[{number}]");
                &elements[number]
            }
            _ => break,
        };
    }
    name
}

/// One change; what it was, in words.
fn change(value: &mut Value, random: &mut Random) -> String {
    let (mut leaves, mut lists) = (Vec::new(), Vec::new());
    places(value, &mut Vec::new(), &mut leaves, &mut lists);
    if random.below(3) > 0 || lists.is_empty() {
        let place = &leaves[random.below(leaves.len())];
        let other = at(value, &leaves[random.below(leaves.len())]).clone();
        let here = at(value, place);
        let mut all = forgeries(here);
        all.push(other);
        *here = all.swap_remove(random.below(all.len()));
        let new = format!("{here:?}");
        return format!("{} = {new}", name(value, place));
    }
    let place = lists[random.below(lists.len())].clone();
    let Value::Array(elements) = at(value, &place) else {
        return String::new();
    };
    if elements.is_empty() {
        elements.push(Value::Integer(0.into()));
        return format!("{}: an element", name(value, &place));
    }
    let (one, two) = (random.below(elements.len()), random.below(elements.len()));
    match random.below(5) {
        0 => elements.swap(one, two),
        1 => drop(elements.remove(one)),
        2 => elements.clear(),
        3 => {
            let copy = elements[one].clone();
            elements.insert(two, copy);
        }
        _ => {
            let copy = elements[one].clone();
            elements.extend(std::iter::repeat_n(copy, 1 << random.below(10)));
        }
    }
    format!("{}: elements {one} and {two}", name(value, &place))
}

/// Everything that looks into an image and touches nothing.
fn look_into(bytes: Vec<u8>, path: &Path) {
    let reader = |bytes: &[u8]| Reader::from_bytes(bytes.to_vec()).expect("its digests are right");
    let image = reader(&bytes);
    let _ = image.verify(&mut |_, _| {});
    let Ok(snapshot) = ckpt::snapshot::read(&image, path) else {
        return;
    };
    let _ = ckpt::objects::references::check(&snapshot, &image);
    let _ = inspect::summary::summary(&image, &snapshot);
    let _ = inspect::threads::threads(&image, &snapshot);
    let _ = inspect::maps::maps(&image, &snapshot);
    let _ = inspect::fds::fds(&snapshot);
    let _ = inspect::needs::needs(&snapshot);
    drop((image, snapshot));
    let request = Request::plain(path, &Silent);
    let _ = restore::obstacles_in(reader(&bytes), &request);
    if let Ok(mut opened) = restore::open(&request) {
        let _ = restore::dry_run(&mut opened);
    }
}

#[test]
fn are_judged_soon() {
    isolated("are_judged_soon", |case| {
        let images: Vec<PathBuf> = FIXTURES
            .into_iter()
            .map(|name| {
                let program = Command::new(case.fixtures().join(name));
                start_in(case, name, name, program).killed_into(case, &format!("{name}.ckpt"))
            })
            .collect();
        let bases: Vec<(Reader, Value)> = images
            .iter()
            .map(|image| {
                let reader = Reader::open(image).expect("it was just written");
                let bytes = reader
                    .section(ckpt::snapshot::SECTION, 1 << 30)
                    .expect("it has one");
                (
                    reader,
                    ciborium::from_reader(&bytes[..]).expect("it is CBOR"),
                )
            })
            .collect();
        let number = std::env::var("CKPT_FORGERIES").ok();
        let number: Option<u64> = number.map(|text| text.parse().expect("a number"));
        let mut random = Random::seeded();
        let (begun, mut tried, mut largest, mut longest) = (Instant::now(), 0, 0, Duration::ZERO);
        let path = case.path("forged.ckpt");
        let now = case.path("now.log");
        while number.map_or_else(|| begun.elapsed() < TIME, |number| tried < number) {
            let which = random.below(bases.len());
            let (reader, base) = &bases[which];
            let mut value = base.clone();
            let changes = (0..=random.below(3)).map(|_| change(&mut value, &mut random));
            let what = format!(
                "{}, {}",
                FIXTURES[which],
                changes.collect::<Vec<_>>().join("; ")
            );
            fs::write(&now, &what).expect("the test's directory is writable");
            let mut bytes = Vec::new();
            ciborium::into_writer(&value, &mut bytes).expect("to memory");
            drop(value);
            rewritten(reader, reader.header().pid, &bytes, &path);
            let image = fs::read(&path).expect("it was just written");
            let size = image.len() + bytes.len();
            drop(bytes);
            let at = processor_time();
            // The image itself is in memory twice here.
            let ((), took) = within(MEMORY + 6 * size, || look_into(image, &path));
            let time = processor_time() - at;
            let soon = SOON[0] + SOON[1] * (size >> 20) as u32;
            assert!(time < soon, "{time:?} for {what}");
            (largest, longest) = (largest.max(took), longest.max(time));
            tried += 1;
        }
        fs::remove_file(&now).expect("it is ours");
        println!(
            "{tried} forgeries, at most {} MiB and {longest:?}",
            largest >> 20
        );
    });
}
