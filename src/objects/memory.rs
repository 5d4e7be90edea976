//! Mappings: what is mapped where, and which of its pages the image holds.

use std::fs::{File, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ckpt_tracer::proc::maps::{VmFlags, Vma, VmaName};
use ckpt_tracer::proc::pagemap::{PageCategories, PageQuery, PagemapScanner};
use serde::{Deserialize, Serialize};

use super::{Snapshot, SpaceId, files};
use crate::capture::source::{Collector, Contents, Source};
use crate::error::Obstacle;
use crate::restore::plan::Builder;
use crate::restore::{FilesPolicy, Request};

type Result<T, E = crate::Error> = std::result::Result<T, E>;

/// One mapping.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// `PROT_READ | PROT_WRITE | PROT_EXEC`.
    pub prot: u32,
    /// What is behind it.
    pub backing: Backing,
    /// Properties beyond the protection.
    pub flags: MappingFlags,
    /// Name given by `PR_SET_VMA_ANON_NAME`.
    pub name: Option<Vec<u8>>,
    /// Protection key, pkeys(7).
    pub protection_key: u32,
    /// Guard pages (`MADV_GUARD_INSTALL`) as address ranges.
    pub guards: Vec<(u64, u64)>,
}

/// What is behind a mapping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backing {
    /// Private anonymous memory; pages are in the image unless zero.
    Anonymous,
    /// Private hugetlb memory with pages of this size.
    AnonymousHuge {
        /// Page size in bytes.
        page_size: u64,
    },
    /// A file, private: pages that differ from the file are in the image.
    PrivateFile {
        /// Index in the snapshot's mapped files.
        file: usize,
        /// Bytes.
        offset: u64,
    },
    /// A file, shared: the pages are the file's.
    SharedFile {
        /// Index in the snapshot's mapped files.
        file: usize,
        /// Bytes.
        offset: u64,
        /// The mapping may be made writable (opened for writing).
        writable: bool,
    },
    /// Shared anonymous memory.
    SharedMemory {
        /// Index in the snapshot's shared memory objects.
        object: usize,
        /// Bytes.
        offset: u64,
    },
    /// A memfd or another file that the job holds open, shared: an open file description.
    Description {
        /// Index in the snapshot's descriptions.
        description: usize,
        /// Bytes.
        offset: u64,
        /// MAP_PRIVATE.
        private: bool,
    },
    /// A piece of the kernel's: moved, never copied.
    Kernel(KernelMapping),
}

/// Mappings that the kernel provides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum KernelMapping {
    /// Code of the fast system calls.
    Vdso,
    /// Their data.
    Vvar,
    /// Their paravirtual clocks' data (a mapping of its own since Linux 6.13).
    VvarVclock,
}

bitflags::bitflags! {
    /// Properties of a mapping, as `VmFlags` in `/proc/PID/smaps` shows them.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(transparent)]
    pub struct MappingFlags: u32 {
        /// `MAP_GROWSDOWN`.
        const GROWS_DOWN = 1 << 0;
        /// mlock(2).
        const LOCKED = 1 << 1;
        /// `MLOCK_ONFAULT`.
        const LOCK_ON_FAULT = 1 << 2;
        /// `MAP_NORESERVE`.
        const NO_RESERVE = 1 << 3;
        /// Counted against the commit limit.
        const ACCOUNTED = 1 << 4;
        /// `MADV_DONTFORK`.
        const DONT_FORK = 1 << 5;
        /// `MADV_WIPEONFORK`.
        const WIPE_ON_FORK = 1 << 6;
        /// `MADV_DONTDUMP`.
        const DONT_DUMP = 1 << 7;
        /// `MADV_MERGEABLE`.
        const MERGEABLE = 1 << 8;
        /// `MADV_HUGEPAGE`.
        const HUGE = 1 << 9;
        /// `MADV_NOHUGEPAGE`.
        const NO_HUGE = 1 << 10;
        /// `MADV_SEQUENTIAL`.
        const SEQUENTIAL = 1 << 11;
        /// `MADV_RANDOM`.
        const RANDOM = 1 << 12;
        /// mseal(2).
        const SEALED = 1 << 13;
        /// `MAP_DROPPABLE`.
        const DROPPABLE = 1 << 14;
        /// `MAP_SYNC`.
        const SYNC = 1 << 15;
    }
}

/// A file that is mapped or executed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MappedFile {
    /// Where it was.
    pub path: PathBuf,
    /// What it was.
    pub identity: FileIdentity,
    /// Its whole contents in the image, where no name leads to it any more.
    pub contents: Option<SpaceId>,
}

