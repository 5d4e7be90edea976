//! System V shared memory: segments, and their attachments.

use ckpt_image::Reader;
use ckpt_sys::sysv::{self, Attached};
use ckpt_tracer::Pid;
use ckpt_tracer::proc::maps::{VmFlags, Vma, VmaName};
use serde::{Deserialize, Serialize};

use super::sysv::{self as object, Found, IpcObject, Sight, Site};
use super::table::{Row, Type};
use super::{Claim, Ipc, Object};
use crate::bounds;
use crate::error::{Error, Obstacle, Result};
use crate::index::SegmentId;
use crate::memory::space::each_run;
use crate::memory::{Backing, Mapping};
use crate::outsiders::process_name;
use crate::plan::Builder;
use crate::process::Process;
use crate::references::{Faults, require};
use crate::source::{Collector, Contents, Source};
use crate::{Snapshot, SpaceId};

/// `SHM_DEST`: it is destroyed at the last detach.
const DESTROYED: i64 = 0o1000;
/// `SHM_LOCKED`.
const LOCKED: i64 = 0o2000;

/// One segment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Id, key, owner.
    pub object: Object,
    /// Size in bytes.
    #[serde(deserialize_with = "bounds::memory")]
    pub size: u64,
    /// It was removed (`IPC_RMID`) and exists until the last detach.
    pub destroyed: bool,
    /// `SHM_LOCK`.
    pub locked: bool,
    /// Page size of hugetlb memory, 0 for ordinary pages.
    #[serde(deserialize_with = "bounds::page")]
    pub huge_page_size: u64,
    /// Its pages in the image.
    pub contents: SpaceId,
}

/// Whether a mapping is an attached segment. The inode number of its file is the id.
pub fn is_segment(vma: &Vma) -> bool {
    matches!(&vma.name, VmaName::File { path, deleted: true }
        if vma.shared && vma.dev.0 == 0 && path.to_string_lossy().starts_with("/SYSV"))
}

/// Adds the segment of a mapping. `contents` is the source of its pages: its file, or if that may not be opened, its
/// mapped parts.
pub fn mapping(
    vma: &Vma,
    contents: impl FnOnce() -> Contents,
    collector: &mut Collector,
) -> Backing {
    let id = vma.inode as i32;
    let known = SegmentId::position(&collector.ipc.segments, |s| s.object.id == id);
    let segment = known.unwrap_or_else(|| {
        let contents = collector.space_for(contents());
        let segment = Segment {
            // The kernel's table has the rest, for all segments at once.
            object: Object {
                id,
                key: 0,
                mode: 0,
                uid: 0,
                gid: 0,
                creator_uid: 0,
                creator_gid: 0,
            },
            size: 0,
            destroyed: false,
            locked: false,
            huge_page_size: match vma.flags.contains(VmFlags::HUGETLB) {
                true => vma.kernel_page_size,
                false => 0,
            },
            contents,
        };
        SegmentId::push(&mut collector.ipc.segments, segment)
    });
    Backing::SysV {
        segment,
        offset: vma.offset,
        writable: vma.flags.contains(VmFlags::MAY_WRITE),
    }
}

/// Whether a segment was created by the job's user in a process that has ended: that may have been one of the job's,
/// or an earlier restore.
fn collector_user(row: &Row, known: &[Segment], processes: &[(&Source, &[Vma])]) -> bool {
    let creator = row.get("cpid") as i32;
    let gone = !std::path::Path::new(&format!("/proc/{creator}")).exists();
    let cuid = row.get("cuid") as u32;
    let ours = processes
        .iter()
        .any(|(s, _)| s.status.uid.effective == cuid);
    gone && ours && !known.iter().any(|s| s.object.id == row.id())
}

/// Mappings may show less than the whole segment.
fn complete_contents(segment: &Segment, collector: &mut Collector) {
    let found = collector
        .contents
        .iter_mut()
        .find(|(space, _)| *space == segment.contents);
    if let Some((_, contents)) = found
        && let Contents::Memory(views) = contents
    {
        let seen: u64 = views.iter().map(|(_, _, _, len)| len).sum();
        if seen < segment.size {
            *contents = Contents::Segment(segment.object.id, segment.size);
        }
    }
}

/// No segment is larger: user space of five-level page tables.
const LARGEST: u64 = 1 << 56;

impl IpcObject for Segment {
    const TYPE: Type = Type::Shm;
    const MAY_BE_OTHERS: bool = false;

