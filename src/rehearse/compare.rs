//! Compares two snapshots: that of a job, and that of its restored copy.
//!
//! A snapshot describes all visible state of a job, from outside and from inside ([`crate::objects`]). Intended
//! differences of a rehearsal were removed from both ([`canonical`](super::canonical)); all other fields, whichever
//! exist, have to be equal.

use std::collections::HashMap;

use ciborium::Value;

use super::private::told;
use crate::error::Difference;
use crate::error::{Error, Result};
use crate::objects::Snapshot;
use crate::objects::process::Process;

/// Display of an absent value.
pub(super) const NOTHING: &str = "nothing";

/// Spaces of the first snapshot, with the corresponding ones of the second.
pub(super) type Spaces = HashMap<u32, u32>;

/// All differences between two canonical snapshots, and the correspondence of their spaces.
///
/// # Errors
/// When a snapshot cannot be serialized.
pub(super) fn compare(job: &Snapshot, copy: &Snapshot) -> Result<(Vec<Difference>, Spaces)> {
    let described =
        |snapshot| Value::serialized(snapshot).map_err(|e| Error::step("describe the job", e));
    let mut walk = Walk {
        job,
        path: Vec::new(),
        found: Vec::new(),
        spaces: Spaces::new(),
    };
    walk.values(&described(job)?, &described(copy)?);
    Ok((walk.found, walk.spaces))
}

struct Walk<'a> {
    job: &'a Snapshot,
    /// Names of fields and indices of lists, from the snapshot on.
    path: Vec<String>,
    found: Vec<Difference>,
    spaces: Spaces,
}

/// Fields with the number of a space.
const SPACES: [&str; 2] = ["space", "contents"];

type Fields = [(Value, Value)];

impl Walk<'_> {
    fn values(&mut self, job: &Value, copy: &Value) {
        let is_space = self
            .path
            .last()
            .is_some_and(|name| SPACES.contains(&name.as_str()));
        match (job, copy) {
            (Value::Integer(a), Value::Integer(b)) if is_space => {
                let number = |n: &ciborium::value::Integer| u32::try_from(*n).unwrap_or(0);
                self.spaces.insert(number(a), number(b));
            }
            (Value::Map(a), Value::Map(b)) if kind(a) == kind(b) => self.maps(a, b),
            (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
                for (index, (a, b)) in a.iter().zip(b).enumerate() {
                    self.at(index.to_string(), a, b);
                }
            }
            (Value::Array(a), Value::Array(b)) => self.lists(a, b),
            (a, b) if a == b => {}
            (a, b) => self.differs(words(a), words(b)),
        }
    }

    fn maps(&mut self, job: &Fields, copy: &Fields) {
        let name = |key: &Value| key.as_text().map_or_else(|| words(key), str::to_owned);
        let in_copy = |key: &Value| copy.iter().find(|(k, _)| k == key).map(|(_, v)| v);
        for (key, value) in job {
            let missing = Value::Null;
            self.at(name(key), value, in_copy(key).unwrap_or(&missing));
        }
        for (key, value) in copy {
            if !job.iter().any(|(k, _)| k == key) {
                self.at(name(key), &Value::Null, value);
            }
        }
    }

    /// For lists of different length, reports elements that only one has.
    fn lists(&mut self, job: &[Value], copy: &[Value]) {
        let only = |of: &[Value], not: &[Value]| {
            let only = of.iter().filter(|value| !not.contains(value));
            only.cloned().collect::<Vec<Value>>()
        };
        let (lost, new) = (only(job, copy), only(copy, job));
        match lost.is_empty() && new.is_empty() {
            true => self.differs(
                format!("{} of them", job.len()),
                format!("{} of them", copy.len()),
            ),
            false => self.differs(listed(&lost), listed(&new)),
        }
    }

    fn at(&mut self, step: String, job: &Value, copy: &Value) {
        self.path.push(step);
        self.values(job, copy);
        self.path.pop();
    }

    fn differs(&mut self, before: String, after: String) {
        let (object, used) = self.object();
        let part = self.path[used..].join(" ").replace('_', " ");
        self.found.push(Difference {
            object,
            part: match part.is_empty() {
                true => "it".into(),
                false => part.to_lowercase(),
            },
            before,
            after,
        });
    }

    /// A readable name of the object at the path, and the number of path elements that it covers.
    fn object(&self) -> (String, usize) {
        let index = |at: usize| {
            self.path
                .get(at)
                .and_then(|step| step.parse::<usize>().ok())
        };
        let step = |at: usize| self.path.get(at).map_or("", String::as_str);
        match (step(0), index(1)) {
            ("processes", Some(process)) => {
                let Some(process) = self.job.processes.get(process) else {
                    return ("the job".into(), 0);
                };
                let of = named(process);
                match (step(2), index(3), step(3), index(4)) {
                    ("threads", Some(at), ..) if at < process.threads.len() => {
                        (format!("thread {} of {of}", process.threads[at].tid), 4)
                    }
                    ("fds", Some(at), ..) if at < process.fds.len() => {
                        (format!("fd {} of {of}", process.fds[at].fd), 4)
                    }
                    ("memory", _, "mappings", Some(at)) if at < process.memory.mappings.len() => {
                        let mapping = &process.memory.mappings[at];
                        let (start, end) = (mapping.start, mapping.end);
                        (format!("the mapping {start:#x}-{end:#x} of {of}"), 5)
                    }
                    _ => (of, 2),
                }
            }
            ("descriptions", Some(index)) => {
                let of = self.job.processes.iter().find_map(|process| {
                    let entry = process.fds.iter().find(|e| e.description.0 == index)?;
                    Some(format!("fd {} of {}", entry.fd, named(process)))
                });
                let label = self.job.descriptions.get(index).map(|d| d.kind.label());
                let of = of.unwrap_or_else(|| "a file in flight".into());
                (format!("{of} ({})", told(&label.unwrap_or_default())), 2)
            }
            ("mapped_files", Some(index)) if index < self.job.mapped_files.len() => {
                let path = crate::text::of_path(&self.job.mapped_files[index].path);
                (format!("the mapped file {}", told(&path)), 2)
            }
            _ => ("the job".into(), 0),
        }
    }
}

