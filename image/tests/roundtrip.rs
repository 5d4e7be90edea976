//! Reading returns what was written, with every codec.
#![allow(missing_docs)]

mod common;

use std::collections::BTreeMap;
use std::io::Read;

use ckpt_image::{Codec, Error, Header, PageRun, Reader, Writer};
use common::*;
use proptest::prelude::*;

#[test]
fn small_image() {
    for codec in CODECS {
        let (bytes, summary) = small(codec);
        assert_eq!(summary.bytes, bytes.len() as u64);
        assert_eq!((summary.chunks, summary.pages, summary.sections), (3, 6, 3));
        assert_eq!(
            Header::read(&bytes[..]).unwrap(),
            Header { codec, ..header() }
        );
        let reader = Reader::from_bytes(bytes).unwrap();
        assert_eq!(reader.header().comm, "sleeper");
        assert_eq!(reader.digest(), summary.digest);
        let names: Vec<_> = reader
            .sections()
            .iter()
            .map(|s| (s.name(), s.version(), s.raw_len()))
            .collect();
        assert_eq!(
            names,
            [("meta", 7, 13), ("empty", 1, 0), ("long", 1, 300 << 10)]
        );
        assert_eq!(reader.section("meta", 13).unwrap(), b"about the job");
        assert_eq!(reader.section("empty", 0).unwrap(), b"");
        assert_eq!(
            reader.section("long", u64::MAX).unwrap(),
            vec![42; 300 << 10]
        );
        assert!(matches!(
            reader.section("long", 1000),
            Err(Error::SectionTooBig { limit: 1000, .. })
        ));
        assert!(matches!(
            reader.section("longer", 1000),
            Err(Error::NoSection { .. })
        ));
        let mut long = Vec::new();
        reader
            .section_reader("long", u64::MAX)
            .unwrap()
            .read_to_end(&mut long)
            .unwrap();
        assert_eq!(long, vec![42; 300 << 10]);

        // Consecutive pages are one run; runs keep their order in the chunk and are sorted in the space.
        let runs: Vec<_> = reader.runs(0).collect();
        let run = |space, start, pages| PageRun {
            space,
            start,
            pages,
        };
        assert_eq!(runs, [run(1, 0x8000, 2), run(0, 0x1000, 1)]);
        assert_eq!(reader.runs(3).len(), 0);
        let space: Vec<_> = reader.runs_of(0).collect();
        assert_eq!(
            space,
            [
                (run(0, 0x1000, 1), 0),
                (run(0, 0x4000, 1), 2),
                (run(0, 0x6000, 1), 2)
            ]
        );
        assert_eq!(reader.spaces(), [0, 1]);
        let expect = [
            (0, 0x1000, 1),
            (0, 0x4fff, 4),
            (0, 0x6000, 6),
            (1, 0x1008, 101),
            (1, 0x8000, 8),
            (1, 0x9abc, 9),
        ];
        for (space, address, number) in expect {
            assert_eq!(
                reader.page(space, address).unwrap(),
                Some(page(number)),
                "{space}:{address:#x}"
            );
        }
        for (space, address) in [
            (0, 0),
            (0, 0x2000),
            (0, 0x5000),
            (1, 0x7fff),
            (1, 0xa000),
            (2, 0x1000),
        ] {
            assert_eq!(reader.page(space, address).unwrap(), None);
        }
        let mut last = (0, 0);
        let verified = reader
            .verify(&mut |done, total| last = (done, total))
            .unwrap();
        assert_eq!(verified.bytes, summary.bytes);
        assert_eq!(last, (summary.bytes, summary.bytes));
    }
}

#[test]
fn nothing_at_all_is_an_image_too() {
    let writer = Writer::new(Vec::new(), &header(), options(Codec::default())).unwrap();
    let (bytes, summary) = writer.finish().unwrap();
    assert_eq!(summary.chunks, 0);
    let reader = Reader::from_bytes(bytes).unwrap();
    assert_eq!(reader.verify(&mut |_, _| {}).unwrap().bytes, summary.bytes);
    assert!(reader.spaces().is_empty());
    assert!(matches!(
        reader.read_chunk(0, &mut vec![], &mut vec![]),
        Err(Error::BadInput { .. })
    ));
}