/// What tells one file's contents from another's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIdentity {
    /// Device, major and minor.
    pub device: (u32, u32),
    /// Inode number.
    pub inode: u64,
    /// Type and permission bits.
    pub mode: u32,
    /// Size in bytes.
    pub size: u64,
    /// Time of the last change of contents, nanoseconds since 1970.
    pub modified_ns: i64,
    /// The build id of an ELF file.
    pub build_id: Option<Vec<u8>>,
}

/// Shared anonymous memory (`MAP_SHARED | MAP_ANONYMOUS`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedMemory {
    /// Its pages in the image.
    pub space: SpaceId,
    /// Size in bytes, as far as it is mapped anywhere in the job.
    pub size: u64,
    /// `/dev/zero (deleted)` inode, which told it from others.
    pub inode: u64,
    /// Page size of hugetlb memory, 0 for ordinary pages.
    pub huge_page_size: u64,
}

/// Refusals and records for one process's mappings.
pub struct Captured {
    /// The mappings, without the vsyscall page.
    pub mappings: Vec<Mapping>,
    /// Index of the executable in the collector's mapped files.
    pub executable: usize,
}

/// Classifies every mapping. `descriptions` tells which descriptions of the process are
/// memfds, by inode.
pub fn capture(
    source: &Source,
    vmas: &[Vma],
    guards: &[(u64, u64)],
    collector: &mut Collector,
) -> Result<Captured> {
    let mut mappings = Vec::with_capacity(vmas.len());
    for vma in vmas {
        if vma.name == VmaName::Vsyscall {
            continue;
        }
        match backing(source, vma, vmas, collector) {
            Ok(backing) => mappings.push(Mapping {
                start: vma.start,
                end: vma.end,
                prot: prot(vma),
                backing,
                flags: mapping_flags(vma),
                name: match &vma.name {
                    VmaName::AnonNamed(name) | VmaName::AnonShmemNamed(name) => Some(name.clone()),
                    _ => None,
                },
                protection_key: vma.protection_key,
                guards: guards_in(vma, guards),
            }),
            Err(obstacle) => collector.obstacles.push(*obstacle),
        }
    }
    let executable = executable(source, vmas, collector)?;
    Ok(Captured {
        mappings,
        executable,
    })
}

fn prot(vma: &Vma) -> u32 {
    let bit = |set: bool, bit: i32| if set { bit as u32 } else { 0 };
    bit(vma.read, libc::PROT_READ)
        | bit(vma.write, libc::PROT_WRITE)
        | bit(vma.exec, libc::PROT_EXEC)
}

fn mapping_flags(vma: &Vma) -> MappingFlags {
    const TABLE: &[(VmFlags, MappingFlags)] = &[
        (VmFlags::GROWS_DOWN, MappingFlags::GROWS_DOWN),
        (VmFlags::LOCKED, MappingFlags::LOCKED),
        (VmFlags::LOCK_ON_FAULT, MappingFlags::LOCK_ON_FAULT),
        (VmFlags::NO_RESERVE, MappingFlags::NO_RESERVE),
        (VmFlags::ACCOUNT, MappingFlags::ACCOUNTED),
        (VmFlags::DONT_COPY, MappingFlags::DONT_FORK),
        (VmFlags::WIPE_ON_FORK, MappingFlags::WIPE_ON_FORK),
        (VmFlags::DONT_DUMP, MappingFlags::DONT_DUMP),
        (VmFlags::MERGEABLE, MappingFlags::MERGEABLE),
        (VmFlags::HUGEPAGE, MappingFlags::HUGE),
        (VmFlags::NO_HUGEPAGE, MappingFlags::NO_HUGE),
        (VmFlags::SEQ_READ, MappingFlags::SEQUENTIAL),
        (VmFlags::RAND_READ, MappingFlags::RANDOM),
        (VmFlags::SEALED, MappingFlags::SEALED),
        (VmFlags::DROPPABLE, MappingFlags::DROPPABLE),
        (VmFlags::SYNC_FAULT, MappingFlags::SYNC),
    ];
    TABLE
        .iter()
        .filter(|(vm, _)| vma.flags.contains(*vm))
        .fold(MappingFlags::empty(), |all, (_, flag)| all | *flag)
}

/// All guard pages (`MADV_GUARD_INSTALL`) of an address space, in order.
pub fn guard_pages(scanner: &PagemapScanner) -> Result<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    if scanner.has_guard() {
        let query = PageQuery {
            required: PageCategories::GUARD,
            report: PageCategories::GUARD,
            ..PageQuery::default()
        };
        scanner.scan(0..crate::holes::TOP, query, |run| {
            found.push((run.start, run.end));
        })?;
    }
    Ok(found)
}