    fn all(ipc: &mut Ipc) -> &mut Vec<Self> {
        &mut ipc.segments
    }

    fn each(ipc: &Ipc) -> &[Self] {
        &ipc.segments
    }

    fn object(&self) -> &Object {
        &self.object
    }

    /// Whether a process of the job has it attached, or had.
    fn claim(&self) -> Claim {
        Claim::Used
    }

    /// Completes the attached segments and adds those that the job created and has not attached now.
    fn capture(sight: &Sight, collector: &mut Collector) {
        let Sight {
            job,
            processes,
            rows,
        } = *sight;
        let mut segments = std::mem::take(&mut collector.ipc.segments);
        for segment in &mut segments {
            let id = segment.object.id;
            let Some(row) = rows.iter().find(|row| row.id() == id) else {
                collector.findings.obstacles.push(Obstacle::without_remedy(
                    segment.object.title(Type::Shm),
                    "is attached by the job and belongs to another IPC namespace",
                ));
                continue;
            };
            segment.complete(row);
            complete_contents(segment, collector);
            let views = processes.iter().flat_map(|(_, vmas)| *vmas);
            let inside = views.filter(|v| is_segment(v) && v.inode as i32 == id);
            if row.get("nattch") > inside.count() as i64 {
                collector.findings.obstacles.push(segment.used_outside(
                    &job.pids,
                    "end that one, or let it detach, before the checkpoint",
                ));
            }
        }
        for row in rows {
            let made = job.pids.contains(&(row.get("cpid") as i32));
            let user = collector_user(row, &segments, processes);
            let used = job.alone || made || (user && job.pids.contains(&(row.get("lpid") as i32)));
            if used && row.get("nattch") == 0 {
                let size = row.get("size") as u64;
                let contents = collector.space_for(Contents::Segment(row.id(), size));
                let mut segment = Segment {
                    object: Object::of(row),
                    size,
                    destroyed: false,
                    locked: false,
                    huge_page_size: 0,
                    contents,
                };
                segment.complete(row);
                segments.push(segment);
            }
        }
        collector.ipc.segments = segments;
    }

    fn check(&self, faults: &mut Faults) {
        let (id, page) = (self.object.id, self.huge_page_size);
        require!(
            faults,
            (1..=LARGEST).contains(&self.size) && (page == 0 || page.is_power_of_two()),
            "segment {id} has the impossible size {} with pages of {page} bytes",
            self.size
        );
    }

    /// For a job that is leaving, its checkpoint has refused segments that other processes have attached.
    fn in_the_way(&self, _: usize, site: &Site) -> Result<(), Obstacle> {
        match site.find(self)? {
            Found::Missing => object::may_create(self),
            Found::Same(row) if row.get("size") as u64 != self.size => Err(Obstacle::new(
                self.title(),
                "does not exist any more, and another object has its id",
                "restore in an IPC namespace of its own: unshare --ipc restore IMAGE",
            )),
            // It is destroyed at the last detach.
            Found::Same(_) if site.leaving && self.destroyed => object::may_create(self),
            Found::Same(row) if row.get("nattch") > 0 && !site.leaving => Err(self.used_outside(
                &[],
                "end that one, or restore in an IPC namespace of its own: \
                 unshare --ipc restore IMAGE",
            )),
            Found::Same(_) => Ok(()),
        }
    }

    fn create(&self, image: &Reader, warnings: &mut Vec<String>) -> Result<Box<dyn object::Ready>> {
        object::may_create(self).map_err(Error::refuse)?;
        let failed = |what, errno| object::failed(self, what, errno);
        // It can be found by its key: no other process must attach it before it is filled.
        let flags = libc::IPC_CREAT | libc::IPC_EXCL | 0o600 | self.huge_flags();
        let (Object { id, key, .. }, size) = (self.object, self.size);
        let remove = |id| sysv::shm_control(id, libc::IPC_RMID);
        let create = || sysv::shmget(key, size, flags);
        object::create(self, create, |other| {
            remove(other).ok();
        })?;
        let mut ready = Ready {
            object: self.object,
            attached: None,
            created: true,
        };
        let attached = self.attached()?;
        self.fill(&attached, image)?;
        let set = sysv::shm_set(id, self.object.access());
        set.map_err(|e| failed("given to its owner", e))?;
        if self.locked && sysv::shm_control(id, libc::SHM_LOCK).is_err() {
            warnings.push(format!("{} is not locked in memory", self.title()));
        }
        if self.destroyed {
            remove(id).map_err(|e| failed("removed", e))?;
            // We keep it attached until the job has.
            ready.attached = Some(attached);
        }
        Ok(Box::new(ready))
    }

