//! Compression of one chunk or block: always whole buffers of known length.

use std::fmt;
use std::io::{Read, Write};
use std::str::FromStr;

use crate::error::Error;

/// How pages and sections are compressed.
///
/// Written as `none`, `lz4`, `zstd[:LEVEL]` or `gzip[:LEVEL]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Codec {
    /// Uncompressed.
    None,
    /// The LZ4 block format.
    Lz4,
    /// One zstd frame, level 1 to 19.
    Zstd(i32),
    /// One gzip member (RFC 1952), level 1 to 9.
    Gzip(u32),
}

impl Default for Codec {
    fn default() -> Self {
        Codec::Zstd(1)
    }
}

impl Codec {
    pub(crate) fn kind(self) -> Kind {
        match self {
            Codec::None => Kind::None,
            Codec::Lz4 => Kind::Lz4,
            Codec::Zstd(_) => Kind::Zstd,
            Codec::Gzip(_) => Kind::Gzip,
        }
    }

    pub(crate) fn level(self) -> u8 {
        match self {
            Codec::None | Codec::Lz4 => 0,
            Codec::Zstd(level) => level.clamp(1, 19) as u8,
            Codec::Gzip(level) => level.clamp(1, 9) as u8,
        }
    }

    /// From the two bytes of the header; `None` if they name no codec.
    pub(crate) fn from_bytes(kind: u8, level: u8) -> Option<Self> {
        match (Kind::from_byte(kind)?, level) {
            (Kind::None, 0) => Some(Codec::None),
            (Kind::Lz4, 0) => Some(Codec::Lz4),
            (Kind::Zstd, 1..=19) => Some(Codec::Zstd(level.into())),
            (Kind::Gzip, 1..=9) => Some(Codec::Gzip(level.into())),
            _ => None,
        }
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Codec::None | Codec::Lz4 => f.write_str(self.kind().name()),
            Codec::Zstd(level) => write!(f, "zstd:{level}"),
            Codec::Gzip(level) => write!(f, "gzip:{level}"),
        }
    }
}

impl FromStr for Codec {
    type Err = Error;

    fn from_str(given: &str) -> Result<Self, Error> {
        let bad = |reason: &str| Error::BadCodec {
            given: given.into(),
            reason: reason.into(),
        };
        let (name, level) = match given.split_once(':') {
            Some((name, level)) => {
                let level: u32 = level
                    .parse()
                    .map_err(|_| bad("the level is not a number"))?;
                (name, Some(level))
            }
            None => (given, None),
        };
        match (name, level) {
            ("none", None) => Ok(Codec::None),
            ("lz4", None) => Ok(Codec::Lz4),
            ("none" | "lz4", Some(_)) => Err(bad("it has no levels")),
            ("zstd", None) => Ok(Codec::Zstd(1)),
            ("zstd", Some(level @ 1..=19)) => Ok(Codec::Zstd(level as i32)),
            ("zstd", Some(_)) => Err(bad("its levels are 1 to 19")),
            ("gzip", None) => Ok(Codec::Gzip(1)),
            ("gzip", Some(level @ 1..=9)) => Ok(Codec::Gzip(level)),
            ("gzip", Some(_)) => Err(bad("its levels are 1 to 9")),
            _ => Err(bad("there is no codec of this name")),
        }
    }
}

/// The codec of one stored record, without the level, which a decoder does not need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Uncompressed.
    None = 0,
    /// The LZ4 block format.
    Lz4 = 1,
    /// One zstd frame.
    Zstd = 2,
    /// One gzip member.
    Gzip = 3,
}

impl Kind {
    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        [Kind::None, Kind::Lz4, Kind::Zstd, Kind::Gzip]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }

    /// The name used on the command line and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Kind::None => "none",
            Kind::Lz4 => "lz4",
            Kind::Zstd => "zstd",
            Kind::Gzip => "gzip",
        }
    }
}

/// One thread's compressor; keeps its working memory from chunk to chunk.
pub(crate) struct Encoder {
    codec: Codec,
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

impl Encoder {
    pub(crate) fn new(codec: Codec) -> Self {
        let zstd = match codec {
            Codec::Zstd(_) => zstd::bulk::Compressor::new(codec.level().into()).ok(),
            _ => None,
        };
        Encoder { codec, zstd }
    }

