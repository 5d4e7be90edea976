//! The subjects, one file each.

use std::path::PathBuf;

use anyhow::{Result, ensure};

use crate::report::Samples;
use crate::tools::Tools;
use crate::{Common, sys};

mod codecs;
mod many;
mod memory;
mod overhead;
mod readers;
mod size;

/// Context of all subjects.
pub(crate) struct Bench {
    tools: Tools,
    scratch: PathBuf,
    pub(crate) quick: bool,
    rounds: Option<usize>,
}

impl Bench {
    pub(crate) fn new(common: &Common, scratch: PathBuf) -> Result<Self> {
        let tools = Tools::find(common.bin.as_deref())?;
        Ok(Bench {
            tools,
            scratch,
            quick: common.quick,
            rounds: common.rounds,
        })
    }

    fn rounds(&self, usual: usize) -> usize {
        self.rounds
            .unwrap_or(if self.quick { 2 } else { usual })
            .max(1)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// Refuses a target that would fill memory or disk: once the target, and its copies in the directory.
    fn room_for(&self, mib: u64, copies: u64) -> Result<()> {
        let meminfo = std::fs::read_to_string("/proc/meminfo")?;
        let line = meminfo
            .lines()
            .find_map(|line| line.strip_prefix("MemAvailable:"));
        let kib = line.and_then(|text| text.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        // The directory may be on tmpfs, so its files count as memory too.
        let want = mib * (1 + copies) + 512;
        let available = kib.unwrap_or(0) >> 10;
        ensure!(
            available >= want,
            "{want} MiB of memory are wanted, {available} are free"
        );
        let (want, free) = (mib * copies, sys::free_space(&self.scratch)? >> 20);
        ensure!(
            free >= want,
            "{want} MiB of disk are wanted, {free} are free"
        );
        Ok(())
    }
}

/// Measurements of one operation and of its floor, taken in the same rounds.
#[derive(Default)]
struct Pairs {
    values: Samples,
    floors: Samples,
    /// Speeds compared: floor / value.
    ratios: Samples,
}

impl Pairs {
    fn push(&mut self, value: f64, floor: f64) {
        self.values.push(value);
        self.floors.push(floor);
        self.ratios.push(floor / value);
    }
}