    fn put_back(
        &self,
        index: usize,
        _: &Row,
        site: &Site,
        image: &Reader,
    ) -> Result<Option<Box<dyn object::Ready>>> {
        self.in_the_way(index, site).map_err(Error::refuse)?;
        let attached = self.attached()?;
        attached.clear();
        self.fill(&attached, image)?;
        Ok(None)
    }

    /// Attached with the other mappings: [`attach`].
    fn rebuild(_: &Process, _: &Snapshot, _: &mut Builder) {}
}

impl Segment {
    fn complete(&mut self, row: &Row) {
        self.object = Object::of(row);
        self.size = row.get("size") as u64;
        self.destroyed = row.get("perms") & DESTROYED != 0;
        self.locked = row.get("perms") & LOCKED != 0;
    }

    /// Attaches it to this process.
    fn attached(&self) -> Result<Attached> {
        let attached = Attached::new(self.object.id, self.size, true);
        attached.map_err(|e| object::failed(self, "attached", e))
    }

    /// Writes its pages in the image to it.
    fn fill(&self, attached: &Attached, image: &Reader) -> Result<()> {
        each_run(self.contents, self.size, image, |offset, bytes| {
            attached.write(offset, bytes);
            Ok(true)
        })
        .map(drop)
    }

    /// Bytes of its mapping.
    pub fn mapped_len(&self) -> u64 {
        self.size.next_multiple_of(self.huge_page_size.max(4096))
    }

    /// The obstacle that processes outside the job have it attached.
    fn used_outside(&self, job: &[i32], remedy: &str) -> Obstacle {
        let inode = self.object.id.to_string();
        let users = super::who_maps(job, |line| {
            let mut words = line.split_whitespace();
            words.nth(4) == Some(&inode) && line.contains(" /SYSV")
        });
        let who = match users.as_slice() {
            [] => "a process that you may not look into".to_owned(),
            [one] => process_name(Pid(*one)),
            [one, rest @ ..] => format!(
                "{} and {} other processes",
                process_name(Pid(*one)),
                rest.len()
            ),
        };
        let reason = format!("is also attached by {who}, outside the job");
        Obstacle::new(self.title(), reason, remedy)
    }

    fn huge_flags(&self) -> i32 {
        match self.huge_page_size {
            0 => 0,
            size => libc::SHM_HUGETLB | (size.trailing_zeros() << libc::MAP_HUGE_SHIFT) as i32,
        }
    }
}

/// A prepared segment.
struct Ready {
    object: Object,
    attached: Option<Attached>,
    created: bool,
}

impl object::Ready for Ready {
    fn keep(mut self: Box<Self>) {
        if self.created {
            // Sets the time of the last change, which then is in the job's lifetime.
            let _ = sysv::shm_set(self.object.id, self.object.access());
        }
        self.created = false;
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        if self.created {
            let _ = sysv::shm_control(self.object.id, libc::IPC_RMID);
        }
        self.attached = None;
    }
}

/// The remains of one shmat(2): mappings of the same file, by which shmdt(2) finds them.
struct Attachment<'a> {
    segment: &'a Segment,
    /// The address that the beginning of the segment has, or had.
    base: u64,
    writable: bool,
    /// Its mappings, by ascending address.
    parts: Vec<(&'a Mapping, u64)>,
}

fn attachments<'a>(process: &'a Process, snapshot: &'a Snapshot) -> Vec<Attachment<'a>> {
    let mut found: Vec<Attachment<'a>> = Vec::new();
    for mapping in &process.memory.mappings {
        let Backing::SysV {
            segment,
            offset,
            writable,
        } = mapping.backing
        else {
            continue;
        };
        let segment = &snapshot.ipc.segments[segment];
        let base = mapping.start.wrapping_sub(offset);
        let known = found.iter_mut().find(|a| {
            (a.segment.object.id, a.base, a.writable) == (segment.object.id, base, writable)
        });
        match known {
            Some(attachment) => attachment.parts.push((mapping, offset)),
            None => found.push(Attachment {
                segment,
                base,
                writable,
                parts: vec![(mapping, offset)],
            }),
        }
    }
    found
}

