//! Whether two snapshots are of one state: that of a job, and that of its restored copy.
//!
//! A snapshot is the description of everything that can be seen of a job, from outside and from inside
//! ([`crate::objects`]). What a rehearsal makes otherwise on purpose was taken out of both
//! ([`canonical`](super::canonical)); everything else has to be equal, whatever fields there are.

use std::collections::HashMap;
use std::fmt;

use ciborium::Value;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::objects::Snapshot;

/// Something that is not as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// What is concerned: `process 12`, `fd 3 of process 12` …
    pub object: String,
    /// Which part of it.
    pub part: String,
    /// What it was in the job.
    pub before: String,
    /// What it is in the copy.
    pub after: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            object,
            part,
            before,
            after,
        } = self;
        write!(f, "{object}: {part} was {before} and came back as {after}")
    }
}

/// Spaces of the first snapshot, with those of the second that stand for the same.
pub(super) type Spaces = HashMap<u32, u32>;

/// Everything in which two canonical snapshots differ, and how their spaces correspond.
///
/// # Errors
/// When a snapshot cannot be described.
pub(super) fn compare(job: &Snapshot, copy: &Snapshot) -> Result<(Vec<Difference>, Spaces)> {
    let described = |snapshot| {
        Value::serialized(snapshot)
            .map_err(|e| Error::Restore(format!("cannot describe the job: {e}")))
    };
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
    /// Names of fields and numbers in lists, from the snapshot on.
    path: Vec<String>,
    found: Vec<Difference>,
    spaces: Spaces,
}

/// Fields that hold the number of a space.
const SPACES: [&str; 2] = ["space", "contents"];

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
            (Value::Map(a), Value::Map(b)) => self.maps(a, b),
            (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
                for (index, (a, b)) in a.iter().zip(b).enumerate() {
                    self.at(index.to_string(), a, b);
                }
            }
            (a, b) if a == b => {}
            (a, b) => self.differs(shown(a), shown(b)),
        }
    }

    fn maps(&mut self, job: &[(Value, Value)], copy: &[(Value, Value)]) {
        let name = |key: &Value| key.as_text().map_or_else(|| shown(key), str::to_owned);
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

    fn at(&mut self, step: String, job: &Value, copy: &Value) {
        self.path.push(step);
        self.values(job, copy);
        self.path.pop();
    }

    fn differs(&mut self, before: String, after: String) {
        let (object, used) = self.object();
        let part = self.path[used..].join(".");
        self.found.push(Difference {
            object,
            part,
            before,
            after,
        });
    }

    /// What the path leads to as people call it, and how many steps of it that takes.
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
                let thread = index(3).and_then(|at| process.threads.get(at));
                match (step(2), thread) {
                    ("threads", Some(thread)) => (
                        format!("thread {} of process {}", thread.tid, process.pid),
                        4,
                    ),
                    _ => (format!("process {}", process.pid), 2),
                }
            }
            ("descriptions", Some(index)) => {
                let of = self.job.processes.iter().find_map(|process| {
                    let entry = process.fds.iter().find(|e| e.description == index)?;
                    Some(format!("fd {} of process {}", entry.fd, process.pid))
                });
                (of.unwrap_or_else(|| "a file in flight".into()), 2)
            }
            _ => ("the job".into(), 0),
        }
    }
}

/// A value for people, cut where it is long.
fn shown(value: &Value) -> String {
    const MOST: usize = 100;
    let text = match value {
        Value::Integer(number) => i128::from(*number).to_string(),
        Value::Text(text) => format!("{text:?}"),
        Value::Bool(yes) => yes.to_string(),
        Value::Null => "nothing".into(),
        Value::Bytes(bytes) => {
            let digits = bytes.iter().take(MOST / 2).map(|b| format!("{b:02x}"));
            format!("{} bytes {}", bytes.len(), digits.collect::<String>())
        }
        Value::Array(list) => format!("{} of them", list.len()),
        other => format!("{other:?}"),
    };
    match text.char_indices().nth(MOST) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspect::fixture::snapshot;
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
                .any(|t| t.starts_with(&format!("process {pid}: umask was"))),
            "{told:?}"
        );
        assert!(told.iter().any(|t| t.contains("regs.rip was")), "{told:?}");
    }
}