fn guards_in(vma: &Vma, guards: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let first = guards.partition_point(|(_, end)| *end <= vma.start);
    let inside = guards[first..]
        .iter()
        .take_while(|(start, _)| *start < vma.end);
    inside
        .map(|(start, end)| (*start.max(&vma.start), *end.min(&vma.end)))
        .collect()
}

fn backing(
    source: &Source,
    vma: &Vma,
    all: &[Vma],
    collector: &mut Collector,
) -> Result<Backing, Box<Obstacle>> {
    let refuse = |what: &str, reason: &str, remedy: Option<&str>| {
        let object = format!(
            "memory {:#x}-{:#x} of {}",
            vma.start,
            vma.end,
            source.title()
        );
        Box::new(Obstacle {
            object,
            reason: format!("{what} {reason}"),
            remedy: remedy.map(str::to_owned),
        })
    };
    let uffd = VmFlags::UFFD_MISSING | VmFlags::UFFD_WP | VmFlags::UFFD_MINOR;
    if vma.flags.intersects(uffd) {
        return Err(refuse(
            "is registered with userfaultfd,",
            "which is not supported",
            None,
        ));
    }
    if vma.flags.contains(VmFlags::SHADOW_STACK) {
        let remedy = "start the program with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off";
        return Err(refuse(
            "is a shadow stack,",
            "which is not supported",
            Some(remedy),
        ));
    }
    let path = match &vma.name {
        VmaName::Vdso => return Ok(Backing::Kernel(KernelMapping::Vdso)),
        VmaName::Vvar => return Ok(Backing::Kernel(KernelMapping::Vvar)),
        VmaName::VvarVclock => return Ok(Backing::Kernel(KernelMapping::VvarVclock)),
        VmaName::OtherSpecial(name) => {
            return Err(refuse(
                &format!("is {name},"),
                "a kind that is not supported",
                None,
            ));
        }
        VmaName::File { path, .. } => Some(path.as_path()),
        _ => None,
    };
    if vma.flags.contains(VmFlags::HUGETLB) && !path.is_some_and(is_memfd) {
        let ours = path.is_some_and(|p| p == Path::new("/anon_hugepage"));
        return match (ours, vma.shared) {
            (true, false) => Ok(Backing::AnonymousHuge {
                page_size: vma.kernel_page_size,
            }),
            (true, true) => Ok(shared_memory(source, vma, all, collector)),
            (false, _) => Err(refuse(
                "is a hugetlbfs file,",
                "a kind that is not supported",
                None,
            )),
        };
    }
    let Some(path) = path else {
        if vma.shared {
            return Ok(shared_memory(source, vma, all, collector));
        }
        return Ok(Backing::Anonymous);
    };
    if vma.shared && path == Path::new("/dev/zero") {
        return Ok(shared_memory(source, vma, all, collector));
    }
    if path == Path::new("/[aio]") {
        let remedy = "let the program end its asynchronous I/O (io_destroy) before the checkpoint";
        return Err(refuse(
            "is the ring of an AIO context,",
            "not supported yet",
            Some(remedy),
        ));
    }
    if is_memfd(path) {
        let description = memfd_mapping(source, vma, all, collector);
        return Ok(Backing::Description {
            description,
            offset: vma.offset,
            private: !vma.shared,
        });
    }
    if path.starts_with("/SYSV00000000") || path.to_string_lossy().starts_with("/SYSV") {
        return Err(refuse(
            "is System V shared memory,",
            "which is not supported yet",
            None,
        ));
    }
    if vma.flags.contains(VmFlags::PFN_MAP) || vma.flags.contains(VmFlags::IO) {
        let what = format!("is memory of the device {},", path.display());
        return Err(refuse(
            &what,
            "which only the device's driver can bring back",
            None,
        ));
    }
    let file = mapped_file(source, vma, path, all, collector);
    Ok(if vma.shared {
        Backing::SharedFile {
            file,
            offset: vma.offset,
            writable: vma.flags.contains(VmFlags::MAY_WRITE),
        }
    } else {
        Backing::PrivateFile {
            file,
            offset: vma.offset,
        }
    })
}

fn is_memfd(path: &Path) -> bool {
    path.to_string_lossy().starts_with("/memfd:")
}

