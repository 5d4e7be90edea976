//! Snapshots that are no program's: other values, references, counts and orders, with right digests. For tests, and for
//! the fuzz target of the name (`fuzz/fuzz_targets/snapshot.rs`), where the bytes of an input choose.

use std::fmt::Write;
use std::path::Path;
use std::sync::LazyLock;

use ciborium::Value;
use ckpt::inspect;
use ckpt::progress::Silent;
use ckpt::restore::{self, Probed, Request};
use ckpt_image::{Codec, Header, Reader, Writer, WriterOptions};

use super::values::{Place, Random, at, forgeries};

/// What looking into an image may take: 64 MiB and four times its size, of which the program itself has some.
pub fn memory_for(image: usize) -> usize {
    (48 << 20) + 4 * image
}

/// Where decisions come from.
pub trait Choices {
    /// A number below `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize;
}

impl Choices for Random {
    fn below(&mut self, end: usize) -> usize {
        Random::below(self, end)
    }
}

/// The bytes of an input; after its end all choices are the first.
impl Choices for &[u8] {
    fn below(&mut self, end: usize) -> usize {
        let bytes = 1 + (end > 1 << 8) as usize + (end > 1 << 16) as usize;
        let (now, rest) = self.split_at(bytes.min(self.len()));
        *self = rest;
        now.iter()
            .fold(0, |number, byte| number << 8 | usize::from(*byte))
            % end
    }
}

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

/// The places of all lists.
pub fn lists(value: &Value) -> Vec<Place> {
    let (mut leaves, mut lists) = (Vec::new(), Vec::new());
    places(value, &mut Vec::new(), &mut leaves, &mut lists);
    lists
}

/// A place by its fields' names.
pub fn name(value: &Value, place: &[usize]) -> String {
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

/// One to three changes; what they were, in words.
pub fn changes(value: &mut Value, choices: &mut impl Choices) -> String {
    let changes = (0..=choices.below(3)).map(|_| change(value, choices));
    changes.collect::<Vec<_>>().join("; ")
}

fn change(value: &mut Value, choices: &mut impl Choices) -> String {
    let (mut leaves, mut lists) = (Vec::new(), Vec::new());
    places(value, &mut Vec::new(), &mut leaves, &mut lists);
    if choices.below(3) > 0 || lists.is_empty() {
        let place = &leaves[choices.below(leaves.len())];
        let other = at(value, &leaves[choices.below(leaves.len())]).clone();
        let here = at(value, place);
        let mut all = forgeries(here);
        all.push(other);
        *here = all.swap_remove(choices.below(all.len()));
        let new = format!("{here:?}");
        return format!("{} = {new}", name(value, place));
    }
    let place = lists[choices.below(lists.len())].clone();
    let Value::Array(elements) = at(value, &place) else {
        return String::new();
    };
    if elements.is_empty() {
        elements.push(Value::Integer(0.into()));
        return format!("{}: an element", name(value, &place));
    }
    let (one, two) = (choices.below(elements.len()), choices.below(elements.len()));
    match choices.below(5) {
        0 => elements.swap(one, two),
        1 => drop(elements.remove(one)),
        2 => elements.clear(),
        3 => {
            let copy = elements[one].clone();
            elements.insert(two, copy);
        }
        _ => {
            let copy = elements[one].clone();
            elements.extend(std::iter::repeat_n(copy, 1 << choices.below(10)));
        }
    }
    format!("{}: elements {one} and {two}", name(value, &place))
}

/// A value as CBOR.
pub fn encoded(value: &Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes).expect("to memory");
    bytes
}

/// The snapshot of an image, as bytes and as a value.
pub fn snapshot(image: &Reader) -> (Vec<u8>, Value) {
    let bytes = image.section(ckpt::snapshot::SECTION, 1 << 30);
    let bytes = bytes.expect("it has one");
    let value = ciborium::from_reader(&bytes[..]).expect("it is CBOR");
    (bytes, value)
}

/// An image without pages.
pub fn image(header: &Header, snapshot: &[u8], codec: Codec) -> Vec<u8> {
    let options = WriterOptions { codec, threads: 1 };
    let mut writer = Writer::new(Vec::new(), header, options).expect("to memory");
    let (section, version) = (ckpt::snapshot::SECTION, ckpt::snapshot::VERSION);
    let written = writer.section(section, version, snapshot);
    written.expect("to memory");
    writer.finish().expect("to memory").0
}

/// Does everything that looks into an image and touches nothing. `path` is for messages.
pub fn look_into(bytes: Vec<u8>, path: &Path) {
    let image = Reader::from_bytes(bytes).expect("its digests are right");
    let _ = image.verify(&mut |_, _| {});
    let Ok(snapshot) = ckpt::snapshot::read(&image, path) else {
        return;
    };
    let _ = inspect::summary::summary(&image, &snapshot);
    let _ = inspect::threads::threads(&image, &snapshot);
    let _ = inspect::maps::maps(&image, &snapshot);
    let _ = inspect::fds::fds(&snapshot);
    let _ = inspect::needs::needs(&snapshot);
    let _ = inspect::attributes::attributes(&snapshot);
    drop(snapshot);
    plan(image, path);
}

/// Plans a restore, as `check` and `--dry-run` do it.
pub fn plan(image: Reader, path: &Path) {
    static PROBED: LazyLock<Probed> = LazyLock::new(|| Probed::here().expect("there is /proc"));
    let request = Request {
        probed: Some(&PROBED),
        ..Request::plain(path, &Silent)
    };
    let opened = restore::open_trusted(image, &request);
    let Ok(mut placed) = opened.and_then(restore::Opened::place_for_a_look) else {
        return;
    };
    let Ok(looked) = placed.look() else { return };
    let _ = looked.dry_run(&mut |_| {});
    let _ = looked.obstacles();
}
