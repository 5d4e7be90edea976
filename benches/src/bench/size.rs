//! A target of one size: checkpoint and restart against the plain loops.

use anyhow::Result;

use super::{Bench, Pairs};
use crate::floor;
use crate::report::{Figure, Report, Samples, Unit};
use crate::target::{Fill, Shape};
use crate::tools::Target;

/// Largest size in MiB with a required time; above it a fraction of the floor's speed is required.
const SMALL: u64 = 64;

impl Bench {
    /// Checkpoint and restart.
    pub(crate) fn size(&self, mib: u64, threads: usize, report: &mut Report) {
        let subject = format!("{mib} MiB, {threads} threads");
        let done = self.checkpoints(&subject, mib, threads, report);
        let done = done.and_then(|pid| self.restarts(&subject, mib, pid, report));
        report.add(&subject, done);
    }

    /// Alternates checkpoints and the plain loop, and which of them is first. Leaves the last image and the loop's
    /// file; the target's pid is free afterwards.
    fn checkpoints(
        &self,
        subject: &str,
        mib: u64,
        threads: usize,
        report: &mut Report,
    ) -> Result<i32> {
        self.room_for(mib, 2)?;
        let (image, raw) = (self.file("image"), self.file("raw"));
        let target = Target::start(&self.scratch, Shape::of(mib, threads, Fill::Random))?;
        let (address, len) = target.memory();
        let (mut all, mut processor) = (Pairs::default(), Pairs::default());
        let (mut gaps, mut paused) = (Samples::default(), Samples::default());
        for round in 0..self.rounds(if mib > SMALL { 7 } else { 10 }) {
            let plain = || floor::write_out(target.pid(), address, len, &raw);
            let attach = || self.tools.attach(&target, &image, "none");
            let (floor, checkpoint) = if round % 2 == 0 {
                let floor = plain()?;
                (floor, attach()?)
            } else {
                let checkpoint = attach()?;
                (plain()?, checkpoint)
            };
            all.push(checkpoint.seconds, floor.wall);
            processor.push(checkpoint.processor, floor.processor);
            gaps.push(checkpoint.gap);
            paused.push(checkpoint.paused);
        }
        let figure = |what, samples| Figure::new(subject, what, Unit::Seconds, samples);
        let whole = figure("checkpoint", &all.values).beside(&all.floors, &all.ratios);
        report.figures.push(whole.judged(mib));
        let work = figure("checkpoint, processor time", &processor.values);
        report
            .figures
            .push(work.beside(&processor.floors, &processor.ratios));
        report
            .figures
            .push(figure("pause, longest gap of beats", &gaps));
        report.figures.push(figure("pause, as reported", &paused));
        let pid = target.pid();
        target.end()?;
        Ok(pid)
    }

    fn restarts(&self, subject: &str, mib: u64, pid: i32, report: &mut Report) -> Result<()> {
        let (image, raw) = (self.file("image"), self.file("raw"));
        let page = crate::beat::BeatPage::open(&self.file("beats"))?;
        let mut all = Pairs::default();
        for round in 0..self.rounds(if mib > SMALL { 7 } else { 10 }) {
            let restart = || self.tools.restore(pid, page, &image);
            let (seconds, restart) = if round % 2 == 0 {
                let seconds = floor::read_in(&raw)?;
                (seconds, restart()?)
            } else {
                let restart = restart()?;
                (floor::read_in(&raw)?, restart)
            };
            all.push(restart.seconds, seconds);
        }
        let figure = Figure::new(
            subject,
            "restart, until all beat",
            Unit::Seconds,
            &all.values,
        );
        report
            .figures
            .push(figure.beside(&all.floors, &all.ratios).judged(mib));
        floor::remove(&image)?;
        floor::remove(&raw)
    }

    /// The plain loops alone.
    pub(crate) fn floor(&self, mib: u64, threads: usize, report: &mut Report) {
        let subject = format!("{mib} MiB");
        let done = self.floor_alone(&subject, mib, threads, report);
        report.add(&subject, done);
    }

    fn floor_alone(
        &self,
        subject: &str,
        mib: u64,
        threads: usize,
        report: &mut Report,
    ) -> Result<()> {
        self.room_for(mib, 2)?;
        let raw = self.file("raw");
        let target = Target::start(&self.scratch, Shape::of(mib, threads, Fill::Random))?;
        let (address, len) = target.memory();
        let (mut out, mut back) = (Samples::default(), Samples::default());
        for _ in 0..self.rounds(7) {
            out.push(floor::write_out(target.pid(), address, len, &raw)?.wall);
            back.push(floor::read_in(&raw)?);
        }
        target.end()?;
        let figure = |what, samples| Figure::new(subject, what, Unit::Seconds, samples);
        report
            .figures
            .push(figure("process_vm_readv + write", &out));
        report
            .figures
            .push(figure("pread into fresh memory", &back));
        floor::remove(&raw)
    }
}

impl Figure {
    /// The requirement for a checkpoint or a restart of that size.
    fn judged(self, mib: u64) -> Self {
        if mib > SMALL {
            return self.wanted("ratio ≥ 0.8", |_, ratio| ratio.is_some_and(|r| r >= 0.8));
        }
        self.wanted("≤ 60 ms, or ratio ≥ 0.5", |seconds, ratio| {
            seconds <= 0.060 || ratio.is_some_and(|r| r >= 0.5)
        })
    }
}
