//! Codecs, with memory of which one half is compressible.

use anyhow::Result;

use super::Bench;
use crate::floor;
use crate::report::{Figure, Report, Samples, Unit};
use crate::target::{Fill, Shape};
use crate::tools::Target;

const CODECS: [&str; 4] = ["none", "lz4", "zstd:1", "gzip:1"];

impl Bench {
    pub(crate) fn codecs(&self, mib: u64, threads: usize, report: &mut Report) {
        for codec in CODECS {
            let subject = format!("{mib} MiB, {codec}");
            let done = self.codec(&subject, mib, threads, codec, report);
            report.add(&subject, done);
        }
    }

    fn codec(
        &self,
        subject: &str,
        mib: u64,
        threads: usize,
        codec: &str,
        report: &mut Report,
    ) -> Result<()> {
        self.room_for(mib, 1)?;
        let image = self.file("image");
        let target = Target::start(&self.scratch, Shape::of(mib, threads, Fill::Half))?;
        let [mut all, mut gaps, mut sizes, mut restarts] = [(); 4].map(|()| Samples::default());
        for _ in 0..self.rounds(3) {
            let checkpoint = self.tools.attach(&target, &image, codec)?;
            all.push(checkpoint.seconds);
            gaps.push(checkpoint.gap);
            sizes.push(checkpoint.memory_bytes as f64 / checkpoint.image_bytes as f64);
        }
        let seconds = |what, samples| Figure::new(subject, what, Unit::Seconds, samples);
        report.figures.push(seconds("checkpoint", &all));
        report
            .figures
            .push(seconds("pause, longest gap of beats", &gaps));
        report
            .figures
            .push(Figure::new(subject, "memory / image", Unit::Number, &sizes));
        let (pid, page) = (target.pid(), target.page);
        target.end()?;
        for _ in 0..self.rounds(3) {
            restarts.push(self.tools.restore(pid, page, &image)?.seconds);
        }
        report
            .figures
            .push(seconds("restart, until all beat", &restarts));
        floor::remove(&image)
    }
}
