//! Writes to standard output, and formats figures for display.

use std::fmt;
use std::io::{self, BufWriter, ErrorKind, StdoutLock, Write};

use serde::Serialize;
use unicode_width::UnicodeWidthStr;

use super::exit::Failure;

/// Prints on standard output. A closed reader is not an error.
pub(crate) fn print(text: impl AsRef<[u8]>) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    written(out.write_all(text.as_ref()).and_then(|()| out.flush()))
}

fn written(result: io::Result<()>) -> Result<(), Failure> {
    match result {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Failure::Message(format!(
            "cannot write to standard output: {error}"
        ))),
        _ => Ok(()),
    }
}

/// Many lines on standard output, printed incrementally.
pub(crate) struct Lines {
    out: BufWriter<StdoutLock<'static>>,
    so_far: io::Result<()>,
}

impl Lines {
    /// No lines so far.
    pub(crate) fn new() -> Self {
        Self {
            out: BufWriter::new(io::stdout().lock()),
            so_far: Ok(()),
        }
    }

    /// Adds a line.
    pub(crate) fn add(&mut self, line: fmt::Arguments<'_>) {
        if self.so_far.is_ok() {
            self.so_far = writeln!(self.out, "{line}");
        }
    }

    /// A value as indented JSON.
    pub(crate) fn json(&mut self, value: &impl Serialize) {
        if self.so_far.is_ok() {
            let written = serde_json::to_writer_pretty(&mut self.out, value);
            self.so_far = written
                .map_err(Into::into)
                .and_then(|()| writeln!(self.out));
        }
    }

    /// Ends the output; whether all was printed, as for [`print`].
    pub(crate) fn end(mut self) -> Result<(), Failure> {
        written(self.so_far.and_then(|()| self.out.flush()))
    }
}

/// Prints a line on standard output.
pub(crate) fn print_line(line: impl fmt::Display) -> Result<(), Failure> {
    print(format!("{line}\n"))
}

/// Prints a line on standard error. Errors are ignored.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// A value as indented JSON with a newline.
pub(crate) fn json(value: &impl Serialize) -> Result<String, Failure> {
    let text = serde_json::to_string_pretty(value);
    let text = text.map_err(|error| Failure::Message(format!("cannot write JSON: {error}")))?;
    Ok(text + "\n")
}

/// A table without frames, as wide as its text. All cells are in one string: there may be a million.
pub(crate) struct Table {
    columns: usize,
    text: String,
    /// End of each cell in the string.
    ends: Vec<usize>,
    right: &'static [usize],
}

impl Table {
    /// Spaces between two columns.
    const GAP: usize = 2;

    pub(crate) fn new(head: &[&str]) -> Self {
        let mut table = Self {
            columns: head.len(),
            text: String::new(),
            ends: Vec::new(),
            right: &[],
        };
        table.add_row(head);
        table
    }

    /// Aligns the columns of these numbers to the right.
    pub(crate) fn right(self, columns: &'static [usize]) -> Self {
        Self {
            right: columns,
            ..self
        }
    }

    /// Adds a row, which has a cell for each column.
    pub(crate) fn add_row(&mut self, cells: impl IntoIterator<Item = impl AsRef<str>>) {
        for cell in cells {
            self.text.push_str(cell.as_ref());
            self.ends.push(self.text.len());
        }
    }

    fn cells(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts
            .zip(&self.ends)
            .map(|(from, to)| &self.text[from..*to])
    }

    /// Passes on its lines, one after another, without trailing spaces.
    pub(crate) fn print(&self, line: &mut dyn FnMut(fmt::Arguments<'_>)) {
        let mut widths = vec![0; self.columns];
        for (number, cell) in self.cells().enumerate() {
            let width = &mut widths[number % self.columns];
            *width = cell.width().max(*width);
        }
        let mut row = String::new();
        for (number, cell) in self.cells().enumerate() {
            let column = number % self.columns;
            let room = widths[column] - cell.width();
            let before = if self.right.contains(&column) {
                room
            } else {
                0
            };
            row.extend(std::iter::repeat_n(' ', before));
            row.push_str(cell);
            row.extend(std::iter::repeat_n(' ', room - before + Self::GAP));
            if column + 1 == self.columns {
                line(format_args!("{}", row.trim_end()));
                row.clear();
            }
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut written = Ok(());
        self.print(&mut |line| written = written.and_then(|()| writeln!(f, "{line}")));
        written
    }
}

/// Untrusted text with control characters escaped.
pub(crate) fn visible(bytes: &[u8]) -> String {
    let text = crate::text::of(bytes);
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// A number with its noun: `1 thread`, `2 threads`, `3 processes`.
pub(crate) fn count(number: u64, noun: &str) -> String {
    match (number, noun) {
        (1, _) => format!("1 {noun}"),
        (_, noun) if noun.ends_with('s') => format!("{number} {noun}es"),
        _ => format!("{number} {noun}s"),
    }
}

/// Bytes in binary units: `917 B`, `1.5 KiB`, `3.2 GiB`.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let (mut value, mut unit) = (bytes as f64 / 1024.0, 0);
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// A time as `2026-11-22 03:10:39 UTC`, from nanoseconds since 1970.
pub(crate) fn time(unix_ns: u64) -> String {
    let seconds = unix_ns / 1_000_000_000;
    let (days, rest) = (seconds / 86400, seconds % 86400);
    // Years that begin in March put the leap day last; 719468 days lie between 0000-03-01 and 1970.
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let year = era * 400 + year + u64::from(month >= 10);
    let month = if month < 10 { month + 3 } else { month - 9 };
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_read_well() {
        let at = |seconds: u64| time(seconds * 1_000_000_000);
        assert_eq!(at(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(at(951_827_696), "2000-02-29 12:34:56 UTC");
        assert_eq!(at(1_772_323_199), "2026-02-28 23:59:59 UTC");
        assert_eq!(at(1_772_323_200), "2026-03-01 00:00:00 UTC");
        assert_eq!(time(u64::MAX), "2554-07-21 23:34:33 UTC");
    }

    #[test]
    fn figures_read_well() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes((1 << 20) - 1), "1.0 MiB");
        assert_eq!(bytes(u64::MAX), "16.0 EiB");
        assert_eq!(count(1, "process"), "1 process");
        assert_eq!(count(0, "process"), "0 processes");
        assert_eq!(count(2, "thread"), "2 threads");
    }
}