/// Ranges of memory in which the object with that inode is mapped: (offset, address, bytes).
fn views(vma: &Vma, all: &[Vma], private: bool) -> Vec<(u64, u64, u64)> {
    let mut views: Vec<_> = all
        .iter()
        .filter(|v| (v.dev, v.inode) == (vma.dev, vma.inode) && v.shared != private)
        .map(|v| (v.offset, v.start, v.end - v.start))
        .collect();
    views.sort_unstable();
    // Every offset once.
    let mut done = 0;
    views.retain_mut(|(offset, address, len)| {
        let skip = done.max(*offset) - *offset;
        if skip >= *len {
            return false;
        }
        (*offset, *address, *len) = (*offset + skip, *address + skip, *len - skip);
        done = *offset + *len;
        true
    });
    views
}

/// The file behind a mapping, through `/proc/PID/map_files` (which wants
/// CAP_CHECKPOINT_RESTORE), or its views in memory.
fn contents_of(source: &Source, vma: &Vma, all: &[Vma], private: bool) -> (Contents, u64) {
    let name = format!("map_files/{:x}-{:x}", vma.start, vma.end);
    if let Ok(file) = File::open(source.dir.join(name))
        && let Ok(meta) = file.metadata()
    {
        let size = meta.len();
        return (Contents::File(file, size), size);
    }
    let views = views(vma, all, private);
    let size = views.last().map_or(0, |(offset, _, len)| offset + len);
    (Contents::Memory(source.pid, views), size)
}

fn shared_memory(source: &Source, vma: &Vma, all: &[Vma], collector: &mut Collector) -> Backing {
    let known = collector
        .shared_memory
        .iter()
        .position(|m| m.inode == vma.inode);
    let object = known.unwrap_or_else(|| {
        let (contents, size) = contents_of(source, vma, all, false);
        let space = collector.space_for(contents);
        let hugetlb = vma.flags.contains(VmFlags::HUGETLB);
        collector.shared_memory.push(SharedMemory {
            space,
            size,
            inode: vma.inode,
            huge_page_size: if hugetlb { vma.kernel_page_size } else { 0 },
        });
        collector.shared_memory.len() - 1
    });
    Backing::SharedMemory {
        object,
        offset: vma.offset,
    }
}

/// The description behind a mapped memfd: one that the job holds open, or, when its
/// descriptors are all closed, one made for the purpose.
fn memfd_mapping(source: &Source, vma: &Vma, all: &[Vma], collector: &mut Collector) -> usize {
    let open = collector.descriptions.iter().position(|d| {
        matches!(&d.kind, files::Kind::MemFd(m) if m.inode == vma.inode)
            && (!vma.shared || !vma.flags.contains(VmFlags::MAY_WRITE) || d.flags & 3 == 2)
    });
    open.unwrap_or_else(|| {
        let (contents, size) = contents_of(source, vma, all, !vma.shared);
        let name = match &vma.name {
            VmaName::File { path, .. } => path
                .as_os_str()
                .as_bytes()
                .strip_prefix(b"/memfd:")
                .unwrap_or_default()
                .to_vec(),
            _ => Vec::new(),
        };
        let hugetlb = vma.flags.contains(VmFlags::HUGETLB);
        let contents = collector.space_for(contents);
        collector.descriptions.push(files::Description {
            kind: files::Kind::MemFd(files::memfd::MemFd {
                name,
                inode: vma.inode,
                size,
                mode: 0o777,
                seals: 0,
                offset: 0,
                huge_page_size: if hugetlb { vma.kernel_page_size } else { 0 },
                contents,
            }),
            flags: libc::O_RDWR as u32,
            owner: None,
        });
        collector.descriptions.len() - 1
    })
}

fn mapped_file(
    source: &Source,
    vma: &Vma,
    path: &Path,
    all: &[Vma],
    collector: &mut Collector,
) -> usize {
    let deleted = matches!(vma.name, VmaName::File { deleted: true, .. });
    collector.mapped_file(path, vma.inode, |collector| {
        if !deleted && let Ok(meta) = std::fs::metadata(path) {
            let identity = FileIdentity::of(&meta);
            return MappedFile {
                path: path.to_owned(),
                identity,
                contents: None,
            };
        }
        // No name leads to it any more: it goes into the image as a whole.
        // A shared view shows the file itself, a private one possibly the process's own pages.
        let shared = all
            .iter()
            .any(|v| v.shared && (v.dev, v.inode) == (vma.dev, vma.inode));
        let (contents, size) = contents_of(source, vma, all, !shared);
        let identity = match &contents {
            Contents::File(file, _) => file.metadata().ok().map(|m| FileIdentity::of(&m)),
            Contents::Memory(..) => None,
        };
        let identity = identity.unwrap_or(FileIdentity {
            device: vma.dev,
            inode: vma.inode,
            mode: libc::S_IFREG | 0o700,
            size,
            modified_ns: 0,
            build_id: None,
        });
        let contents = Some(collector.space_for(contents));
        MappedFile {
            path: path.to_owned(),
            identity,
            contents,
        }
    })
}