impl Attachment<'_> {
    /// Whether nothing of it was unmapped or moved, and nothing extends past its end.
    fn is_whole(&self) -> bool {
        let (all, len) = (self.parts.iter(), self.segment.mapped_len());
        let all: u64 = all.map(|(m, _)| m.end - m.start).sum();
        all == len && self.reach() == len
    }

    /// Offset of the end of the last mapping, which mremap(2) may extend past the end of the segment.
    fn reach(&self) -> u64 {
        let ends = self
            .parts
            .iter()
            .map(|(m, offset)| offset + (m.end - m.start));
        ends.fold(self.segment.mapped_len(), u64::max)
    }

    fn object(&self) -> String {
        format!("{} at {:#x}", self.segment.title(), self.base)
    }

    fn attach(&self, aside: u64, plan: &mut Builder) {
        let id = self.segment.object.id as u64;
        let flags = if self.writable { 0 } else { libc::SHM_RDONLY } as u64;
        let at = if self.is_whole() { self.base } else { aside };
        plan.expect(libc::SYS_shmat, &[id, at, flags], at, || self.object());
        if !self.is_whole() {
            let (len, reach) = (self.segment.mapped_len(), self.reach());
            if reach > len {
                // Grown in place; the segment keeps its size.
                let args = [aside, len, reach, 0];
                plan.expect(libc::SYS_mremap, &args, aside, || self.object());
            }
            for (mapping, offset) in &self.parts {
                // An old length of 0 makes another mapping of shared pages (mremap(2)).
                let how = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
                let len = mapping.end - mapping.start;
                let args = [aside + offset, 0, len, how, mapping.start];
                plan.expect(libc::SYS_mremap, &args, mapping.start, || self.object());
            }
            plan.syscall(libc::SYS_munmap, &[aside, reach], || self.object());
        }
        let attached = libc::PROT_READ | if self.writable { libc::PROT_WRITE } else { 0 };
        for (mapping, _) in &self.parts {
            let (start, len) = (mapping.start, mapping.end - mapping.start);
            mapping.advise_huge(plan);
            // Mappings with a key of the program's get protection and key later, as all mappings do.
            if mapping.prot != attached as u32 && mapping.protection_key == 0 {
                let args = [start, len, mapping.prot.into()];
                plan.syscall(libc::SYS_mprotect, &args, || self.object());
            }
        }
    }
}

/// Free address space that [`attach`] needs: bytes, and their alignment.
pub fn room(process: &Process, snapshot: &Snapshot) -> Option<(u64, u64)> {
    let partial = attachments(process, snapshot);
    let partial = partial.iter().filter(|a| !a.is_whole());
    let attached = partial.map(|a| (a.segment, a.reach()));
    let unattached = unattached(snapshot).map(|s| (s, s.mapped_len()));
    attached
        .chain(unattached)
        .map(|(s, len)| (len, s.huge_page_size.max(4096)))
        .reduce(|a, b| (a.0.max(b.0), a.1.max(b.1)))
}

/// Segments that no process of the job has attached.
fn unattached(snapshot: &Snapshot) -> impl Iterator<Item = &Segment> {
    let all = SegmentId::each(&snapshot.ipc.segments);
    // Most jobs have none, and this is called for each process.
    let processes = snapshot.processes.iter().take_while(|_| all.len() > 0);
    let attached: Vec<SegmentId> = processes
        .flat_map(|p| &p.memory.mappings)
        .filter_map(|m| match m.backing {
            Backing::SysV { segment, .. } => Some(segment),
            _ => None,
        })
        .collect();
    all.filter(move |(index, _)| !attached.contains(index))
        .map(|(_, segment)| segment)
}

/// Attaches all segments at their addresses. Their contents are filled in already. A partial attachment (munmap,
/// mremap) is made from a temporary one of the whole at `aside`.
pub fn attach(process: &Process, snapshot: &Snapshot, aside: u64, plan: &mut Builder) {
    for attachment in attachments(process, snapshot) {
        attachment.attach(aside, plan);
    }
    if process.pid != snapshot.processes[0].pid {
        return;
    }
    for segment in unattached(snapshot) {
        // Makes the job the last user again, by which it is attributed to the job.
        let args = [segment.object.id as u64, aside, libc::SHM_RDONLY as u64];
        plan.attempt(libc::SYS_shmat, &args, || segment.title());
        plan.attempt(libc::SYS_shmdt, &[aside], || segment.title());
    }
}
