//! Small byte parsers shared by the readers of `/proc`.

use std::borrow::Cow;
use std::str::FromStr;

/// Lines without their newline; the empty rest after the last newline is not a line.
pub(crate) fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.strip_suffix(b"\n")
        .unwrap_or(text)
        .split(|&byte| byte == b'\n')
}

/// Fields separated by blanks and tabs.
pub(crate) fn fields(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(u8::is_ascii_whitespace)
        .filter(|field| !field.is_empty())
}

/// `key`, separator, value; both trimmed of blanks.
pub(crate) fn key_value(line: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let at = line.iter().position(|&byte| byte == separator)?;
    Some((line[..at].trim_ascii(), line[at + 1..].trim_ascii()))
}

/// A decimal number, with a sign where `T` has one.
pub(crate) fn dec<T: FromStr>(text: &[u8]) -> Option<T> {
    std::str::from_utf8(text.trim_ascii()).ok()?.parse().ok()
}

/// A hexadecimal number, `0x` allowed.
pub(crate) fn hex(text: &[u8]) -> Option<u64> {
    radix(
        text.trim_ascii()
            .strip_prefix(b"0x")
            .unwrap_or(text.trim_ascii()),
        16,
    )
}

/// An octal number.
pub(crate) fn oct(text: &[u8]) -> Option<u64> {
    radix(text.trim_ascii(), 8)
}

fn radix(text: &[u8], radix: u32) -> Option<u64> {
    // from_str_radix would take a leading plus sign.
    text.first().filter(|byte| byte.is_ascii_hexdigit())?;
    u64::from_str_radix(std::str::from_utf8(text).ok()?, radix).ok()
}

/// `MAJOR:MINOR`, each in the given radix (hexadecimal in maps and locks, decimal in mountinfo).
pub(crate) fn device(text: &[u8], base: u32) -> Option<(u32, u32)> {
    let (major, minor) = key_value(text, b':')?;
    Some((
        radix(major, base)?.try_into().ok()?,
        radix(minor, base)?.try_into().ok()?,
    ))
}

/// The kernel's internal `dev_t` of fdinfo (`sdev:`): 12 bits of major above 20 bits of minor.
pub(crate) fn kernel_device(dev: u64) -> (u32, u32) {
    ((dev >> 20) as u32, (dev & 0xf_ffff) as u32)
}

/// Undoes `\ooo`, as `seq_path` and `mangle` in the kernel's `fs/seq_file.c` write it.
pub(crate) fn unescape_octal(text: &[u8]) -> Cow<'_, [u8]> {
    if !text.contains(&b'\\') {
        return Cow::Borrowed(text);
    }
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        let escape = match rest {
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] => {
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        plain.push(escape.unwrap_or(first));
        rest = if escape.is_some() { &rest[4..] } else { tail };
    }
    Cow::Owned(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_escapes() {
        assert_eq!(&*unescape_octal(br"/a\012b\040c"), b"/a\nb c");
        assert_eq!(&*unescape_octal(br"\134012 \9 \01"), br"\012 \9 \01");
        assert_eq!(&*unescape_octal(br"\377\400"), b"\xff\\400");
        assert!(matches!(unescape_octal(b"plain"), Cow::Borrowed(_)));
    }

    #[test]
    fn numbers() {
        assert_eq!(dec::<i32>(b" -1\n"), Some(-1));
        assert_eq!(dec::<u8>(b"256"), None);
        assert_eq!(hex(b"0x7f"), Some(0x7f));
        assert_eq!(hex(b"+7f"), None);
        assert_eq!(hex(b""), None);
        assert_eq!(oct(b"0100002"), Some(0o100002));
        assert_eq!(device(b"fe:0a", 16), Some((254, 10)));
        assert_eq!(kernel_device(0x0fe0_0003), (254, 3));
    }

    #[test]
    fn text_without_a_last_newline() {
        assert_eq!(lines(b"a\n\nb").count(), 3);
        assert_eq!(lines(b"a\nb\n").count(), 2);
    }
}
