//! Which pages of a job are stored in its image, and in which space.

use std::io::Write;

use ckpt_image::Writer;
use ckpt_tracer::fault::{self, Step};
use ckpt_tracer::proc::pagemap::PageQuery;

use super::captured::{Pages, State};
use super::cow::Comparison;
use super::pages::{PageSink, Reading};
use crate::error::Result;
use crate::objects::memory;
use crate::objects::process::Process;
use crate::objects::source::Source;
use crate::progress::Progress;

/// Writes the pages of all processes and other contents; returns the bytes stored.
pub(super) fn write_pages<W: Write + Send + 'static>(
    writer: &mut Writer<W>,
    state: &mut State,
    progress: &dyn Progress,
) -> Result<u64> {
    let mut sink = PageSink::new(writer, progress);
    let sources = state.job.sources();
    let processes = &mut state.snapshot.processes;
    let mut held: Vec<Vec<(u64, u64)>> = Vec::with_capacity(processes.len());
    let mut stored: Vec<Vec<StoredRange>> = Vec::with_capacity(processes.len());
    for (index, pages) in state.pages.iter().enumerate() {
        let parent = parent_of(index, processes);
        if let Some(parent) = parent.filter(|_| processes[index].shares.memory) {
            processes[index].memory.inherited = processes[parent].memory.inherited.clone();
            held.push(held[parent].clone());
            stored.push(Vec::new());
            continue;
        }
        let mut ranges = stored_ranges(pages)?;
        held.push(ranges.iter().flat_map(|r| r.runs.clone()).collect());
        if processes[index].forked {
            let shared = leave_to_parent(&mut ranges, index, processes, &sources, &held)?;
            processes[index].memory.inherited = shared;
        }
        stored.push(ranges);
    }
    progress.begin(stored.iter().flatten().map(StoredRange::bytes).sum());
    let half = stored.iter().map(Vec::len).sum::<usize>() / 2;
    let mut count = 0;
    for (index, ranges) in stored.iter().enumerate() {
        for range in ranges {
            if count == half {
                fault::hit(Step::PagesHalf)?;
            }
            count += 1;
            sink.memory(
                &sources[index].mem,
                processes[index].memory.space,
                range.runs.iter().copied(),
                range.how,
            )?;
        }
    }
    for (space, contents) in &state.contents {
        sink.contents(*space, contents)?;
    }
    sink.finish()
}

fn parent_of(index: usize, processes: &[Process]) -> Option<usize> {
    let parent = processes[index].parent;
    processes.iter().position(|p| p.pid == parent)
}

/// Removes from `ranges` the pages that a forked process shares with its parent; returns them.
fn leave_to_parent(
    ranges: &mut [StoredRange],
    child: usize,
    processes: &[Process],
    sources: &[&Source],
    held: &[Vec<(u64, u64)>],
) -> Result<Vec<(u64, u64)>> {
    let Some(parent) = parent_of(child, processes) else {
        return Ok(Vec::new());
    };
    let over = memory::inherited(
        &processes[parent].memory.mappings,
        &processes[child].memory.mappings,
    );
    let over: Vec<(u64, u64)> = over.iter().map(|i| (i.start, i.end)).collect();
    let comparison = Comparison {
        parent: &sources[parent].mem,
        child: &sources[child].mem,
        common: memory::intersect(&held[parent], &over),
        pagemap: Comparison::pagemap(&sources[child].dir),
    };
    let mut inherited = Vec::new();
    for range in ranges {
        let split = comparison.split(&range.runs)?;
        range.runs = split.own;
        inherited.extend(split.inherited);
    }
    Ok(memory::join(inherited))
}

/// Pages of one mapping to be stored.
struct StoredRange {
    runs: Vec<(u64, u64)>,
    how: Reading,
}

impl StoredRange {
    fn bytes(&self) -> u64 {
        self.runs.iter().map(|(start, end)| end - start).sum()
    }
}

fn stored_ranges(pages: &Pages) -> Result<Vec<StoredRange>> {
    use ckpt_tracer::proc::maps::VmaName as Name;
    let mut ranges = Vec::new();
    for vma in &pages.vmas {
        let kernels = matches!(
            vma.name,
            Name::Vdso | Name::Vvar | Name::VvarVclock | Name::Vsyscall
        );
        if kernels {
            continue;
        }
        let Some(query) = PageQuery::stored_pages(vma) else {
            continue;
        };
        let mut runs = Vec::new();
        pages.scanner.scan(vma.start..vma.end, query, |run| {
            runs.push((run.start, run.end))
        })?;
        if !runs.is_empty() {
            ranges.push(StoredRange {
                runs,
                how: Reading {
                    zero_is_default: vma.is_private_anonymous(),
                    shared: vma.pss < vma.rss,
                },
            });
        }
    }
    Ok(ranges)
}
