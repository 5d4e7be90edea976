//! Every damage to the bytes of an image is detected, and wrong contents are never returned.
#![allow(missing_docs)]

mod common;

use ckpt_image::{Codec, Error, FormatVersion, HEADER_BYTES, Header, Part, Reader, Result};
use common::*;

/// Opens an image and reads everything in every way.
fn read_all(bytes: Vec<u8>) -> Result<()> {
    let reader = Reader::from_bytes(bytes)?;
    let verified = reader.verify(&mut |done, total| assert!(done <= total))?;
    assert_eq!(verified.bytes, reader.bytes());
    let (mut data, mut scratch) = (Vec::new(), Vec::new());
    for chunk in 0..reader.chunks().len() {
        reader.read_chunk(chunk, &mut data, &mut scratch)?;
        let runs: u64 = reader.runs(chunk).map(|run| run.bytes(4096)).sum();
        assert_eq!(runs, data.len() as u64);
    }
    for space in reader.spaces() {
        for (run, chunk) in reader.runs_of(space) {
            assert_eq!(reader.locate(space, run.start).map(|at| at.0), Some(chunk));
            reader.page(space, run.start)?;
        }
    }
    for section in reader.sections() {
        assert_eq!(
            reader.section(section.name(), 1 << 30)?.len() as u64,
            section.raw_len()
        );
    }
    Ok(())
}

/// A read without `verify` returns an error or the bytes that were written.
fn never_wrong(bytes: Vec<u8>, what: &str) {
    let Ok(reader) = Reader::from_bytes(bytes) else {
        return;
    };
    for (space, address, number) in [
        (0, 0x1000, 1),
        (0, 0x6000, 6),
        (1, 0x1000, 101),
        (1, 0x9000, 9),
    ] {
        if let Ok(read) = reader.page(space, address) {
            assert_eq!(read, Some(page(number)), "{what}: {space}:{address:#x}");
        }
    }
    if let Ok(read) = reader.section("meta", 100) {
        assert_eq!(read, b"about the job", "{what}");
    }
}