    /// The size of the output buffer that [`Encoder::encode`] needs for `raw` bytes of input.
    pub(crate) fn bound(&self, raw: usize) -> usize {
        match self.codec {
            Codec::None => 0,
            Codec::Lz4 => lz4_flex::block::get_maximum_output_size(raw),
            Codec::Zstd(_) | Codec::Gzip(_) => raw,
        }
    }

    /// Compresses into `out` and returns the length, or `None` when the result is not smaller (or the compressor
    /// fails): then the raw bytes are stored instead.
    pub(crate) fn encode(&mut self, raw: &[u8], out: &mut [u8]) -> Option<usize> {
        let stored = match self.codec {
            Codec::None => None,
            Codec::Lz4 => lz4_flex::block::compress_into(raw, out).ok(),
            Codec::Zstd(_) => self.zstd.as_mut()?.compress_to_buffer(raw, out).ok(),
            Codec::Gzip(_) => {
                let room = out.len();
                let level = flate2::Compression::new(self.codec.level().into());
                let mut encoder = flate2::write::GzEncoder::new(out, level);
                encoder.write_all(raw).ok()?;
                Some(room - encoder.finish().ok()?.len())
            }
        };
        stored.filter(|stored| *stored < raw.len())
    }
}

/// Decodes `stored` into exactly `raw`; a result of another length is an error.
pub(crate) fn decode(kind: Kind, stored: &[u8], raw: &mut [u8]) -> Result<(), String> {
    let length = match kind {
        Kind::None => {
            if stored.len() == raw.len() {
                raw.copy_from_slice(stored);
            }
            stored.len()
        }
        Kind::Lz4 => {
            lz4_flex::block::decompress_into(stored, raw).map_err(|error| error.to_string())?
        }
        Kind::Zstd => {
            zstd::bulk::decompress_to_buffer(stored, raw).map_err(|error| error.to_string())?
        }
        Kind::Gzip => {
            let mut decoder = flate2::bufread::GzDecoder::new(stored);
            decoder.read_exact(raw).map_err(|error| error.to_string())?;
            // Reading up to the end makes the decoder check its CRC.
            if decoder.read(&mut [0]).map_err(|error| error.to_string())? != 0 {
                return Err(format!("it is longer than its {} bytes", raw.len()));
            }
            if !decoder.into_inner().is_empty() {
                return Err("there are bytes after its end".into());
            }
            raw.len()
        }
    };
    if length != raw.len() {
        return Err(format!("it gives {length} bytes and not {}", raw.len()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Codec; 5] = [
        Codec::None,
        Codec::Lz4,
        Codec::Zstd(1),
        Codec::Zstd(19),
        Codec::Gzip(6),
    ];

    #[test]
    fn names_round_trip() {
        for codec in ALL {
            assert_eq!(codec.to_string().parse::<Codec>().unwrap(), codec);
            assert_eq!(
                Codec::from_bytes(codec.kind() as u8, codec.level()),
                Some(codec)
            );
        }
        assert_eq!("zstd".parse::<Codec>().unwrap(), Codec::default());
        for bad in [
            "", "zst", "zstd:0", "zstd:20", "zstd:", "zstd:-1", "gzip:10", "lz4:1", "none:0",
            "zstd:1:1",
        ] {
            assert!(
                matches!(bad.parse::<Codec>(), Err(Error::BadCodec { .. })),
                "{bad}"
            );
        }
    }

    #[test]
    fn wrong_lengths_are_errors() {
        let raw = vec![7; 10_000];
        for codec in ALL {
            let mut encoder = Encoder::new(codec);
            let mut out = vec![0; encoder.bound(raw.len())];
            let stored = match encoder.encode(&raw, &mut out) {
                Some(length) => &out[..length],
                None => &raw[..],
            };
            let mut back = vec![0; raw.len()];
            decode(codec.kind(), stored, &mut back).unwrap();
            assert_eq!(back, raw);
            for wrong in [0, 1, raw.len() - 1, raw.len() + 1] {
                assert!(
                    decode(codec.kind(), stored, &mut vec![0; wrong]).is_err(),
                    "{codec} into {wrong}"
                );
            }
            for cut in 0..stored.len().min(50) {
                assert!(
                    decode(codec.kind(), &stored[..cut], &mut back).is_err(),
                    "{codec} cut at {cut}"
                );
            }
        }
    }
}
