//! Our readers of `/proc` where they are on the path of a pause, against those of the crate procfs. Elsewhere that one serves.

use std::fs::read_dir;
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};
use ckpt_tracer::proc::maps::read_smaps;
use ckpt_tracer::proc::status::read_task;
use ckpt_tracer::{Pid, Tid};
use procfs_core::FromRead;
use procfs_core::process::{MemoryMaps, Status};

use super::{Bench, Pairs};
use crate::report::{Figure, Report, Unit};
use crate::target::{Fill, Shape};
use crate::tools::Target;

impl Bench {
    /// Mappings and statuses of a process with so many threads, each with a stack and a guard.
    pub(crate) fn readers(&self, threads: usize, report: &mut Report) {
        let subject = format!("/proc of {threads} threads");
        let done = self.read_both(&subject, threads, report);
        report.add(&subject, done);
    }

    fn read_both(&self, subject: &str, threads: usize, report: &mut Report) -> Result<()> {
        let target = Target::start(&self.scratch, Shape::of(1, threads, Fill::Random))?;
        let pid = target.pid();
        let dir = format!("/proc/{pid}");
        let tasks = read_dir(format!("{dir}/task"))?;
        let tids: Vec<i32> = tasks
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        let figure = |what: &str, pairs: &Pairs| {
            let figure = Figure::new(subject, what, Unit::Seconds, &pairs.values);
            let figure = figure.beside(&pairs.floors, &pairs.ratios);
            figure.wanted("ratio ≥ 1", |_, ratio| ratio.is_some_and(|r| r >= 1.0))
        };
        let (mut smaps, mut statuses) = (Pairs::default(), Pairs::default());
        for _ in 0..self.rounds(5) {
            let (ours, found) = timed(|| Ok(read_smaps(Pid(pid))?.len()))?;
            let path = format!("{dir}/smaps");
            let (theirs, known) = timed(|| Ok(MemoryMaps::from_file(&path)?.0.len()))?;
            ensure!(found == known, "{found} mappings, and {known} by procfs");
            smaps.push(ours, theirs);
            let ours = || {
                tids.iter()
                    .try_for_each(|tid| read_task(Pid(pid), Tid(*tid)).map(drop))
            };
            let (ours, ()) = timed(|| Ok(ours()?))?;
            let by_path =
                |tid: &i32| Status::from_file(Path::new(&format!("{dir}/task/{tid}/status")));
            let theirs = || tids.iter().try_for_each(|tid| by_path(tid).map(drop));
            let (theirs, ()) = timed(|| Ok(theirs()?))?;
            statuses.push(ours, theirs);
        }
        report
            .figures
            .push(figure("smaps, floor: crate procfs", &smaps));
        report
            .figures
            .push(figure("statuses, floor: crate procfs", &statuses));
        target.end()
    }
}

/// Seconds that it takes, and its result.
fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(f64, T)> {
    let start = Instant::now();
    let done = work()?;
    Ok((start.elapsed().as_secs_f64(), done))
}
