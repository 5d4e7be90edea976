//! Edits the snapshot of an image as the input says, and looks into the image: an error, obstacles or a plan, never a panic, a
//! hang, or more memory than 64 MiB and four times the image.
//!
//! The first byte says which image of `bases/` (or of the directory `CKPT_FUZZ_BASES`), the others what is changed.
#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use ciborium::Value;
use ckpt_image::{Codec, Header, Reader};
use libfuzzer_sys::fuzz_target;

#[path = "../../tests/common/forging.rs"]
mod forging;
#[path = "../../tests/measure.rs"]
mod measure;
#[path = "../../tests/common/values.rs"]
mod values;

use forging::Choices;

/// Headers and snapshots of the images that are edited.
static BASES: LazyLock<Vec<(Header, Value)>> = LazyLock::new(|| {
    let own = concat!(env!("CARGO_MANIFEST_DIR"), "/bases");
    let bases = std::fs::read_dir(std::env::var_os("CKPT_FUZZ_BASES").unwrap_or(own.into()));
    let bases = bases.expect("make fuzz has made it").flatten().map(|entry| entry.path());
    let mut bases: Vec<_> = bases.filter(|path| path.extension().is_some_and(|e| e == "ckpt")).collect();
    bases.sort();
    let base = |path: &_| {
        let reader = Reader::open(path).expect("it is an image");
        (reader.header().clone(), forging::snapshot(&reader).1)
    };
    bases.iter().map(base).collect()
});

fuzz_target!(|input: &[u8]| {
    let mut choices = input;
    let (header, base) = &BASES[choices.below(BASES.len())];
    let mut value = base.clone();
    let what = forging::changes(&mut value, &mut choices);
    let image = forging::image(header, &forging::encoded(&value), Codec::None);
    if std::env::var_os("CKPT_FUZZ_KEEP").is_some() {
        println!("{what}");
        std::fs::write("kept.ckpt", &image).expect("the directory is writable");
    }
    measure::within(forging::memory_for(image.len()), || forging::look_into(image, Path::new("forged.ckpt")));
});
