//! Snapshots that are no program's: other values, references, counts and orders, with right digests. Whatever is in one,
//! `verify`, `inspect`, `check` and `--dry-run` end soon, take no more memory than 64 MiB and four times the image, and do not
//! panic.
//!
//! A run takes a time; `CKPT_FORGERIES` names a number instead. `CKPT_FUZZ_BASES` is a directory for the images that `make fuzz`
//! begins with. What was found once is kept in `fuzz/kept`.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use ciborium::Value;
use ckpt::objects::memory::FileIdentity;
use ckpt_image::{Codec, Header, Reader};

use crate::common::edit::rewritten;
use crate::common::fixture::start_in;
use crate::common::forging::{
    changes, encoded, image, lists, look_into, memory_for, name, plan, snapshot,
};
use crate::common::peak::peak_of;
use crate::common::tool::{CKPT, RESTORE};
use crate::common::values::{Place, Random, at, leaves};
use crate::common::{Case, ckpt, isolated, run};
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
const TIME: Duration = Duration::from_secs(15);
/// For one image, on a processor of its own; and for each MiB of it as it is packed and unpacked.
const SOON: [Duration; 2] = [Duration::from_secs(2), Duration::from_millis(300)];

/// For a program that looks into one image, on a processor.
const SECONDS: u64 = 10;

/// How many are asked for.
fn asked() -> Option<u64> {
    let number = std::env::var("CKPT_FORGERIES").ok();
    number.map(|text| text.parse().expect("a number"))
}

/// Whether a run goes on.
fn goes_on(begun: Instant, tried: u64) -> bool {
    asked().map_or_else(|| begun.elapsed() < TIME, |number| tried < number)
}

/// Images of fixtures, without pages.
fn bases(case: &Case, fixtures: &[&str]) -> Vec<(Header, Value)> {
    let of_fixture = |name: &&str| {
        let program = Command::new(case.fixtures().join(name));
        let image = start_in(case, name, name, program).killed_into(case, &format!("{name}.ckpt"));
        let reader = Reader::open(image).expect("it was just written");
        (reader.header().clone(), snapshot(&reader).1)
    };
    fixtures.iter().map(of_fixture).collect()
}

/// Looks into an image within its limits, of which `raw` is the length of the metadata; how much memory that took.
fn judged_soon(bytes: Vec<u8>, raw: usize, what: &str) -> usize {
    let size = bytes.len();
    let begun = processor_time();
    // The image is in memory, too.
    let ((), took) = within(memory_for(size), || {
        look_into(bytes, Path::new("forged.ckpt"))
    });
    let time = processor_time() - begun;
    let soon = SOON[0] + SOON[1] * ((raw + size) >> 20) as u32;
    assert!(time < soon, "{time:?} for {what}");
    took
}

#[test]
fn are_judged_soon() {
    isolated("are_judged_soon", |case| {
        let bases = bases(case, &FIXTURES);
        if let Some(to) = std::env::var_os("CKPT_FUZZ_BASES") {
            write_bases(case, Path::new(&to), &bases);
        }
        let mut random = Random::seeded();
        let (begun, mut tried, mut largest) = (Instant::now(), 0, 0);
        let now = case.path("now.log");
        while goes_on(begun, tried) {
            let which = random.below(bases.len());
            let (header, base) = &bases[which];
            let mut value = base.clone();
            let what = format!("{}, {}", FIXTURES[which], changes(&mut value, &mut random));
            fs::write(&now, &what).expect("the test's directory is writable");
            let bytes = encoded(&value);
            drop(value);
            let image = image(header, &bytes, Codec::None);
            largest = largest.max(judged_soon(image, bytes.len(), &what));
            tried += 1;
        }
        println!("{tried} forgeries, at most {} MiB", largest >> 20);
    });
}

