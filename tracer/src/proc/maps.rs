//! Memory maps: `/proc/PID/maps` and `/proc/PID/smaps`.
//!
//! One pass over the text; a mapping without a name costs no allocation. Formats:
//! `show_map_vma` and `show_smap` in the kernel's `fs/proc/task_mmu.c`, proc_pid_maps(5).

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::ProcDir;
use super::parse::{dec, device, fields, hex, key_value, lines, unescape_octal};
use super::silly::is_silly_name;
pub use super::vmflags::VmFlags;
use crate::Result;

/// One mapping of an address space. Sizes are bytes; they and the flags are 0 after [`read_maps`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vma {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// `PROT_READ`.
    pub read: bool,
    /// `PROT_WRITE`.
    pub write: bool,
    /// `PROT_EXEC`.
    pub exec: bool,
    /// `MAP_SHARED` (`VM_MAYSHARE`): a shared mapping of a file opened read-only counts as shared.
    pub shared: bool,
    /// Offset in the file, bytes.
    pub offset: u64,
    /// Device of the file's superblock, major and minor. On btrfs and overlayfs `stat` reports another one.
    pub dev: (u32, u32),
    /// Inode of the file, 0 without one.
    pub inode: u64,
    /// What is mapped.
    pub name: VmaName,
    /// The name as the kernel printed it, if it differs from [`name`](Self::name): it contains `" (deleted)"` or an
    /// escaped newline.
    pub raw_name: Option<Box<[u8]>>,
    /// Flags of the kernel.
    pub flags: VmFlags,
    /// Two-letter flags that [`VmFlags`] has no name for (a newer kernel).
    pub unknown_flags: Vec<String>,
    /// Resident.
    pub rss: u64,
    /// Resident, each page divided by the number of its users.
    pub pss: u64,
    /// Resident and anonymous: of a private file mapping, the pages that were written.
    pub anon: u64,
    /// Swapped out. Page table markers (guard pages, userfaultfd) do not count.
    pub swap: u64,
    /// Locked in memory.
    pub locked: u64,
    /// Size of the mapping's pages; more than 4096 for hugetlbfs.
    pub kernel_page_size: u64,
    /// Protection key, see pkeys(7).
    pub protection_key: u32,
}

/// What is mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmaName {
    /// Anonymous memory without a name.
    Anonymous,
    /// `[anon:NAME]`: private memory named by `PR_SET_VMA_ANON_NAME`.
    AnonNamed(Vec<u8>),
    /// `[anon_shmem:NAME]`: shared anonymous memory, named likewise.
    AnonShmemNamed(Vec<u8>),
    /// `[heap]`: the program break.
    Heap,
    /// `[stack]`: of the first thread.
    Stack,
    /// `[vdso]`
    Vdso,
    /// `[vvar]`
    Vvar,
    /// `[vvar_vclock]` (Linux 6.13)
    VvarVclock,
    /// `[vsyscall]`
    Vsyscall,
    /// Another special name: `[uprobes]`, `anon_inode:[io_uring]`, `socket:[12]` …
    OtherSpecial(String),
    /// A file, also `/dev/zero`, `/memfd:x`, `/SYSV00000000` and everything else with an inode.
    File {
        /// Its path, seen from our root directory, without escapes and without `" (deleted)"`.
        path: PathBuf,
        /// No longer reachable by that path when the map was read.
        deleted: bool,
    },
}

impl Vma {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Always false for mappings that the kernel prints.
    pub fn is_empty(&self) -> bool {
        self.end == self.start
    }

    /// Private memory without a file. (A private mapping of `/dev/zero` is anonymous to the kernel but shows a name;
    /// it counts as a file here, at no cost.)
    pub fn is_private_anonymous(&self) -> bool {
        !self.shared && self.inode == 0
    }
}

/// The memory map with flags and sizes. The kernel walks the page tables for it: about 1 ms for each GiB of 4 KiB
/// pages.
///
/// # Errors
/// See [`ProcDir::read`]; [`crate::Error::ProcSyntax`] when the format is unknown.
pub fn read_smaps(process: impl Into<ProcDir>) -> Result<Vec<Vma>> {
    read(process.into(), "smaps")
}

/// The memory map alone: flags and sizes stay 0.
///
/// # Errors
/// As [`read_smaps`].
pub fn read_maps(process: impl Into<ProcDir>) -> Result<Vec<Vma>> {
    read(process.into(), "maps")
}

fn read(dir: ProcDir, name: &str) -> Result<Vec<Vma>> {
    let text = dir.read(name)?;
    parse(&text, &|path| identities(&dir, path)).map_err(|line| dir.syntax(name, line))
}

/// Device and inode.
type Identity = ((u32, u32), u64);

