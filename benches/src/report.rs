//! Figures and their requirements.

use std::fmt;
use std::fs::read_to_string;
use std::path::Path;

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

/// Several measurements of one thing.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn push(&mut self, value: f64) {
        self.0.push(value);
        self.0.sort_by(f64::total_cmp);
    }

    pub(crate) fn median(&self) -> f64 {
        let (low, high) = (self.0.len().saturating_sub(1) / 2, self.0.len() / 2);
        match (self.0.get(low), self.0.get(high)) {
            (Some(a), Some(b)) => (a + b) / 2.0,
            _ => f64::NAN,
        }
    }
}

/// Format of a figure.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Unit {
    Seconds,
    Nanoseconds,
    Bytes,
    /// A plain number, as a compression ratio.
    Number,
}

impl Unit {
    fn show(self, value: f64) -> String {
        match self {
            Unit::Seconds if value < 1.0 => format!("{:.1} ms", value * 1e3),
            Unit::Seconds => format!("{value:.2} s"),
            Unit::Nanoseconds => format!("{value:.1} ns"),
            Unit::Bytes => format!("{:.1} MiB", value / f64::from(1 << 20)),
            Unit::Number => format!("{value:.2}"),
        }
    }
}

/// One line of the report.
#[derive(Debug, Serialize)]
pub(crate) struct Figure {
    subject: String,
    what: String,
    unit: Unit,
    median: f64,
    least: f64,
    most: f64,
    samples: usize,
    /// The floor, measured in the same run.
    floor: Option<f64>,
    /// As defined in `wanted`, or as a speed: 1 is as fast as the floor, less is slower.
    ratio: Option<f64>,
    wanted: Option<String>,
    met: Option<bool>,
}

impl Figure {
    pub(crate) fn new(subject: &str, what: &str, unit: Unit, samples: &Samples) -> Self {
        Figure {
            subject: subject.into(),
            what: what.into(),
            unit,
            median: samples.median(),
            least: samples.0.first().copied().unwrap_or(f64::NAN),
            most: samples.0.last().copied().unwrap_or(f64::NAN),
            samples: samples.0.len(),
            floor: None,
            ratio: None,
            wanted: None,
            met: None,
        }
    }

    /// Adds its floor, with the median of the ratios of each round.
    pub(crate) fn beside(mut self, floor: &Samples, ratios: &Samples) -> Self {
        (self.floor, self.ratio) = (Some(floor.median()), Some(ratios.median()));
        self
    }

    pub(crate) fn wanted(mut self, text: &str, met: impl FnOnce(f64, Option<f64>) -> bool) -> Self {
        self.met = Some(met(self.median, self.ratio));
        self.wanted = Some(text.into());
        self
    }
}

/// All measurements.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    machine: String,
    pub(crate) figures: Vec<Figure>,
    pub(crate) failures: Vec<String>,
}

impl Report {
    pub(crate) fn new(dir: &Path) -> Self {
        Report {
            machine: machine(dir),
            figures: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// Adds the figures of a subject, or the error.
    pub(crate) fn add(&mut self, subject: &str, measured: anyhow::Result<()>) {
        if let Err(error) = measured {
            self.failures.push(format!("{subject}: {error:#}"));
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new();
        table.load_preset(presets::ASCII_MARKDOWN);
        table.set_header([
            "target",
            "what",
            "median",
            "least–most",
            "floor",
            "ratio",
            "wanted",
            "",
        ]);
        for figure in &self.figures {
            let show = |value| figure.unit.show(value);
            table.add_row([
                figure.subject.clone(),
                figure.what.clone(),
                show(figure.median),
                format!("{}–{}", show(figure.least), show(figure.most)),
                figure.floor.map(show).unwrap_or_default(),
                figure.ratio.map(|r| format!("{r:.2}")).unwrap_or_default(),
                figure.wanted.clone().unwrap_or_default(),
                figure
                    .met
                    .map(|met| if met { "met" } else { "missed" })
                    .unwrap_or_default()
                    .into(),
            ]);
        }
        for column in 2..6 {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        writeln!(f, "{}\n\n{table}", self.machine)?;
        self.failures
            .iter()
            .try_for_each(|failure| writeln!(f, "FAILED {failure}"))
    }
}

/// The machine in one line.
fn machine(dir: &Path) -> String {
    let read = |path| read_to_string(path).unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let cpu = read("/proc/cpuinfo");
    let cpu = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let memory = read("/proc/meminfo");
    let memory = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"));
    let memory = memory.and_then(|text| text.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    format!(
        "{cores} cores ({}), {} GiB, Linux {}, {} on {}, load {} at the start",
        cpu.map_or("unknown", |(_, name)| name),
        memory.unwrap_or(0) >> 20,
        read("/proc/sys/kernel/osrelease").trim(),
        dir.display(),
        file_system(dir, &read("/proc/mounts")),
        read("/proc/loadavg").split(' ').next().unwrap_or("unknown"),
    )
}

/// The type of the file system that a directory is on.
fn file_system(dir: &Path, mounts: &str) -> String {
    let mounts = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        Some((words.next()?, words.next()?))
    });
    let over = mounts.filter(|(at, _)| dir.starts_with(at));
    // Of several mounts on one mount point the last one counts, and `max_by_key` returns the last.
    over.max_by_key(|(at, _)| at.len())
        .map_or("unknown", |(_, kind)| kind)
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        let mut samples = Samples::default();
        assert!(samples.median().is_nan());
        samples.push(3.0);
        assert_eq!(samples.median(), 3.0);
        samples.push(1.0);
        assert_eq!(samples.median(), 2.0);
        samples.push(9.0);
        assert_eq!(samples.median(), 3.0);
    }

    #[test]
    fn the_innermost_mount_counts() {
        let mounts = "/dev/vda / ext4 rw 0 0\ntmpfs /dev/shm tmpfs rw 0 0\n";
        assert_eq!(file_system(Path::new("/dev/shm/x"), mounts), "tmpfs");
        assert_eq!(file_system(Path::new("/dev/shmoo"), mounts), "ext4");
    }
}
