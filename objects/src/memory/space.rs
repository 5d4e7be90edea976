//! A space of the image as the contents of a file: writing, comparing, iterating.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use ckpt_image::Reader;

use crate::SpaceId;
use crate::error::{Error, Result};
use crate::memory::{join, subtract};

/// Writes a space of the image to a file; holes stay holes.
pub fn fill(file: &File, path: &Path, space: SpaceId, size: u64, image: &Reader) -> Result<()> {
    let error = Error::file("write the contents of", path);
    file.set_len(size).map_err(&error)?;
    each_run(space, size, image, |start, bytes| {
        file.write_all_at(bytes, start).map_err(&error)?;
        Ok(true)
    })?;
    Ok(())
}

/// Whether a file of that size has exactly the contents of a space.
pub fn same(file: &File, path: &Path, space: SpaceId, size: u64, image: &Reader) -> Result<bool> {
    let error = Error::file("read", path);
    let mut there = Vec::new();
    let mut runs = Vec::new();
    let same = each_run(space, size, image, |start, bytes| {
        there.resize(bytes.len(), 0);
        runs.push((start, start + bytes.len() as u64));
        match file.read_exact_at(&mut there, start) {
            Ok(()) => Ok(there == bytes),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
            Err(e) => Err(error(e)),
        }
    })?;
    if !same {
        return Ok(false);
    }
    // What the image does not contain is zero.
    there.resize(1 << 20, 0);
    for (mut start, end) in subtract(&[(0, size)], &join(runs)) {
        while start < end {
            let piece = &mut there[..(end - start).min(1 << 20) as usize];
            match file.read_at(piece, start).map_err(&error)? {
                0 => return Ok(false),
                n if piece[..n].iter().any(|byte| *byte != 0) => return Ok(false),
                n => start += n as u64,
            }
        }
    }
    Ok(true)
}

/// Calls `f` with (offset, bytes) of all stored parts of an object of that size, until it returns false. Returns its
/// last result.
pub fn each_run(
    space: SpaceId,
    size: u64,
    image: &Reader,
    mut f: impl FnMut(u64, &[u8]) -> Result<bool>,
) -> Result<bool> {
    let page_size = image.header().page_size;
    let mut chunks: Vec<usize> = image.runs_of(space.0).map(|(_, chunk)| chunk).collect();
    chunks.dedup();
    let (mut data, mut scratch) = (Vec::new(), Vec::new());
    for chunk in chunks {
        image.read_chunk(chunk, &mut data, &mut scratch)?;
        let mut at = 0;
        for run in image.runs(chunk) {
            let len = run.bytes(page_size) as usize;
            if run.space == space.0 && run.start < size {
                let keep = len.min((size - run.start) as usize);
                if !f(run.start, &data[at..at + keep])? {
                    return Ok(false);
                }
            }
            at += len;
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;
    use crate::fixture;

    #[test]
    fn contents_are_compared_with_their_holes() {
        let image = fixture::image(&[(5, 0, b'a'), (5, 3 * 4096, b'b')]);
        let (space, size) = (SpaceId(5), 3 * 4096 + 100);
        let path = Path::new("a file");
        let made = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_TMPFILE)
            .open(std::env::temp_dir());
        let file = made.unwrap();
        fill(&file, path, space, size, &image).unwrap();
        let is_same = || same(&file, path, space, size, &image).unwrap();
        assert!(is_same());
        for at in [0, 5000, size - 1] {
            let mut was = [0];
            file.read_exact_at(&mut was, at).unwrap();
            file.write_all_at(b"x", at).unwrap();
            assert!(!is_same(), "byte {at}");
            file.write_all_at(&was, at).unwrap();
            assert!(is_same());
        }
        file.set_len(size - 1).unwrap();
        assert!(!is_same());
    }
}