/// What is asked of this machine for an image is asked without a new process: it was found out before, once.
#[test]
fn are_planned_without_a_process() {
    isolated("are_planned_without_a_process", |case| {
        // No other process takes ids in this pid namespace.
        let last_id = || {
            let text = fs::read_to_string("/proc/loadavg").expect("there is /proc");
            text.split(' ')
                .next_back()
                .expect("it has words")
                .to_owned()
        };
        for (header, base) in bases(case, &FIXTURES) {
            let bytes = encoded(&base);
            let reader = || {
                let image = image(&header, &bytes, Codec::None);
                Reader::from_bytes(image).expect("it was just made")
            };
            plan(reader(), Path::new("first.ckpt"));
            let again = reader();
            let before = last_id();
            plan(again, Path::new("again.ckpt"));
            assert_eq!(last_id(), before, "process {}", header.pid);
        }
    });
}

/// Each number of each record, as large and as small as it can be written; as many as there is time for, or all with
/// `CKPT_FORGERIES`.
#[test]
fn extreme_numbers() {
    isolated("extreme_numbers", |case| {
        let extremes: [i128; 5] = [
            -1,
            i32::MAX.into(),
            u32::MAX.into(),
            i64::MAX.into(),
            u64::MAX.into(),
        ];
        let bases = bases(case, &FIXTURES);
        let mut all: BTreeMap<String, (usize, Place)> = BTreeMap::new();
        for (which, (_, base)) in bases.iter().enumerate() {
            let mut found = BTreeMap::new();
            leaves(base, "", &mut Vec::new(), &mut found);
            for (field, place) in found {
                if at(&mut base.clone(), &place).is_integer() {
                    all.entry(field).or_insert((which, place));
                }
            }
        }
        assert!(all.len() > 150, "{}", all.len());
        let mut left: Vec<_> = all
            .iter()
            .flat_map(|one| extremes.map(|n| (one, n)))
            .collect();
        let (total, now) = (left.len(), case.path("now.log"));
        let (mut random, begun) = (Random::seeded(), Instant::now());
        while !left.is_empty() && (asked().is_some() || begun.elapsed() < TIME) {
            let ((field, (which, place)), extreme) = left.swap_remove(random.below(left.len()));
            let (header, base) = &bases[*which];
            let mut value = base.clone();
            *at(&mut value, place) = Value::Integer(extreme.try_into().expect("it fits"));
            let what = format!("{}, {field} = {extreme}", FIXTURES[*which]);
            fs::write(&now, &what).expect("the test's directory is writable");
            let bytes = encoded(&value);
            judged_soon(image(header, &bytes, Codec::None), bytes.len(), &what);
        }
        println!("{} of {total} numbers", total - left.len());
    });
}

/// Each list with so many elements that nothing but its packing makes the image small; as many as there is time for, or
/// all with `CKPT_FORGERIES`.
#[test]
fn packed_lists() {
    isolated("packed_lists", |case| {
        let bases = bases(case, &FIXTURES);
        let mut all: BTreeMap<String, (usize, Place)> = BTreeMap::new();
        for (which, (_, base)) in bases.iter().enumerate() {
            for place in lists(base) {
                let field = name(base, &place).replace(|c: char| c.is_ascii_digit(), "");
                all.entry(field).or_insert((which, place));
            }
        }
        let mut left: Vec<_> = all
            .iter()
            .flat_map(|one| [18, 20, 21, 24].map(|bits| (one, 1 << bits)))
            .flat_map(|(one, raw)| [false, true].map(|ascending| (one, raw, ascending)))
            .collect();
        let (total, now) = (left.len(), case.path("now.log"));
        let (mut random, begun, mut largest) = (Random::seeded(), Instant::now(), 0);
        while !left.is_empty() && (asked().is_some() || begun.elapsed() < TIME) {
            let ((field, (which, place)), raw, ascending) =
                left.swap_remove(random.below(left.len()));
            let (header, base) = &bases[*which];
            let mut value = base.clone();
            let Value::Array(elements) = at(&mut value, place) else {
                panic!("it is a list");
            };
            let element = elements
                .first()
                .cloned()
                .unwrap_or(Value::Integer(0.into()));
            let count = raw / encoded(&element).len();
            *elements = vec![element; count];
            if ascending {
                for (more, element) in elements.iter_mut().enumerate() {
                    raise_first(element, more);
                }
            }
            let order = if ascending { "ascending" } else { "equal" };
            let what = format!("{}, {field}: {count} {order} elements", FIXTURES[*which]);
            fs::write(&now, &what).expect("the test's directory is writable");
            let bytes = encoded(&value);
            drop(value);
            let image = image(header, &bytes, Codec::Zstd(1));
            let (raw, size) = (bytes.len(), image.len());
            drop(bytes);
            if asked().is_some() || random.below(8) == 0 {
                tools_are_bounded(case, &image, &what);
            }
            let took = judged_soon(image, raw, &what);
            if took > largest {
                println!(
                    "{} KiB for {} KiB in {} KiB: {what}",
                    took >> 10,
                    raw >> 10,
                    size >> 10
                );
            }
            largest = largest.max(took);
        }
        let tried = total - left.len();
        println!(
            "{tried} of {total} packed lists, at most {} MiB",
            largest >> 20
        );
    });
}

