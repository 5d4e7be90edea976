//! Writes the seed corpus of the `image` target: `cargo run --bin seeds` in this directory.

use std::error::Error;
use std::fs;

use ckpt_image::{Codec, Header, Writer, WriterOptions};

fn image(codec: Codec, chunks: u64, section: usize) -> ckpt_image::Result<Vec<u8>> {
    let header = Header { comm: "seed".into(), pid: 1, processes: 1, threads: 1, ..Header::default() };
    let mut writer = Writer::new(Vec::new(), &header, WriterOptions { codec, threads: 1 })?;
    for number in 0..chunks {
        let mut chunk = writer.chunk();
        chunk.push(number as u32 % 2, number << 16, 4096, &[number as u8; 8192]);
        chunk.push(7, number << 13, 4096, &[1; 4096]);
        writer.submit(chunk)?;
    }
    writer.section("meta", 1, b"about the job")?;
    if section > 0 {
        writer.section("long", 2, &vec![3; section])?;
    }
    Ok(writer.finish()?.0)
}

fn main() -> Result<(), Box<dyn Error>> {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/image");
    fs::create_dir_all(directory)?;
    for codec in [Codec::None, Codec::Lz4, Codec::Zstd(1), Codec::Gzip(1)] {
        for (chunks, section) in [(0, 0), (1, 0), (4, 300 << 10)] {
            if codec == Codec::None && section > 0 {
                continue;
            }
            let bytes = image(codec, chunks, section)?;
            for how in 0..3u8 {
                let name = format!("{directory}/{}-{chunks}-{how}", codec.to_string().replace(':', "-"));
                fs::write(name, [&[how][..], &bytes].concat())?;
            }
        }
    }
    Ok(())
}
