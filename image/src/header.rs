//! The first 1024 bytes of an image, readable without decoding.

use std::fmt;
use std::io::Read;
use std::path::Path;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::codec::Codec;
use crate::error::{Error, Part, Result, STREAM};

/// The first eight bytes of every image: a non-text byte, the name, and line ends that a text conversion would
/// change.
pub const MAGIC: [u8; 8] = *b"\x89CKPT\r\n\x1a";

/// The length of the header in the file.
pub const HEADER_BYTES: usize = 1024;

/// A version of the file format. Readers accept every minor version of their major version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FormatVersion {
    /// Incremented when older readers cannot read the file.
    pub major: u16,
    /// Incremented for additions that older readers may ignore.
    pub minor: u16,
}

impl FormatVersion {
    /// The version this crate writes.
    pub const CURRENT: Self = FormatVersion { major: 1, minor: 0 };
}

impl fmt::Display for FormatVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// A processor architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arch {
    /// 64-bit x86 (number 1).
    X86_64,
    /// 64-bit ARM (number 2).
    Aarch64,
    /// 64-bit RISC-V (number 3).
    Riscv64,
    /// Unknown number.
    Other(u16),
}

impl Arch {
    /// The architecture of this build.
    pub const fn native() -> Self {
        if cfg!(target_arch = "x86_64") {
            Arch::X86_64
        } else if cfg!(target_arch = "aarch64") {
            Arch::Aarch64
        } else if cfg!(target_arch = "riscv64") {
            Arch::Riscv64
        } else {
            Arch::Other(0)
        }
    }

    fn number(self) -> u16 {
        match self {
            Arch::X86_64 => 1,
            Arch::Aarch64 => 2,
            Arch::Riscv64 => 3,
            Arch::Other(number) => number,
        }
    }

    fn from_number(number: u16) -> Self {
        match number {
            1 => Arch::X86_64,
            2 => Arch::Aarch64,
            3 => Arch::Riscv64,
            other => Arch::Other(other),
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Arch::X86_64 => f.write_str("x86_64"),
            Arch::Aarch64 => f.write_str("aarch64"),
            Arch::Riscv64 => f.write_str("riscv64"),
            Arch::Other(number) => write!(f, "architecture number {number}"),
        }
    }
}

/// The contents of the header.
///
/// The strings have a bounded length; longer ones are cut at a character boundary when written, and NUL characters
/// become spaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Version of the format; a writer always writes [`FormatVersion::CURRENT`].
    pub version: FormatVersion,
    /// Architecture of the job.
    pub arch: Arch,
    /// Bytes of a page: a power of two from 4096 to 65536.
    pub page_size: u32,
    /// Nanoseconds since 1970 at which the checkpoint was taken.
    pub created_unix_ns: u64,
    /// `/proc/sys/kernel/random/boot_id` at the checkpoint.
    pub boot_id: [u8; 16],
    /// Random identity of this image; see [`random_id`].
    pub image_id: [u8; 16],
    /// Pid of the job's first process.
    pub pid: u32,
    /// Number of processes in the job.
    pub processes: u32,
    /// Number of tasks in the job.
    pub threads: u32,
    /// The requested codec; a writer always writes that of its options. Each record has its own.
    pub codec: Codec,
    /// Name of the first process (at most 32 bytes).
    pub comm: String,
    /// Name of the machine (at most 64 bytes).
    pub host: String,
    /// Kernel release and version (at most 128 bytes).
    pub kernel: String,
    /// Model of the processor (at most 64 bytes).
    pub cpu: String,
    /// Command line of the first process (at most 512 bytes).
    pub command_line: String,
}

impl Default for Header {
    fn default() -> Self {
        Header {
            version: FormatVersion::CURRENT,
            arch: Arch::native(),
            page_size: 4096,
            created_unix_ns: 0,
            boot_id: [0; 16],
            image_id: [0; 16],
            pid: 0,
            processes: 0,
            threads: 0,
            codec: Codec::default(),
            comm: String::new(),
            host: String::new(),
            kernel: String::new(),
            cpu: String::new(),
            command_line: String::new(),
        }
    }
}