/// Adds to the first number of a value, by which the kind of record is often known.
fn raise_first(value: &mut Value, more: usize) -> bool {
    match value {
        Value::Integer(number) => {
            let raised = i128::from(*number) + more as i128;
            *number = raised.try_into().unwrap_or(*number);
            true
        }
        Value::Array(elements) => elements
            .iter_mut()
            .any(|element| raise_first(element, more)),
        Value::Map(entries) => entries
            .iter_mut()
            .any(|(_, value)| raise_first(value, more)),
        _ => false,
    }
}

/// The programs themselves, as the kernel counts their memory.
fn tools_are_bounded(case: &Case, image: &[u8], what: &str) {
    let path = case.path("packed.ckpt");
    fs::write(&path, image).expect("the test's directory is writable");
    let limit = (64 << 20) + 4 * image.len();
    let everything = "inspect --threads --maps --fds --needs --attributes";
    for line in [
        "verify",
        everything,
        &format!("{everything} --json"),
        "check",
    ] {
        bounded(CKPT, line, &path, limit, what);
    }
    bounded(RESTORE, "--dry-run", &path, limit, what);
}

fn bounded(program: &str, line: &str, path: &Path, limit: usize, what: &str) {
    let mut command = Command::new(program);
    command.args(line.split(' ')).arg(path);
    let (code, peak) = peak_of(&mut command, SECONDS);
    assert!(
        code.is_some(),
        "{line} was killed, as after {SECONDS} s: {what}"
    );
    assert!(
        peak <= limit,
        "{line} takes {peak} bytes of {limit}: {what}"
    );
}

/// Real jobs with many objects: what is kept of them is within the bounds as well, and can be looked at.
#[test]
fn large_jobs_are_looked_at() {
    isolated("large_jobs_are_looked_at", |case| {
        for name in ["maps_limit", "threads500"] {
            let program = Command::new(case.fixtures().join(name));
            let image =
                start_in(case, name, name, program).killed_into(case, &format!("{name}.ckpt"));
            let size = fs::metadata(&image).expect("it was just written").len() as usize;
            let limit = (64 << 20) + 4 * size;
            for line in [
                "verify",
                "inspect",
                "inspect --threads --maps --fds --attributes",
                "check",
            ] {
                bounded(CKPT, line, &image, limit, name);
            }
            bounded(RESTORE, "--dry-run", &image, limit, name);
            // As it is stored, and packed throughout.
            let packed = case.path("packed.ckpt");
            let reader = Reader::open(&image).expect("it was just written");
            rewritten(&reader, reader.header().pid, &snapshot(&reader).0, &packed);
            for command in ["verify", "check"] {
                ckpt(case, [command.as_ref(), image.as_os_str()]).ok();
                let of_packed = ckpt(case, [command.as_ref(), packed.as_os_str()]);
                // Its metadata are 6 MiB, the others' less than 2.
                match name {
                    "maps_limit" => of_packed.refused(1, &["would take more memory"]),
                    _ => drop(of_packed.ok().to_owned()),
                }
            }
        }
    });
}

