//! Memory of ckpt itself. Resident memory counts the pages of its own program file too.

use anyhow::Result;

use super::Bench;
use crate::floor;
use crate::report::{Figure, Report, Samples, Unit};
use crate::target::{Fill, Shape};
use crate::tools::Target;

/// A target sixty-four times as large may cost this many times the memory.
const GROWTH: f64 = 1.5;

impl Bench {
    pub(crate) fn memory(&self, report: &mut Report) {
        let sizes: &[u64] = if self.quick {
            &[16, 256]
        } else {
            &[64, 1024, 4096]
        };
        let mut first = [None; 2];
        for &mib in sizes {
            let subject = format!("{mib} MiB, zstd:1");
            let done = self.memory_at(&subject, mib, &mut first, report);
            report.add(&subject, done);
        }
    }

    fn memory_at(
        &self,
        subject: &str,
        mib: u64,
        first: &mut [Option<f64>; 2],
        report: &mut Report,
    ) -> Result<()> {
        self.room_for(mib, 1)?;
        let image = self.file("image");
        let target = Target::start(&self.scratch, Shape::of(mib, 5, Fill::Half))?;
        let mut enter = |place: usize, what, bytes: u64| {
            let bytes = bytes as f64;
            let mut samples = Samples::default();
            samples.push(bytes);
            let mut figure = Figure::new(subject, what, Unit::Bytes, &samples);
            if let Some(first) = first[place] {
                let bound = format!("≤ {GROWTH} × the smallest target's");
                figure = figure.wanted(&bound, |_, _| bytes <= GROWTH * first);
            }
            first[place].get_or_insert(bytes);
            report.figures.push(figure);
        };
        let checkpoint = self.tools.attach(&target, &image, "zstd:1")?;
        enter(0, "memory of ckpt attach", checkpoint.memory);
        let (pid, page) = (target.pid(), target.page);
        target.end()?;
        let restart = self.tools.restore(pid, page, &image)?;
        enter(1, "memory of restore", restart.memory);
        floor::remove(&image)
    }
}