/// The header in the file's layout; docs/image-format.md has the table.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    major: U16,
    minor: U16,
    header_bytes: U32,
    arch: U16,
    codec: u8,
    level: u8,
    page_size: U32,
    created_unix_ns: U64,
    boot_id: [u8; 16],
    image_id: [u8; 16],
    pid: U32,
    processes: U32,
    threads: U32,
    flags: U32,
    comm: [u8; 32],
    host: [u8; 64],
    kernel: [u8; 128],
    cpu: [u8; 64],
    command_line: [u8; 512],
    reserved: [u8; 112],
    digest: [u8; 32],
}

const _: () = assert!(size_of::<Raw>() == HEADER_BYTES);
const DIGESTED: usize = HEADER_BYTES - 32;

impl Header {
    /// Reads and checks a header from the first [`HEADER_BYTES`] bytes of a stream.
    ///
    /// # Errors
    /// `Empty`, `NotAnImage`, `Truncated`, `NewerVersion`, `Corrupt`, or `Io` when `r` fails.
    pub fn read(r: impl Read) -> Result<Header> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        let path = Path::new(STREAM);
        r.take(HEADER_BYTES as u64)
            .read_to_end(&mut bytes)
            .map_err(|source| Error::reading(path, source))?;
        Header::parse(&bytes, path)
    }

    /// Checks from the outside in, so that the error names the outermost fault.
    pub(crate) fn parse(bytes: &[u8], path: &Path) -> Result<Header> {
        let known = bytes.len().min(MAGIC.len());
        if bytes.is_empty() {
            return Err(Error::Empty { path: path.into() });
        }
        if bytes[..known] != MAGIC[..known] {
            let reason = "it does not begin with the magic bytes of one".into();
            return Err(Error::NotAnImage {
                path: path.into(),
                reason,
            });
        }
        let Ok((raw, _)) = Raw::ref_from_prefix(bytes) else {
            return Err(Error::truncated(
                path,
                format!("it ends in the header, after {} bytes", bytes.len()),
            ));
        };
        let corrupt = |reason: String| Error::corrupt(path, Part::Header, reason);
        let version = FormatVersion {
            major: raw.major.get(),
            minor: raw.minor.get(),
        };
        if version.major > FormatVersion::CURRENT.major {
            return Err(Error::NewerVersion {
                path: path.into(),
                found: version,
            });
        }
        if *blake3::hash(&bytes[..DIGESTED]).as_bytes() != raw.digest {
            return Err(corrupt("its bytes do not match its digest".into()));
        }
        if version.major != FormatVersion::CURRENT.major {
            return Err(corrupt(format!(
                "it says format {version}, which does not exist"
            )));
        }
        if raw.header_bytes.get() as usize != HEADER_BYTES {
            return Err(corrupt(format!(
                "it says it has {} bytes",
                raw.header_bytes
            )));
        }
        let page_size = raw.page_size.get();
        if !valid_page_size(page_size) {
            return Err(corrupt(format!("it says pages have {page_size} bytes")));
        }
        let codec = Codec::from_bytes(raw.codec, raw.level).ok_or_else(|| {
            corrupt(format!(
                "it names codec {} at level {}",
                raw.codec, raw.level
            ))
        })?;
        let text = |field: &str, bytes: &[u8]| {
            text_from(bytes)
                .ok_or_else(|| corrupt(format!("its field {field} is not text padded with zeros")))
        };
        Ok(Header {
            version,
            arch: Arch::from_number(raw.arch.get()),
            page_size,
            created_unix_ns: raw.created_unix_ns.get(),
            boot_id: raw.boot_id,
            image_id: raw.image_id,
            pid: raw.pid.get(),
            processes: raw.processes.get(),
            threads: raw.threads.get(),
            codec,
            comm: text("comm", &raw.comm)?,
            host: text("host", &raw.host)?,
            kernel: text("kernel", &raw.kernel)?,
            cpu: text("cpu", &raw.cpu)?,
            command_line: text("command_line", &raw.command_line)?,
        })
    }

    /// The header's bytes with their digest, with the current version and `codec` instead of its own.
    pub(crate) fn encode(&self, codec: Codec) -> [u8; HEADER_BYTES] {
        let mut raw = Raw::new_zeroed();
        raw.magic = MAGIC;
        raw.major.set(FormatVersion::CURRENT.major);
        raw.minor.set(FormatVersion::CURRENT.minor);
        raw.header_bytes.set(HEADER_BYTES as u32);
        raw.arch.set(self.arch.number());
        raw.codec = codec.kind() as u8;
        raw.level = codec.level();
        raw.page_size.set(self.page_size);
        raw.created_unix_ns.set(self.created_unix_ns);
        raw.boot_id = self.boot_id;
        raw.image_id = self.image_id;
        raw.pid.set(self.pid);
        raw.processes.set(self.processes);
        raw.threads.set(self.threads);
        text_into(&self.comm, &mut raw.comm);
        text_into(&self.host, &mut raw.host);
        text_into(&self.kernel, &mut raw.kernel);
        text_into(&self.cpu, &mut raw.cpu);
        text_into(&self.command_line, &mut raw.command_line);
        raw.digest = *blake3::hash(&raw.as_bytes()[..DIGESTED]).as_bytes();
        let mut bytes = [0; HEADER_BYTES];
        bytes.copy_from_slice(raw.as_bytes());
        bytes
    }
}