/// The files to which a path leads from our root and from the target's.
fn identities(dir: &ProcDir, path: &Path) -> Vec<Identity> {
    let inner = path
        .strip_prefix("/")
        .map(|path| dir.join("root").join(path));
    let both = [Some(path.to_owned()), inner.ok()];
    let found = both
        .into_iter()
        .flatten()
        .filter_map(|path| std::fs::metadata(path).ok());
    found
        .map(|file| {
            (
                (libc::major(file.dev()), libc::minor(file.dev())),
                file.ino(),
            )
        })
        .collect()
}

type Lookup<'a> = &'a dyn Fn(&Path) -> Vec<Identity>;

/// Parses maps or smaps; the error is the line that was not understood.
fn parse<'a>(text: &'a [u8], lookup: Lookup<'_>) -> Result<Vec<Vma>, &'a [u8]> {
    let mut vmas: Vec<Vma> = Vec::new();
    for line in lines(text).filter(|line| !line.is_empty()) {
        // A mapping begins with a hexadecimal digit in lower case, a detail with a capital.
        if !line[0].is_ascii_uppercase() {
            vmas.push(header(line, lookup).ok_or(line)?);
        } else if let Some(vma) = vmas.last_mut() {
            detail(vma, line).ok_or(line)?;
        } else {
            return Err(line);
        }
    }
    Ok(vmas)
}

/// `55f8-55f9 rw-p 00000000 fe:00 18504      /path with spaces`
fn header(line: &[u8], lookup: Lookup<'_>) -> Option<Vma> {
    let mut parts = line.splitn(6, |&byte| byte == b' ');
    let range = parts.next()?;
    let dash = range.iter().position(|&byte| byte == b'-')?;
    let (start, end) = (hex(&range[..dash])?, hex(&range[dash + 1..])?);
    let &[read, write, exec, shared] = parts.next()? else {
        return None;
    };
    let offset = hex(parts.next()?)?;
    let dev = device(parts.next()?, 16)?;
    let inode = dec(parts.next()?)?;
    // Padded with blanks up to a column; no name begins with a blank.
    let raw = parts.next().unwrap_or_default().trim_ascii_start();
    let (name, exact) = name(raw, dev, inode, lookup);
    (start <= end).then(|| Vma {
        start,
        end,
        read: read == b'r',
        write: write == b'w',
        exec: exec == b'x',
        shared: shared == b's',
        offset,
        dev,
        inode,
        name,
        raw_name: (!exact).then(|| raw.into()),
        flags: VmFlags::empty(),
        unknown_flags: Vec::new(),
        rss: 0,
        pss: 0,
        anon: 0,
        swap: 0,
        locked: 0,
        kernel_page_size: 0,
        protection_key: 0,
    })
}

/// The name, and whether it equals the kernel's text byte by byte.
fn name(raw: &[u8], dev: (u32, u32), inode: u64, lookup: Lookup<'_>) -> (VmaName, bool) {
    let inside = |prefix: &[u8]| Some(raw.strip_prefix(prefix)?.strip_suffix(b"]")?.to_vec());
    let special = match raw {
        b"" => VmaName::Anonymous,
        b"[heap]" => VmaName::Heap,
        b"[stack]" => VmaName::Stack,
        b"[vdso]" => VmaName::Vdso,
        b"[vvar]" => VmaName::Vvar,
        b"[vvar_vclock]" => VmaName::VvarVclock,
        b"[vsyscall]" => VmaName::Vsyscall,
        [b'/', ..] => return file_name(raw, dev, inode, lookup),
        _ => match (inside(b"[anon:"), inside(b"[anon_shmem:")) {
            (Some(name), _) => VmaName::AnonNamed(name),
            (_, Some(name)) => VmaName::AnonShmemNamed(name),
            _ => VmaName::OtherSpecial(String::from_utf8_lossy(raw).into_owned()),
        },
    };
    (special, true)
}

/// The kernel writes a newline as `\012` but does not escape the backslash, and appends `" (deleted)"`, which may
/// also be part of the name. So of the possible readings the one whose file is the mapped one is taken; if there is
/// none, the likely one.
fn file_name(raw: &[u8], dev: (u32, u32), inode: u64, lookup: Lookup<'_>) -> (VmaName, bool) {
    let plain = unescape_octal(raw);
    let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
    let escaped = *plain != *raw;
    let cut = plain.strip_suffix(b" (deleted)");
    if escaped || cut.is_some() {
        let readings = [raw, &plain];
        for reading in readings.into_iter().skip(usize::from(!escaped)) {
            let found = lookup(Path::new(OsStr::from_bytes(reading)));
            // A device with major 0 has no fixed number: btrfs subvolumes, overlayfs.
            let same = |&((major, minor), ino): &Identity| {
                ino == inode && ((major, minor) == dev || major == 0)
            };
            if found.iter().any(same) {
                let exact = reading == raw;
                return (
                    VmaName::File {
                        path: path(reading),
                        deleted: false,
                    },
                    exact,
                );
            }
        }
    }
    let path = path(cut.unwrap_or(&plain));
    let deleted = cut.is_some() || is_silly_name(&path);
    (VmaName::File { path, deleted }, !escaped && cut.is_none())
}