/// `process 12 (name)`.
fn named(process: &Process) -> String {
    let name = process.threads.first().map(|t| t.name.as_slice());
    let name = String::from_utf8_lossy(name.unwrap_or_default());
    format!("process {} ({name})", process.pid)
}

/// The name of the variant, for an enumeration.
fn kind(fields: &Fields) -> Option<&str> {
    match fields {
        [(Value::Text(name), _)] if name.starts_with(char::is_uppercase) => Some(name),
        _ => None,
    }
}

/// A value for display, truncated if long.
fn words(value: &Value) -> String {
    const MOST: usize = 160;
    /// Numbers from here on are addresses or bit sets, shown in hexadecimal.
    const LARGE: i128 = 1 << 20;
    let text = match value {
        Value::Integer(number) => match i128::from(*number) {
            number @ LARGE.. => format!("{number:#x}"),
            number => number.to_string(),
        },
        Value::Text(text) => told(text),
        Value::Bool(true) => "yes".into(),
        Value::Bool(false) => "no".into(),
        Value::Null => NOTHING.into(),
        Value::Bytes(bytes) => {
            let digits = bytes.iter().take(MOST / 4).map(|b| format!("{b:02x}"));
            format!("{} bytes {}", bytes.len(), digits.collect::<String>())
        }
        Value::Float(number) => number.to_string(),
        Value::Tag(_, value) => words(value),
        Value::Array(list) => listed(list),
        Value::Map(fields) => match (kind(fields), fields.as_slice()) {
            (Some(kind), [(_, Value::Map(fields))]) => {
                format!("{} ({})", spaced(kind), pairs(fields))
            }
            (Some(kind), [(_, value)]) => format!("{} {}", spaced(kind), words(value)),
            _ => pairs(fields),
        },
        _ => "something else".into(),
    };
    match text.char_indices().nth(MOST) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

fn pairs(fields: &Fields) -> String {
    let pair = |(key, value): &(Value, Value)| format!("{} {}", words(key), words(value));
    let pairs: Vec<String> = fields.iter().map(pair).collect();
    pairs.join(", ").replace('_', " ")
}

fn listed(list: &[Value]) -> String {
    const SHOWN: usize = 4;
    let mut parts: Vec<String> = list.iter().take(SHOWN).map(words).collect();
    match list.len() {
        0 => "none".into(),
        more if more > SHOWN => {
            parts.push(format!("and {} more", more - SHOWN));
            parts.join("; ")
        }
        _ => parts.join("; "),
    }
}

/// `UnixSocket` as `unix socket`.
fn spaced(name: &str) -> String {
    let mut text = String::new();
    for (at, letter) in name.char_indices() {
        if at > 0 && letter.is_uppercase() {
            text.push(' ');
        }
        text.extend(letter.to_lowercase());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::files::eventfd::EventFd;
    use crate::objects::fixture::snapshot;
    use crate::objects::memory::Backing;
    use crate::rehearse::canonical::{Known, canonical};

    #[test]
    fn every_field_counts_unless_it_is_taken_out() {
        let mut job = snapshot();
        let known = Known::of(&job);
        canonical(&mut job, &known);
        let mut copy = job.clone();
        assert_eq!(compare(&job, &copy).unwrap().0, []);
        copy.processes[0].umask ^= 0o7;
        copy.processes[0].threads[0].regs.rip += 1;
        let told: Vec<String> = compare(&job, &copy)
            .unwrap()
            .0
            .iter()
            .map(Difference::to_string)
            .collect();
        assert_eq!(told.len(), 2, "{told:?}");
        let pid = job.processes[0].pid;
        assert!(
            told.iter()
                .any(|t| t.starts_with(&format!("process {pid} (")) && t.contains("): umask was")),
            "{told:?}"
        );
        assert!(told.iter().any(|t| t.contains("regs rip was")), "{told:?}");
    }

    #[test]
    fn what_differs_is_told_in_words() {
        let mut job = snapshot();
        let known = Known::of(&job);
        canonical(&mut job, &known);
        let mut copy = job.clone();
        copy.processes[0].fds.pop();
        let event = EventFd {
            count: 1,
            semaphore: false,
        };
        copy.descriptions[0].kind = event.into();
        copy.processes[0].memory.mappings[0].backing = Backing::Anonymous;
        let (found, _) = compare(&job, &copy).unwrap();
        let told: Vec<String> = found.iter().map(Difference::to_string).collect();
        assert_eq!(told.len(), 3, "{told:?}");
        for text in &told {
            let debug = ["Map(", "Text(", "Integer(", "Array(", "{", "["];
            assert!(!debug.iter().any(|sign| text.contains(sign)), "{text}");
        }
        let says = |words: &[&str]| {
            told.iter()
                .any(|t| words.iter().all(|word| t.contains(word)))
        };
        assert!(says(&["fds was fd 1, ", "comes back as none"]), "{told:?}");
        assert!(
            says(&["kind was ", "comes back as event fd (count 1"]),
            "{told:?}"
        );
        let mapping = [
            "the mapping 0x1000-0x2000",
            "was private file (file 0",
            "as Anonymous",
        ];
        assert!(says(&mapping), "{told:?}");
    }
}