pub(crate) fn valid_page_size(page_size: u32) -> bool {
    page_size.is_power_of_two() && (4096..=65536).contains(&page_size)
}

fn text_into(text: &str, place: &mut [u8]) {
    let mut end = text.len().min(place.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    place[..end].copy_from_slice(&text.as_bytes()[..end]);
    place[..end]
        .iter_mut()
        .filter(|byte| **byte == 0)
        .for_each(|byte| *byte = b' ');
}

fn text_from(place: &[u8]) -> Option<String> {
    let end = place
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(place.len());
    let (text, padding) = place.split_at(end);
    if padding.iter().any(|byte| *byte != 0) {
        return None;
    }
    std::str::from_utf8(text).ok().map(str::to_owned)
}

/// Sixteen random bytes from the kernel, for [`Header::image_id`].
///
/// # Errors
/// When `/dev/urandom` cannot be read.
pub fn random_id() -> Result<[u8; 16]> {
    let mut id = [0; 16];
    let path = Path::new("/dev/urandom");
    let read = std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut id));
    read.map_err(|source| Error::Io {
        path: path.into(),
        action: "read random bytes",
        source,
    })?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_cut_strings() {
        let header = Header {
            comm: "é".repeat(40),
            host: "a\0b".into(),
            command_line: "x".repeat(1000),
            codec: Codec::Gzip(9),
            image_id: random_id().unwrap(),
            created_unix_ns: u64::MAX,
            arch: Arch::Other(77),
            ..Header::default()
        };
        let read = Header::read(&header.encode(Codec::Lz4)[..]).unwrap();
        assert_eq!(read.comm, "é".repeat(16));
        assert_eq!(read.host, "a b");
        assert_eq!(read.command_line, "x".repeat(512));
        assert_eq!(read.codec, Codec::Lz4);
        assert_eq!((read.image_id, read.arch), (header.image_id, header.arch));
        let cut = Header {
            comm: "aé".repeat(40),
            ..Header::default()
        };
        assert_eq!(
            Header::read(&cut.encode(Codec::None)[..])
                .unwrap()
                .comm
                .len(),
            31
        );
    }

    #[test]
    fn every_flip_and_every_cut_is_told() {
        let good = Header::default().encode(Codec::None);
        for at in 0..good.len() {
            let mut bad = good;
            bad[at] ^= 0x10;
            let error = Header::read(&bad[..]).unwrap_err();
            match at {
                0..8 => assert!(matches!(error, Error::NotAnImage { .. }), "{at}: {error}"),
                8..10 => assert!(matches!(error, Error::NewerVersion { .. }), "{at}: {error}"),
                _ => assert!(
                    matches!(
                        error,
                        Error::Corrupt {
                            part: Part::Header,
                            ..
                        }
                    ),
                    "{at}: {error}"
                ),
            }
            let error = Header::read(&good[..at]).unwrap_err();
            match at {
                0 => assert!(matches!(error, Error::Empty { .. })),
                _ => assert!(matches!(error, Error::Truncated { .. }), "{at}: {error}"),
            }
        }
    }
}