#[test]
fn incompressible_data_is_stored_raw() {
    for codec in CODECS {
        let mut writer = Writer::new(Vec::new(), &header(), options(codec)).unwrap();
        let data = noise(1, 64 * PAGE);
        writer.submit(chunk_of(&[(0, 0, data.clone())])).unwrap();
        let reader = Reader::from_bytes(writer.finish().unwrap().0).unwrap();
        let chunk = reader.chunks()[0];
        assert_eq!(
            (chunk.codec.name(), chunk.stored_len),
            ("none", chunk.raw_len)
        );
        let (mut read, mut scratch) = (Vec::new(), Vec::new());
        reader.read_chunk(0, &mut read, &mut scratch).unwrap();
        assert_eq!(read, data);
    }
}

#[test]
fn many_small_runs_stay_compact() {
    let mut writer = Writer::new(Vec::new(), &header(), options(Codec::Zstd(1))).unwrap();
    let runs = 50_000u64;
    // Descending, every second page, so that nothing merges and nothing is in order.
    let mut addresses = (0..runs).rev().map(|n| n * 2 * PAGE as u64).peekable();
    while addresses.peek().is_some() {
        let mut chunk = writer.chunk();
        while chunk.room() >= PAGE {
            let Some(address) = addresses.next() else {
                break;
            };
            chunk.push(3, address, PAGE as u32, &page(address));
        }
        writer.submit(chunk).unwrap();
    }
    let (bytes, summary) = writer.finish().unwrap();
    assert_eq!(summary.pages, runs);
    let stored_elsewhere = summary.bytes - summary.stored_page_bytes;
    assert!(
        stored_elsewhere < 26 * runs,
        "{} bytes a run",
        stored_elsewhere / runs
    );
    let reader = Reader::from_bytes(bytes).unwrap();
    assert_eq!(reader.runs_of(3).count() as u64, runs);
    assert!(reader.runs_of(3).is_sorted());
    for n in (0..runs).step_by(997) {
        let address = n * 2 * PAGE as u64;
        assert_eq!(reader.page(3, address).unwrap(), Some(page(address)));
        assert_eq!(reader.page(3, address + PAGE as u64).unwrap(), None);
    }
}

#[test]
fn threads_read_the_same() {
    let (bytes, _) = {
        let mut writer = Writer::new(Vec::new(), &header(), options(Codec::Lz4)).unwrap();
        for n in 0..40 {
            let mut chunk = writer.chunk();
            chunk.push(
                0,
                n << 20,
                PAGE as u32,
                &[page(n), noise(n, 31 * PAGE)].concat(),
            );
            writer.submit(chunk).unwrap();
        }
        writer.finish().unwrap()
    };
    let reader = Reader::from_bytes(bytes).unwrap();
    let all = |order: &mut dyn Iterator<Item = usize>| {
        let (mut data, mut scratch) = (Vec::new(), Vec::new());
        let mut chunks = BTreeMap::new();
        for chunk in order {
            reader.read_chunk(chunk, &mut data, &mut scratch).unwrap();
            chunks.insert(chunk, data.clone());
        }
        chunks
    };
    let one = all(&mut (0..40));
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|n| scope.spawn(move || all(&mut (0..40).map(|i| (i * 7 + n * 10) % 40))))
            .collect();
        for thread in threads {
            assert!(thread.join().unwrap() == one);
        }
    });
    assert_eq!(one[&7][..PAGE], page(7));
}

