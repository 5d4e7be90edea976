//! Bytes as text, for messages and JSON.

use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A name of the kernel, which is bytes: invalid UTF-8 becomes `\xNN`, and in such names each backslash `\\`. Valid
/// UTF-8 is unchanged.
pub fn of(bytes: &[u8]) -> String {
    if let Ok(text) = std::str::from_utf8(bytes) {
        return text.to_owned();
    }
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(&chunk.valid().replace('\\', r"\\"));
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

/// The same for a path.
pub fn of_path(path: impl AsRef<Path>) -> String {
    of(path.as_ref().as_os_str().as_bytes())
}

/// Paths in messages.
pub trait Shown {
    /// As [`of`]: unlike that of [`Path::display`], the text identifies the bytes.
    fn shown(&self) -> String;
}

impl Shown for Path {
    fn shown(&self) -> String {
        of_path(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_can_be_told_from_the_text() {
        assert_eq!(of("a\\\u{e4}".as_bytes()), "a\\\u{e4}");
        assert_eq!(of(b"a\xff\\b\xc3"), r"a\xff\\b\xc3");
        assert_eq!(of(b""), "");
    }
}