/// The executable, which in general is mapped as well.
fn executable(source: &Source, vmas: &[Vma], collector: &mut Collector) -> Result<usize> {
    let link = source.dir.join("exe");
    let error = |e| crate::Error::File {
        what: "look at",
        path: link.clone(),
        source: e,
    };
    let meta = std::fs::metadata(&link).map_err(error)?;
    let mapped = vmas.iter().find_map(|v| match &v.name {
        VmaName::File { path, .. } if v.inode == meta.ino() => collector.known_file(path, v.inode),
        _ => None,
    });
    if let Some(index) = mapped {
        // Where `map_files` may not be opened, the executable's whole file still can.
        let file = &collector.mapped_files[index];
        if let Some(space) = file.contents
            && let Some(at) = collector.contents.iter().position(|(s, _)| *s == space)
            && matches!(collector.contents[at].1, Contents::Memory(..))
        {
            let file = File::open(&link).map_err(error)?;
            collector.contents[at].1 = Contents::File(file, meta.len());
            collector.mapped_files[index].identity = FileIdentity::of(&meta);
        }
        return Ok(index);
    }
    let path = std::fs::read_link(&link).map_err(error)?;
    let exists = std::fs::metadata(&path).is_ok_and(|m| same_file(&m, &meta));
    let file = File::open(&link).map_err(error)?;
    Ok(
        collector.mapped_file(&path, meta.ino(), |collector| MappedFile {
            path: path.clone(),
            identity: FileIdentity::of(&meta),
            contents: (!exists).then(|| collector.space_for(Contents::File(file, meta.len()))),
        }),
    )
}

/// Whether two looks were at one file.
pub fn same_file(a: &Metadata, b: &Metadata) -> bool {
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

impl FileIdentity {
    /// What a file is, without its build id (see [`read_build_id`](Self::read_build_id)).
    pub fn of(meta: &Metadata) -> Self {
        Self {
            device: (libc::major(meta.dev()), libc::minor(meta.dev())),
            inode: meta.ino(),
            mode: meta.mode(),
            size: meta.len(),
            modified_ns: meta.mtime() * 1_000_000_000 + meta.mtime_nsec(),
            build_id: None,
        }
    }

    /// Reads the build id of an ELF file; leaves the identity alone for other files.
    pub fn read_build_id(&mut self, path: &Path) {
        self.build_id = build_id(path);
    }
}

/// The build id of an ELF file.
pub fn build_id(path: &Path) -> Option<Vec<u8>> {
    let file = File::open(path).ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut magic = [0; 4];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut magic, 0).ok()?;
    if magic != *b"\x7fELF" {
        return None;
    }
    let cache = object::ReadCache::new(file);
    let elf = object::File::parse(&cache).ok()?;
    object::Object::build_id(&elf)
        .ok()
        .flatten()
        .map(<[u8]>::to_vec)
}

/// Where shared memory objects are mapped as a whole while they are filled and handed out.
pub type SharedAt = Vec<u64>;

impl Mapping {
    fn object(&self) -> String {
        format!("memory {:#x}-{:#x}", self.start, self.end)
    }

    fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Read-only private memory that is counted against the commit limit was writable once;
    /// mapping it writable and protecting it afterwards brings the same about.
    fn mapped_prot(&self) -> u64 {
        let write = libc::PROT_WRITE as u32;
        let once_writable = self.flags.contains(MappingFlags::ACCOUNTED)
            && self.prot & write == 0
            && matches!(
                self.backing,
                Backing::Anonymous | Backing::PrivateFile { .. }
            );
        u64::from(if once_writable {
            self.prot | write
        } else {
            self.prot
        })
    }

    /// The protection key that the program gave, 0 for none; an execute-only mapping has the
    /// kernel's.
    fn given_key(&self) -> u32 {
        if self.prot == libc::PROT_EXEC as u32 {
            0
        } else {
            self.protection_key
        }
    }

    /// `MAP_*` beyond private, shared, anonymous.
    fn map_flags(&self) -> i32 {
        let mut flags = libc::MAP_FIXED_NOREPLACE;
        let table = [
            (MappingFlags::GROWS_DOWN, libc::MAP_GROWSDOWN),
            (MappingFlags::NO_RESERVE, libc::MAP_NORESERVE),
        ];
        for (flag, map) in table {
            if self.flags.contains(flag) {
                flags |= map;
            }
        }
        flags
    }