/// Images that something was wrong with once.
#[test]
fn kept() {
    isolated("kept", |_| {
        let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/kept");
        let mut kept: Vec<PathBuf> = fs::read_dir(kept)
            .expect("it is there")
            .flatten()
            .map(|file| file.path())
            .collect();
        kept.sort();
        assert!(!kept.is_empty());
        for path in kept {
            let bytes = fs::read(&path).expect("it can be read");
            judged_soon(bytes, 0, &path.display().to_string());
        }
    });
}

/// Writes what fuzzing starts from, with the programs and files of the jobs. Each can be restored: of one that is refused no
/// plan would be completed.
fn write_bases(case: &Case, to: &Path, bases: &[(Header, Value)]) {
    let (files, programs) = (to.join("files"), to.join("programs"));
    let fixtures = case.fixtures();
    let places: [(&Path, &Path); 2] = [(case.dir(), &files), (&fixtures, &programs)];
    for (from, to) in places {
        fs::create_dir_all(to).expect("it can be made");
        let mut copy = Command::new("cp");
        run(
            case,
            copy.args(["-a", "--no-target-directory"]).args([from, to]),
        )
        .ok();
    }
    for (name, (header, value)) in FIXTURES.iter().zip(bases) {
        let mut value = value.clone();
        replace(&mut value, &places);
        identify(&mut value, to);
        let image = image(header, &encoded(&value), Codec::None);
        let path = to.join(format!("{name}.ckpt"));
        fs::write(&path, image).expect("it can be written");
        ckpt(case, ["check".as_ref(), path.as_os_str()]).ok();
    }
}

/// Says of each file below a directory that it is the one that is there now.
fn identify(value: &mut Value, below: &Path) {
    match value {
        Value::Map(entries) => {
            let paths = entries.iter().filter_map(|(_, value)| value.as_bytes());
            let mut paths = paths.map(|bytes| Path::new(OsStr::from_bytes(bytes)));
            let path = paths.find(|path| path.starts_with(below));
            let now = path.and_then(|path| fs::metadata(path).ok());
            for (key, value) in entries {
                match (key.as_text(), &now) {
                    (Some("identity"), Some(now)) => {
                        let was: FileIdentity = value.deserialized().expect("it is one");
                        let now = FileIdentity {
                            build_id: was.build_id,
                            ..FileIdentity::of(now)
                        };
                        *value = Value::serialized(&now).expect("it is a record");
                    }
                    _ => identify(value, below),
                }
            }
        }
        Value::Array(elements) => elements.iter_mut().for_each(|value| identify(value, below)),
        _ => {}
    }
}

/// Puts other directories in the place of some.
fn replace(value: &mut Value, places: &[(&Path, &Path)]) {
    let other = |bytes: &[u8]| {
        places.iter().find_map(|(old, new)| {
            let rest = bytes.strip_prefix(old.as_os_str().as_bytes())?;
            Some([new.as_os_str().as_bytes(), rest].concat())
        })
    };
    match value {
        Value::Map(entries) => entries
            .iter_mut()
            .for_each(|(_, value)| replace(value, places)),
        Value::Array(elements) => elements.iter_mut().for_each(|value| replace(value, places)),
        Value::Bytes(bytes) => {
            if let Some(new) = other(bytes) {
                *bytes = new;
            }
        }
        Value::Text(text) => {
            if let Some(new) = other(text.as_bytes()) {
                *text = String::from_utf8(new).expect("both are text");
            }
        }
        _ => {}
    }
}
