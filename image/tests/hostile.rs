//! Images with valid digests and invalid contents, as an attacker would make them.
#![allow(missing_docs)]

mod common;

use ckpt_image::{Codec, Error, Part, Reader, Result};
use common::forge::{Forged, forge, records, reseal, reseal_records};
use common::*;
use proptest::prelude::*;

fn read_all(bytes: Vec<u8>) -> Result<()> {
    let reader = Reader::from_bytes(bytes)?;
    reader.verify(&mut |_, _| {})?;
    for section in reader.sections() {
        reader.section(section.name(), 1 << 20)?;
    }
    for space in reader.spaces() {
        for (run, _) in reader.runs_of(space) {
            reader
                .page(space, run.start)?
                .expect("a page that a run names");
        }
    }
    Ok(())
}

fn raw_chunk(runs: &[(u32, u64, u64)]) -> Forged {
    let pages: u64 = runs.iter().map(|run| run.2).sum();
    Forged::chunk(0, runs, vec![5; pages as usize * PAGE])
}

fn read_forged(records: &[Forged]) -> Result<()> {
    read_all(forge(&tiny(Codec::None), records))
}

#[test]
fn the_forger_and_the_writer_agree() {
    read_forged(&[]).unwrap();
    read_forged(&[
        raw_chunk(&[(0, 1, 2), (0, 9, 1)]),
        Forged::block(b"meta", 0, 1, b"m".to_vec()),
    ])
    .unwrap();
    let mut same = small(Codec::Zstd(3)).0;
    let before = same.clone();
    reseal_records(&mut same);
    reseal(&mut same);
    assert!(same == before);
}

#[test]
fn lies_of_chunks() {
    let good = raw_chunk(&[(0, 1, 2)]);
    let top = u64::MAX >> 12;
    let zstd = zstd::bulk::compress(&[5; 8192], 1).unwrap();
    let lies: [(&str, Forged); 14] = [
        (
            "kind",
            Forged {
                kind: 3,
                ..good.clone()
            },
        ),
        (
            "codec",
            Forged {
                codec: 9,
                ..good.clone()
            },
        ),
        (
            "raw length too long",
            Forged {
                raw: 12288,
                ..good.clone()
            },
        ),
        (
            "raw length huge",
            Forged {
                raw: u32::MAX,
                codec: 2,
                ..good.clone()
            },
        ),
        (
            "raw length beyond the chunk's bound",
            Forged::chunk(2, &[(0, 0, 1025)], zstd.clone()),
        ),
        (
            "no pages",
            Forged {
                raw: 0,
                stored: vec![],
                ..good.clone()
            },
        ),
        (
            "no runs",
            Forged {
                table: vec![],
                ..good.clone()
            },
        ),
        (
            "half a run",
            Forged {
                table: good.table[..6].to_vec(),
                ..good.clone()
            },
        ),
        (
            "runs that are not the pages",
            Forged {
                table: raw_chunk(&[(0, 1, 3)]).table,
                ..good.clone()
            },
        ),
        ("the last page of all", raw_chunk(&[(0, top, 1)])),
        ("wrap around", raw_chunk(&[(0, top - 1, 3)])),
        (
            "a section's name",
            Forged {
                name: [b'a'; 16],
                ..good.clone()
            },
        ),
        (
            "a section's blocks",
            Forged {
                blocks: 1,
                ..good.clone()
            },
        ),
        (
            "a version",
            Forged {
                version: 1,
                ..good.clone()
            },
        ),
    ];
    for (what, lie) in lies {
        let error = read_forged(&[raw_chunk(&[(7, 1, 1)]), lie]).expect_err(what);
        let expected = matches!(
            &error,
            Error::Corrupt {
                part: Part::Chunk(1) | Part::Index | Part::Footer,
                ..
            }
        );
        assert!(expected, "{what}: {error}");
    }
}

#[test]
fn lies_of_sections() {
    let full = || vec![1; 256 << 10];
    let block = Forged::block;
    let lies: [(&str, Vec<Forged>); 10] = [
        (
            "twice",
            vec![
                block(b"a", 0, 1, vec![1]),
                block(b"b", 0, 1, vec![1]),
                block(b"a", 0, 1, vec![1]),
            ],
        ),
        ("no name", vec![block(b"", 0, 1, vec![1])]),
        ("odd name", vec![block(b"a/b", 0, 1, vec![1])]),
        ("no blocks", vec![block(b"a", 0, 0, vec![1])]),
        ("lacks the last", vec![block(b"a", 0, 2, full())]),
        ("lacks the first", vec![block(b"a", 1, 2, vec![1])]),
        (
            "a short block inside",
            vec![block(b"a", 0, 2, vec![1]), block(b"a", 1, 2, vec![1])],
        ),
        (
            "too long a block",
            vec![block(b"a", 0, 1, vec![1; (256 << 10) + 1])],
        ),
        (
            "a chunk inside",
            vec![
                block(b"a", 0, 2, full()),
                raw_chunk(&[(0, 1, 1)]),
                block(b"a", 1, 2, vec![1]),
            ],
        ),
        (
            "another inside",
            vec![
                block(b"a", 0, 2, full()),
                block(b"b", 0, 1, vec![1]),
                block(b"a", 1, 2, vec![1]),
            ],
        ),
    ];
    for (what, lie) in lies {
        let error = read_forged(&lie).expect_err(what);
        assert!(matches!(&error, Error::Corrupt { .. }), "{what}: {error}");
    }
    read_forged(&[block(b"a", 0, 2, full()), block(b"a", 1, 2, vec![1])]).unwrap();
}

