//! A target with very many tasks.

use anyhow::Result;

use super::Bench;
use crate::floor;
use crate::report::{Figure, Report, Samples, Unit};
use crate::target::{Fill, Shape};
use crate::tools::Target;

impl Bench {
    /// One process with that many threads.
    pub(crate) fn threads(&self, count: usize, report: &mut Report) {
        let shape = Shape::of(1, count, Fill::Random);
        self.many(&format!("{count} threads"), shape, 3.0, report);
    }

    /// That many processes with one thread each.
    pub(crate) fn processes(&self, count: usize, report: &mut Report) {
        let shape = Shape {
            processes: count,
            ..Shape::of(1, 1, Fill::Random)
        };
        self.many(&format!("{count} processes"), shape, 5.0, report);
    }

    fn many(&self, subject: &str, shape: Shape, most: f64, report: &mut Report) {
        let done = self.lives(subject, shape, most, report);
        report.add(subject, done);
    }

    /// `most` is the limit in seconds for a checkpoint; for a restart it is always 5.
    fn lives(&self, subject: &str, shape: Shape, most: f64, report: &mut Report) -> Result<()> {
        let image = self.file("image");
        let figure = |what, samples| Figure::new(subject, what, Unit::Seconds, samples);
        let target = Target::start(&self.scratch, shape)?;
        let [mut all, mut gaps, mut restarts] = [(); 3].map(|()| Samples::default());
        for _ in 0..self.rounds(3) {
            let checkpoint = self.tools.attach(&target, &image, "none")?;
            all.push(checkpoint.seconds);
            gaps.push(checkpoint.gap);
        }
        let wanted = format!("≤ {most} s");
        let all = figure("checkpoint", &all).wanted(&wanted, |seconds, _| seconds <= most);
        report.figures.push(all);
        report
            .figures
            .push(figure("pause, longest gap of beats", &gaps));
        let (pid, page) = (target.pid(), target.page);
        target.end()?;
        for _ in 0..self.rounds(3) {
            restarts.push(self.tools.restore(pid, page, &image)?.seconds);
        }
        let restarts = figure("restart, until all beat", &restarts);
        report
            .figures
            .push(restarts.wanted("≤ 5 s", |seconds, _| seconds <= 5.0));
        floor::remove(&image)
    }
}
