//! The images of one name in a directory: their numbers, and which are kept.

use crate::text::Shown;

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use ckpt_image::Reader;

/// The images `NAME.<counter>.ckpt` of a directory.
#[derive(Clone, Debug)]
pub struct Images {
    directory: PathBuf,
    name: OsString,
}

impl Images {
    /// The images called `name` in `directory`.
    pub fn new(directory: impl Into<PathBuf>, name: impl Into<OsString>) -> Self {
        Images {
            directory: directory.into(),
            name: name.into(),
        }
    }

    /// The path of the image with this number.
    pub fn path(&self, counter: u64) -> PathBuf {
        let mut name = self.name.clone().into_vec();
        name.extend_from_slice(format!(".{counter}.ckpt").as_bytes());
        self.directory.join(OsString::from_vec(name))
    }

    /// The numbers of all existing images, ascending.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn counters(&self) -> io::Result<Vec<u64>> {
        let mut counters = Vec::new();
        for entry in std::fs::read_dir(&self.directory)? {
            counters.extend(counter_of(&entry?.file_name(), &self.name));
        }
        counters.sort_unstable();
        Ok(counters)
    }

    /// The number after the last existing one.
    ///
    /// # Errors
    /// When the directory cannot be read, or contains the largest number.
    pub fn next_counter(&self) -> io::Result<u64> {
        let last = self.counters()?.last().copied().unwrap_or(0);
        last.checked_add(1).ok_or_else(|| {
            io::Error::other(format!(
                "there is no number after {}",
                self.path(last).shown()
            ))
        })
    }

    /// Removes all images older than the newest `keep` valid ones.
    ///
    /// # Errors
    /// When the directory cannot be read or an image cannot be removed.
    pub fn prune(&self, keep: usize) -> io::Result<()> {
        let counters = self.counters()?;
        for counter in superfluous(&counters, keep, |counter| is_good(&self.path(counter))) {
            match std::fs::remove_file(self.path(*counter)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

/// Whether header, footer and index are consistent: the file is a whole image, not a remainder from a full disk or an
/// interrupted copy.
fn is_good(path: &Path) -> bool {
    Reader::open(path).is_ok()
}

/// The numbers (ascending) older than the newest `keep` valid images. With fewer valid ones none is superfluous, so
/// the last valid one stays even for a `keep` of 0.
fn superfluous(counters: &[u64], keep: usize, good: impl Fn(u64) -> bool) -> &[u64] {
    let mut good_ones = (0..counters.len()).rev().filter(|at| good(counters[*at]));
    match good_ones.nth(keep.max(1) - 1) {
        Some(oldest_kept) => &counters[..oldest_kept],
        None => &[],
    }
}

/// The counter in the file name `NAME.<counter>.ckpt`, in our notation: no sign, no leading zero.
fn counter_of(file: &OsStr, name: &OsStr) -> Option<u64> {
    let rest = file.as_bytes().strip_prefix(name.as_bytes())?;
    let digits = rest.strip_prefix(b".")?.strip_suffix(b".ckpt")?;
    let digits = std::str::from_utf8(digits).ok()?;
    let counter: u64 = digits.parse().ok()?;
    (counter.to_string() == digits).then_some(counter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_images_of_the_name_count() {
        let counter = |file: &str| counter_of(file.as_ref(), "job".as_ref());
        assert_eq!(counter("job.1.ckpt"), Some(1));
        assert_eq!(counter("job.18446744073709551615.ckpt"), Some(u64::MAX));
        for other in [
            "job.ckpt",
            "job..ckpt",
            "job.01.ckpt",
            "job.+1.ckpt",
            "job.1.ckpt.tmp",
            "jobs.1.ckpt",
            ".job.1.ckpt",
            "job.x.1.ckpt",
            "job.18446744073709551616.ckpt",
        ] {
            assert_eq!(counter(other), None, "{other}");
        }
    }

    #[test]
    fn the_newest_good_ones_stay() {
        let all = |_| true;
        assert_eq!(superfluous(&[1, 2, 3], 2, all), [1]);
        assert_eq!(superfluous(&[1, 2, 3], 1, all), [1, 2]);
        assert_eq!(superfluous(&[1, 2, 3], 3, all), [0; 0]);
        assert_eq!(superfluous(&[], 1, all), [0; 0]);
        assert_eq!(
            superfluous(&[4, 9], 0, all),
            [4],
            "the last one is never superfluous"
        );
    }

    #[test]
    fn the_last_good_one_is_never_superfluous() {
        assert_eq!(superfluous(&[1, 2, 3], 1, |n| n == 1), [0; 0]);
        assert_eq!(superfluous(&[1, 2, 3], 1, |n| n == 2), [1]);
        assert_eq!(superfluous(&[1, 2, 3, 4], 2, |n| n != 3), [1]);
        assert_eq!(superfluous(&[1, 2, 3], 1, |_| false), [0; 0]);
    }
}
