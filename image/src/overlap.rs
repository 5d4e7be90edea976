//! All runs of an index ordered by address: detects duplicate pages, and finds pages.

use crate::chunk::PageRun;
use crate::index::{RECORD_BYTES, RUN_BYTES, Record, run_at};

/// Runs by their position in the index, ordered by space and address.
///
/// Four bytes a run, so this table is always smaller than the index.
#[derive(Debug, Default)]
pub(crate) struct SortedRuns {
    /// Byte positions in the index, divided by four: sizes of record headers and table entries are multiples of four.
    places: Vec<u32>,
}

/// The longest index whose positions can be represented.
pub(crate) const MAX_INDEX: u64 = 4 * (u32::MAX as u64);

impl SortedRuns {
    /// Sorts the `runs` runs of an index whose records have been checked.
    pub(crate) fn new(index: &[u8], page_size: u32, runs: usize) -> Self {
        let mut places = Vec::with_capacity(runs);
        let mut at = 0;
        while let Some(record) = index.get(at..).and_then(Record::at) {
            let table = at + RECORD_BYTES;
            at = table + record.table_len.get() as usize;
            places.extend(
                (table..at)
                    .step_by(RUN_BYTES)
                    .map(|place| (place / 4) as u32),
            );
        }
        let mut sorted = SortedRuns { places };
        let key = |place: &u32| run(index, *place, page_size).map(|run| (run.space, run.start));
        if !sorted.places.is_sorted_by_key(key) {
            sorted.places.sort_unstable_by_key(key);
        }
        sorted
    }

    /// The first duplicate address: its space, the address, and the positions of both runs.
    pub(crate) fn overlap(&self, index: &[u8], page_size: u32) -> Option<(u32, u64, usize, usize)> {
        self.places.windows(2).find_map(|pair| {
            let (a, b) = (
                run(index, pair[0], page_size)?,
                run(index, pair[1], page_size)?,
            );
            let overlaps = a.space == b.space && a.end(page_size) > b.start;
            overlaps.then_some((b.space, b.start, pair[0] as usize * 4, pair[1] as usize * 4))
        })
    }

    /// The runs of one space with their positions in the index, by address.
    pub(crate) fn of_space<'a>(
        &'a self,
        index: &'a [u8],
        page_size: u32,
        space: u32,
    ) -> impl Iterator<Item = (PageRun, usize)> + 'a {
        let space_of = move |place: &u32| run(index, *place, page_size).map(|run| run.space);
        let first = self
            .places
            .partition_point(|place| space_of(place) < Some(space));
        self.places[first..]
            .iter()
            .map_while(move |place| {
                run(index, *place, page_size).map(|run| (run, *place as usize * 4))
            })
            .take_while(move |(run, _)| run.space == space)
    }

    /// The run that contains an address, with its position in the index.
    pub(crate) fn find(
        &self,
        index: &[u8],
        page_size: u32,
        space: u32,
        address: u64,
    ) -> Option<(PageRun, usize)> {
        let key = |place: &u32| run(index, *place, page_size).map(|run| (run.space, run.start));
        let after = self
            .places
            .partition_point(|place| key(place) <= Some((space, address)));
        let place = *self.places.get(after.checked_sub(1)?)?;
        let run = run(index, place, page_size)?;
        (run.space == space && address < run.end(page_size)).then_some((run, place as usize * 4))
    }

    /// The numbers of all spaces, ascending.
    pub(crate) fn spaces(&self, index: &[u8], page_size: u32) -> Vec<u32> {
        let mut spaces: Vec<u32> = Vec::new();
        for run in self
            .places
            .iter()
            .filter_map(|place| run(index, *place, page_size))
        {
            if spaces.last() != Some(&run.space) {
                spaces.push(run.space);
            }
        }
        spaces
    }
}

fn run(index: &[u8], place: u32, page_size: u32) -> Option<PageRun> {
    run_at(index.get(place as usize * 4..)?, page_size)
}
