//! Between checkpoints there is no overhead: system calls cost the same under `ckpt run`.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::{Bench, Pairs};
use crate::report::{Figure, Report, Unit};

impl Bench {
    pub(crate) fn overhead(&self, report: &mut Report) {
        let subject = "ckpt run";
        let done = self.overhead_of_run(subject, report);
        report.add(subject, done);
    }

    fn overhead_of_run(&self, subject: &str, report: &mut Report) -> Result<()> {
        std::fs::write(self.file("byte"), "x")?;
        let mut calls = [Pairs::default(), Pairs::default()];
        for round in 0..self.rounds(11) {
            let alone = || self.system_calls(Command::new(std::env::current_exe()?));
            let supervised = || {
                let mut command = self.tools.run();
                // With an interval, so that the periodic checkpoints are set up.
                command
                    .args(["--interval", "1h", "--dir"])
                    .arg(&self.scratch)
                    .arg("--");
                command.arg(std::env::current_exe()?);
                self.system_calls(command)
            };
            let (floor, value) = if round % 2 == 0 {
                let floor = alone()?;
                (floor, supervised()?)
            } else {
                let value = supervised()?;
                (alone()?, value)
            };
            for (pairs, (value, floor)) in calls.iter_mut().zip(value.into_iter().zip(floor)) {
                pairs.push(value, floor);
            }
        }
        for (what, pairs) in ["getppid", "pread of 1 byte"].into_iter().zip(&calls) {
            let figure = Figure::new(subject, what, Unit::Nanoseconds, &pairs.values);
            let figure = figure.beside(&pairs.floors, &pairs.ratios);
            report
                .figures
                .push(figure.wanted("ratio ≥ 0.95", |_, ratio| {
                    ratio.is_some_and(|r| r >= 0.95)
                }));
        }
        Ok(())
    }

    /// Nanoseconds of getppid and of pread.
    fn system_calls(&self, mut command: Command) -> Result<[f64; 2]> {
        let count = if self.quick { "100000" } else { "2000000" };
        command
            .args(["system-calls", "--count", count, "--file"])
            .arg(self.file("byte"));
        let output = command
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()?;
        ensure!(
            output.status.success(),
            "the program ended with {}",
            output.status
        );
        let text = String::from_utf8(output.stdout)?;
        let mut words = text.split_whitespace().map(str::parse::<f64>);
        let mut next = || {
            words
                .next()
                .context("a figure is missing")?
                .context("not a figure")
        };
        Ok([next()?, next()?])
    }
}
