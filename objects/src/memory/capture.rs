//! Mappings of a live process: their kinds, and the contents of objects without a name.

use std::fs::{File, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ckpt_tracer::proc::maps::{VmFlags, Vma, VmaName};
use ckpt_tracer::proc::pagemap::{PageCategories, PageQuery, PagemapScanner};

use super::contents::{Layout, add_views, contents_of, looked_at};
use super::{
    Backing, FileIdentity, KernelMapping, MappedFile, Mapping, MappingFlags, SharedMemory,
    same_file,
};
use crate::error::Obstacle;
use crate::files::memfd::MemFd;
use crate::files::regular::Regular;
use crate::index::{DescriptionId, FileId, SharedId};
use crate::ipc::sysv_shm;
use crate::source::{Collector, Contents, Source};
use crate::text::Shown;
use crate::{aio, files, uring};

/// The path that memfd_secret(2) shows (mm/secretmem.c).
const SECRET: &str = "/secretmem";

type Result<T, E = crate::Error> = std::result::Result<T, E>;

/// Records of one process's mappings.
#[derive(Clone)]
pub struct Captured {
    /// The mappings, without the vsyscall page.
    pub mappings: Vec<Mapping>,
    /// Index of the executable in the collector's mapped files.
    pub executable: FileId,
}

/// Classifies every mapping. `descriptions` are the memfds among the process's descriptions, by inode.
pub fn capture(
    source: &Source,
    vmas: &[Vma],
    guards: &[(u64, u64)],
    collector: &mut Collector,
) -> Result<Captured> {
    let mut mappings = Vec::with_capacity(vmas.len());
    let mut refused = Vec::new();
    for vma in vmas {
        if vma.name == VmaName::Vsyscall {
            continue;
        }
        let all = Layout { vmas, guards };
        match backing(source, vma, all, collector) {
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
                policy: None,
            }),
            Err(obstacle) => refused.push(*obstacle),
        }
    }
    one_a_cause(refused, source, collector);
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

