//! Compares the pages of two images.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};

use ckpt_image::Reader;

use super::compare::Spaces;
use crate::error::Difference;
use crate::error::Result;
use crate::objects::files::regular::Regular;
use crate::objects::{Snapshot, SpaceId};

/// A digest of each page, by space and address. A zero page and an absent one are equal.
struct Pages(HashMap<(u32, u64), u64>);

/// Most different pages that are listed one by one.
const MOST_TOLD: usize = 8;

/// Memory of a process that the kernel writes when a task runs: not part of the job's state.
struct Written {
    space: u32,
    start: u64,
    end: u64,
}

/// The pages of `job` and `copy` that differ, by process if they belong to one. `spaces` maps spaces of the job to
/// those of the copy.
pub(super) fn compare(
    (snapshot, job): (&Snapshot, &Reader),
    (copy_snapshot, copy): (&Snapshot, &Reader),
    spaces: &Spaces,
) -> Result<Vec<Difference>> {
    let hasher = std::hash::RandomState::new();
    let mut written = restartable_sequences(snapshot);
    written.extend(remainders(snapshot));
    let beside = stored_beside(snapshot);
    let beside_there = stored_beside(copy_snapshot);
    let mut there = Pages::of(copy_snapshot, copy, &hasher, &|space, page, data| {
        let same = |(_, copy): &(&u32, &u32)| **copy == space;
        if let Some((job, _)) = spaces.iter().find(same) {
            blank(&written, *job, page, data);
        }
    })?;
    let here = Pages::of(snapshot, job, &hasher, &|space, page, data| {
        blank(&written, space, page, data);
    })?;
    let mut differing: Vec<(u32, u64)> = Vec::new();
    for ((space, page), digest) in here.0 {
        if beside.contains(&space) {
            continue;
        }
        let other = spaces.get(&space).and_then(|s| there.0.remove(&(*s, page)));
        if other != Some(digest) {
            differing.push((space, page));
        }
    }
    let back: HashMap<u32, u32> = spaces.iter().map(|(job, copy)| (*copy, *job)).collect();
    differing.extend(
        there
            .0
            .into_keys()
            .filter(|(space, _)| !beside_there.contains(space))
            .map(|(space, page)| (back.get(&space).copied().unwrap_or(u32::MAX), page)),
    );
    differing.sort_unstable();
    differing.dedup();
    let more = differing.len().saturating_sub(MOST_TOLD);
    let mut told: Vec<Difference> = differing
        .into_iter()
        .take(MOST_TOLD)
        .map(|(space, page)| Difference {
            object: owner(snapshot, SpaceId(space)),
            part: format!("the page at {page:#x}"),
            before: "one thing".into(),
            after: "another".into(),
        })
        .collect();
    if more > 0 {
        told.push(Difference {
            object: "the job".into(),
            part: format!("{more} further pages"),
            before: "one thing".into(),
            after: "another".into(),
        });
    }
    Ok(told)
}

/// `struct rseq` of each thread: the kernel writes the number of the processor to it, rseq(2).
fn restartable_sequences(snapshot: &Snapshot) -> Vec<Written> {
    let threads = snapshot
        .processes
        .iter()
        .flat_map(|p| p.threads.iter().map(|t| (p.memory.space.0, t)));
    let areas = threads.filter_map(|(space, thread)| {
        let rseq = thread.rseq?;
        Some(Written {
            space,
            start: rseq.address,
            end: rseq.address + u64::from(rseq.length),
        })
    });
    areas.collect()
}

/// The remaining time that an interrupted sleep writes, which occurs in the copy (nanosleep(2)).
fn remainders(snapshot: &Snapshot) -> impl Iterator<Item = Written> + '_ {
    let threads = snapshot
        .processes
        .iter()
        .flat_map(|p| p.threads.iter().map(|t| (p.memory.space.0, t)));
    threads.filter_map(|(space, thread)| {
        let start = match thread.regs.orig_rax as i64 {
            libc::SYS_nanosleep => thread.regs.rsi,
            libc::SYS_clock_nanosleep => thread.regs.r10,
            _ => return None,
        };
        let end = start.checked_add(size_of::<libc::timespec>() as u64)?;
        Some(Written { space, start, end })
    })
}

/// Spaces that only the job's image has (`--save-files`, `--bundle`).
fn stored_beside(snapshot: &Snapshot) -> Vec<u32> {
    let open = snapshot.descriptions.iter();
    let open = open.filter_map(|d| Some(d.kind.get::<Regular>()?.saved?.space.0));
    let mapped = snapshot.mapped_files.iter();
    let mapped = mapped.filter_map(|file| Some(file.saved?.space.0));
    let bundled = snapshot.bundle.iter().map(|file| file.contents.0);
    open.chain(mapped).chain(bundled).collect()
}

fn blank(written: &[Written], space: u32, page: u64, data: &mut [u8]) {
    let end = page + data.len() as u64;
    for area in written.iter().filter(|a| a.space == space) {
        let (from, to) = (area.start.max(page), area.end.min(end));
        if from < to {
            data[(from - page) as usize..(to - page) as usize].fill(0);
        }
    }
}

fn owner(snapshot: &Snapshot, space: SpaceId) -> String {
    let process = snapshot.processes.iter().find(|p| p.memory.space == space);
    match process {
        Some(process) => format!("process {}", process.pid),
        None => "shared memory or a file of the job".into(),
    }
}

impl Pages {
    fn of(
        snapshot: &Snapshot,
        image: &Reader,
        hasher: &impl BuildHasher,
        blank: &dyn Fn(u32, u64, &mut [u8]),
    ) -> Result<Self> {
        let size = image.header().page_size as usize;
        let mut pages = HashMap::new();
        let (mut data, mut scratch) = (Vec::new(), Vec::new());
        for chunk in 0..image.chunks().len() {
            image.read_chunk(chunk, &mut data, &mut scratch)?;
            let mut rest = data.as_mut_slice();
            for run in image.runs(chunk) {
                for number in 0..u64::from(run.pages) {
                    let Some((page, after)) = std::mem::take(&mut rest).split_at_mut_checked(size)
                    else {
                        break;
                    };
                    rest = after;
                    let address = run.start + number * size as u64;
                    blank(run.space, address, page);
                    if page.iter().any(|byte| *byte != 0) {
                        let mut digest = hasher.build_hasher();
                        digest.write(page);
                        pages.insert((run.space, address), digest.finish());
                    }
                }
            }
        }
        // Parents precede their children.
        for process in &snapshot.processes {
            let parent = snapshot.processes.iter().find(|p| p.pid == process.parent);
            let Some(parent) = parent else { continue };
            let (mine, theirs) = (process.memory.space.0, parent.memory.space.0);
            for &(start, end) in &process.memory.inherited {
                for address in (start..end).step_by(size) {
                    if let Some(digest) = pages.get(&(theirs, address)).copied() {
                        pages.entry((mine, address)).or_insert(digest);
                    }
                }
            }
        }
        Ok(Self(pages))
    }
}