/// `Rss:      8 kB`, `VmFlags: rd mr mw me`.
fn detail(vma: &mut Vma, line: &[u8]) -> Option<()> {
    let (key, value) = key_value(line, b':')?;
    let bytes = || {
        Some(
            fields(value)
                .next()
                .and_then(dec::<u64>)?
                .saturating_mul(1024),
        )
    };
    match key {
        b"Rss" => vma.rss = bytes()?,
        b"Pss" => vma.pss = bytes()?,
        b"Anonymous" => vma.anon = bytes()?,
        b"Swap" => vma.swap = bytes()?,
        b"Locked" => vma.locked = bytes()?,
        b"KernelPageSize" => vma.kernel_page_size = bytes()?,
        b"ProtectionKey" => vma.protection_key = dec(value)?,
        b"VmFlags" => {
            for letters in fields(value) {
                match VmFlags::from_letters(letters) {
                    Some(flag) => vma.flags |= flag,
                    None => {
                        vma.unknown_flags
                            .push(String::from_utf8_lossy(letters).into_owned());
                    }
                }
            }
        }
        _ => {}
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn no_identities(_: &Path) -> Vec<Identity> {
        Vec::new()
    }

    fn names(text: &str) -> Vec<VmaName> {
        parse(text.as_bytes(), &no_identities)
            .unwrap()
            .into_iter()
            .map(|vma| vma.name)
            .collect()
    }

    fn file(path: &str, deleted: bool) -> VmaName {
        VmaName::File {
            path: path.into(),
            deleted,
        }
    }

    const SMAPS: &str = "\
55c65977a000-55c65977f000 r-xp 00002000 fe:0a 247030                     /usr/bin/cat
Size:                 20 kB
KernelPageSize:        4 kB
MMUPageSize:           4 kB
Rss:                  16 kB
Pss:                   8 kB
Pss_Dirty:             0 kB
Anonymous:             4 kB
Swap:                 12 kB
SwapPss:               1 kB
Locked:                8 kB
THPeligible:           0
ProtectionKey:         3
VmFlags: rd ex mr mw me sl zz q
7ffc86ae1000-7ffc86b02000 rw-p 00000000 00:00 0                          [stack]
KernelPageSize:     2048 kB
VmFlags: rd wr mr mw me gd ac uw
";

    #[test]
    fn a_mapping_with_its_details() {
        let vmas = parse(SMAPS.as_bytes(), &no_identities).unwrap();
        assert_eq!(vmas.len(), 2);
        let cat = &vmas[0];
        assert_eq!((cat.start, cat.end), (0x55c6_5977_a000, 0x55c6_5977_f000));
        assert_eq!(
            (cat.read, cat.write, cat.exec, cat.shared),
            (true, false, true, false)
        );
        assert_eq!(
            (cat.offset, cat.dev, cat.inode),
            (0x2000, (254, 10), 247_030)
        );
        assert_eq!(cat.name, file("/usr/bin/cat", false));
        assert_eq!(cat.raw_name, None);
        assert_eq!((cat.rss, cat.pss, cat.anon), (16 << 10, 8 << 10, 4 << 10));
        assert_eq!(
            (cat.swap, cat.locked, cat.kernel_page_size),
            (12 << 10, 8 << 10, 4 << 10)
        );
        assert_eq!(cat.protection_key, 3);
        assert_eq!(
            cat.flags,
            VmFlags::READ
                | VmFlags::EXEC
                | VmFlags::MAY_READ
                | VmFlags::MAY_WRITE
                | VmFlags::MAY_EXEC
                | VmFlags::SEALED
        );
        assert_eq!(cat.unknown_flags, ["zz", "q"]);
        let stack = &vmas[1];
        assert_eq!(stack.name, VmaName::Stack);
        assert!(stack.flags.contains(VmFlags::GROWS_DOWN | VmFlags::UFFD_WP));
        assert_eq!(stack.kernel_page_size, 2 << 20);
        assert!(stack.is_private_anonymous() && !cat.is_private_anonymous());
    }

    #[test]
    fn names_that_are_no_files() {
        let text = "\
1000-2000 rw-p 00000000 00:00 0 
2000-3000 rw-p 00000000 00:00 0                          [heap]
3000-4000 r--p 00000000 00:00 0                          [vvar]
4000-5000 r--p 00000000 00:00 0                          [vvar_vclock]
5000-6000 r-xp 00000000 00:00 0                          [vdso]
6000-7000 rw-p 00000000 00:00 0                          [anon:my ] name]
7000-8000 rw-s 00000000 00:01 1025                       [anon_shmem:x]
8000-9000 rw-s 00000000 00:0f 10913                      anon_inode:[io_uring]
9000-a000 --xp 00000000 00:00 0                          [uprobes]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";
        let expected = [
            VmaName::Anonymous,
            VmaName::Heap,
            VmaName::Vvar,
            VmaName::VvarVclock,
            VmaName::Vdso,
            VmaName::AnonNamed(b"my ] name".to_vec()),
            VmaName::AnonShmemNamed(b"x".to_vec()),
            VmaName::OtherSpecial("anon_inode:[io_uring]".into()),
            VmaName::OtherSpecial("[uprobes]".into()),
            VmaName::Vsyscall,
        ];
        assert_eq!(names(text), expected);
    }

    #[test]
    fn paths_with_blanks_newlines_and_words_of_the_kernel() {
        let text = r"1000-2000 rw-s 00000000 fe:00 1          /tmp/a b  c
2000-3000 rw-s 00000000 fe:00 2          /tmp/a\012b
3000-4000 rw-s 00000000 fe:00 3          /tmp/gone (deleted)
4000-5000 rw-s 00000000 fe:00 4          /tmp/gone (deleted) (deleted)
5000-6000 rw-s 00000000 00:01 1025       /dev/zero (deleted)
6000-7000 rw-p 00000000 fe:00 7          /[heap]
7000-8000 rw-s 00000000 00:01 8          /memfd:x y (deleted)
8000-9000 rw-s 00000000 fe:00 9          /tmp/ (deleted)
";
        let expected = [
            file("/tmp/a b  c", false),
            file("/tmp/a\nb", false),
            file("/tmp/gone", true),
            file("/tmp/gone (deleted)", true),
            file("/dev/zero", true),
            file("/[heap]", false),
            file("/memfd:x y", true),
            file("/tmp/", true),
        ];
        assert_eq!(names(text), expected);
        let vmas = parse(text.as_bytes(), &no_identities).unwrap();
        let raw: Vec<_> = vmas.iter().map(|vma| vma.raw_name.is_some()).collect();
        assert_eq!(raw, [false, true, true, true, true, false, true, true]);
        assert_eq!(vmas[1].raw_name.as_deref(), Some(&br"/tmp/a\012b"[..]));
    }

    #[test]
    fn the_file_itself_decides_what_its_name_is() {
        let exists = |path: &Path| match path.to_str().unwrap_or_default() {
            "/tmp/x (deleted)" => vec![((254, 0), 5)],
            r"/tmp/back\012slash" => vec![((254, 0), 6)],
            "/btrfs (deleted)" => vec![((0, 33), 7)],
            "/other (deleted)" => vec![((254, 0), 98), ((254, 0), 99)],
            _ => vec![],
        };
        let text = r"1000-2000 rw-s 00000000 fe:00 5          /tmp/x (deleted)
2000-3000 rw-s 00000000 fe:00 6          /tmp/back\012slash
3000-4000 rw-s 00000000 00:20 7          /btrfs (deleted)
4000-5000 rw-s 00000000 fe:00 8          /other (deleted)
5000-6000 rw-s 00000000 fe:00 9          /tmp/x (deleted)
";
        let vmas = parse(text.as_bytes(), &exists).unwrap();
        let got: Vec<_> = vmas.iter().map(|vma| vma.name.clone()).collect();
        let expected = [
            file("/tmp/x (deleted)", false),
            file(r"/tmp/back\012slash", false),
            file("/btrfs (deleted)", false),
            file("/other", true),
            file("/tmp/x", true),
        ];
        assert_eq!(got, expected);
        assert_eq!(vmas[0].raw_name, None);
        assert!(vmas[3].raw_name.is_some());
    }

    #[test]
    fn odd_text_is_an_error_that_names_the_line() {
        let odd = [
            "Size: 4 kB",
            "1000 rw-p 0 00:00 0",
            "1000-2000 rw 0 00:00 0",
            "2000-1000 rw-p 0 00:00 0 ",
            "1000-2000 rw-p 0 00:00",
            "1000-2000 rw-p 0 0000 0 ",
            "1000-99999999999999999 rw-p 0 00:00 0 ",
        ];
        for line in odd {
            assert_eq!(parse(line.as_bytes(), &no_identities), Err(line.as_bytes()));
        }
        let detail = "1000-2000 rw-p 0 00:00 0 \nRss: many kB\n";
        assert_eq!(
            parse(detail.as_bytes(), &no_identities),
            Err(&b"Rss: many kB"[..])
        );
        assert_eq!(parse(b"", &no_identities), Ok(vec![]));
    }
}