    fn map(&self, flags: i32, fd: i64, offset: u64, plan: &mut Builder) {
        let args = [
            self.start,
            self.len(),
            self.mapped_prot(),
            (flags | self.map_flags()) as u64,
            fd as u64,
            offset,
        ];
        plan.expect(libc::SYS_mmap, &args, self.start, || self.object());
        // Before pages come, so that they come as huge pages or not.
        for (flag, advice) in [
            (MappingFlags::HUGE, libc::MADV_HUGEPAGE),
            (MappingFlags::NO_HUGE, libc::MADV_NOHUGEPAGE),
        ] {
            if self.flags.contains(flag) {
                let args = [self.start, self.len(), advice as u64];
                plan.attempt(libc::SYS_madvise, &args, || self.object());
            }
        }
    }
}

/// Removes what the new process has mapped and moves the kernel's mappings to where the job
/// had them.
pub fn clear_and_move(
    mappings: &[Mapping],
    present: &[Vma],
    hole: u64,
    plan: &mut Builder,
) -> Result<(), Box<Obstacle>> {
    let kind = |v: &Vma| match v.name {
        VmaName::Vdso => Some(KernelMapping::Vdso),
        VmaName::Vvar => Some(KernelMapping::Vvar),
        VmaName::VvarVclock => Some(KernelMapping::VvarVclock),
        _ => None,
    };
    for vma in present
        .iter()
        .filter(|v| kind(v).is_none() && v.name != VmaName::Vsyscall)
    {
        plan.syscall(libc::SYS_munmap, &[vma.start, vma.len()], || {
            "the address space of the new process".into()
        });
    }
    let kernels: Vec<&Vma> = present.iter().filter(|v| kind(v).is_some()).collect();
    let wanted = |v: &Vma| {
        mappings
            .iter()
            .find(|m| kind(v).is_some_and(|k| m.backing == Backing::Kernel(k)))
    };
    for m in mappings {
        if let Backing::Kernel(k) = m.backing
            && !kernels
                .iter()
                .any(|v| kind(v) == Some(k) && v.len() == m.len())
        {
            return Err(Box::new(Obstacle::without_remedy(
                m.object(),
                format!("is the kernel's {k:?}, which this kernel does not have in that size"),
            )));
        }
    }
    // Through a free place when any of them overlaps a place where one shall go.
    let crowded = kernels.iter().any(|v| {
        mappings
            .iter()
            .any(|m| matches!(m.backing, Backing::Kernel(_)) && m.start < v.end && v.start < m.end)
    });
    let mut at: Vec<u64> = kernels.iter().map(|v| v.start).collect();
    let steps = if crowded { 2 } else { 1 };
    for step in 0..steps {
        let mut aside = hole;
        for (i, vma) in kernels.iter().enumerate() {
            let object = || format!("the kernel's {}", kind(vma).map_or("", |k| k.label()));
            let Some(m) = wanted(vma) else {
                if step == 0 {
                    plan.syscall(libc::SYS_munmap, &[vma.start, vma.len()], object);
                }
                continue;
            };
            let to = if step + 1 == steps { m.start } else { aside };
            aside += vma.len();
            if to != at[i] {
                let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
                let args = [at[i], vma.len(), vma.len(), flags, to];
                plan.expect(libc::SYS_mremap, &args, to, object);
                at[i] = to;
            }
        }
    }
    Ok(())
}

impl KernelMapping {
    /// Its name in `/proc/PID/maps`.
    pub fn label(self) -> &'static str {
        match self {
            KernelMapping::Vdso => "[vdso]",
            KernelMapping::Vvar => "[vvar]",
            KernelMapping::VvarVclock => "[vvar_vclock]",
        }
    }
}