/// Refuses mappings. Those with the same reason are reported on one line, by the first of them.
fn one_a_cause(refused: Vec<Obstacle>, source: &Source, collector: &mut Collector) {
    let mut causes: Vec<(Obstacle, usize)> = Vec::new();
    for obstacle in refused {
        let known = causes.iter_mut().find(|(c, _)| c.reason == obstacle.reason);
        match known {
            Some((_, others)) => *others += 1,
            None => causes.push((obstacle, 0)),
        }
    }
    for (mut first, others) in causes {
        // A report about the process as a whole is the same each time.
        if others > 0 && first.object != source.title() {
            let more = if others == 1 { "mapping" } else { "mappings" };
            first.object = format!("{}, like {others} more {more} of it,", first.object);
        }
        collector.refuse(first);
    }
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
    all: Layout<'_>,
    collector: &mut Collector,
) -> Result<Backing, Box<Obstacle>> {
    let refuse = |reason: &str, remedy: &str| {
        let (start, end) = (vma.start, vma.end);
        let object = format!("memory {start:#x}-{end:#x} of {}", source.title());
        Box::new(Obstacle::new(object, reason, remedy))
    };
    let uffd = VmFlags::UFFD_MISSING | VmFlags::UFFD_WP | VmFlags::UFFD_MINOR;
    if vma.flags.intersects(uffd) {
        return Err(refuse(
            "is registered with userfaultfd, which is not supported",
            "let the program unregister it before the checkpoint (UFFDIO_UNREGISTER)",
        ));
    }
    if vma.flags.contains(VmFlags::SHADOW_STACK) {
        return Err(refuse(
            "is a shadow stack, which is not supported",
            "start the program with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off",
        ));
    }
    if let Some(kind) = KernelMapping::of(vma) {
        return Ok(Backing::Kernel(kind));
    }
    let path = match &vma.name {
        VmaName::OtherSpecial(name) if name.contains(uring::NAME) => {
            return Err(Box::new(uring::obstacle(source)));
        }
        VmaName::OtherSpecial(name) => {
            return Err(refuse(
                &format!("is a special mapping of the kernel ({name}), which is not supported"),
                "end what made it, a uprobe of perf or bpftrace for [uprobes], and start the program anew",
            ));
        }
        VmaName::File { path, .. } => Some(path.as_path()),
        _ => None,
    };
    if sysv_shm::is_segment(vma) {
        let contents = || contents_of(source, vma, all, false).0;
        return Ok(sysv_shm::mapping(vma, contents, collector));
    }
    if vma.flags.contains(VmFlags::HUGETLB) && !path.is_some_and(is_memfd) {
        let ours = path.is_some_and(|p| p == Path::new("/anon_hugepage"));
        return match (ours, vma.shared) {
            (true, false) => Ok(Backing::AnonymousHuge {
                page_size: vma.kernel_page_size,
            }),
            (true, true) if seen_twice(vma, all.vmas) => Err(refuse(
                "is shared memory of huge pages that is mapped twice, which is not supported",
                "use a memfd of huge pages for it (MFD_HUGETLB)",
            )),
            (true, true) => Ok(shared_memory(source, vma, all, collector)),
            (false, _) => Err(refuse(
                "is a file of a hugetlbfs, which is not supported",
                "use a memfd of huge pages for it (MFD_HUGETLB)",
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
    if aio::is_ring(vma) {
        return Ok(Backing::AioRing(aio::capture(source, vma, collector)?));
    }
    if is_memfd(path) {
        let description = memfd_mapping(source, vma, all, collector);
        return Ok(Backing::Description {
            description,
            offset: vma.offset,
            private: !vma.shared,
        });
    }
    if vma.flags.contains(VmFlags::PFN_MAP) || vma.flags.contains(VmFlags::IO) {
        return Err(refuse(
            &format!(
                "is memory of the device {}, which only its driver can restore",
                path.shown()
            ),
            "let the program unmap it before the checkpoint",
        ));
    }
    if path == Path::new(SECRET) {
        return Err(refuse(
            "is secret memory (memfd_secret(2)), which only the process itself can read",
            "let the program unmap it before the checkpoint, or start it without secret memory",
        ));
    }
    let file = mapped_file(source, vma, path, all, collector);
    files::saved::save_mapped(source, vma, file, collector)?;
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

/// Whether another mapping of the process maps the same object.
fn seen_twice(vma: &Vma, all: &[Vma]) -> bool {
    let end = |v: &Vma| v.offset + (v.end - v.start);
    all.iter().any(|v| {
        v.start != vma.start
            && (v.dev, v.inode) == (vma.dev, vma.inode)
            && v.offset < end(vma)
            && vma.offset < end(v)
    })
}

fn is_memfd(path: &Path) -> bool {
    path.to_string_lossy().starts_with("/memfd:")
}

fn shared_memory(
    source: &Source,
    vma: &Vma,
    all: Layout<'_>,
    collector: &mut Collector,
) -> Backing {
    let known = SharedId::position(&collector.shared_memory, |m| m.inode == vma.inode);
    if let Some(object) = known {
        let space = collector.shared_memory[object].space;
        if collector.viewed.insert((source.pid, space)) {
            let end = add_views(space, source, vma, (all, false), collector);
            let size = &mut collector.shared_memory[object].size;
            *size = end.max(*size);
        }
    }
    let object = known.unwrap_or_else(|| {
        let (contents, size) = contents_of(source, vma, all, false);
        let space = collector.space_for(contents);
        collector.viewed.insert((source.pid, space));
        let hugetlb = vma.flags.contains(VmFlags::HUGETLB);
        let object = SharedMemory {
            space,
            size,
            inode: vma.inode,
            huge_page_size: if hugetlb { vma.kernel_page_size } else { 0 },
            reach: 0,
        };
        SharedId::push(&mut collector.shared_memory, object)
    });
    let reach = &mut collector.shared_memory[object].reach;
    *reach = (vma.offset + vma.len()).max(*reach);
    Backing::SharedMemory {
        object,
        offset: vma.offset,
    }
}

/// The description of a mapped memfd: one that the job holds open, or, if all its descriptors are closed, a new one.
fn memfd_mapping(
    source: &Source,
    vma: &Vma,
    all: Layout<'_>,
    collector: &mut Collector,
) -> DescriptionId {
    let open = collector.descriptions.iter().position(|d| {
        d.kind.get::<MemFd>().is_some_and(|m| m.inode == vma.inode)
            && (!vma.shared || !vma.flags.contains(VmFlags::MAY_WRITE) || d.flags & 3 == 2)
    });
    let mut known = collector
        .descriptions
        .iter()
        .filter_map(|d| d.kind.get::<MemFd>());
    let known = known.find(|memfd| memfd.inode == vma.inode).cloned();
    let index = open.unwrap_or_else(|| {
        // One file, though no descriptor refers to such a mapping.
        let memfd = known.unwrap_or_else(|| closed_memfd(source, vma, all, collector));
        let writes = !vma.shared || vma.flags.contains(VmFlags::MAY_WRITE);
        let access = if writes { libc::O_RDWR } else { libc::O_RDONLY };
        collector.descriptions.push(files::Description {
            kind: MemFd { offset: 0, ..memfd }.into(),
            flags: access as u32,
            owner: None,
            made_by: None,
            locks: Vec::new(),
        });
        collector.descriptions.len() - 1
    });
    // An earlier process may have mapped less of it.
    if let Some(memfd) = collector.descriptions[index].kind.get::<MemFd>() {
        let end = add_views(memfd.contents, source, vma, (all, !vma.shared), collector);
        let open = collector.descriptions.iter_mut();
        let open = open.filter_map(|d| d.kind.get_mut::<MemFd>());
        for memfd in open.filter(|memfd| memfd.inode == vma.inode) {
            memfd.size = end.max(memfd.size);
        }
    }
    DescriptionId(index)
}

/// A memfd that is only mapped.
fn closed_memfd(source: &Source, vma: &Vma, all: Layout<'_>, collector: &mut Collector) -> MemFd {
    let (contents, size) = contents_of(source, vma, all, !vma.shared);
    let name = match &vma.name {
        VmaName::File { path, .. } => path.as_os_str().as_bytes().strip_prefix(b"/memfd:"),
        _ => None,
    };
    let hugetlb = vma.flags.contains(VmFlags::HUGETLB);
    let (meta, attributes) = looked_at(&contents).unzip();
    let seals = contents.as_file();
    let seals = seals.and_then(ckpt_sys::files::seals);
    MemFd {
        name: name.unwrap_or_default().to_vec(),
        inode: vma.inode,
        size,
        mode: meta.map_or(0o777, |meta| meta.mode() & 0o7777),
        seals: seals.unwrap_or(0),
        offset: 0,
        huge_page_size: if hugetlb { vma.kernel_page_size } else { 0 },
        contents: collector.space_for(contents),
        attributes,
    }
}

/// The file of a mapping, if it is open under a descriptor.
fn open_file<'a>(path: &Path, vma: &Vma, collector: &'a Collector) -> Option<&'a Regular> {
    let mut open = collector
        .descriptions
        .iter()
        .filter_map(|d| d.kind.get::<Regular>());
    open.find(|file| {
        file.identity.inode == vma.inode && (file.identity.device == vma.dev || file.path == path)
    })
}

fn mapped_file(
    source: &Source,
    vma: &Vma,
    path: &Path,
    all: Layout<'_>,
    collector: &mut Collector,
) -> FileId {
    let deleted = matches!(vma.name, VmaName::File { deleted: true, .. });
    // A shared mapping shows the file itself, a private one possibly the process's own pages.
    let mut views = all.vmas.iter();
    let shared = views.any(|v| v.shared && (v.dev, v.inode) == (vma.dev, vma.inode));
    let index = collector.mapped_file(path, vma.inode, |collector| {
        if !deleted && let Ok(meta) = std::fs::metadata(path) {
            let identity = FileIdentity::of(&meta);
            return MappedFile {
                path: path.to_owned(),
                identity,
                contents: None,
                attributes: None,
                saved: None,
            };
        }
        // A file that is also open must stay one file with its descriptors.
        if let Some(open) = open_file(path, vma, collector) {
            return MappedFile {
                path: open.path.clone(),
                identity: open.identity.clone(),
                contents: open.contents,
                attributes: open.attributes.clone(),
                saved: open.saved,
            };
        }
        // It lost the name under which it was opened, and has another one: sem_open(3) creates a semaphore under a
        // temporary name and links it. Later openers have mapped it by the other name.
        if let Some((path, meta)) = linked_elsewhere(source, vma, path) {
            return MappedFile {
                path,
                identity: FileIdentity::of(&meta),
                contents: None,
                attributes: None,
                saved: None,
            };
        }
        // It has no name left: the image stores all of it.
        let (contents, size) = contents_of(source, vma, all, !shared);
        let (meta, attributes) = looked_at(&contents).unzip();
        let identity = meta.map(|meta| FileIdentity::of(&meta));
        let identity = identity.unwrap_or(FileIdentity {
            device: vma.dev,
            inode: vma.inode,
            mode: libc::S_IFREG | 0o700,
            size,
            modified_ns: 0,
            build_id: None,
            created_ns: None,
        });
        let contents = Some(collector.space_for(contents));
        MappedFile {
            path: path.to_owned(),
            identity,
            contents,
            attributes,
            saved: None,
        }
    });
    // An earlier process may have mapped less of it.
    if let Some(space) = collector.mapped_files[index].contents {
        let end = add_views(space, source, vma, (all, !shared), collector);
        let size = &mut collector.mapped_files[index].identity.size;
        *size = end.max(*size);
    }
    index
}

/// The remaining name of a file whose mapping shows a deleted one.
fn linked_elsewhere(source: &Source, vma: &Vma, path: &Path) -> Option<(PathBuf, Metadata)> {
    // Without permission to follow this link, device and inode of the mapping have to suffice.
    let link = format!("map_files/{:x}-{:x}", vma.start, vma.end);
    let id = match std::fs::metadata(source.dir.join(link)) {
        Ok(meta) if meta.nlink() == 0 => return None,
        Ok(meta) => (meta.dev(), meta.ino()),
        Err(_) => (libc::makedev(vma.dev.0, vma.dev.1), vma.inode),
    };
    let name = files::regular::name_of(id, path)?;
    let meta = std::fs::metadata(&name).ok()?;
    Some((name, meta))
}

/// The executable, which is usually mapped too.
fn executable(source: &Source, vmas: &[Vma], collector: &mut Collector) -> Result<FileId> {
    let link = source.dir.join("exe");
    let error = crate::Error::file("look at", &link);
    let meta = std::fs::metadata(&link).map_err(&error)?;
    let mapped = vmas.iter().find_map(|v| match &v.name {
        VmaName::File { path, .. } if v.inode == meta.ino() => collector.known_file(path, v.inode),
        _ => None,
    });
    if let Some(index) = mapped {
        // If `map_files` may not be opened, the whole executable can still be read.
        let file = &collector.mapped_files[index];
        if let Some(space) = file.contents
            && let Some(at) = collector.contents.iter().position(|(s, _)| *s == space)
            && matches!(collector.contents[at].1, Contents::Memory(_))
        {
            let file = File::open(&link).map_err(&error)?;
            collector.contents[at].1 = Contents::File(file, meta.len());
            collector.mapped_files[index].identity = FileIdentity::of(&meta);
        }
        return Ok(index);
    }
    let path = std::fs::read_link(&link).map_err(&error)?;
    let exists = std::fs::metadata(&path).is_ok_and(|m| same_file(&m, &meta));
    let file = File::open(&link).map_err(&error)?;
    Ok(
        collector.mapped_file(&path, meta.ino(), |collector| MappedFile {
            path: path.clone(),
            identity: FileIdentity::of(&meta),
            contents: (!exists).then(|| collector.space_for(Contents::File(file, meta.len()))),
            attributes: None,
            saved: None,
        }),
    )
}
