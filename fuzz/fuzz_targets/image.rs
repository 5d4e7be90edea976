//! Reads any bytes as an image: an error or contents, never a panic or a hang.
//!
//! The first byte says how much is made right before reading, or no mutation would get past the first digest:
//! 0 nothing, 1 the digests of header, index and footer, 2 those of the stored bytes as well.
#![no_main]

use std::io::Read;

use ckpt_image::Reader;
use libfuzzer_sys::fuzz_target;

#[path = "../../image/tests/common/forge.rs"]
mod forge;
#[path = "../../tests/measure.rs"]
mod measure;

/// What reading an image may take: 64 MiB and four times its size, of which the program itself has some.
fn memory_for(image: usize) -> usize {
    (48 << 20) + 4 * image
}

/// What is decoded of one input, so that a section which is large by right does not look like a hang.
const LIMIT: u64 = 8 << 20;

fuzz_target!(|input: &[u8]| {
    measure::within(memory_for(input.len()), || read(input));
});

fn read(input: &[u8]) {
    let Some((how, image)) = input.split_first() else { return };
    let mut image = image.to_vec();
    if how % 3 == 2 {
        forge::reseal_records(&mut image);
    }
    if how % 3 >= 1 {
        forge::reseal(&mut image);
    }
    let Ok(reader) = Reader::from_bytes(image) else { return };
    let page_size = u64::from(reader.header().page_size);
    let raw: u64 = reader.chunks().iter().map(|chunk| u64::from(chunk.raw_len)).sum();
    assert_eq!(raw, reader.pages() * page_size);
    if raw <= LIMIT && reader.sections().iter().all(|section| section.raw_len() <= LIMIT) {
        let _ = reader.verify(&mut |done, total| assert!(done <= total));
    }
    for section in reader.sections() {
        let whole = reader.section(section.name(), LIMIT);
        let mut parts = Vec::new();
        let piecewise = reader.section_reader(section.name(), u64::MAX).map(|read| read.take(LIMIT).read_to_end(&mut parts));
        if let (Ok(whole), Ok(Ok(_))) = (whole, piecewise) {
            assert!(whole == parts && whole.len() as u64 == section.raw_len());
        }
    }
    let (mut data, mut scratch) = (Vec::new(), Vec::new());
    for space in reader.spaces() {
        for (run, chunk) in reader.runs_of(space).take(100) {
            let (found, at) = reader.locate(space, run.start).expect("a run's own page");
            assert_eq!(found, chunk);
            if reader.read_chunk(chunk, &mut data, &mut scratch).is_ok() {
                let page = &data[at..at + page_size as usize];
                assert!(reader.page(space, run.start).expect("it was just read").as_deref() == Some(page));
            }
        }
    }
}