/// Maps everything, so that pages can be filled in.
pub fn map_all(
    mappings: &[Mapping],
    snapshot: &Snapshot,
    staging: files::Staging,
    shared_at: &SharedAt,
    plan: &mut Builder,
) {
    let mut open: Option<(usize, bool)> = None;
    for m in mappings {
        match &m.backing {
            Backing::Anonymous => m.map(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0, plan),
            Backing::AnonymousHuge { page_size } => {
                let size = page_size.trailing_zeros() << libc::MAP_HUGE_SHIFT;
                let huge = libc::MAP_HUGETLB | size as i32;
                m.map(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | huge, -1, 0, plan);
            }
            Backing::PrivateFile { file, offset } => {
                let fd = file_fd(*file, false, snapshot, staging, &mut open, plan);
                m.map(libc::MAP_PRIVATE, fd, *offset, plan);
            }
            Backing::SharedFile {
                file,
                offset,
                writable,
            } => {
                let fd = file_fd(*file, *writable, snapshot, staging, &mut open, plan);
                m.map(libc::MAP_SHARED, fd, *offset, plan);
            }
            Backing::Description {
                description,
                offset,
                private,
            } => {
                let how = if *private {
                    libc::MAP_PRIVATE
                } else {
                    libc::MAP_SHARED
                };
                m.map(how, staging.of(*description).into(), *offset, plan);
            }
            Backing::SharedMemory { .. } | Backing::Kernel(_) => {}
        }
    }
    close_open(&mut open, plan);
    for (index, (object, at)) in snapshot.shared_memory.iter().zip(shared_at).enumerate() {
        let mut flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        if object.huge_page_size != 0 {
            flags |= libc::MAP_HUGETLB
                | (object.huge_page_size.trailing_zeros() << libc::MAP_HUGE_SHIFT) as i32;
        } else if mappings.iter().any(|m| {
            m.flags.contains(MappingFlags::NO_RESERVE)
                && matches!(m.backing, Backing::SharedMemory { object, .. } if object == index)
        }) {
            flags |= libc::MAP_NORESERVE;
        }
        let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let args = [*at, object.mapped_len(), prot, flags as u64, u64::MAX, 0];
        plan.expect(libc::SYS_mmap, &args, *at, || "shared memory".into());
    }
}

impl SharedMemory {
    /// Bytes to map, whole pages.
    pub fn mapped_len(&self) -> u64 {
        self.size.next_multiple_of(self.huge_page_size.max(4096))
    }
}

/// The descriptor to map a file from: an inherited one for contents from the image, else the
/// file opened at descriptor 0. Mappings of one file mostly follow each other, so it stays
/// open until another is needed.
fn file_fd(
    file: usize,
    writable: bool,
    snapshot: &Snapshot,
    staging: files::Staging,
    open: &mut Option<(usize, bool)>,
    plan: &mut Builder,
) -> i64 {
    let record = &snapshot.mapped_files[file];
    if record.contents.is_some() {
        return staging.mapped_file(file, writable).into();
    }
    if *open != Some((file, writable)) {
        close_open(open, plan);
        let path = plan.path(&record.path);
        let access = if writable {
            libc::O_RDWR
        } else {
            libc::O_RDONLY
        };
        let args = [
            libc::AT_FDCWD as u64,
            path,
            (access | libc::O_CLOEXEC) as u64,
            0,
        ];
        let object = || format!("the mapped file {}", record.path.display());
        plan.expect(libc::SYS_openat, &args, 0, object);
        *open = Some((file, writable));
    }
    0
}

fn close_open(open: &mut Option<(usize, bool)>, plan: &mut Builder) {
    if open.take().is_some() {
        plan.syscall(libc::SYS_close, &[0], || "a mapped file".into());
    }
}

/// With all pages filled in: shared memory in its places, protections and advice as they were.
pub fn finish(mappings: &[Mapping], snapshot: &Snapshot, shared_at: &SharedAt, plan: &mut Builder) {
    for m in mappings {
        if let Backing::SharedMemory { object, offset } = m.backing {
            // An old length of 0 makes another view of shared pages (mremap(2)).
            let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
            let args = [shared_at[object] + offset, 0, m.len(), flags, m.start];
            plan.expect(libc::SYS_mremap, &args, m.start, || m.object());
        }
    }
    for (object, at) in snapshot.shared_memory.iter().zip(shared_at) {
        plan.syscall(libc::SYS_munmap, &[*at, object.mapped_len()], || {
            "shared memory".into()
        });
    }
    for m in mappings {
        let shared = matches!(m.backing, Backing::SharedMemory { .. });
        if m.given_key() != 0 {
            let args = [m.start, m.len(), m.prot.into(), m.given_key().into()];
            plan.syscall(libc::SYS_pkey_mprotect, &args, || m.object());
        } else if shared || m.mapped_prot() != u64::from(m.prot) {
            let args = [m.start, m.len(), m.prot.into()];
            plan.syscall(libc::SYS_mprotect, &args, || m.object());
        }
        m.advise(plan);
    }
}