#[test]
fn every_flipped_byte_is_told() {
    for codec in CODECS {
        let good = if codec == Codec::None {
            tiny(codec)
        } else {
            small(codec).0
        };
        read_all(good.clone()).unwrap();
        let index = forge::index(&good).unwrap();
        let footer = good.len() - forge::FOOTER;
        for at in 0..good.len() {
            for mask in [0x01, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] ^= mask;
                let what = format!("{codec}: byte {at} xor {mask:#x}");
                never_wrong(bad.clone(), &what);
                let error = read_all(bad).expect_err(&what);
                let part = match &error {
                    Error::Corrupt { part, reason, .. } if !reason.is_empty() => part.clone(),
                    Error::NotAnImage { .. } if at < 8 => continue,
                    Error::NewerVersion { .. } if (8..10).contains(&at) => continue,
                    Error::Truncated { .. } if at >= good.len() - 8 => continue,
                    other => panic!("{what}: {other}"),
                };
                match part {
                    // Major version 0 does not exist; the digest detects it as well.
                    Part::Header => assert!((8..HEADER_BYTES).contains(&at), "{what}"),
                    Part::Index => assert!(index.contains(&at), "{what}"),
                    Part::Footer => assert!(at >= footer, "{what}"),
                    Part::Chunk(_) | Part::Section { .. } => {
                        assert!((HEADER_BYTES..index.start).contains(&at), "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn every_cut_is_told() {
    for codec in CODECS {
        let good = small(codec).0;
        let step = if codec == Codec::None { 251 } else { 1 };
        for len in (0..good.len()).step_by(step) {
            match read_all(good[..len].to_vec()).unwrap_err() {
                Error::Empty { .. } => assert_eq!(len, 0),
                Error::Truncated { .. } => assert_ne!(len, 0),
                other => panic!("{codec}: cut to {len}: {other}"),
            }
        }
        for more in [
            &b"\0"[..],
            b"\n",
            &good[good.len() - forge::FOOTER..],
            &good,
        ] {
            let longer = [&good, more].concat();
            assert!(matches!(
                read_all(longer).unwrap_err(),
                Error::Truncated { .. }
            ));
        }
        // Bytes removed from the middle.
        for at in (HEADER_BYTES..good.len() - forge::FOOTER - 64).step_by(step * 7) {
            let mut shorter = good.clone();
            shorter.drain(at..at + 64);
            assert!(
                matches!(read_all(shorter).unwrap_err(), Error::Truncated { .. }),
                "{codec} at {at}"
            );
        }
    }
}

#[test]
fn every_swap_is_told() {
    let good = small(Codec::Zstd(1)).0;
    let unit = 16;
    let units = good.len() / unit;
    let mut swaps = 0;
    for a in 0..units {
        for b in a + 1..units {
            let mut bad = good.clone();
            let (first, second) = bad.split_at_mut(b * unit);
            first[a * unit..][..unit].swap_with_slice(&mut second[..unit]);
            if bad != good {
                swaps += 1;
                read_all(bad).expect_err("swapped");
            }
        }
    }
    assert!(swaps > 5_000, "{swaps}");
}

#[test]
fn parts_of_two_images_do_not_mix() {
    let one = tiny(Codec::None);
    let other = write_small(
        Codec::None,
        Header {
            image_id: [9; 16],
            ..header()
        },
        0,
    )
    .0;
    assert_eq!(one.len(), other.len());
    let footer = one.len() - forge::FOOTER;
    let index = forge::index(&one).unwrap();
    for at in [HEADER_BYTES, index.start, footer] {
        let mixed = [&one[..at], &other[at..]].concat();
        assert!(matches!(
            read_all(mixed).unwrap_err(),
            Error::Corrupt {
                part: Part::Footer,
                ..
            }
        ));
    }
    // Two whole pages swapped: same length, same run, other digest.
    let mut pages = one.clone();
    let chunk = Reader::from_bytes(one).unwrap().chunks()[0];
    let data = chunk.offset as usize + forge::RECORD + 12 * chunk.runs as usize;
    let (first, second) = pages[data..].split_at_mut(PAGE);
    first.swap_with_slice(&mut second[..PAGE]);
    assert!(matches!(
        read_all(pages).unwrap_err(),
        Error::Corrupt {
            part: Part::Chunk(0),
            ..
        }
    ));
}

#[test]
fn versions_of_the_format() {
    let version = |major: u16, minor: u16| {
        let mut bytes = tiny(Codec::None);
        bytes[8..10].copy_from_slice(&major.to_le_bytes());
        bytes[10..12].copy_from_slice(&minor.to_le_bytes());
        bytes[900] = 77; // A field that a later minor version may have added.
        forge::reseal(&mut bytes);
        bytes
    };
    read_all(version(1, 3)).unwrap();
    let error = read_all(version(2, 0)).unwrap_err();
    assert!(matches!(
        error,
        Error::NewerVersion {
            found: FormatVersion { major: 2, minor: 0 },
            ..
        }
    ));
    let text =
        "<stream>: image format 2.0 is newer than this ckpt understands (1.x); use a newer ckpt";
    assert_eq!(error.to_string(), text);
    assert!(matches!(
        read_all(version(0, 9)).unwrap_err(),
        Error::Corrupt {
            part: Part::Header,
            ..
        }
    ));
}

#[test]
fn other_architectures_open_but_are_told() {
    let mut bytes = tiny(Codec::None);
    bytes[16] = 2;
    forge::reseal(&mut bytes);
    let reader = Reader::from_bytes(bytes).unwrap();
    let error = reader.require_arch(ckpt_image::Arch::X86_64).unwrap_err();
    assert!(
        matches!(
            error,
            Error::OtherArch {
                found: ckpt_image::Arch::Aarch64,
                ..
            }
        ),
        "{error}"
    );
    reader.require_arch(ckpt_image::Arch::Aarch64).unwrap();
}

#[test]
fn the_first_damage_in_the_file_is_told() {
    let mut writer = ckpt_image::Writer::new(Vec::new(), &header(), options(Codec::None)).unwrap();
    for n in 0..40 {
        writer
            .submit(chunk_of(&[(0, n << 20, noise(n, 64 * PAGE))]))
            .unwrap();
    }
    let good = writer.finish().unwrap().0;
    let chunks = Reader::from_bytes(good.clone()).unwrap().chunks().to_vec();
    let mut told = Vec::new();
    let mut record = |done, total| told.push((done, total));
    let summary = Reader::from_bytes(good.clone())
        .unwrap()
        .verify(&mut record)
        .unwrap();
    assert_eq!(summary.bytes, good.len() as u64);
    assert_eq!(
        (told.len(), told.last()),
        (41, Some(&(summary.bytes, summary.bytes)))
    );
    for damaged in [[0, 1], [3, 20], [38, 39]] {
        let mut bad = good.clone();
        for chunk in damaged {
            bad[chunks[chunk].offset as usize + 1000] ^= 4;
        }
        let error = Reader::from_bytes(bad)
            .unwrap()
            .verify(&mut |_, _| {})
            .unwrap_err();
        let expected = Part::Chunk(damaged[0]);
        assert!(
            matches!(&error, Error::Corrupt { part, .. } if *part == expected),
            "{error}"
        );
    }
}