#[test]
fn bad_input_is_refused() {
    let mut writer = Writer::new(Vec::new(), &header(), options(Codec::None)).unwrap();
    let bad = |run: PageRun, data: usize| ckpt_image::Chunk {
        runs: vec![run],
        data: vec![0; data],
    };
    let run = |start, pages| PageRun {
        space: 0,
        start,
        pages,
    };
    for chunk in [
        bad(run(0, 1), 0),
        bad(run(0, 1), 2 * PAGE),
        bad(run(0, 0), 0),
        bad(run(1, 1), PAGE),
        bad(run(0u64.wrapping_sub(PAGE as u64), 2), 2 * PAGE),
        bad(run(0, 1025), 1025 * PAGE),
        ckpt_image::Chunk {
            runs: vec![],
            data: vec![0; PAGE],
        },
    ] {
        assert!(matches!(writer.submit(chunk), Err(Error::BadInput { .. })));
    }
    for name in ["", "a b", "UPPER", "seventeen-letters", "nul\0", "é"] {
        assert!(
            matches!(writer.section(name, 1, b""), Err(Error::BadInput { .. })),
            "{name}"
        );
    }
    writer.section("once", 1, b"").unwrap();
    assert!(matches!(
        writer.section("once", 2, b""),
        Err(Error::BadInput { .. })
    ));
    writer.finish().unwrap();
    let odd = Header {
        page_size: 5000,
        ..header()
    };
    assert!(matches!(
        Writer::new(Vec::new(), &odd, options(Codec::None)),
        Err(Error::BadInput { .. })
    ));
}

#[test]
fn a_page_given_twice_is_an_error() {
    let mut writer = Writer::new(Vec::new(), &header(), options(Codec::None)).unwrap();
    writer.submit(chunk_of(&[(0, 0x4000, page(1))])).unwrap();
    writer.submit(chunk_of(&[(1, 0x1000, page(1))])).unwrap();
    writer
        .submit(chunk_of(&[(0, 0x3000, [page(1), page(2)].concat())]))
        .unwrap();
    let error = writer.finish().map(|_| ()).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Overlap {
                space: 0,
                address: 0x4000,
                first: 2,
                second: 0,
                ..
            }
        ),
        "{error}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn round_trip(
        codec in prop_oneof![
            Just(Codec::None), Just(Codec::Lz4), (1..=19).prop_map(Codec::Zstd), (1..=9u32).prop_map(Codec::Gzip),
        ],
        threads in 1..4usize,
        // Space, page number, compressible or not; runs result from adjacent pages.
        pages in prop::collection::btree_map((0..3u32, 0..60u64), any::<bool>(), 0..50),
        per_chunk in 1..20usize,
        sections in prop::collection::btree_map("[a-z0-9._-]{1,16}", (any::<u16>(), prop::collection::vec(any::<u8>(), 0..2000)), 0..4),
        comm in ".{0,40}",
    ) {
        let header = Header { comm: comm.clone(), ..header() };
        let mut writer = Writer::new(Vec::new(), &header, ckpt_image::WriterOptions { codec, threads }).unwrap();
        let contents = |space: u32, number: u64, smooth: bool| {
            let seed = u64::from(space) * 1000 + number;
            if smooth { page(seed) } else { noise(seed, PAGE) }
        };
        let list: Vec<_> = pages.iter().map(|((space, number), smooth)| (*space, *number, *smooth)).collect();
        for part in list.chunks(per_chunk) {
            let mut chunk = writer.chunk();
            for (space, number, smooth) in part {
                let place = chunk.extend(*space, number * PAGE as u64, PAGE as u32, 1);
                place.copy_from_slice(&contents(*space, *number, *smooth));
            }
            writer.submit(chunk).unwrap();
        }
        for (name, (version, bytes)) in &sections {
            writer.section(name, *version, bytes).unwrap();
        }
        let (bytes, summary) = writer.finish().unwrap();
        prop_assert_eq!(summary.bytes, bytes.len() as u64);
        let reader = Reader::from_bytes(bytes).unwrap();
        prop_assert_eq!(reader.pages(), pages.len() as u64);
        for ((space, number), smooth) in &pages {
            let read = reader.page(*space, number * PAGE as u64).unwrap();
            prop_assert_eq!(read, Some(contents(*space, *number, *smooth)));
        }
        prop_assert_eq!(reader.sections().len(), sections.len());
        for (name, (version, bytes)) in &sections {
            prop_assert_eq!(&reader.section(name, 2000).unwrap(), bytes);
            prop_assert!(reader.sections().iter().any(|s| s.name() == name && s.version() == *version));
        }
        prop_assert!(comm.replace('\0', " ").starts_with(&reader.header().comm));
        prop_assert_eq!(reader.verify(&mut |_, _| {}).unwrap().bytes, summary.bytes);
    }
}