#[test]
fn nothing_hides_between_the_records_and_the_index() {
    let good = forge(&tiny(Codec::None), &[raw_chunk(&[(0, 1, 1)])]);
    read_all(good.clone()).unwrap();
    let (index, footer) = (forge::index(&good).unwrap(), good.len() - forge::FOOTER);
    for at in [forge::HEADER, index.start] {
        let mut bad = good.clone();
        bad.splice(at..at, [0; 100]);
        for field in [16, 32] {
            let number = &mut bad[footer + 100 + field..][..8];
            let moved = u64::from_le_bytes((&*number).try_into().unwrap()) + 100;
            number.copy_from_slice(&moved.to_le_bytes());
        }
        reseal(&mut bad);
        let error = read_all(bad).unwrap_err();
        assert!(
            matches!(
                &error,
                Error::Corrupt {
                    part: Part::Index,
                    ..
                }
            ),
            "{at}: {error}"
        );
    }
}

#[test]
fn overlaps_are_told() {
    let cases: [&[Forged]; 4] = [
        &[raw_chunk(&[(0, 1, 2), (0, 2, 1)])],
        &[raw_chunk(&[(0, 1, 1)]), raw_chunk(&[(0, 1, 1)])],
        &[
            raw_chunk(&[(3, 9, 1)]),
            raw_chunk(&[(3, 1, 1)]),
            raw_chunk(&[(3, 8, 9)]),
        ],
        &[raw_chunk(&[(0, 1, 9)]), raw_chunk(&[(0, 4, 1)])],
    ];
    for case in cases {
        let error = read_forged(case).unwrap_err();
        assert!(matches!(error, Error::Overlap { .. }), "{error}");
    }
    read_forged(&[
        raw_chunk(&[(0, 1, 2), (1, 1, 2), (0, 3, 1)]),
        raw_chunk(&[(0, 0, 1)]),
    ])
    .unwrap();
}

#[test]
fn bytes_that_do_not_decode_are_told() {
    let runs = [(0, 1, 4)];
    let other = vec![7; 3 * PAGE];
    let lz4 = lz4_flex::block::compress(&other);
    let zstd = zstd::bulk::compress(&other, 1).unwrap();
    let longer = zstd::bulk::compress(&[7; 5 * PAGE], 1).unwrap();
    for (codec, stored) in [
        (1, lz4),
        (2, zstd),
        (2, longer),
        (1, vec![]),
        (2, vec![]),
        (3, vec![]),
        (3, noise(3, 99)),
    ] {
        let error = read_forged(&[Forged::chunk(codec, &runs, stored)]).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Codec {
                    part: Part::Chunk(0),
                    ..
                }
            ),
            "{codec}: {error}"
        );
    }
    let gzip = |pages: usize, more: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(1));
        std::io::Write::write_all(&mut encoder, &vec![7; pages * PAGE]).unwrap();
        Forged::chunk(
            3,
            &runs,
            [encoder.finish().unwrap(), more.to_vec()].concat(),
        )
    };
    for bad in [gzip(3, b""), gzip(5, b""), gzip(4, b"more")] {
        let error = read_forged(&[bad]).unwrap_err();
        assert!(matches!(error, Error::Codec { .. }), "{error}");
    }
    read_forged(&[gzip(4, b"")]).unwrap();
    let good = zstd::bulk::compress(&vec![7; 4 * PAGE], 1).unwrap();
    read_forged(&[Forged::chunk(2, &runs, good)]).unwrap();
}

#[test]
fn every_number_of_index_and_footer_may_lie() {
    let good = tiny(Codec::Zstd(1));
    let index = forge::index(&good).unwrap();
    for at in index.start..good.len() - 72 {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut bad = good.clone();
            bad[at] = value;
            if bad == good {
                continue;
            }
            reseal(&mut bad);
            // The record headers in the file are intact, so every difference must be found.
            let outcome = read_all(bad);
            // Reserved bytes of the footer are free for later minor versions.
            let reserved = good.len() - forge::FOOTER + 80..good.len() - forge::FOOTER + 88;
            assert_eq!(
                outcome.is_ok(),
                reserved.contains(&at),
                "byte {at} as {value}: {outcome:?}"
            );
        }
    }
    // Eight bytes at a time, so that whole numbers become extreme.
    for at in index.start..good.len() - 80 {
        for value in [
            u64::MAX,
            u64::MAX - 4095,
            1 << 63,
            1 << 32,
            u64::from(u32::MAX),
        ] {
            let mut bad = good.clone();
            bad[at..at + 8].copy_from_slice(&value.to_le_bytes());
            reseal(&mut bad);
            let _ = read_all(bad.clone());
            reseal_records(&mut bad);
            reseal(&mut bad);
            let _ = read_all(bad);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn nothing_panics(
        codec in 0..4usize,
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        fix_records in any::<bool>(),
    ) {
        let mut bytes = tiny(CODECS[codec]);
        for (at, value) in edits {
            let at = at.index(bytes.len() - 8);
            bytes[at] = value;
        }
        if fix_records {
            reseal_records(&mut bytes);
        }
        reseal(&mut bytes);
        prop_assert!(records(&bytes).len() < 1000);
        let _ = read_all(bytes);
    }

    #[test]
    fn garbage_is_not_an_image(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
        prop_assert!(read_all(bytes).is_err());
    }
}
