//! A target with very many threads.

use anyhow::Result;

use super::Bench;
use crate::floor;
use crate::report::{Figure, Report, Samples, Unit};
use crate::target::Fill;
use crate::tools::Target;

impl Bench {
    pub(crate) fn threads(&self, count: usize, report: &mut Report) {
        let subject = format!("{count} threads");
        let done = self.many_threads(&subject, count, report);
        report.add(&subject, done);
    }

    fn many_threads(&self, subject: &str, count: usize, report: &mut Report) -> Result<()> {
        let image = self.file("image");
        let figure = |what, samples| Figure::new(subject, what, Unit::Seconds, samples);
        let target = Target::start(&self.scratch, 1, count, Fill::Random)?;
        let [mut all, mut gaps, mut restarts] = [(); 3].map(|()| Samples::default());
        for _ in 0..self.rounds(3) {
            let checkpoint = self.tools.attach(&target, &image, "none")?;
            all.push(checkpoint.seconds);
            gaps.push(checkpoint.gap);
        }
        let all = figure("checkpoint", &all).wanted("≤ 3 s", |seconds, _| seconds <= 3.0);
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