/// Protection keys are given out from the lowest free one; those that no mapping was given are
/// freed again. Done before anything is mapped: the kernel takes a key of its own for
/// execute-only mappings (`execute_only_pkey`, arch/x86/mm/pkeys.c).
pub fn allocate_keys(mappings: &[Mapping], plan: &mut Builder) {
    let highest = mappings.iter().map(Mapping::given_key).max().unwrap_or(0);
    for key in 1..=highest {
        plan.expect(libc::SYS_pkey_alloc, &[0, 0], key.into(), || {
            format!("protection key {key}")
        });
    }
    for key in 1..highest {
        if !mappings.iter().any(|m| m.given_key() == key) {
            plan.syscall(libc::SYS_pkey_free, &[key.into()], || {
                format!("protection key {key}")
            });
        }
    }
}

/// `MADV_GUARD_INSTALL` (Linux 6.13).
const MADV_GUARD_INSTALL: u64 = 102;

impl Mapping {
    fn advise(&self, plan: &mut Builder) {
        let advice = [
            (MappingFlags::DONT_FORK, libc::MADV_DONTFORK),
            (MappingFlags::WIPE_ON_FORK, libc::MADV_WIPEONFORK),
            (MappingFlags::DONT_DUMP, libc::MADV_DONTDUMP),
            (MappingFlags::MERGEABLE, libc::MADV_MERGEABLE),
            (MappingFlags::SEQUENTIAL, libc::MADV_SEQUENTIAL),
            (MappingFlags::RANDOM, libc::MADV_RANDOM),
        ];
        if matches!(self.backing, Backing::Kernel(_)) {
            return;
        }
        let range = [self.start, self.len()];
        for (flag, advice) in advice {
            // hugetlb mappings carry DONT_DUMP-like flags of their own that may be refused.
            if self.flags.contains(flag) {
                let args = [range[0], range[1], advice as u64];
                plan.syscall(libc::SYS_madvise, &args, || self.object());
            }
        }
        for (start, end) in &self.guards {
            let args = [*start, end - start, MADV_GUARD_INSTALL];
            plan.syscall(libc::SYS_madvise, &args, || {
                format!("guard pages in {}", self.object())
            });
        }
        if let Some(name) = &self.name {
            let mut name = name.clone();
            name.push(0);
            let name = plan.data(&name);
            let args = [
                u64::from(libc::PR_SET_VMA as u32),
                0,
                range[0],
                range[1],
                name,
            ];
            plan.attempt(libc::SYS_prctl, &args, || self.object());
        }
        if self.flags.contains(MappingFlags::LOCKED) {
            let on_fault = self.flags.contains(MappingFlags::LOCK_ON_FAULT);
            let flags = if on_fault {
                libc::MLOCK_ONFAULT as u64
            } else {
                0
            };
            let warning = format!("{} is not locked in memory", self.object());
            plan.try_syscall(libc::SYS_mlock2, &[range[0], range[1], flags], &warning);
        }
    }

    /// Seals the mapping; after this nothing can be changed any more.
    pub fn seal(&self, plan: &mut Builder) {
        const SYS_MSEAL: i64 = 462;
        if self.flags.contains(MappingFlags::SEALED) && !matches!(self.backing, Backing::Kernel(_))
        {
            plan.syscall(SYS_MSEAL, &[self.start, self.len(), 0], || self.object());
        }
    }
}

/// Whether the file that was mapped is still there, as far as that can be told: the same size
/// and time, or the same build id. A file of which the job only has shared mappings may have
/// been written since, by the job itself; then it is enough that it is the same file.
pub fn check_file(
    file: &MappedFile,
    shared_only: bool,
    request: &Request<'_>,
) -> Result<(), Box<Obstacle>> {
    if file.contents.is_some() {
        return Ok(());
    }
    let object = format!("the mapped file {}", file.path.display());
    let meta = match std::fs::metadata(&file.path) {
        Ok(meta) => meta,
        Err(e) => {
            let reason = format!("cannot be opened: {e}");
            return Err(Box::new(Obstacle::new(
                object,
                reason,
                "put it back in its place",
            )));
        }
    };
    let now = FileIdentity::of(&meta);
    let was = &file.identity;
    let same_inode = shared_only && now.inode == was.inode && now.size >= was.size;
    if same_inode
        || (now.size, now.modified_ns) == (was.size, was.modified_ns)
        || request.files == FilesPolicy::Adopt
        || (was.build_id.is_some() && build_id(&file.path) == was.build_id)
        || was.mode & libc::S_IFMT != libc::S_IFREG
    {
        return Ok(());
    }
    Err(Box::new(Obstacle::new(
        object,
        "was changed since the checkpoint, and the job would go on with other contents",
        "put the old one back, or take what is there with --files adopt",
    )))
}
