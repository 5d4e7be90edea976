//! Throughput of the writer relative to a plain write of the same bytes, in one run.
//!
//! `cargo run --release -p ckpt-image --example throughput [MIB] [DIRECTORY]`

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use ckpt_image::{CHUNK_BYTES, Codec, Header, Reader, Writer, WriterOptions};

const PAGE: u32 = 4096;

/// Bytes like those of a heap: short texts, small numbers, pointers, some noise, some zeros.
fn heap(bytes: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252_u64;
    let mut data = Vec::with_capacity(bytes + 64);
    while data.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        match state % 8 {
            0 => data.extend_from_slice(&state.to_le_bytes()),
            1..=2 => data.extend_from_slice(&(0x7f12_3400_0000 + (state >> 44) * 16).to_le_bytes()),
            3..=4 => data.extend_from_slice(&(state >> 52).to_le_bytes()),
            5 => write!(data, "key-{:06}\0\0\0\0\0\0", state >> 46).unwrap_or_default(),
            _ => data.extend_from_slice(&[0; 32]),
        }
    }
    data.truncate(bytes);
    data
}

/// Writes the bytes chunk by chunk, as a capture would, to a new file. Returns the time and the file's length.
fn plain(path: &Path, data: &[u8]) -> std::io::Result<(Duration, u64)> {
    let start = Instant::now();
    let mut file = File::create(path)?;
    let mut buffer = Vec::with_capacity(CHUNK_BYTES);
    for part in data.chunks(CHUNK_BYTES) {
        buffer.clear();
        buffer.extend_from_slice(part);
        file.write_all(&buffer)?;
    }
    Ok((start.elapsed(), data.len() as u64))
}

fn image(
    path: &Path,
    data: &[u8],
    codec: Codec,
) -> Result<(Duration, u64), Box<dyn std::error::Error>> {
    let start = Instant::now();
    let mut writer = Writer::new(
        File::create(path)?,
        &Header::default(),
        WriterOptions { codec, threads: 0 },
    )?;
    for (number, part) in data.chunks(CHUNK_BYTES).enumerate() {
        let mut chunk = writer.chunk();
        chunk.push(0, (number * CHUNK_BYTES) as u64, PAGE, part);
        writer.submit(chunk)?;
    }
    let (_, summary) = writer.finish()?;
    Ok((start.elapsed(), summary.bytes))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let mib: usize = arguments.next().map_or(Ok(512), |mib| mib.parse())?;
    let directory = arguments.next().unwrap_or_else(|| "/dev/shm".into());
    let path = Path::new(&directory).join(format!("ckpt-throughput.{}", std::process::id()));
    let data = heap(mib << 20);
    let speed = |time: Duration| mib as f64 / time.as_secs_f64();
    // The best of five, interleaved, so that other load affects all alike.
    let codecs = [Codec::None, Codec::Lz4, Codec::Zstd(1), Codec::Gzip(1)];
    let mut best = [(Duration::MAX, 0); 5];
    let mut verify = [Duration::MAX; 5];
    for _ in 0..5 {
        best[0] = best[0].min(plain(&path, &data)?);
        std::fs::remove_file(&path)?;
        for (number, codec) in codecs.iter().enumerate() {
            best[number + 1] = best[number + 1].min(image(&path, &data, *codec)?);
            let reader = Reader::open(&path)?;
            let start = Instant::now();
            reader.verify(&mut |_, _| {})?;
            verify[number + 1] = verify[number + 1].min(start.elapsed());
            std::fs::remove_file(&path)?;
        }
    }
    println!("plain write: {:.0} MiB/s", speed(best[0].0));
    for (number, codec) in codecs.iter().enumerate() {
        let (time, bytes) = best[number + 1];
        println!(
            "{codec}: {:.0} MiB/s, {:.2} of a plain write; 1/{:.2} of the size; verify {:.0} MiB/s",
            speed(time),
            best[0].0.as_secs_f64() / time.as_secs_f64(),
            data.len() as f64 / bytes as f64,
            speed(verify[number + 1]),
        );
    }
    Ok(())
}
